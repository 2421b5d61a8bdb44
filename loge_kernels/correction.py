"""Bias correction: what an exact step teaches the cheap steps after it.

The cheap activation gradient is biased, and more steps do not lift a static bias. On an exact step the adapter gradient
of the same batch is taken twice over one graph, once through the factors and once exactly; their difference d enters a
running mean m <- decay m + (1 - decay) d (m = d at the first), and every cheap step adds m to its gradient. Memory: one
adapter gradient, and a second during an exact step, whose first pass keeps the graph for the other, at the cost of
three more tensors of the hidden states; under torch.distributed a third while they are averaged. Time: one more cheap
backward in every exact step, from the output of the backbone down: the head's backward is spared, and a loss that
computes the logits by itself, from the hidden states and the head's weight, is none of its business.

The idea is a control variate with stale means, as in SVRG (Johnson and Zhang, NeurIPS 2013), on the difference of two
gradients of one batch.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from .collectives import Group, distributed, mean_over_ranks
from .linear import LoGELinear
from .ops import cheap_backward, in_cheap_backward

logger = logging.getLogger("loge_kernels")


class LossScaler(Protocol):
    """What is asked of a `torch.amp.GradScaler`. Not its `get_scale`, which waits for the GPU."""

    def scale(self, outputs: Tensor) -> Tensor: ...


class BiasCorrection:
    """The running mean of exact minus cheap gradient of every trained parameter of `model`.

    `exact`: whether the step under way is an exact one; its owner, the schedule, sets it. `scaler`: the
    `torch.amp.GradScaler` of the training loop, where there is one: the mean is kept in unscaled units. `means`: by
    parameter name, in the gradient's dtype. Parameters that begin to train after `apply` (an adapter added later) are
    found at the next exact step. One that also serves in the head (tied embeddings that train) has no mean: of its
    gradient only a part comes through the factors. `group`: the process group whose ranks train together, None for the
    default one.
    """

    def __init__(self, model: nn.Module, decay: float, group: Group = None) -> None:
        self.decay = decay
        self._group = group
        self.exact = False
        self.scaler: LossScaler | None = None
        self.means: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}  # exact minus cheap, of the step under way
        self._corrected: set[str] = set()  # parameters whose gradient of the step under way has its mean already
        self._pass = -1  # autograd's number of the backward pass that fed `_pending` last
        self._model = weakref.ref(model)
        self._watched: dict[str, weakref.ref[Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._warned = False
        # What has all parameters below the tap, or all above it.
        self._parted: weakref.ref[nn.Module] | None = None
        # The tap at the head, until the backbone is seen: OPT and Bart call the decoder in it by itself.
        self._substitute: RemovableHandle | None = None
        backbone, head = _backbone(model), _output_head(model)
        if head is not None and not _low_rank_layers(head):
            self._parted = weakref.ref(head)
            self._substitute = head.register_forward_pre_hook(_TapInput(self))
            self._handles.append(self._substitute)
        if backbone is not None and _low_rank_layers(model) == _low_rank_layers(backbone):
            self._handles.append(backbone.register_forward_hook(_TapBackbone(self)))
        elif self._parted is None:
            self._handles.append(model.register_forward_hook(_TapOutput(self)))

    def detach(self) -> None:
        """Take every hook back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watched.clear()

    def finish_step(self) -> None:
        """After an optimizer step: the difference of an exact step enters the mean."""
        self._corrected.clear()
        pending, self._pending = self._pending, {}
        if self.exact and not pending and not self._warned:
            self._warned = True
            logger.warning(
                "bias correction saw no gradient in an exact step (reentrant checkpointing: give use_reentrant=False? "
                "sharded parameters? a model compiled before apply? a backbone that is called by other means than "
                "its module?): the cheap steps stay uncorrected"
            )
        if self.exact and distributed():
            # The same on every rank, also for a parameter that this rank's batch did not reach.
            trained = self._watch().items()
            mine = [pending[name] if name in pending else torch.zeros_like(p) for name, p in trained]
            pending = dict(zip((name for name, _ in trained), mean_over_ranks(mine, self._group), strict=True))
        for name, difference in pending.items():
            before = self.means.get(name)
            after = difference if before is None else before.lerp(difference, 1.0 - self.decay)
            # A step whose loss overflowed teaches nothing; decided on the device, without waiting for it.
            kept = torch.zeros_like(after) if before is None else before
            self.means[name] = torch.where(after.isfinite().all(), after, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The means by parameter name."""
        return {name: mean.clone() for name, mean in self.means.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError for other names or shapes than this model's."""
        parameters = self._watch()
        for name, mean in state.items():
            p = parameters.get(name)
            if p is None or p.shape != mean.shape:
                have = "no such trained parameter" if p is None else f"shape {tuple(p.shape)}"
                raise ValueError(f"state: {name} has shape {tuple(mean.shape)}; this model has {have}")
        self.means = {name: mean.to(parameters[name], copy=True) for name, mean in state.items()}
        self._pending.clear()
        self._corrected.clear()

    def _watch(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, each with a hook on its gradient."""
        trained = self._trained()
        for name, p in trained.items():
            known = self._watched.get(name)
            if known is None or known() is not p:
                self._watched[name] = weakref.ref(p)
                self._handles.append(p.register_hook(_OnGradient(self, name)))
        return trained

    def _trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, without those on both sides of the tap."""
        model = self._model()
        if model is None:
            return {}
        parted = None if self._parted is None else self._parted()
        both = set() if parted is None else _shared_parameters(parted, model)
        return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in both}

    def _scaled(self, mean: Tensor) -> Tensor:
        return mean if self.scaler is None else self.scaler.scale(mean)

    def _unscaled(self, gradient: Tensor) -> Tensor:
        if self.scaler is None:
            return gradient
        return gradient / self.scaler.scale(torch.ones((), device=gradient.device))

    def _first(self, parameter: Tensor | None) -> Tensor | bool:
        """Whether this is the first gradient after a `zero_grad`. A scaler skips steps without a word: what was kept of
        such a step is of a gradient that nobody used. Zeros are told on the device, without waiting for it."""
        if self.scaler is None or parameter is None:
            return False
        return True if parameter.grad is None else (parameter.grad == 0).all()

    def on_gradient(self, name: str, gradient: Tensor) -> Tensor | None:
        """Of every backward pass that reaches the parameter: one per micro-batch."""
        if in_cheap_backward():
            return None
        if self.exact:
            if name in self._pending:  # only what the cheap pass reached, too
                self._pending[name].add_(self._unscaled(gradient))
            return None
        mean = self.means.get(name)
        first = True if name not in self._corrected else self._first(self._watched[name]())
        if mean is None or first is False:
            return None
        self._corrected.add(name)
        addend = self._scaled(mean).to(gradient.dtype)
        return gradient + (torch.where(first, addend, 0.0) if isinstance(first, Tensor) else addend)

    def tap_backbone(self, backbone: nn.Module, output: Any) -> Any:
        """The output of a backbone, which takes the place of the head."""
        if self._substitute is not None:
            self._substitute.remove()
            self._substitute = None
        self._parted = weakref.ref(backbone)
        return tree_map(self.tap, output)

    def tap(self, value: Any) -> Any:
        """`value`, with the cheap pass before its backward if it is a tensor of an exact step."""
        if not (self.exact and torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad):
            return value
        self._watch()
        return _Tap.apply(value, self)

    def learn_cheap(self, source: Tensor, gradient: Tensor) -> None:
        """The cheap half of the difference, before autograd goes on with the exact one."""
        if in_cheap_backward():  # then the pass under way is cheap itself, and no step
            return
        trained = self._trained()
        if not trained:
            return
        with cheap_backward():
            cheap = torch.autograd.grad(source, list(trained.values()), gradient, retain_graph=True, allow_unused=True)
        before, self._pass = self._pass, torch._C._current_graph_task_id()
        for (name, p), part in zip(trained.items(), cheap, strict=True):
            if self._pass != before and name in self._pending:
                first, kept = self._first(p), self._pending[name]
                if isinstance(first, Tensor):
                    self._pending[name] = torch.where(first, 0.0, kept)
                elif first:
                    del self._pending[name]
            if part is None:
                continue
            if name not in self._pending:
                self._pending[name] = torch.zeros_like(part)
            self._pending[name].sub_(self._unscaled(part))


def _backbone(model: nn.Module) -> nn.Module | None:
    """What a model of transformers, perhaps inside one of PEFT, calls for the hidden states; None for other models."""
    get_inner = getattr(model, "get_base_model", None)
    inner = get_inner() if callable(get_inner) else model
    found = getattr(inner, "base_model", None)
    return found if isinstance(found, nn.Module) and found is not inner else None


def _output_head(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return head if isinstance(head, nn.Module) else None


def _low_rank_layers(module: nn.Module) -> set[int]:
    return {id(layer) for layer in module.modules() if isinstance(layer, LoGELinear) and layer.factors is not None}


def _shared_parameters(part: nn.Module, whole: nn.Module) -> set[int]:
    """The parameters that `part` shares with the modules of `whole` outside it."""
    inside = set(part.modules())
    outside = {id(p) for module in whole.modules() if module not in inside for p in module._parameters.values()}
    return outside & {id(p) for p in part.parameters()}


class _Hook:
    """A hook that does not keep its correction alive; in a copied or unpickled model it does nothing."""

    def __init__(self, correction: BiasCorrection | None = None, name: str = "") -> None:
        self._correction = (lambda: None) if correction is None else weakref.ref(correction)
        self._name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


# Between two graphs, because the one below is differentiated twice.
_outside_graphs = torch.compiler.disable(
    reason="a bias correction divides the graph: fullgraph=True needs correction=None"
)


class _TapInput(_Hook):
    @_outside_graphs
    def __call__(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        correction = self._correction()
        return None if correction is None else tuple(correction.tap(value) for value in inputs)


class _TapOutput(_Hook):
    @_outside_graphs
    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        correction = self._correction()
        return None if correction is None else tree_map(correction.tap, output)


class _TapBackbone(_Hook):
    @_outside_graphs
    def __call__(self, backbone: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        correction = self._correction()
        return None if correction is None else correction.tap_backbone(backbone, output)


class _OnGradient(_Hook):
    def __call__(self, gradient: Tensor) -> Tensor | None:
        correction = self._correction()
        return None if correction is None else correction.on_gradient(self._name, gradient)


class _Tap(torch.autograd.Function):
    """The identity; its backward runs the cheap pass over the graph of its input first."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, correction: BiasCorrection) -> Tensor:
        ctx.correction, ctx.source = correction, value  # not saved: its graph, not its values, is read
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.correction.learn_cheap(ctx.source, gradient)
        return gradient, None
