"""Where LoRETTA goes in the model families that are known, by the `model_type` of their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo", "olmo2", "smollm3")
BERT = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2")

# Which side of which linear layer a bottleneck adapter is on.
PLACES: dict[str, dict[str, str]] = {
    **{name: {"gate_proj": "before", "up_proj": "before", "down_proj": "after"} for name in GATED},
    **{name: {"output.dense": "after"} for name in BERT},
    "opt": {"fc1": "before", "fc2": "after"},
    # output.dense: the names of older transformers.
    "vit": {"fc1": "before", "fc2": "after", "output.dense": "after"},
}

# The dense layer before a classifier's last one, where it is new with the task.
CLASSIFIERS: dict[str, list[str]] = {
    **{name: ["pooler.dense"] for name in ("deberta", "deberta-v2")},
    **{name: ["classifier.dense"] for name in ("roberta", "xlm-roberta", "camembert", "electra")},
}

# Query and value, where PEFT has no entry for LoRA.
PROJECTIONS: Mapping[str, Any] = {
    **{name: ["q_proj", "v_proj"] for name in GATED},
    "camembert": ["query", "value"],
    "vit": ["q_proj", "v_proj", "query", "value"],
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
}


def is_norm(module: nn.Module) -> bool:
    """Whether this is a LayerNorm or RMSNorm with parameters, of whatever library."""
    name = type(module).__name__
    return ("LayerNorm" in name or "RMSNorm" in name) and any(True for _ in module.parameters(recurse=False))


def of_family(table: Mapping[str, Any], model_type: str | None, method: str, also: str = "") -> Any:
    """The entry of a table for a model.

    Raises ValueError for a family that is not in it.
    """
    if model_type is not None and model_type in table:
        return table[model_type]
    raise ValueError(
        f"{method} knows no place in a model of type {model_type!r} (known: {', '.join(sorted(table))}); "
        f"give target_modules={also}"
    )
