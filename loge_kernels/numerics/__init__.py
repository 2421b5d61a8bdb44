"""Tensors in, tensors out: what every room above computes with.

Read matmul, eight_bit and merging first; then dropout, autocast, decompositions, version, and four_bit last.
Imports nothing of the package.
"""
