"""Tensors in, tensors out: what every room above computes with.

Read matmul, eight_bit and merging first; then dropout, autocast, decompositions, version.
Imports nothing of the package.
"""
