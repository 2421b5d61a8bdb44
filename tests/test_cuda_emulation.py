"""The Ampere kernel's own code on the host: every instruction emulated, every gradient against float64.

What runs here is `csrc/sm80_block.h` as the GPU runs it, one fiber a thread, under AddressSanitizer and UBSan: index
arithmetic, fragment layouts, pipeline and edges. What only hardware can show, memory ordering and speed, it does not.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(
    COMPILER is None or not (ROOT / "csrc" / "sm80_block.h").exists(), reason="needs g++ and a checkout"
)


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
    late: bool = True  # cp.async lands at its wait, not at its issue


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("emulator") / "sm80_emulate"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'csrc'}"]
    source = ROOT / "tests" / "csrc" / "sm80_emulate.cpp"
    made = subprocess.run([str(COMPILER), *flags, str(source), "-o", str(program)], capture_output=True, text=True)
    if "sanitize" in made.stderr and "cannot find" in made.stderr:
        pytest.skip("g++ has no sanitizer libraries")
    assert made.returncode == 0, made.stderr[-4000:]
    return program


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.int16).numpy().tobytes()


def with_gap(tensor: Tensor, gap: int) -> bytes:
    """Rows `gap` elements apart, NaN between them, none after the last."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + gap), torch.nan, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return raw(wide.flatten()[: wide.numel() - gap])


def run(emulator: Path, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """The gradients, those of the formula in float64, and the instructions counted."""
    c = case
    torch.manual_seed(c.M * 1009 + c.N + c.K + c.R + c.P)
    need_dx, need_dA, need_dB = c.need
    make = lambda *shape: (torch.randn(*shape) / 4).to(c.dtype)  # noqa: E731
    dy, x, xa = make(c.M, c.N), make(c.M, c.K), make(c.M, c.P)
    left, right, lora_A, lora_B = make(c.N, c.R), make(c.R, c.K), make(c.P, c.K), make(c.N, c.P)
    parts = [with_gap(dy, c.dy_gap), with_gap(x, c.x_gap) if need_dA else b"", raw(xa) if need_dB else b""]
    parts += [raw(left), raw(right), raw(lora_A)] if need_dx else []
    parts += [raw(lora_B)] if need_dx or need_dA else []
    numbers = [c.M, c.N, c.K, c.R, c.P, c.N + c.dy_gap, c.K + c.x_gap, int(c.dtype == torch.bfloat16)]
    numbers += [int(c.deterministic), *map(int, c.need), c.scaling, int(c.late)]
    environment = {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    done = subprocess.run(
        [str(emulator), *map(str, numbers)], input=b"".join(parts), capture_output=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    items = done.stderr.decode().splitlines()[-1].split()  # above it ASan says that it is new to swapcontext
    counts = {key: int(value) for key, value in (item.split("=") for item in items)}

    slabs = -(-c.M // 64) if c.deterministic else 1
    shapes = {"dx": (c.M, c.K), "dA": (slabs, c.P, c.K), "dB": (slabs, c.N, c.P)}
    got, position = {}, 0
    for (name, shape), needed in zip(shapes.items(), c.need, strict=True):
        if not needed:
            continue
        kind = np.dtype(np.int16 if name == "dx" else np.float32)
        count = int(np.prod(shape))
        array = np.frombuffer(done.stdout, kind, count, position).reshape(shape).copy()
        position += count * kind.itemsize
        got[name] = torch.from_numpy(array).view(c.dtype) if name == "dx" else torch.from_numpy(array).sum(0)
    assert position == len(done.stdout)

    d, s = torch.Tensor.double, c.scaling
    t_b = s * d(dy) @ d(lora_B)
    want = {"dx": d(dy) @ d(left) @ d(right) + t_b @ d(lora_A), "dA": t_b.t() @ d(x), "dB": s * d(dy).t() @ d(xa)}
    # The same formula at the precision of the operands: T rounded to 16 bits, everything else accumulated exactly.
    t_r, t_b = (d(dy) @ d(left)).to(c.dtype).double(), t_b.to(c.dtype).double()
    near = {"dx": (t_r @ d(right) + t_b @ d(lora_A)).to(c.dtype).double(), "dA": t_b.t() @ d(x), "dB": want["dB"]}
    for name, gradient in got.items():
        error, allowed = (d(gradient) - want[name]).abs().max(), (near[name] - want[name]).abs().max()
        assert error <= 2 * allowed + 1e-5 * want[name].abs().max(), (name, case, error, allowed)
    return got, want, counts


CASES = [
    Case(64, 64, 128, 64, 16),
    Case(1, 8, 8, 8, 8),
    Case(67, 200, 136, 48, 8, late=False),
    Case(130, 328, 264, 72, 16, dy_gap=8, x_gap=24),
    Case(33, 136, 200, 128, 64, dtype=torch.bfloat16),
    Case(70, 264, 392, 256, 16, dtype=torch.bfloat16, late=False),
    Case(70, 392, 264, 248, 24, deterministic=True),
    Case(65, 72, 328, 256, 64, late=False, deterministic=True, dtype=torch.bfloat16),
    Case(66, 328, 200, 64, 0, need=(True, False, False)),
    Case(66, 200, 328, 256, 0, need=(True, False, False), late=False),
    Case(100, 200, 136, 0, 16, need=(False, True, True)),
    Case(100, 136, 328, 0, 64, need=(False, True, False), late=False),
    Case(100, 200, 136, 0, 16, need=(False, False, True)),
    Case(50, 72, 136, 128, 16, need=(True, False, True)),
    Case(50, 72, 136, 128, 40, need=(True, True, False), late=False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.M}-{c.N}-{c.K}-{c.R}-{c.P}-{'late' if c.late else 'eager'}")
def test_gradients(emulator: Path, case: Case) -> None:
    _, _, counts = run(emulator, case)
    assert counts["mma"] > 0
    assert counts["ldmatrix"] > 0
    assert counts["conflicts"] == 0
    assert (counts["reductions"] == 0) == (case.deterministic or case.need[1:] == (False, False))


@pytest.mark.parametrize("late", [False, True], ids=["eager", "late"])
@pytest.mark.parametrize("P", [0, 16, 64])
@pytest.mark.parametrize("R", [64, 128, 256])
def test_every_pipeline_turns_over(emulator: Path, R: int, P: int, late: bool) -> None:
    """More steps than stages in both walks, so that every tile is filled again while its neighbours are read."""
    run(emulator, Case(40, 456, 520, R, P, late=late, x_gap=8, need=(True, P > 0, P > 0)))


def test_partials_add_up_in_order(emulator: Path) -> None:
    case = Case(150, 136, 200, 64, 16, deterministic=True)
    first, _, _ = run(emulator, case)
    again, _, _ = run(emulator, case)
    assert all(torch.equal(first[name], again[name]) for name in first)
