"""How a matrix is cut into the modes of a tensor train.

The modes of `in_features` come first, those of `out_features` after them, and no mode spans both: the train can then
be applied as two thin products, and the matrix is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from operator import mul

# The paper's shapes. Where one of its modes spans in and out (a 4 of [16, 16, 8, 4, 4] for 4096 x 8), it is cut at the
# boundary, into 2 and 2: at one rank throughout, that is the same number of parameters.
PAPER: dict[tuple[int, int], tuple[int, ...]] = {
    (768, 64): (8, 8, 12, 8, 8),
    (4096, 64): (16, 16, 16, 4, 4, 4),
    (768, 8): (8, 8, 12, 8),
    (2304, 8): (9, 4, 8, 8, 8),
    (4096, 8): (16, 16, 8, 2, 2, 4),
    (768, 768): (8, 8, 12, 12, 8, 8),
}
PAPER |= {(out, size): modes[::-1] for (size, out), modes in PAPER.items()}

TYPICAL = 8  # the paper's modes are 4 to 16


def modes_of(
    in_features: int, out_features: int, shapes: Mapping[str, Sequence[int]] | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The modes of `in_features` and those of `out_features`.

    `shapes` maps "INxOUT" to the modes that the user wants for that size, as in {"768x64": [8, 8, 12, 8, 8]}; other
    sizes have the paper's modes, or else near-equal ones.

    Raises ValueError where the modes of `shapes` do not multiply out to in · out, or none of them ends at `in`.
    """
    given = (shapes or {}).get(f"{in_features}x{out_features}")
    modes = tuple(given) if given is not None else PAPER.get((in_features, out_features))
    if modes is None:
        # The outermost cores have rank 1 on one side: the largest modes cost least there.
        return near_equal(in_features)[::-1], near_equal(out_features)
    products = list(accumulate(modes, mul))
    if not modes or min(modes) < 1 or products[-1] != in_features * out_features:
        raise ValueError(
            f"tensor_shapes: modes {list(modes)} multiply to {math.prod(modes)}, not to "
            f"{in_features} x {out_features} = {in_features * out_features}"
        )
    if in_features not in products:
        raise ValueError(
            f"tensor_shapes: no prefix of the modes {list(modes)} multiplies to in_features={in_features} (they "
            f"give {products}); list the modes of {in_features} first, then those of {out_features}"
        )
    boundary = products.index(in_features) + 1
    return modes[:boundary], modes[boundary:]


def check_shapes(shapes: object) -> None:
    """Raise TypeError or ValueError unless `shapes` is as `modes_of` takes it."""
    if shapes is None:
        return
    if not isinstance(shapes, Mapping):
        raise TypeError(f"tensor_shapes={shapes!r} is a {type(shapes).__name__}; give a dict of 'INxOUT' to modes")
    for key, modes in shapes.items():
        sizes = key.split("x") if isinstance(key, str) else []
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ValueError(f"tensor_shapes has the key {key!r}; write a size as 'INxOUT', for example '768x64'")
        if isinstance(modes, str) or not isinstance(modes, Sequence) or not all(isinstance(m, int) for m in modes):
            raise TypeError(f"tensor_shapes[{key!r}]={modes!r}; give a list of integers")
        modes_of(int(sizes[0]), int(sizes[1]), shapes)


@cache
def near_equal(size: int) -> tuple[int, ...]:
    """Factors of `size`, ascending and as equal as they can be: about log_8(size) of them, fewer where its primes allow
    no more (a prime stands alone)."""
    count = max(1, round(math.log(size, TYPICAL)))
    candidates = [modes for wanted in range(1, count + 1) for modes in _factorizations(size, wanted, 2)]
    # Of two with the same sum, which is what parameters cost, the one with more modes.
    return min(candidates, key=lambda modes: (sum(modes), -len(modes)), default=(size,))


def _factorizations(size: int, count: int, least: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `size` as `count` ascending factors of `least` or more."""
    if count == 1:
        if size >= least:
            yield (size,)
        return
    factor = least
    while factor**count <= size:
        if size % factor == 0:
            for rest in _factorizations(size // factor, count - 1, factor):
                yield (factor, *rest)
        factor += 1
