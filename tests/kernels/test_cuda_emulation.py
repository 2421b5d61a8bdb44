"""The CUDA kernels' own code on the host: every instruction emulated, every gradient against float64.

What runs here is `csrc/sm80_project.h`, `csrc/sm80_expand.h` and `csrc/sm90_*.cuh` as the GPU runs them, one fiber a
thread, under sanitizers: index arithmetic, fragments, descriptors and swizzles, pipelines, what blocks and clusters
exchange, and edges. What only hardware can show, memory ordering and speed, it does not.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from toolchain import HOST_SOURCES, SOURCES, WARNINGS, build, cute_options, needs_compiler
from torch import Tensor

from loge_kernels.triton_kernels import cost_sm90
from loge_kernels.triton_kernels.phases import Flags
from loge_kernels.triton_kernels.rates import DEFAULT, WGMMA_LEAST

pytestmark = needs_compiler

SLAB = 128
LAST_FIRST, LATE_LOADS, LATE_PRODUCTS, LATE_STORES, LATE_PUSHES = 1, 2, 4, 8, 16  # bits of Case.schedule for sm90
COUNTS_ALONE = 32  # nothing is moved or multiplied


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    R: int
    P: int
    dtype: torch.dtype = torch.float16
    scaling: float = 2.0
    dy_gap: int = 0  # elements between the rows of a strided dy
    x_gap: int = 0
    deterministic: bool = False
    need: tuple[bool, bool, bool] = (True, True, True)  # dx, dA, dB
    schedule: int = 1  # when what is asynchronous happens; sm80: 1 for at its wait, 0 for at its issue
    cluster: str = "1x1"  # slabs that share the factors' loads, by splits of N and K; sm80: 1 by multiprocessors
    rounded: bool = False  # dA and dB in dtype, by the last block, and not in fp32

    def __str__(self) -> str:
        name = f"{self.M}-{self.N}-{self.K}-{self.R}-{self.P}-schedule{self.schedule}-cluster{self.cluster}"
        return name + "-rounded" * self.rounded


@dataclass(frozen=True)
class Emulator:
    kernel: str
    program: Path


@pytest.fixture(scope="module")
def sm80(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    program = tmp_path_factory.mktemp("emulator") / "sm80"
    return Emulator("sm80", build(program, [HOST_SOURCES / "sm80_emulate.cpp"], *WARNINGS))


@pytest.fixture(scope="module")
def sm90(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    options = cute_options()
    folder = tmp_path_factory.mktemp("sm90")
    # An include looks beside the file it stands in: there the emulated instructions must lie.
    for source in (*SOURCES.iterdir(), *HOST_SOURCES.iterdir()):
        if source.suffix in (".h", ".cuh", ".cpp"):
            shutil.copy(source, folder)
    sources = [folder / name for name in ("sm90_emulate.cpp", "sm90_backward.cpp", "tensor_map_table.cpp")]
    # UBSan would double the compiler's time; test_sm90_host.py has the index maths under both.
    return Emulator("sm90", build(folder / "sm90", sources, *options, sanitize="address"))


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.int16).numpy().tobytes()


def with_gap(tensor: Tensor, gap: int) -> bytes:
    """Rows `gap` elements apart, NaN between them, none after the last."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + gap), torch.nan, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return raw(wide.flatten()[: wide.numel() - gap])


def call(emulator: Emulator, case: Case, operands: bytes) -> tuple[bytes, list[dict[str, int]]]:
    """What the emulator gives, and the lines of what it has counted."""
    c = case
    numbers = [c.M, c.N, c.K, c.R, c.P, c.N + c.dy_gap, c.K + c.x_gap, int(c.dtype == torch.bfloat16)]
    numbers += [int(c.deterministic), *map(int, c.need), c.scaling, c.schedule, c.cluster, int(c.rounded)]
    environment = {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    command = [str(emulator.program), *map(str, numbers)]
    done = subprocess.run(command, input=operands, capture_output=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    # Above them ASan says that it is new to swapcontext.
    lines = [line for line in done.stderr.decode().splitlines() if line.count("=") > 1 and not line.startswith("=")]
    return done.stdout, [{key: int(value) for key, value in (i.split("=") for i in line.split())} for line in lines]


def run(emulator: Emulator, case: Case) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The gradients, compared with those of the formula in float64, and what was counted."""
    c = case
    torch.manual_seed(c.M * 1009 + c.N + c.K + c.R + c.P)
    need_dx, need_dA, need_dB = c.need
    make = lambda *shape: (torch.randn(*shape) / 4).to(c.dtype)  # noqa: E731
    dy, x, xa = make(c.M, c.N), make(c.M, c.K), make(c.M, c.P)
    left, right, lora_A, lora_B = make(c.N, c.R), make(c.R, c.K), make(c.P, c.K), make(c.N, c.P)
    parts = [with_gap(dy, c.dy_gap), with_gap(x, c.x_gap) if need_dA else b"", raw(xa) if need_dB else b""]
    parts += [raw(left), raw(right), raw(lora_A)] if need_dx else []
    parts += [raw(lora_B)] if need_dx or need_dA else []
    output, lines = call(emulator, c, b"".join(parts))
    counts = lines[-1]

    slabs = -(-c.M // SLAB) if c.deterministic and emulator.kernel == "sm90" else 1
    shapes = {"dx": (c.M, c.K), "dA": (c.P, c.K), "dB": (c.N, c.P)}
    wanted = {name: shape for (name, shape), needed in zip(shapes.items(), c.need, strict=True) if needed}
    sizes = {name: int(np.prod(shape)) for name, shape in wanted.items()}
    halves = sum(size for name, size in sizes.items() if c.rounded or name == "dx")
    rounded = torch.from_numpy(np.frombuffer(output, np.int16, halves).copy()).view(c.dtype)
    # A set of sums for each slab, dA and then dB.
    sums = torch.from_numpy(np.frombuffer(output, np.float32, offset=2 * halves).copy())
    sums = sums.view(slabs, -1).sum(0) if sums.numel() else sums
    got = {}
    for name, size in sizes.items():
        if c.rounded or name == "dx":
            part, rounded = rounded.split([size, rounded.numel() - size])
        else:
            part, sums = sums.split([size, sums.numel() - size])
        got[name] = part.view(wanted[name])
    assert rounded.numel() == sums.numel() == 0

    d, s = torch.Tensor.double, c.scaling
    t_b = s * d(dy) @ d(lora_B)
    want = {"dx": d(dy) @ d(left) @ d(right) + t_b @ d(lora_A), "dA": t_b.t() @ d(x), "dB": s * d(dy).t() @ d(xa)}
    # The same formula at the precision of the operands: T rounded to 16 bits, everything else accumulated exactly.
    t_r, t_b = (d(dy) @ d(left)).to(c.dtype).double(), t_b.to(c.dtype).double()
    near = {"dx": (t_r @ d(right) + t_b @ d(lora_A)).to(c.dtype).double(), "dA": t_b.t() @ d(x), "dB": want["dB"]}
    for name, gradient in got.items():
        error, allowed = (d(gradient) - want[name]).abs().max(), (near[name] - want[name]).abs().max()
        if c.rounded and name != "dx":
            allowed = (near[name].to(c.dtype).double() - want[name]).abs().max()
        assert error <= 2 * allowed + 1e-5 * want[name].abs().max(), (name, case, error, allowed)
    return got, counts


SM80 = [
    Case(128, 64, 128, 64, 16),
    Case(1, 8, 8, 8, 8),
    Case(130, 200, 136, 48, 8, schedule=0, cluster="1x3"),
    Case(300, 328, 264, 72, 16, dy_gap=8, x_gap=24, cluster="1x5"),
    Case(33, 136, 200, 128, 64, dtype=torch.bfloat16, cluster="1x2"),
    Case(140, 264, 392, 256, 16, dtype=torch.bfloat16, cluster="1x4"),
    Case(140, 392, 264, 248, 24, deterministic=True, cluster="1x3"),
    Case(130, 72, 328, 256, 64, schedule=0, deterministic=True, dtype=torch.bfloat16, cluster="1x2"),
    Case(66, 328, 200, 64, 0, need=(True, False, False), cluster="1x3"),
    Case(150, 200, 328, 256, 0, need=(True, False, False), schedule=0, cluster="1x4"),
    Case(300, 200, 136, 0, 16, need=(False, True, True), cluster="1x2"),
    Case(300, 136, 328, 0, 64, need=(False, True, False), schedule=0, cluster="1x4"),
    Case(300, 200, 136, 0, 16, need=(False, False, True), cluster="1x2"),
    Case(50, 72, 136, 128, 16, need=(True, False, True), cluster="1x3"),
    Case(50, 72, 136, 128, 40, need=(True, True, False), schedule=0),
    Case(150, 136, 200, 312, 16, rounded=True, cluster="1x5"),
    Case(150, 72, 136, 512, 16, rounded=True, schedule=0, cluster="1x3"),
    Case(140, 136, 72, 472, 64, dtype=torch.bfloat16, cluster="1x7"),
    Case(200, 200, 136, 64, 16, rounded=True, cluster="1x3"),
    Case(200, 136, 200, 256, 64, rounded=True, dtype=torch.bfloat16, schedule=0, cluster="1x5"),
    Case(270, 200, 136, 0, 16, need=(False, False, True), rounded=True, schedule=0, cluster="1x5"),
    Case(270, 200, 136, 0, 16, need=(False, True, True), rounded=True, cluster="1x2"),
    Case(270, 200, 136, 48, 8, need=(True, True, False), rounded=True, schedule=0, cluster="1x5"),
]
SM80 += [
    Case(300, 264, 136, 64, 16, schedule=3, cluster="1x3"),
    Case(520, 200, 136, 120, 8, schedule=2, cluster="1x2", dtype=torch.bfloat16),
    Case(300, 328, 72, 320, 16, schedule=3, cluster="1x4", need=(True, False, True)),
    Case(520, 200, 136, 0, 16, schedule=3, need=(False, True, True)),
]
# Tiles of T, and columns of dA, that three blocks or four share.
SHARED = Case(270, 1032, 136, 48, 8, cluster="1x8", deterministic=True)


@pytest.mark.parametrize("case", SM80, ids=str)
def test_sm80(sm80: Emulator, case: Case) -> None:
    _, counts = run(sm80, case)
    assert counts["mma"] > 0
    assert counts["ldmatrix"] > 0
    assert counts["conflicts"] == 0


QUICK = {(64, 0, 0), (128, 16, 1), (256, 64, 0)}  # R, P, schedule
TURNOVERS = [
    pytest.param(
        Case(140, 392, 328, R, P, schedule=schedule, x_gap=8, need=(True, P > 0, P > 0)),
        marks=[] if (R, P, schedule) in QUICK else [pytest.mark.slow],
    )
    for R, P, schedule in product((64, 128, 256), (0, 16, 64), (0, 1))
]


@pytest.mark.parametrize("case", TURNOVERS, ids=str)
def test_every_pipeline_of_sm80_turns_over(sm80: Emulator, case: Case) -> None:
    """More steps than stages in both walks, so that every tile is filled again while its neighbours are read. One block
    walks all slabs: it comes by its part of dB again, and goes on to other columns of dX."""
    _, counts = run(sm80, case)
    assert counts["parts"] == 0


BF16 = torch.bfloat16
ALL_LATE = LATE_LOADS | LATE_PRODUCTS | LATE_STORES | LATE_PUSHES
SM90 = [
    Case(128, 64, 64, 64, 16, schedule=LAST_FIRST),
    Case(1, 8, 8, 8, 8, schedule=ALL_LATE | LAST_FIRST),
    Case(1, 8, 8, 8, 8, schedule=ALL_LATE | LAST_FIRST, cluster="2x4"),  # a phantom slab, and splits without a step
    Case(130, 328, 264, 48, 8, schedule=LATE_LOADS, dy_gap=8, x_gap=24, cluster="1x2"),
    Case(130, 328, 264, 48, 8, schedule=LATE_PRODUCTS, dy_gap=8, x_gap=24, cluster="2x2"),
    Case(67, 520, 648, 64, 16, schedule=LATE_PRODUCTS | LATE_STORES | LAST_FIRST),
    Case(300, 520, 648, 64, 16, schedule=LATE_LOADS | LATE_STORES, cluster="2x1"),  # turns over, and a phantom
    Case(300, 1160, 1096, 64, 16, schedule=LATE_PRODUCTS | LATE_PUSHES | LAST_FIRST, cluster="2x2"),
    Case(200, 520, 456, 56, 16, schedule=LATE_LOADS | LATE_PUSHES | LAST_FIRST, cluster="1x4", deterministic=True),
    Case(140, 520, 456, 56, 16, schedule=LATE_STORES | LATE_PUSHES, cluster="2x4", deterministic=True),
    Case(300, 136, 200, 56, 16, schedule=LATE_LOADS, cluster="2x2", deterministic=True),  # a phantom has no sums
    Case(33, 72, 136, 136, 40, dtype=BF16, schedule=ALL_LATE | LAST_FIRST, cluster="1x2", deterministic=True),
    Case(140, 264, 392, 256, 64, dtype=BF16, schedule=LATE_PRODUCTS | LATE_STORES),
    Case(140, 264, 392, 256, 64, dtype=BF16, schedule=LATE_LOADS | LAST_FIRST, cluster="2x1"),
    Case(60, 328, 264, 248, 24, dtype=BF16, schedule=LATE_LOADS | LATE_STORES, cluster="1x4"),
    Case(250, 712, 648, 248, 64, dtype=BF16, schedule=LATE_PUSHES | LATE_LOADS, cluster="2x4"),
    Case(66, 456, 200, 72, 0, need=(True, False, False), schedule=LATE_PRODUCTS | LATE_PUSHES, cluster="1x2"),
    Case(150, 456, 200, 72, 0, need=(True, False, False), schedule=ALL_LATE, cluster="2x2"),
    Case(100, 200, 136, 0, 16, need=(False, True, True), schedule=LATE_LOADS, cluster="1x2"),
    Case(300, 200, 136, 0, 16, need=(False, True, True), schedule=LATE_LOADS | LATE_PUSHES, cluster="2x2"),
    Case(150, 136, 584, 0, 64, need=(False, True, False), dtype=BF16, schedule=LATE_PRODUCTS | LAST_FIRST),
    Case(150, 456, 136, 0, 16, need=(False, False, True), schedule=LATE_PRODUCTS, cluster="1x4", deterministic=True),
    Case(150, 456, 136, 0, 16, need=(False, False, True), schedule=LATE_LOADS, cluster="2x2"),
    Case(50, 72, 136, 64, 16, need=(True, False, True), schedule=LATE_STORES, cluster="1x2"),
    # Loads in a hurry to overwrite the exchange, this block's and its neighbour's.
    Case(50, 72, 136, 64, 16, schedule=LATE_PRODUCTS, cluster="1x2"),
    Case(250, 72, 136, 64, 16, schedule=LATE_PRODUCTS | LAST_FIRST, cluster="2x2"),
    Case(50, 136, 72, 64, 16, need=(True, True, False), schedule=LATE_STORES | LAST_FIRST, cluster="1x8"),
    Case(300, 328, 456, 64, 16, schedule=LATE_LOADS, rounded=True),
    Case(300, 328, 456, 64, 16, schedule=LATE_LOADS | LAST_FIRST, cluster="2x1", rounded=True),
    Case(300, 456, 328, 64, 16, schedule=LATE_PRODUCTS | LATE_STORES | LAST_FIRST, cluster="2x2", rounded=True),
    Case(150, 136, 584, 0, 64, need=(False, True, False), dtype=BF16, schedule=LAST_FIRST, rounded=True),
    Case(150, 456, 136, 0, 16, need=(False, False, True), schedule=LATE_PRODUCTS, cluster="1x4", rounded=True),
    Case(150, 72, 136, 256, 64, dtype=BF16, schedule=LATE_LOADS, cluster="1x4", rounded=True),  # splits without a step
    # Two launches.
    Case(130, 328, 264, 512, 16, schedule=LATE_LOADS, dy_gap=8, x_gap=24, rounded=True),
    Case(300, 200, 712, 264, 8, schedule=LATE_PRODUCTS | LATE_STORES | LAST_FIRST, cluster="2x1"),
    Case(300, 456, 840, 328, 16, schedule=LATE_LOADS | LATE_STORES, cluster="2x2", rounded=True),  # tiles in turn
    Case(140, 264, 520, 456, 40, dtype=BF16, schedule=ALL_LATE | LAST_FIRST, cluster="1x4", deterministic=True),
    Case(400, 72, 1032, 512, 64, dtype=BF16, schedule=LATE_PRODUCTS, cluster="2x1", rounded=True),
    Case(200, 136, 328, 384, 0, need=(True, False, False), dtype=BF16, schedule=LATE_LOADS, cluster="2x2"),
    Case(1, 8, 8, 264, 8, schedule=ALL_LATE | LAST_FIRST),
    Case(300, 72, 840, 264, 16, schedule=LATE_LOADS),  # tiles of two slabs for a block
    Case(300, 72, 328, 264, 16, schedule=LATE_STORES, cluster="2x1", deterministic=True),  # a phantom has no sums
    Case(600, 72, 328, 320, 64, dtype=BF16, schedule=LATE_PRODUCTS | LAST_FIRST, cluster="2x1"),
    Case(150, 136, 328, 320, 16, need=(True, False, True), schedule=LATE_STORES, cluster="1x2", rounded=True),
    Case(150, 136, 328, 320, 16, need=(True, True, False), schedule=LATE_PUSHES, cluster="2x2", rounded=True),
]


@pytest.mark.parametrize("case", SM90, ids=str)
def test_sm90(sm90: Emulator, case: Case) -> None:
    _, counts = run(sm90, case)
    assert counts["loads"] > 0
    assert counts["products"] > 0
    assert (counts["stores"] > 0) == case.need[0]
    assert (counts["reductions"] == 0) == (case.deterministic or case.need[1:] == (False, False))


COUNTED = [
    # One cluster: of each pair or slab of a larger problem it is as much.
    Case(256, 512, 256, 64, 16, cluster="2x2"),
    Case(256, 512, 256, 256, 64, dtype=BF16, cluster="2x4"),
    Case(128, 256, 512, 256, 64, dtype=BF16, cluster="1x2"),
    Case(256, 256, 512, 128, 0, need=(True, False, False), cluster="2x2"),
    Case(256, 256, 1024, 512, 16, cluster="2x1"),
    Case(256, 512, 1024, 512, 64, dtype=BF16, cluster="2x2"),
]


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_the_cost_model_counts_what_the_kernels_do(sm90: Emulator, case: Case) -> None:
    """Bytes of L2 and between blocks, products and bytes of shared memory, phase by phase, of Hopper's own code."""
    c = replace(case, schedule=COUNTS_ALONE)
    zeros = bytes(2 * (c.M * (c.N + c.K * c.need[1] + c.P * c.need[2]) + (c.N + c.K) * (c.R + c.P)))
    phases = dict(zip(("walk N", "exchange", "walk K", "expand"), call(sm90, c, zeros)[1], strict=False))
    rows, splits = map(int, c.cluster.split("x"))
    # As many multiprocessors as the emulator takes for the second launch: two clusters.
    device = replace(DEFAULT, sms=2 * rows)
    model = cost_sm90.Problem(c.M, c.N, c.K, c.R, c.P, Flags(*c.need), device, rows, splits)
    steps_n, steps_k = (-(-size // 64) // splits for size in (c.N, c.K))
    in_turn = -(-c.K // 256) // 2
    # Values of a row that pass through shared memory once a walk, not once a step: xa and, on its way out, T; T_P; T.
    t_stored = 2 * (256 // splits + model.adapter) * model.two
    once = {
        "walk N": model.adapter * c.need[2] + t_stored,
        "walk K": model.adapter * c.need[1],
        "expand": model.t_width,
    }
    # What one thread waits for: every step, xa, and in the exchange three times for other blocks.
    waits = {"walk N": steps_n + c.need[2], "exchange": 3, "walk K": steps_k}
    waits["expand"] = in_turn * (-(-c.R // 64) * 2 + max(1, c.P // 32) + 4)
    found = [("walk N", model.walk_n(), model.step_n(), steps_n)]
    if splits > 1:
        found.append(("exchange", model.exchange(), None, 0))
    if c.R > 256:
        found.append(("expand", model.expand(), model.tile(), in_turn))
    else:
        found.append(("walk K", model.walk_k(), model.step_k(), steps_k))
    for name, phase, step, steps in found:
        counted = phases[name]
        assert counted["waits"] == waits[name], name
        assert sum(counted[key] for key in ("loaded", "stored", "added", "pushed")) == phase.l2_bytes, name
        if step is not None:
            cycles = sum(counted[f"n{width}"] * max(width // 2, WGMMA_LEAST) for width in (16, 64, 128, 256))
            assert cycles == steps * step.tensor, name
            assert counted["shared"] == steps * step.shared + 2 * 128 * once[name], name


@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        ("sm80", SHARED),
        ("sm90", Case(150, 136, 200, 64, 16, deterministic=True, cluster="1x2")),
        ("sm90", Case(150, 136, 200, 64, 16, deterministic=True, cluster="2x2")),
    ],
)
def test_partials_add_up_in_order(kernel: str, case: Case, request: pytest.FixtureRequest) -> None:
    """The same bits whatever runs first."""
    emulator = request.getfixturevalue(kernel)
    (first, counts), (again, _) = (
        run(emulator, replace(case, schedule=0)),
        run(emulator, replace(case, schedule=LAST_FIRST | LATE_PUSHES)),
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert counts.get("parts", 12) >= 12
