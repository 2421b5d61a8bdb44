"""`loge_kernels.linear`, the differentiable op.

Read linear first; then autograd, arguments.
Imports backend, factors and numerics.
"""
