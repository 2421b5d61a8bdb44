"""What setup.py builds and why, what a source distribution holds, and what `make wheels` accepts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution, Extension

import loge_kernels as loge

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "LOGE_SKIP_CUDA", "LOGE_CUDA_ARCHS", "CUTLASS_INCLUDE", "MAX_JOBS")
ALONE = ("CMakeLists.txt", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml")
ABOUT = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux alone")


def load(path: Path) -> ModuleType:
    spec = spec_from_file_location(f"loge_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py on a machine where no toolkit is named or in PATH, and every tool is there."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    module = load(ROOT / "setup.py")
    which = shutil.which

    def elsewhere(name: str, path: str | None = None) -> str | None:
        return None if path == "/usr/local/cuda/bin" else which(name, path=path)

    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    monkeypatch.setattr(module.shutil, "which", elsewhere)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(module.sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(module, "find_tool", lambda name: f"/tools/{name}")
    return module


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def nvcc(folder: Path, release: str = "12.6") -> Path:
    return program(folder / "nvcc", f'echo "Cuda compilation tools, release {release}, V{release}.85"')


def test_which_toolkit_is_taken(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the environment names; where that has no nvcc, no other."""
    assert build.find_nvcc() is None
    in_path = nvcc(tmp_path / "path")
    assert build.find_nvcc() == str(in_path)
    by_path_variable = nvcc(tmp_path / "b" / "bin")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "b"))
    assert build.find_nvcc() == str(by_path_variable)
    by_home = nvcc(tmp_path / "a" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "a"))
    assert build.find_nvcc() == str(by_home)
    monkeypatch.setenv("CUDACXX", str(by_path_variable))
    assert build.find_nvcc() == str(by_path_variable)
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setenv("CUDA_HOME", "/no/toolkit")
    assert build.find_nvcc() is None
    assert build.why_no_cuda() == "no nvcc in CUDA_HOME=/no/toolkit"


def test_reasons_for_a_pure_python_package(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.why_no_cuda().startswith("no nvcc in PATH or /usr/local/cuda")
    nvcc(tmp_path / "path")
    monkeypatch.setattr(build, "find_tool", lambda name: None)
    assert build.why_no_cuda().startswith("cmake, ninja, pybind11, nvidia-cutlass or CUTLASS_INCLUDE not found")
    monkeypatch.setenv("LOGE_SKIP_CUDA", "1")
    assert build.why_no_cuda() == "LOGE_SKIP_CUDA=1"
    monkeypatch.setattr(build.sys, "platform", "darwin")
    monkeypatch.setenv("LOGE_SKIP_CUDA", "0")
    assert "darwin" in build.why_no_cuda()


def test_cutlass_is_wanted_for_sm_90a_alone(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc(tmp_path / "path")
    monkeypatch.setattr(build, "find_spec", lambda name: object() if name == "pybind11" else None)
    assert "CUTLASS_INCLUDE" in build.why_no_cuda()
    monkeypatch.setenv("LOGE_CUDA_ARCHS", "80;86")
    assert build.why_no_cuda() is None
    monkeypatch.delenv("LOGE_CUDA_ARCHS")
    monkeypatch.setenv("CUTLASS_INCLUDE", "/somewhere")
    assert build.why_no_cuda() is None
    assert build.cutlass_include() == "/somewhere"
    monkeypatch.delenv("CUTLASS_INCLUDE")
    assert build.cutlass_include() == ""
    (tmp_path / "prefix" / "include" / "cute").mkdir(parents=True)
    assert build.cutlass_include() == str(tmp_path / "prefix" / "include")


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first is not None
    assert first[1].startswith(f"[{loge.__version__}] - ")


def test_the_local_tag_is_the_toolkits(build: ModuleType, tmp_path: Path) -> None:
    assert build.version(None) == loge.__version__
    assert build.version(str(nvcc(tmp_path, "13.0"))) == f"{loge.__version__}+cu130"
    broken = program(tmp_path / "nvcc", "echo gone >&2; exit 127")
    with pytest.raises(SystemExit, match=r"nvcc --version names no release: 'gone\\n'.*LOGE_SKIP_CUDA=1"):
        build.version(str(broken))


def run_build(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cmake: str) -> list[str]:
    """The calls of CMake, a script here, that a build of the extension makes."""
    pytest.importorskip("pybind11")
    log = tmp_path / "calls"
    log.unlink(missing_ok=True)
    fake = program(tmp_path / "cmake", f'echo "$@" >> {log}\n{cmake}')
    monkeypatch.setenv("CUDACXX", str(nvcc(tmp_path)))
    monkeypatch.setattr(build, "find_tool", lambda name: str(fake))
    command = build.CMakeBuild(Distribution({"ext_modules": [Extension("loge_kernels._C", sources=[])]}))
    command.ensure_finalized()
    command.build_lib = str(tmp_path / "lib")
    command.build_extension(command.extensions[0])
    return log.read_text().splitlines()


def test_choices_reach_cmake(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGE_CUDA_ARCHS", "80;100")
    monkeypatch.setenv("CUTLASS_INCLUDE", "/cutlass")
    monkeypatch.setenv("MAX_JOBS", "3")
    configure, compile_, install = run_build(build, tmp_path, monkeypatch, "")
    assert f"-DCMAKE_CUDA_COMPILER={tmp_path / 'nvcc'} " in configure
    assert f"-DCMAKE_INSTALL_PREFIX={tmp_path / 'lib' / 'loge_kernels'} " in configure
    assert "-DCUTLASS_INCLUDE=/cutlass" in configure
    assert configure.endswith("-ULOGE_CUDA_ARCHS -DLOGE_CUDA_ARCHS=80;100")
    assert compile_.endswith("-cuda-12.6 -j 3")
    assert install.startswith("--install")
    for name in ("LOGE_CUDA_ARCHS", "MAX_JOBS"):
        monkeypatch.delenv(name)
    configure, compile_, _ = run_build(build, tmp_path, monkeypatch, "")
    assert configure.endswith("-ULOGE_CUDA_ARCHS")  # the choice of the last build is forgotten
    assert "-j" not in compile_.split()


def test_a_failed_build(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error, and no pure Python package."""
    with pytest.raises(SystemExit, match=r"does not build with .*nvcc: .* returned 7.*LOGE_SKIP_CUDA=1 installs"):
        run_build(build, tmp_path, monkeypatch, "exit 7")


@pytest.mark.parametrize("archs", ["sm_90a", "75", "80,90a"])
def test_cmake_refuses_what_is_no_architecture(archs: str, tmp_path: Path) -> None:
    cmake = load(ROOT / "setup.py").find_tool("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path), f"-DLOGE_CUDA_ARCHS={archs}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert f"LOGE_CUDA_ARCHS='{archs}'" in done.stderr


def test_a_source_distribution_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And belongs to no toolkit."""
    monkeypatch.setenv("CUDACXX", str(nvcc(tmp_path)))
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=120)
    top = f"loge_kernels-{loge.__version__}"
    with tarfile.open(tmp_path / f"{top}.tar.gz") as archive:
        names = set(archive.getnames())
    wanted = [ROOT / name for name in (*ALONE, *ABOUT)]
    for folder in ("csrc", "tests", "docs", "examples", "loge_kernels", "triton_kernels", "bench"):
        suffixes = ("*.cu", "*.cuh", "*.cpp", "*.h", "*.py", "*.json", "*.md", "py.typed")
        wanted += [path for suffix in suffixes for path in (ROOT / folder).rglob(suffix)]
    missing = {f"{top}/{path.relative_to(ROOT)}" for path in wanted if "results" not in path.parts} - names
    assert not missing
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.fixture
def wheels() -> ModuleType:
    path = ROOT / ".ci" / "wheels.py"
    if not path.exists():
        pytest.skip("needs a checkout")
    return load(path)


TAGGED = "p-1+cu130-cp311-cp311-manylinux_2_34_x86_64.whl"
PURE = "p-1-py3-none-any.whl"


@pytest.mark.parametrize(
    ("name", "entries", "toolkit", "message"),
    [
        (TAGGED, ["p/_C.so"], "13.0", None),
        (PURE, ["p/a.py"], None, None),
        (TAGGED.replace("manylinux_2_34", "linux"), ["p/_C.so"], "13.0", "manylinux"),
        (TAGGED, ["p/_C.so"], "12.6", r"\+cu126"),
        (TAGGED, ["p/_C.so", "p.libs/libcuda.so.1"], "13.0", "libcuda"),
        (TAGGED, ["p/a.py"], "13.0", r"binaries \[\]"),
        (PURE, ["p/_C.so"], None, "_C.so"),
        (PURE, ["p/large.py"], None, r"10\.0 MB; at most 10 MB"),
    ],
)
def test_what_a_wheel_must_be(
    wheels: ModuleType, tmp_path: Path, name: str, entries: list[str], toolkit: str | None, message: str | None
) -> None:
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        for entry in entries:
            archive.writestr(entry, "x" * (10_000_001 if "large" in entry else 1))
    refused = nullcontext() if message is None else pytest.raises(SystemExit, match=message)
    with refused:
        wheels.inspect(wheels.Wheel(tmp_path / name, toolkit, 1.0))
