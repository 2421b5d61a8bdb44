"""Where the packages lie, and the CUDA extension, which CMake builds; everything else is in pyproject.toml.

`triton_kernels` is the import name of another project, and `bench` is nobody's: both folders are installed inside
`loge_kernels` and nowhere else.

    CUDACXX, CUDA_HOME or CUDA_PATH   the CUDA compiler, or the toolkit that holds it; otherwise nvcc in PATH, or the
                                      one of /usr/local/cuda; with none of them the package is pure Python
    LOGE_CUDA_ARCHS                   compute capabilities to compile for (CMakeLists.txt has the default)
    LOGE_SKIP_CUDA                    1: a pure-Python package, whatever is installed
    CUTLASS_INCLUDE                   folder that holds cute/, instead of the one of the nvidia-cutlass package or of
                                      this Python's include/
    MAX_JOBS                          compilers at a time
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MAPPED = {"loge_kernels.triton_kernels": "triton_kernels", "loge_kernels.bench": "bench"}
ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """The compiler that the environment names; where it names none, the one in PATH or in /usr/local/cuda."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def toolkit(nvcc: str) -> str:
    """The toolkit's version, as in "13.0"."""
    said = subprocess.run([nvcc, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None:
        raise SystemExit(
            f"loge_kernels: {nvcc} --version names no release: {said!r}. CUDA_HOME names another toolkit, and "
            "LOGE_SKIP_CUDA=1 installs the package without the CUDA extension."
        )
    return found[1]


def version(nvcc: str | None) -> str:
    """The package's version; the local tag keeps wheels of different toolkits apart."""
    # Read and not imported: the package imports torch, and a build has none.
    source = (ROOT / "loge_kernels" / "__init__.py").read_text(encoding="utf-8")
    (number,) = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    return number if nvcc is None else f"{number}+cu{toolkit(nvcc).replace('.', '')}"


def find_tool(name: str) -> str | None:
    """cmake or ninja: the one of the Python package, whose folder need not be in PATH, or else the one in PATH."""
    folder = None
    if find_spec(name) is not None:
        folder = getattr(import_module(name), {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}[name], None)
    return (shutil.which(name, path=folder) if folder else None) or shutil.which(name)


def why_no_cuda() -> str | None:
    """The reason why this build has no CUDA extension, or None."""
    if os.environ.get("LOGE_SKIP_CUDA", "0") not in ("", "0"):
        return f"LOGE_SKIP_CUDA={os.environ['LOGE_SKIP_CUDA']}"
    if sys.platform != "linux":
        return f"it is built on Linux alone, and this is {sys.platform}"
    if find_nvcc() is None:
        named = [f"{name}={os.environ[name]}" for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        return f"no nvcc in {named[0] if named else 'PATH or /usr/local/cuda; CUDA_HOME names a toolkit elsewhere'}"
    missing = [tool for tool in ("cmake", "ninja") if find_tool(tool) is None]
    missing += ["pybind11"] if find_spec("pybind11") is None else []
    # The kernels of sm_90a, which are built unless LOGE_CUDA_ARCHS leaves them out, are written with CUTLASS.
    cutlass_needed = "90a" in (os.environ.get("LOGE_CUDA_ARCHS") or "90a")
    missing += ["nvidia-cutlass or CUTLASS_INCLUDE"] if cutlass_needed and not cutlass_include() else []
    return f"{', '.join(missing)} not found (build isolation installs them)" if missing else None


def cutlass_include() -> str:
    """The folder that holds cute/, or "" where it is not installed: not every kernel needs it."""
    if os.environ.get("CUTLASS_INCLUDE"):
        return os.environ["CUTLASS_INCLUDE"]
    spec = find_spec("cutlass_library")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "source" / "include")
    here = Path(sys.prefix) / "include"
    return str(here) if (here / "cute").is_dir() else ""


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt where setuptools would call the compiler itself."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        nvcc, cmake = str(find_nvcc()), str(find_tool("cmake"))  # why_no_cuda() has found them
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # A folder that stays, one for each Python and toolkit: only what has changed is compiled again.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-cuda-{toolkit(nvcc)}"
        # Whatever may differ from the last time is named: CMake would go on with what it remembers.
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DCMAKE_INSTALL_PREFIX={target}", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"]
        configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += ["-DPYBIND11_FINDPYTHON=ON", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        configure += [f"-DCUTLASS_INCLUDE={cutlass_include()}", "-ULOGE_CUDA_ARCHS"]
        if os.environ.get("LOGE_CUDA_ARCHS"):
            configure += [f"-DLOGE_CUDA_ARCHS={os.environ['LOGE_CUDA_ARCHS']}"]
        jobs = os.environ.get("MAX_JOBS")
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build), *(["-j", jobs] if jobs else [])], check=True)
            subprocess.run([cmake, "--install", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"loge_kernels: the CUDA extension does not build with {nvcc}: {' '.join(error.cmd[:2])} ... returned "
                f"{error.returncode}, and says above why. LOGE_SKIP_CUDA=1 installs the package without it."
            ) from None


def main() -> None:
    reason = why_no_cuda()
    nvcc = find_nvcc() if reason is None else None
    if "sdist" in sys.argv:  # sources belong to no toolkit
        nvcc = None
    elif reason is not None:
        print(f"loge_kernels: building without the CUDA extension: {reason}", file=sys.stderr)

    packages = find_packages(include=["loge_kernels", "loge_kernels.*"])
    for name, folder in MAPPED.items():
        packages += [name, *(f"{name}.{below}" for below in find_packages(folder))]

    setup(
        version=version(nvcc),
        packages=packages,
        package_dir=MAPPED,
        package_data={
            "loge_kernels": ["py.typed"],
            "loge_kernels.backend": ["cuda_measured.json"],
            "loge_kernels.triton_kernels": ["configs/*.json", "resources.json"],
        },
        ext_modules=[] if nvcc is None else [Extension("loge_kernels._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )


if __name__ == "__main__":
    main()
