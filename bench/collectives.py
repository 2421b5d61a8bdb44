"""What each policy sends under FSDP2, counted: steps of a small LLaMA over gloo ranks of this machine.

The model has bfloat16 weights and adapters of rank 4, `MixedPrecisionPolicy(param_dtype=bfloat16)` and two blocks. PEFT
is sharded by torch's own `fully_shard`, each block and then the model; what is applied by `loge_kernels.fully_shard`.
Counted are whole tensors, of the blocks and of the root (embedding, head, last norm), which both gather once. What
rank 0 holds between steps is counted too, its shards of parameters, 8-bit copies and factors; and the most that it
holds in a step, with gathered tensors and activations.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from typer import Option

import loge_kernels as loge
from loge_kernels.command_line import WHOLE, Json

from .measure.collectives import Collectives
from .measure.memory import with_peak_memory
from .measure.output import check_writable, print_wide, size, spinner, table, without_files, write
from .measure.shapes import Llama
from .policies import PEFT, Policy, parse, parse_all

MODEL = Llama(hidden=512, key_value=128, intermediate=1408, layers=2, vocabulary=256)
HEADS, LORA_RANK, BATCH, TOKENS = 8, 4, 1, 32
DEFAULTS = (
    PEFT,
    "exact",
    "exact_dtype=int8",
    "exact_dtype=float8",
    "base_dtype=int8",
    "base_dtype=float8",
    "rank=1/8",
    "rank=1/8,exact_layers=0.5",
    "rank=1/8,exact_layers=0.5,exact_dtype=int8",
    "rank=1/8,exact_every=2,exact_dtype=int8",
)
_STEPS = 2  # one of each kind with exact_every=2


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectivesOptions:
    """The policies and the ranks."""

    policies: Annotated[
        Sequence[str],
        Option("--policy", help="As in `bench step`; default: one of each kind.", show_default=False),
        WHOLE,
    ] = DEFAULTS
    ranks: Annotated[Sequence[int], Option(help="How many processes: a list.")] = (2, 4)
    json: Json = None

    def check(self) -> list[Policy]:
        """The policies, PEFT's first. Raises ValueError where a value cannot work."""
        for count in self.ranks:
            if count < 2:
                raise ValueError(f"--ranks {count}: give at least 2")
        check_writable(self.json)
        return parse_all((PEFT, *self.policies))


def run(options: CollectivesOptions) -> dict[str, Any]:
    """Count, print the table; returns, and writes to `options.json`, the report. Raises ValueError for bad options."""
    policies = [policy.text for policy in options.check()]
    console = Console()
    rows = []
    for ranks in options.ranks:
        with spinner(console, f"{ranks} ranks"):
            rows += _count(policies, ranks)
    for row in rows:
        peft = next(r for r in rows if r["policy"] == PEFT and all(r[k] == row[k] for k in ("ranks", "checkpointing")))
        row["backward_over_peft"] = row["backward_bytes"] / peft["backward_bytes"]
    model = asdict(MODEL) | {"lora_rank": LORA_RANK, "dtype": "bfloat16"}
    report = {
        "benchmark": "collectives",
        "measured": True,
        "options": without_files(asdict(options)),
        "model": model,
        "versions": {"torch": torch.__version__.partition("+")[0], "loge_kernels": loge.__version__.partition("+")[0]},
        "rows": rows,
    }
    _print(console, report)
    write(report, options.json)
    return report


def _count(policies: Sequence[str], ranks: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (ranks, list(policies), folder), nprocs=ranks)
        return json.loads((Path(folder) / "rows.json").read_text())


def _rank(rank: int, ranks: int, policies: list[str], folder: str) -> None:
    """One process: every policy, without and with checkpointing."""
    from torch.distributed.device_mesh import init_device_mesh

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if "lo" in (name for _, name in socket.if_nameindex()) else "")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    rows = [_row(policy, again, mesh, ranks) for policy in policies for again in (False, True)]
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _row(policy: str, checkpointing: bool, mesh: Any, ranks: int) -> dict[str, Any]:
    from .step.run import StepOptions
    from .step.trainer import build

    options = StepOptions(
        hidden=MODEL.hidden,
        intermediate=MODEL.intermediate,
        layers=MODEL.layers,
        heads=HEADS,
        kv_heads=MODEL.key_value * HEADS // MODEL.hidden,
        vocab=MODEL.vocabulary,
        batch=BATCH,
        seq=TOKENS,
        lora_rank=LORA_RANK,
    )
    made = build(options, [parse(policy)], torch.bfloat16, checkpointing, torch.device("cpu"))
    model: Any = next(iter(made.values())).model
    inside = {id(p) for p in model.base_model.model.model.layers.parameters()}
    ends = sum(p.nbytes for p in model.parameters() if id(p) not in inside)
    _shard(model, policy, mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with Collectives() as sent:
        losses = [_step(model, optimizer) for _ in range(_STEPS)]
    peaks = [_peak(lambda: _step(model, optimizer)) for _ in range(3 * _STEPS)]
    # Gloo's threads have buffers of their own at times of their own: the least of a kind of step is without them.
    peak = max(min(peaks[kind::_STEPS]) for kind in range(_STEPS))
    held = sum(_local(tensor).nbytes for tensor in [*model.parameters(), *_kept(model)])
    # The root's are gathered once, before the first block.
    totals = {way: sent.total("allgather", way == "backward") // _STEPS for way in ("forward", "backward")}
    return {
        "policy": policy,
        "ranks": ranks,
        "checkpointing": checkpointing,
        "forward_bytes": totals["forward"] - ends,
        "backward_bytes": totals["backward"],
        "reduced_bytes": sent.total("reduce_scatter", True) // _STEPS,
        "root_bytes": ends,
        "held_bytes": held,
        "peak_bytes": held + peak,
        "loss": losses[-1],
    }


def _shard(model: Any, policy: str, mesh: Any) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    arguments = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
    if policy == PEFT:
        for block in model.base_model.model.model.layers:
            fully_shard(block, **arguments)
        fully_shard(model, **arguments)
    else:
        loge.fully_shard(model, **arguments)


def _peak(call: Callable[[], Any]) -> int:
    """Bytes, of rank 0 alone: the profile takes longer than the step."""
    if torch.distributed.get_rank() == 0:
        return with_peak_memory(call, torch.device("cpu"))[1]
    call()
    return 0


def _step(model: Any, optimizer: torch.optim.Optimizer) -> float:
    tokens = torch.randint(MODEL.vocabulary, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _kept(model: Any) -> list[Any]:
    """Factors and 8-bit copies."""
    found: list[Any] = []
    for layer in model.modules():
        if isinstance(layer, loge.LoGELinear):
            found += [] if layer.factors is None else layer.factors.tensors
            store = getattr(layer.eight_bit, "store", None)
            found += [] if store is None else store.parameters()
    return found


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _print(console: Console, report: dict[str, Any]) -> None:
    model = report["model"]
    console.print(
        f"[bold]Counted[/bold]: whole tensors of {model['layers']} blocks {model['hidden']} wide in bfloat16, adapters "
        f"of rank {model['lora_rank']}, FSDP2 over gloo ranks: bytes of a step; what rank 0 holds between steps, and "
        "the most in one",
        highlight=False,
        soft_wrap=True,
    )
    headings = ("checkpointing", "fwd gathers", "bwd gathers", "x PEFT", "reduces", "held", "peak")
    printed = table(("ranks", "policy"), headings)
    for row in report["rows"]:
        sent = [size(row[f"{kind}_bytes"]) for kind in ("forward", "backward", "reduced", "held", "peak")]
        again = "yes" if row["checkpointing"] else "no"
        share = f"{row['backward_over_peft']:.3f}"
        printed.add_row(str(row["ranks"]), row["policy"], again, *sent[:2], share, *sent[2:])
    print_wide(console, printed)
