"""What `bench step` times: a LLaMA-shaped model with random weights for every policy, and its training step."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import loge_kernels as loge
from loge_kernels.numerics.eight_bit import DTYPES
from loge_kernels.numerics.four_bit import FORMATS

from ..policies import Policy

if TYPE_CHECKING:
    from .run import StepOptions

PHASES = ("forward", "backward", "optimizer")
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(
    options: StepOptions, policies: Sequence[Policy], dtype: torch.dtype, checkpointing: bool, device: torch.device
) -> dict[str, Trainer]:
    """A trainer per policy: frozen weights shared, adapters equal, B not zero so that every gradient counts."""
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ValueError(
            f"bench step needs PEFT and transformers (pip install 'loge_kernels[peft]'): {error}"
        ) from error
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads or options.heads,
        vocab_size=options.vocab,
        max_position_embeddings=max(2048, options.tokens[1]),
        use_cache=False,
        tie_word_embeddings=False,
    )
    lora = LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules=_TARGETS)
    base = LlamaForCausalLM(config).to(device=device, dtype=dtype)
    first: Any = get_peft_model(base, lora, autocast_adapter_dtype=options.adapter_dtype == "float32")
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    first.train()
    if checkpointing:
        first.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    frozen = {id(p): p for p in first.parameters() if not p.requires_grad}
    tokens = torch.randint(options.vocab, options.tokens, device=device)
    trainers = {}
    for policy in policies:
        model = copy.deepcopy(first, dict(frozen))
        report = policy.for_speed().apply(model, backend=options.backend)
        trainers[policy.text] = Trainer(policy, model, report, tokens)
    return trainers


class Trainer:
    """One policy's model and optimizer; `run()` is what is timed: a step, or, with `exact_every`, as many as make one
    exact one."""

    def __init__(self, policy: Policy, model: nn.Module, report: loge.Report | None, tokens: torch.Tensor) -> None:
        self.policy, self.model, self.report = policy, model, report
        self._tokens = tokens
        self.adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(self.adapters.values(), lr=1e-4)
        self.steps = 1 if report is None else report.exact_every or 1
        self.phases: list[tuple[float, ...]] = []  # seconds, one entry a step
        self.processor: list[float] = []  # seconds of all cores in a step, one entry a run
        self.first_gradients: dict[str, torch.Tensor] = {}

    def run(self) -> float:
        """The loss of the first of its steps."""
        started = time.process_time()
        losses = [self.step() for _ in range(self.steps)]
        self.processor.append((time.process_time() - started) / self.steps)
        return losses[0]

    def step(self) -> float:
        """One training step; its loss. A step is long: waiting for the device between its phases costs nothing."""
        marks = [self._now()]
        loss = self.model(input_ids=self._tokens, labels=self._tokens).loss
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        self._optimizer.step()
        if not self.phases:
            self.first_gradients = {name: p.grad for name, p in self.adapters.items() if p.grad is not None}
        self._optimizer.zero_grad(set_to_none=True)
        marks.append(self._now())
        self.phases.append(tuple(b - a for a, b in pairwise(marks)))
        return loss.item()

    @property
    def kinds(self) -> set[str]:
        """What approximates the gradients: of "low rank", as far from exact as which 4 bits are, "8 bits" and
        "8-bit forward"."""
        layers = () if self.report is None else self.report.converted
        found = {"low rank" for layer in layers if layer.rank is not None or layer.dx in FORMATS}
        found |= {"8-bit forward" for module in self.model.modules() if getattr(module, "base_dtype", None) is not None}
        return found | {"8 bits" for layer in layers if layer.dx in DTYPES}

    @property
    def held_bytes(self) -> int:
        held: list[torch.Tensor | None] = []
        for layer in self.model.modules():
            if isinstance(layer, loge.LoGELinear):
                held += [] if layer.factors is None else layer.factors.tensors
                held += [] if layer.eight_bit is None else [layer.eight_bit.tensor, layer.eight_bit.scale]
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def _now(self) -> float:
        if self._tokens.device.type == "cuda":
            torch.cuda.synchronize(self._tokens.device)
        return time.perf_counter()
