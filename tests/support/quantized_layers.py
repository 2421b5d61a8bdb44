"""Quantised linear layers for the tests: one of each format that runs on a CPU, and tiny models made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import llama
from torch import Tensor, nn

import loge_kernels as loge
from loge_kernels.layers.quantized import QuantizedLinear

N, K = 96, 128
BITSANDBYTES = ("nf4", "nf4 in bfloat16", "fp4", "int8")
TORCHAO = ("torchao int8", "torchao float8", "torchao int4")
KINDS = (*BITSANDBYTES, *TORCHAO)


def quantised(kind: str, bias: bool = True, n: int = N, k: int = K) -> Any:
    """A layer [n, k] in a format of KINDS, over float32 activations; the same at every call."""
    torch.manual_seed(5)
    plain = nn.Linear(k, n, bias)
    # A decaying spectrum, as trained weights have: low-rank factors are then neither exact nor useless.
    U, _, Vt = torch.linalg.svd(plain.weight.detach(), full_matrices=False)
    plain.weight.data = (U * 0.95 ** torch.arange(U.shape[1])) @ Vt
    if kind in TORCHAO:
        return with_torchao(nn.Sequential(plain), kind)[0]
    return with_bitsandbytes(nn.Sequential(plain), kind)[0]


def with_bitsandbytes(model: Any, kind: str, keep: tuple[str, ...] = ("lm_head",)) -> Any:
    """`model` with its linear layers quantised by bitsandbytes, as transformers does it."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or name in keep:
            continue
        size = layer.in_features, layer.out_features, layer.bias is not None
        if kind == "int8":
            made = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
        else:
            dtype = torch.bfloat16 if "bfloat16" in kind else torch.float32
            made = bnb.nn.Linear4bit(*size, compute_dtype=dtype, quant_type=kind[:3])
        made.load_state_dict(layer.state_dict())
        made.requires_grad_(False)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made.to("cpu"))
    return model


def with_torchao(model: Any, kind: str) -> Any:
    """`model` with its linear layers but the head quantised by torchao."""
    pytest.importorskip("torchao")
    from torchao import quantization

    configs: dict[str, Callable[[], Any]] = {
        "torchao int8": quantization.Int8WeightOnlyConfig,
        "torchao float8": quantization.Float8WeightOnlyConfig,
        "torchao int4": lambda: quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32)),
    }
    quantization.quantize_(
        model, configs[kind](), lambda layer, name: isinstance(layer, nn.Linear) and name != "lm_head"
    )
    return model.requires_grad_(False)


def quantised_llama(kind: str, **options: Any) -> Any:
    model: Any = llama(**options)
    if kind in TORCHAO:
        return with_torchao(model, kind)
    model = with_bitsandbytes(model, kind).requires_grad_(False)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind != "int8", kind == "int8"
    return model


def pair(kind: str, rank: int | float = 0.25, **options: Any) -> tuple[Any, Any]:
    """A converted layer and the library's own of the same numbers."""
    ours, theirs = (nn.Sequential(quantised(kind)) for _ in range(2))
    loge.apply(ours, rank, **options)
    assert isinstance(ours[0], QuantizedLinear)
    return ours[0], theirs[0]


def give_full_rank(layer: Any) -> None:
    """Factors that lose nothing, where `apply` would take the cheaper dense product."""
    layer.factors = loge.factorize(layer.dense_weight(), 1.0).bind(layer.weight)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def derive(layer: Any, x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of x."""
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(leaf), leaf, dy)
    return gradient


@contextmanager
def weights_out_of_reach(model: nn.Module) -> Iterator[None]:
    """In the block every road to a dequantised weight raises, and the quantised weights themselves are gone."""
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("dequantised")

        for layer in model.modules():
            if not isinstance(layer, nn.Linear) or type(layer.weight) is nn.Parameter:
                continue
            if type(layer.weight).__module__.startswith("torchao"):
                patch.setattr(type(layer.weight), "dequantize", refuse)
            else:
                import bitsandbytes as bnb

                patch.setattr(bnb.functional, "dequantize_4bit", refuse)
                patch.setattr(bnb.functional, "int8_vectorwise_dequant", refuse)
                if isinstance(layer, bnb.nn.Linear8bitLt):
                    patch.setattr(layer.state, "CB", None)
                patch.setattr(layer.weight, "data", torch.empty(0, dtype=layer.weight.dtype))
            if isinstance(layer, QuantizedLinear):
                patch.setattr(type(layer), "dequantize", refuse)
        yield
