"""Benchmarks: ratios measured side by side in one process, with the bytes and flops counted and the results checked."""
