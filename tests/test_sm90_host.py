"""The Hopper kernel's index maths, compiled for the host with sanitizers and compared with brute force; no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "csrc"
SOURCES = Path(__file__).parent.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


def build_and_run(name: str, folder: Path, *options: str) -> str:
    """The output of tests/csrc/`name`.cpp, built with `options`; the compiler's or program's words on failure."""
    program = folder / name
    command = [str(COMPILER), "-std=c++17", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command += [f"-I{SOURCES}", *options, str(HERE / f"{name}.cpp"), "-o", str(program)]
    for arguments in (command, [str(program)]):
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cutlass_include() -> Path | None:
    """CUTLASS's headers: CUTLASS_INCLUDE, or those in the nvidia-cutlass wheel."""
    named = os.environ.get("CUTLASS_INCLUDE")
    if named:
        return Path(named)
    wheel = find_spec("cutlass_library")
    if wheel is None or not wheel.submodule_search_locations:
        return None
    return Path(wheel.submodule_search_locations[0]) / "source" / "include"


def cuda_include() -> Path | None:
    """The CUDA toolkit's headers: those of CUDA_HOME, or of the nvcc on the path."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and str(Path(nvcc).resolve().parent.parent), "/usr/local/cuda"]
    return next(
        (Path(home) / "include" for home in homes if home and (Path(home) / "include" / "cuda.h").exists()), None
    )


def test_schedule_fragments_exchange_and_plan(tmp_path: Path) -> None:
    assert build_and_run("sm90_index_maths", tmp_path, "-Wall", "-Wextra", "-Werror") == "ok\n"


def test_descriptors_read_what_tma_writes(tmp_path: Path) -> None:
    cutlass, cuda = cutlass_include(), cuda_include()
    if cutlass is None or cuda is None:
        pytest.skip("needs CUTLASS's headers (CUTLASS_INCLUDE) and the CUDA toolkit's (CUDA_HOME)")
    headers = [f"-isystem{folder}" for folder in (cutlass, cuda, cuda / "cccl") if folder.exists()]
    options = ["-w", "-DCUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED=1", "-include", str(HERE / "shared_address.h")]
    assert build_and_run("sm90_descriptors", tmp_path, *options, *headers) == "ok\n"
