"""The machine code of the CUDA extension: what its kernels are made of, and what it links."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

needs_extension = pytest.mark.skipif(
    find_spec("loge_kernels._C") is None, reason="the CUDA extension is not built (pip install -e . where nvcc is)"
)


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    return import_module("loge_kernels._C")


def tool(name: str) -> Path:
    triton = pytest.importorskip("triton", reason="cuobjdump and nvdisasm come with Triton's wheel")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        pytest.skip(f"this Triton carries no {name}")
    return path


@dataclass(frozen=True)
class Function:
    """One kernel as compiled for one architecture; the names of the instructions in its machine code."""

    name: str
    arch: str
    stack: int
    instructions: Counter[str]


@pytest.fixture(scope="module")
def functions(extension: ModuleType) -> list[Function]:
    """Every kernel for every architecture: one dump of each."""
    path = {"PATH": str(tool("nvdisasm").parent)}

    def dump(*options: str) -> str:
        command = [str(tool("cuobjdump")), *options, str(extension.__file__)]
        return subprocess.run(command, capture_output=True, text=True, timeout=500, env=path, check=True).stdout

    found = []
    for arch in extension.archs.split():
        usage = dict(re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", dump("-res-usage", "-arch", f"sm_{arch}")))
        for part in dump("-sass", "-arch", f"sm_{arch}").split("Function : ")[1:]:
            name, _, code = part.partition("\n")
            instructions = re.findall(r"\*/ +(?:@!?U?P\w+ )?([A-Z][\w.]+)", code)
            found.append(Function(name, arch, int(usage[name]), Counter(instructions)))
    return found


INSTRUCTIONS = {
    # mma.sync, ldmatrix.trans, cp.async
    "sm80": ("HMMA.16816.F32", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS"),
    # wgmma, TMA loads, to two blocks at once too, and their barriers, the registers' redistribution, pushes
    "sm90_backward": ("HGMMA.64x", "UTMALDG.2D", "UTMALDG.2D.MULTICAST", "SYNCS", "USETMAXREG", "STAS.128"),
    "sm90_expand": ("HGMMA.64x256", "UTMALDG.2D", "UTMALDG.2D.MULTICAST", "SYNCS", "USETMAXREG", "ACQBULK"),
}


@needs_extension
def test_the_machine_code(functions: list[Function], extension: ModuleType) -> None:
    """Everything stays in registers; tensor cores and asynchronous copies are used."""
    archs = extension.archs.split()
    # Tiles of R, or of K, and P by two dtypes; for the architectures without a suffix, if there are any.
    plain = [arch for arch in archs if arch.isdigit()] or archs
    assert sum("sm80" in f.name for f in functions) == (28 + 12) * len(plain)
    # Tiles of R and P in one launch, and of P in two.
    assert sum("sm90" in f.name for f in functions) == (2 * 11 + 2 * 6 if "sm90" in extension.kernels else 0)
    for function in functions:
        assert len(function.instructions) > 40, function.name
        spills = [i for i in function.instructions if i.startswith(("LDL", "STL"))]
        assert (function.stack, spills) == (0, []), (function.name, function.arch)
        for wanted in next(INSTRUCTIONS[kind] for kind in INSTRUCTIONS if kind in function.name):
            assert any(i.startswith(wanted) for i in function.instructions), (function.name, function.arch, wanted)


@needs_extension
def test_hopper_waits_for_global_memory_where_it_counts_finished_blocks_alone(functions: list[Function]) -> None:
    """The exchange of T has no memory barrier of the GPU: it would wait for the additions to dB."""
    for function in functions:
        if "sm90" in function.name:
            adapter = not re.search(r"(Li\d+ELi0ELb|kernelIN7cutlass\w+_tELi0E)", function.name)
            barriers = sum(n for i, n in function.instructions.items() if i.startswith("MEMBAR") and i.endswith("GPU"))
            assert barriers == adapter, function.name


@needs_extension
def test_no_library_of_cuda_or_torch_is_linked(extension: ModuleType) -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    command = [readelf, "-d", str(extension.__file__)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listing)
    assert any(name.startswith("libc.so") for name in needed)
    assert [name for name in needed if re.match(r"lib(cuda|nv|torch|c10)", name)] == []
