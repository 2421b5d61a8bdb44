"""Where a model can be cut: its stack of layers, and what runs before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

# What runs between the input embedding and the first layer, in the models of transformers: position embeddings, norms
# and projections of embeddings. Not "rel_embeddings" (DeBERTa's), which every layer reads.
_BEFORE_LAYERS = ("emb", "wte", "wpe", "word_emb", "position_emb", "patch_emb", "project_in")


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers of a model, in order, the name they have there, the modules that run before them, and the other
    lists of modules, by name."""

    name: str
    layers: nn.ModuleList
    before: tuple[nn.Module, ...]
    others: tuple[tuple[str, nn.ModuleList], ...] = ()


def find_stack(model: nn.Module) -> Stack:
    """The model's stack of layers: its largest `nn.ModuleList` that lies in no other.

    Raises ValueError where there is none, or where two are of like size (an encoder and a decoder)."""
    found: list[tuple[int, str, nn.ModuleList]] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0 and id(module) not in inside:
            inside.update(id(child) for child in module.modules())
            found.append((sum(p.numel() for p in module.parameters()), name, module))
    kind = type(model).__name__
    if not found:
        raise ValueError(f"this {kind} has no torch.nn.ModuleList of layers, whose first ones could freeze")
    found.sort(key=lambda entry: entry[0], reverse=True)
    if len(found) > 1 and found[1][0] * 8 > found[0][0]:
        names = " and ".join(repr(name) for _, name, _ in found[:2])
        raise ValueError(f"this {kind} has two stacks of layers, {names}: which of them comes first is not known")
    (_, name, layers), *rest = found
    before = tuple(_before(model, name))
    known = {id(child) for module in before for child in module.modules()}
    others = tuple((other, modules) for _, other, modules in rest if id(modules) not in known)
    return Stack(name, layers, before, others)


def _before(model: nn.Module, stack: str) -> list[nn.Module]:
    """The siblings of `stack`, and of what it lies in, that run before it, each once."""
    embedding, head = embeddings(model, "input"), embeddings(model, "output")
    found: list[nn.Module] = []
    parent = model
    for step in stack.split("."):
        above = False  # ESM and LFM2 have a norm after their layers whose name begins with "emb"
        for name, child in parent.named_children():
            above = above or name == step
            if name == step or child is head or next(child.parameters(), None) is None:
                continue
            named = name.startswith(_BEFORE_LAYERS) and not above
            before = named or any(module is embedding for module in child.modules())
            if before and all(module is not child for module in found):  # prompt learning has the embedding twice
                found.append(child)
        parent = parent.get_submodule(step)
    return found


def embeddings(model: Any, which: str) -> nn.Module | None:
    """transformers' "input" or "output" embeddings of a model, as they stand there (PEFT wraps them); None without."""
    get = getattr(model, f"get_{which}_embeddings", None)
    try:
        return get() if callable(get) else None
    except NotImplementedError:
        return None
