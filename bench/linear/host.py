"""What the host pays for a call: the Python of a forward and of a backward, over an autograd function without work.

The empty function takes the same tensors, allocates the same results and saves what the op saves. The op runs with
kernels that do nothing: what is left is this package's Python. On a GPU it is measured with the kernels too, which adds
what Triton and the driver take to launch them; without one, that part is not counted. Every figure is the least of many
short batches, because other programs only add to a time.

Beside it, one small layer with PEFT's LoRA, whole: PEFT's own, and as `apply` has it, through the op and by PyTorch's
operations, which small layers take (`op.linear.waits_for_host`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any
from unittest.mock import patch

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from typer import Option

import loge_kernels as loge
from loge_kernels.backend import cuda as cuda_backend
from loge_kernels.backend import reference
from loge_kernels.backend.problem import BackwardProblem, Gradients
from loge_kernels.backend.problem import Operands as Given
from loge_kernels.command_line import Device, Json
from loge_kernels.machine import choose_device
from loge_kernels.op import linear as op

from ..measure import output
from ..measure.environment import describe
from .operands import Operands, make_operands

TARGET_US = 15.0
_TRITON = ("one_launch_backward", "project", "expand_slab", "expand_tiles", "fused_forward")
_BATCH = 20  # calls


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOptions:
    """What to measure, and how long."""

    device: Device = "auto"
    rounds: Annotated[int, Option(help="Batches of 20 calls of each candidate.")] = 100
    json: Json = None


class _Empty(torch.autograd.Function):
    """The op's tensors and results, and no work."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        o: Operands = given[-1]
        (factors,) = o.factors.values()
        y, xa = _results(o.x, o.weight, o.lora_A)
        ctx.save_for_backward(xa, o.x, factors.left, factors.right, o.lora_A, o.lora_B)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        _, x, _, _, A, B = ctx.saved_tensors
        return torch.empty_like(x), None, None, torch.empty_like(A), torch.empty_like(B), None


def _results(x: Tensor, weight: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_A.shape[0])


def _forward(given: Given) -> tuple[Tensor, Tensor]:
    assert given.x is not None
    assert given.weight is not None
    assert given.lora_A is not None
    return _results(given.x, given.weight, given.lora_A)


def _backward(p: BackwardProblem) -> Gradients:
    assert p.x is not None
    assert p.lora_A is not None
    assert p.lora_B is not None
    return Gradients(torch.empty_like(p.x), dA=torch.empty_like(p.lora_A), dB=torch.empty_like(p.lora_B))


def _without_kernel(plan: Any) -> Any:
    return plan if isinstance(plan, str) else plan._replace(launch=lambda *addresses: None)


class _Launcher:
    """A Triton kernel that is not launched."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **constants: None


@contextmanager
def null_kernels(backend: str) -> Iterator[None]:
    """`backend` and the plain forward without their kernels: what they return is not written."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(reference, "forward", _forward))
        if backend == "triton":
            from loge_kernels.triton_kernels import launch

            for name in _TRITON:
                stack.enter_context(patch.object(launch, name, _Launcher()))
        elif backend == "cuda":
            plan = cuda_backend._plan
            stack.enter_context(patch.object(cuda_backend, "_plan", lambda p: _without_kernel(plan(p))))
        yield


def measure(o: Operands, rounds: int) -> list[dict[str, Any]]:
    """Microseconds of a forward and of a backward over the empty function's, for each backend that can run here."""

    def call(backend: str) -> Tensor:
        (factors,) = o.factors.values()
        return loge.linear(o.x, o.weight, factors, lora_A=o.lora_A, lora_B=o.lora_B, scaling=2.0, backend=backend)

    def empty() -> Tensor:
        result: Tensor = _Empty.apply(o.x, o.weight, None, o.lora_A, o.lora_B, o)
        return result

    names = [row.name for row in loge.backends() if row.available and row.name != "reference"]
    with patch.dict("loge_kernels.backend.choice._REGISTRY"):
        loge.register_backend("the op alone", _backward, about="allocates and returns")
        rows = [_row(o, name, True, partial(call, name), empty, rounds) for name in ("the op alone", *names)]
        if o.dy.is_cuda:
            rows += [_row(o, name, False, partial(call, name), empty, rounds) for name in names]
    return rows


def layers(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Microseconds of a forward and of a backward of one small exact layer with its adapter."""
    from peft import LoraConfig, get_peft_model

    found = {}
    for name, by_torch in (("PEFT", None), ("exact, the op", False), ("exact, small", True)):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False, device=device))
        model = get_peft_model(net, LoraConfig(r=8, target_modules=["0"]))
        if by_torch is not None:
            loge.apply(model, exact_dtype=None)
        found[name] = net[0], by_torch
    x = torch.randn(2, 16, 64, device=device, requires_grad=True)
    calls: dict[str, Callable[[], Any]] = {}
    for name, (layer, by_torch) in found.items():
        graph = _decided(by_torch, partial(layer, x))()
        leaves = x, *(p for p in layer.parameters() if p.requires_grad)
        calls[f"{name}, forward"] = _decided(by_torch, partial(layer, x))
        calls[f"{name}, backward"] = partial(
            torch.autograd.grad, graph, leaves, torch.ones_like(graph), retain_graph=True
        )
    times = _least(calls, rounds, device)
    parts = ("forward", "backward")
    return [{"layer": name} | {f"{part}_us": times[f"{name}, {part}"] for part in parts} for name in found]


def _decided(by_torch: bool | None, call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` with the choice that depends on the device and the size made; None: there is none."""
    if by_torch is None:
        return call

    def decided() -> Any:
        kept = op.waits_for_host
        op.waits_for_host = lambda *given: by_torch
        try:
            return call()
        finally:
            op.waits_for_host = kept

    return decided


def _row(
    o: Operands, name: str, null: bool, call: Callable[[], Tensor], empty: Callable[[], Tensor], rounds: int
) -> dict[str, Any]:
    with null_kernels(name) if null else ExitStack():
        times = _least({"forward": call, "empty forward": empty}, rounds, o.dy.device)
        graphs = {"backward": call(), "empty backward": empty()}

        def gradients(y: Tensor) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(y, (o.x, o.lora_A, o.lora_B), o.dy, retain_graph=True)

        times |= _least({key: gradients(y) for key, y in graphs.items()}, rounds, o.dy.device)
    over = {f"{part}_us": times[part] - times[f"empty {part}"] for part in ("forward", "backward")}
    return {"backend": name, "kernels": "null" if null else "launched", **over, "microseconds": times}


def _least(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """The least microseconds of a call, over `rounds` batches of each in turn. No batch waits for the device."""
    for call in calls.values():
        call()
    best = dict.fromkeys(calls, float("inf"))
    gc.collect()
    for _ in range(rounds):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            for _ in range(_BATCH):
                call()
            best[name] = min(best[name], (time.perf_counter() - started) / _BATCH * 1e6)
    return best


def run(options: HostOptions, console: Console | None = None) -> dict[str, Any]:
    """Measure, print a table, write the file asked for; the JSON-able report is returned."""
    console = console or Console()
    if options.rounds < 1:
        raise ValueError(f"rounds={options.rounds} must be at least 1")
    device = choose_device(options.device)
    output.check_writable(options.json)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # Triton's interpreter has no bfloat16
    operands = make_operands(64, 128, 128, (16,), 8, dtype, device, torch.float32)
    rows = measure(operands, options.rounds)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="microseconds over an empty autograd.Function")
    for heading in ("backend", "kernels", "forward", "backward", "target"):
        table.add_column(heading, justify="left" if heading in ("backend", "kernels") else "right")
    for row in rows:
        forward, backward = row["forward_us"], row["backward_us"]
        table.add_row(row["backend"], row["kernels"], f"{forward:.1f}", f"{backward:.1f}", f"{TARGET_US:.0f}")
    output.print_wide(console, table)
    whole = layers(device, options.rounds)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="microseconds of a small layer")
    for heading in ("layer", "forward", "backward"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for row in whole:
        table.add_row(row["layer"], f"{row['forward_us']:.1f}", f"{row['backward_us']:.1f}")
    output.print_wide(console, table)
    environment = describe(device)
    report = {"benchmark": "host", "environment": environment, "rows": rows, "layers": whole, "passed": True}
    output.write(report, options.json)
    return report
