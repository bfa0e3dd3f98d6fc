"""Tests of ``megafp4_kernels`` against the specification; most of them need a GPU."""
