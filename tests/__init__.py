"""Tests of megafp4, laid out like the package; shared tolerances live in ``tolerances.py``."""
