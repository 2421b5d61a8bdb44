"""The linear layers to measure: those of known models by name, or given as M,N,K.

Names follow `torch.nn.Linear`: M tokens, N out features, K in features; a weight is [N, K].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """One linear layer; `rows` is the M of an "M,N,K" string, None for a model's layer."""

    name: str
    N: int
    K: int
    rows: int | None = None


def _block(hidden: int, key_value: int, intermediate: int) -> dict[str, tuple[int, int]]:
    """The distinct linears of a LLaMA-style block, [N, K] by the names of the projections that share the shape."""
    attention = {"q,o": (hidden, hidden), "k,v": (key_value, hidden)}
    if key_value == hidden:
        attention = {"q,k,v,o": (hidden, hidden)}
    return {**attention, "gate,up": (intermediate, hidden), "down": (hidden, intermediate)}


@dataclass(frozen=True, slots=True)
class Llama:
    """Sizes of a whole LLaMA; `key_value` is the width of all key (or value) heads."""

    hidden: int
    key_value: int
    intermediate: int
    layers: int
    vocabulary: int

    def linears(self) -> list[tuple[int, int]]:
        """[N, K] of every linear layer of a block."""
        h, kv, i = self.hidden, self.key_value, self.intermediate
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)]


# From each model's published config, as the sizes below: hidden size, width of all key heads, intermediate size.
LLAMAS = {
    "LLaMA-3-8B": Llama(4096, 1024, 14336, 32, 128256),
    "LLaMA-3-70B": Llama(8192, 1024, 28672, 80, 128256),
}
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "SmolLM2-135M": _block(576, 192, 1536),
    "LLaMA-2-7B": _block(4096, 4096, 11008),
    "LLaMA-3-8B": _block(4096, 1024, 14336),
    "Qwen2.5-7B": _block(3584, 512, 18944),
}


def parse_shapes(texts: Iterable[str]) -> list[Shape]:
    """The layers that `texts` name, in order.

    Each text is a model's name or the start of one ("smollm2"; case does not matter), a model and some of its
    projections ("LLaMA-2-7B:down", "LLaMA-3-8B:q,gate"), or "M,N,K". Raises ValueError with the known names.
    """
    shapes = [shape for text in texts for shape in _parse(text.strip())]
    if not shapes:
        raise ValueError(f"no shape given; {_known()}")
    return shapes


def _parse(text: str) -> list[Shape]:
    if text and text.replace(",", "").replace(" ", "").lstrip("+-").isdigit():
        return [_parse_numbers(text)]
    name, _, projections = text.partition(":")
    matches = [model for model in MODELS if name and model.lower().startswith(name.lower())]
    exact = [model for model in matches if model.lower() == name.lower()]
    if len(matches) > 1 and not exact:
        raise ValueError(f"shape {text!r} fits several models: {', '.join(matches)}; give one in full")
    if not matches:
        raise ValueError(f"shape {text!r} is not known; {_known()}")
    model = (exact or matches)[0]
    layers = MODELS[model]
    if not projections:
        wanted = list(layers)
    else:
        wanted = []
        for projection in projections.lower().split(","):
            found = [key for key in layers if projection.strip().removesuffix("_proj") in key.split(",")]
            if not found:
                known = ", ".join(layer for key in layers for layer in key.split(","))
                raise ValueError(f"shape {text!r}: {model} has no projection {projection!r}; it has {known}")
            wanted += [key for key in found if key not in wanted]
    return [Shape(f"{model} {key}", *layers[key]) for key in wanted]


def _parse_numbers(text: str) -> Shape:
    try:
        M, N, K = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"shape {text!r} has not the form M,N,K (three integers, such as 2048,4096,4096)") from None
    if min(M, N, K) < 1:
        raise ValueError(f"shape {text!r} needs M, N and K of at least 1")
    return Shape(f"{N}x{K}", N, K, rows=M)


def _known() -> str:
    return (
        f"choose one of {', '.join(MODELS)}, one of them with projections (LLaMA-2-7B:down), or M,N,K (2048,4096,4096)"
    )
