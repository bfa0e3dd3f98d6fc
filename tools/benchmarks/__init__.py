"""The parts of tools/bench.py: one module per command, and what they share."""
