"""Benchmarks: ratios measured side by side in one process, with the bytes and flops counted and the results checked.

Lies at the top of the repository, and is installed as `loge_kernels.bench` (setup.py).
"""
