"""`python -m loge_kernels check`: every backend held against `backend.naive` in float64.

Read cases first; then truth, accuracy, harness, report.
Imports op, backend, factors and numerics. `run` is the one name that stands here.
"""

from .harness import run as run
