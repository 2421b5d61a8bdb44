"""Cases of the op, and what it is tested against: `backend.naive`, which test_naive holds against autograd."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import loge_kernels as loge
from loge_kernels.backend import naive
from loge_kernels.backend.problem import BackwardProblem
from loge_kernels.numerics.dropout import draw_seed, keep_mask

NAMES = ("x", "weight", "bias", "lora_A", "lora_B")  # what may need a gradient
NEEDS = ("need_dx", "need_dweight", "need_dbias", "need_dA", "need_dB")


@dataclass
class Case:
    """The tensors of one linear layer. Any of the optional ones may be None."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    left: Tensor | None  # [N, R]
    right: Tensor | None  # [R, K]
    bias: Tensor | None  # [N]
    lora_A: Tensor | None  # [P, K]
    lora_B: Tensor | None  # [N, P]
    dy: Tensor  # [M, N]
    scaling: float = 0.7

    def factors(self) -> loge.Factors | None:
        return None if self.left is None or self.right is None else loge.Factors(self.left, self.right)

    def to(self, dtype: torch.dtype) -> Case:
        """Copies in `dtype`."""
        fields = {name: t.to(dtype) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **fields)


def case(
    M: int = 7,
    N: int = 13,
    K: int = 11,
    R: int | None = 5,
    P: int | None = 3,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Random operands; rows of dy have well separated norms, so that "the heaviest" is unambiguous. R or P None: no
    factors, no adapter."""
    g = torch.Generator().manual_seed(M + 10 * N + 100 * K)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    weights = torch.linspace(0.5, 3.0, M, dtype=torch.float64)[torch.randperm(M, generator=g)]
    return Case(
        x=draw(M, K),
        weight=draw(N, K),
        left=None if R is None else draw(N, R),
        right=None if R is None else draw(R, K),
        bias=draw(N) if bias else None,
        lora_A=None if P is None else draw(P, K),
        lora_B=None if P is None else draw(N, P),
        dy=(torch.nn.functional.normalize(draw(M, N).double(), dim=1) * weights[:, None]).to(dtype),
    )


def gradients(c: Case, scale: Tensor | None = None, exact_rows: Tensor | None = None) -> dict[str, Tensor]:
    """y and the gradient of every tensor of `c` by `naive`, in c's dtype.

    `scale` [M, K] multiplies the adapter's input (the dropout mask over 1 - p); `exact_rows` bool [M].
    """
    N, K = c.weight.shape
    A, B = (c.x.new_empty(0, K), c.x.new_empty(N, 0)) if c.lora_A is None else (c.lora_A, c.lora_B)
    drop = naive.nothing_dropped if scale is None else lambda tensor: tensor * scale
    exact = c.dy @ c.weight
    frozen = exact if c.left is None else naive.low_rank(c.dy, c.left, c.right, None, None)
    if exact_rows is not None:
        frozen = torch.where(exact_rows[:, None], exact, frozen)
    y = naive.forward(c.x, c.weight, c.x.new_zeros(1) if c.bias is None else c.bias, A, B, c.scaling, drop)
    found = naive.backward(c.dy, c.x, frozen, A, B, c.scaling, drop)
    return {"y": y, **{name: found[name] for name in NAMES if getattr(c, name) is not None}}


def leaves_of(c: Case, need: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    """The case's operands by their names in `loge.linear`; those of `need` take a gradient."""
    return {n: t.detach().requires_grad_(n in need) for n in NAMES if (t := getattr(c, n)) is not None}


def call(c: Case, leaves: dict[str, Tensor], **options: Any) -> Tensor:
    """y by the op, with the case's factors or those among `options`."""
    return loge.linear(**{"factors": c.factors(), "scaling": c.scaling, **leaves, **options})


def run(c: Case, need: tuple[str, ...] = NAMES, **options: Any) -> dict[str, Tensor]:
    """y and the gradients of `need` by the op."""
    leaves = leaves_of(c, need)
    y = call(c, leaves, **options)
    if y.requires_grad:
        y.backward(c.dy)
    return {"y": y.detach(), **{n: t.grad for n, t in leaves.items() if t.grad is not None}}


def problem_of(c: Case, needs: tuple[str, ...] = NEEDS, **changes: Any) -> BackwardProblem:
    """The backward problem of the case, without dropout."""
    given = {
        "xa": None if c.lora_A is None else c.x @ c.lora_A.t(),
        **{name: value for name, value in vars(c).items() if name != "bias"},
        **{name: name in needs for name in NEEDS},
        "dropout": 0.0,
        "seed": None,
        "exact_fraction": 0.0,
        "deterministic": False,
    }
    return BackwardProblem(**{**given, **changes})


def drawn_mask(c: Case, p: float) -> Tensor | None:
    """The mask over 1 - p that the op draws when its call follows; None without an adapter or with p = 0."""
    torch.manual_seed(5)
    if p == 0.0 or c.lora_A is None:
        return None
    scale = keep_mask(draw_seed(torch.device("cpu")), *c.x.shape, p).double() / (1 - p)
    torch.manual_seed(5)
    return scale


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    """Each tensor of `got` is the expected one of its name."""
    for name, tensor in got.items():
        limits = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(tensor, expected[name], **limits, msg=lambda m, n=name: f"{n}: {m}")


def heaviest(dy: Tensor, count: int) -> Tensor:
    """The `count` rows of largest norm, as bool [M]."""
    order = dy.double().norm(dim=1).argsort(descending=True)
    chosen = torch.zeros(dy.shape[0], dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen


def assert_within_twice(got: Tensor, plain: Tensor, truth: Tensor, name: str = "") -> None:
    """The correctness rule: at most twice the error of plain PyTorch in the same precision, and a tiny term."""
    tiny = 4 * torch.finfo(plain.dtype).eps ** 2 + 1e-15
    size = truth.abs().max().item() if truth.numel() else 0.0
    allowed = 2 * (plain.double() - truth).abs().max().item() + tiny * size if truth.numel() else 0.0
    error = (got.double() - truth).abs().max().item() if truth.numel() else 0.0
    assert got.shape == truth.shape, name
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (largest value {size:.3g})"
