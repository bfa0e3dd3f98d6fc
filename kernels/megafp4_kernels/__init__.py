"""GPU kernels of megafp4: quantizers, GEMMs and the optimizer's step.

A leaf: it imports torch, triton and cuda-bindings only, and nothing at all before a kernel's module
is imported. Importing needs no GPU; calling a kernel without one raises RuntimeError.
"""
