"""torch modules over the op.

Read linear first; then peft, exact_every, quantized with its formats, sharded.
Imports op, backend, factors and numerics.
"""
