"""Oracle tests of ``megafp4.numerics``; ``oracle.py`` holds the independent answers."""
