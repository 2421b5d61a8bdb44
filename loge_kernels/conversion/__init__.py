"""`loge_kernels.apply`: which layers, what each of them does, and the report.

Read apply first; then options, targets, plan, calibrate, report.
Imports layers, op, freezing, backend, factors and numerics; triton_kernels for its cost model.
"""
