"""Who computes dX, dA and dB.

Read naive (the formulae) and problem first; then reference, choice, triton, cuda.
Imports numerics and files; triton_kernels and the extension `_C` alone know of kernels.
"""
