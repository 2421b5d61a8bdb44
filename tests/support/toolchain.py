"""Host programs over csrc/: where the compiler and the headers are, and how sanitized programs are built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc"
HOST_SOURCES = Path(__file__).parents[1] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

needs_compiler = pytest.mark.skipif(
    COMPILER is None or not SOURCES.exists(), reason="needs a C++ compiler and a checkout"
)


def cutlass_include() -> Path | None:
    """CUTLASS's headers: CUTLASS_INCLUDE, or those in the nvidia-cutlass wheel or in this Python's include/."""
    named = os.environ.get("CUTLASS_INCLUDE")
    if named:
        return Path(named)
    wheel = find_spec("cutlass_library")
    if wheel is not None and wheel.submodule_search_locations:
        return Path(wheel.submodule_search_locations[0]) / "source" / "include"
    here = Path(sys.prefix) / "include"
    return here if (here / "cute").is_dir() else None


def cuda_include() -> Path | None:
    """The CUDA toolkit's headers: those of CUDA_HOME, or of the nvcc on the path."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and str(Path(nvcc).resolve().parent.parent), "/usr/local/cuda"]
    return next(
        (Path(home) / "include" for home in homes if home and (Path(home) / "include" / "cuda.h").exists()), None
    )


def cute_options() -> list[str]:
    """What a host program over CuTe is compiled with; skips the test where the headers are missing."""
    cutlass, cuda = cutlass_include(), cuda_include()
    if cutlass is None or cuda is None:
        pytest.skip("needs CUTLASS's headers (CUTLASS_INCLUDE) and the CUDA toolkit's (CUDA_HOME)")
    headers = [f"-isystem{folder}" for folder in (cutlass, cuda, cuda / "cccl") if folder.exists()]
    # CuTe's headers warn on a host; shared memory is addressed as shared_address.h says.
    shared = ["-DCUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED=1", "-include", str(HOST_SOURCES / "shared_address.h")]
    return ["-w", *shared, *headers]


def build(program: Path, sources: list[Path], *options: str, sanitize: str = "address,undefined") -> Path:
    """`program`, compiled from `sources` with sanitizers; the compiler's words where that fails."""
    # What compiles CuTe soonest; -O0 takes as long and then runs six times longer.
    flags = ["-std=c++17", "-Og", f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
    flags += [f"-I{SOURCES}", f"-I{HOST_SOURCES}", *options]
    command = [str(COMPILER), *flags, *map(str, sources), "-o", str(program)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=500)
    if "sanitize" in made.stderr and "cannot find" in made.stderr:
        pytest.skip(f"{COMPILER} has no sanitizer libraries")
    assert made.returncode == 0, made.stderr[-4000:]
    return program


WARNINGS = ("-Wall", "-Wextra", "-Werror")
