"""Where the packages lie, and the CUDA extension, which CMake builds; everything else is in pyproject.toml.

`triton_kernels` is the import name of another project, and `bench` is nobody's: both folders are installed inside
`loge_kernels` and nowhere else.

    LOGE_CUDA_ARCHS   compute capabilities to compile for (default "80;90a")
    LOGE_SKIP_CUDA    1: a pure-Python package, whatever is installed
    CUTLASS_INCLUDE   folder that holds cute/, instead of the one of the nvidia-cutlass package
    MAX_JOBS          compilers at a time
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

VERSION = "0.1.0"
MAPPED = {"loge_kernels.triton_kernels": "triton_kernels", "loge_kernels.bench": "bench"}


def find_nvcc() -> str | None:
    """The compiler of the toolkit in CUDACXX, CUDA_HOME, PATH or /usr/local/cuda, in this order."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda") if home]
    named = [os.environ.get("CUDACXX"), *(shutil.which("nvcc", path=f"{home}/bin") for home in homes[:-1])]
    candidates = [*named, shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]
    return next((nvcc for nvcc in candidates if nvcc and shutil.which(nvcc)), None)


def toolkit(nvcc: str) -> str:
    """The toolkit's version, as in "13.0"."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None:
        raise SystemExit(f"{nvcc} --version names no release: {said!r}")
    return found[1]


def why_no_cuda() -> str | None:
    """The reason why this build has no CUDA extension, or None."""
    if os.environ.get("LOGE_SKIP_CUDA", "0") not in ("", "0"):
        return f"LOGE_SKIP_CUDA={os.environ['LOGE_SKIP_CUDA']}"
    if sys.platform != "linux":
        return f"it is built on Linux alone, and this is {sys.platform}"
    if find_nvcc() is None:
        return "there is no CUDA toolkit: no nvcc in CUDACXX, CUDA_HOME, PATH or /usr/local/cuda"
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    missing += ["pybind11"] if find_spec("pybind11") is None else []
    return f"{', '.join(missing)} not found (build isolation installs them)" if missing else None


def cutlass_include() -> str:
    """The folder that holds cute/, or "" where it is not installed: not every kernel needs it."""
    given = os.environ.get("CUTLASS_INCLUDE")
    spec = find_spec("cutlass_library")
    if given or spec is None or spec.origin is None:
        return given or ""
    return str(Path(spec.origin).parent / "source" / "include")


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt where setuptools would call the compiler itself."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        configure = ["cmake", "-G", "Ninja", "-S", str(Path(__file__).resolve().parent), "-B", str(build)]
        configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_INSTALL_PREFIX={target}"]
        configure += [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += ["-DPYBIND11_FINDPYTHON=ON", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        configure += [f"-DCUTLASS_INCLUDE={cutlass_include()}"]
        if os.environ.get("LOGE_CUDA_ARCHS"):
            configure += [f"-DLOGE_CUDA_ARCHS={os.environ['LOGE_CUDA_ARCHS']}"]
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), *(["-j", jobs] if jobs else [])], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)


reason = why_no_cuda()
if reason is not None:
    print(f"loge_kernels: building without the CUDA extension: {reason}", file=sys.stderr)
nvcc = find_nvcc() if reason is None else None

packages = find_packages(include=["loge_kernels", "loge_kernels.*"])
for name, folder in MAPPED.items():
    packages += [name, *(f"{name}.{below}" for below in find_packages(folder))]

setup(
    # The local tag keeps wheels of different toolkits apart.
    version=VERSION if nvcc is None else f"{VERSION}+cu{toolkit(nvcc).replace('.', '')}",
    packages=packages,
    package_dir=MAPPED,
    package_data={
        "loge_kernels": ["py.typed", "cuda_measured.json"],
        "loge_kernels.triton_kernels": ["configs/*.json", "resources.json"],
    },
    ext_modules=[] if nvcc is None else [Extension("loge_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
