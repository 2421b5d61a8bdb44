"""Every shipped configuration compiled ahead of time, without a GPU, and what the compiler made of it.

Requirements: no spills; shared memory within the architecture's limit; on sm_90 every 16-bit product of aligned
operands on wgmma (HGMMA, and no mma.sync left), on sm_80 on mma.sync (HMMA). The rows for known Triton versions are
committed in `resources.json` and compared: a change of a kernel or of a configuration shows there. And no operand of
wgmma is read from a wrong address (`broken_descriptors`), and none waited for before the next is issued (`serialised`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import availability, exact_compile
from .configs import Entry, ForwardConfig, OneLaunchConfig, TwoLaunchConfig, shipped
from .constants import expand_constants, forward_constants, keeps_t, one_launch_constants, project_constants
from .cost_model import Flags
from .devices import KNOWN, DeviceSpec

TABLE = Path(__file__).parent / "resources.json"
ARCHITECTURES: dict[str, DeviceSpec] = {"sm_80": KNOWN["NVIDIA A100-SXM4-80GB"], "sm_90": KNOWN["NVIDIA H200"]}
# A predicate, the name and the arguments of a line of SASS, behind its address.
_INSTRUCTION = re.compile(r"\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+ )?(\S+) (.*?) ?;")
VARIANTS = {
    # The common case, and the one that needs most: a mask to regenerate, a cast in the loop, every gradient.
    "plain": (False, Flags()),
    "full": (True, Flags(need_dbias=True, dropout=True)),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel to compile: an entry of a table in one variant, for the largest ranks it serves."""

    arch: str
    kernel: str
    entry: Entry
    rank: int
    variant: str

    @property
    def name(self) -> str:
        e = self.entry
        aligned = "aligned" if e.aligned else "unaligned"
        rank = "" if self.kernel.startswith("exact_") else f"R<={self.rank} "
        return f"{self.kernel} {e.bits}-bit {rank}P<={e.adapter} {aligned} {self.variant}"


@dataclass(frozen=True, slots=True)
class Row:
    """What one compiled kernel uses; `problems` is empty when it meets the requirements."""

    arch: str
    name: str
    registers: int
    stack: int
    spills: int  # LDL and STL instructions
    shared: int  # bytes
    hmma: int
    hgmma: int
    eight_bits: int = 0  # tensor-core instructions over 8-bit operands: QGMMA, IGMMA, IMMA
    broken: int = 0  # descriptors of wgmma that point elsewhere
    serialised: int = 0  # wgmma that is waited for one by one, where the source has several in flight
    problems: tuple[str, ...] = ()


def jobs_for(arch: str, kernels: Iterable[str] | None = None) -> list[Job]:
    """Everything that the shipped table of an architecture can launch."""
    jobs = [job for entry in shipped(arch) for job in _entry_jobs(arch, entry)]
    return [job for job in jobs if kernels is None or job.kernel in kernels]


def _entry_jobs(arch: str, entry: Entry) -> list[Job]:
    if entry.kernel == "one_launch":
        return [Job(arch, "one_launch_backward", entry, entry.rank, variant) for variant in VARIANTS]
    if entry.kernel.startswith("exact_"):
        # dY is divided by its scales in one tile for all adapters.
        quantizes = entry.kernel == "exact_prepare" and entry.adapter > 16
        kernels = (entry.kernel, "exact_quantize", "exact_quantize_rows") if quantizes else (entry.kernel,)
        device = ARCHITECTURES[arch]
        return [
            Job(arch, kernel, entry, entry.rank, variant)
            for kernel in kernels
            for variant in exact_compile.variants(kernel, entry.bits, device)
        ]
    if entry.kernel == "forward":
        return [Job(arch, "fused_forward", entry, entry.rank, "full")]
    assert isinstance(entry.config, TwoLaunchConfig)
    ranks = (("expand_slab", entry.config.project_r), ("project", entry.rank), ("expand_tiles", entry.rank))
    return [Job(arch, kernel, entry, rank, variant) for kernel, rank in ranks for variant in VARIANTS]


def entries_within(arch: str, shared_bytes: int) -> tuple[Entry, ...]:
    """The shipped entries of an architecture that fit a device with less shared memory than it (sm_86, sm_89, sm_120
    have 99 KiB), by what the compilers of the committed table needed."""
    if shared_bytes >= ARCHITECTURES[arch].shared_bytes:
        return shipped(arch)
    tables = _recorded().values()

    def needed(entry: Entry) -> int:
        keys = [f"{arch} {job.name}" for job in _entry_jobs(arch, entry)]
        return max((table[key]["shared"] for table in tables for key in keys if key in table), default=0)

    return tuple(entry for entry in shipped(arch) if needed(entry) <= shared_bytes)


def run(
    archs: Sequence[str] = ("sm_80", "sm_90"),
    kernels: Iterable[str] | None = None,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Compile what ships for `archs` and return a row for each kernel, in the tables' order; some minutes of CPU.

    `kernels` restricts the run to kernels of these names; `progress(done, total)` is called after each. Raises
    ValueError for an unknown architecture, RuntimeError where Triton is missing, too old or in interpreter mode.
    """
    for arch in archs:
        if arch not in ARCHITECTURES:
            raise ValueError(f"architecture {arch!r} is not one of {', '.join(ARCHITECTURES)}")
    reason = availability.triton_missing()
    if reason is None and availability.interpreted():
        reason = "TRITON_INTERPRET is set: nothing is compiled in the interpreter"
    if reason is not None:
        raise RuntimeError(f"cannot compile: {reason}")
    jobs = [job for arch in archs for job in jobs_for(arch, kernels)]
    rows = []
    # Processes, spawned: LLVM holds the interpreter's lock, and a forked child would inherit torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=context) as pool:
        for row in pool.map(compile_job, jobs):
            rows.append(row)
            if progress is not None:
                progress(len(rows), len(jobs))
    return rows


def compile_job(job: Job) -> Row:
    """Compile one kernel, disassemble it and judge it."""
    device = ARCHITECTURES[job.arch]
    compiled = compile_kernel(job)
    sass, usage = _disassemble(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage for {job.name}: {usage!r}")
    count = functools.partial(_count, sass)
    row = Row(
        arch=job.arch,
        name=job.name,
        registers=int(found[1]),
        stack=int(found[2]),
        spills=count("LDL") + count("STL"),
        shared=compiled.metadata.shared,
        hmma=count("HMMA"),
        hgmma=count("HGMMA"),
        eight_bits=count("QGMMA") + count("IGMMA") + count("IMMA"),
        broken=len(broken_descriptors(sass)),
        serialised=serialised(sass, compiled.asm["ptx"]),
    )
    return dataclasses.replace(row, problems=tuple(_problems(job, row, device)))


def compile_kernel(job: Job) -> Any:
    """Triton's compiled kernel of a job."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    device = ARCHITECTURES[job.arch]
    kernel, dtypes, constants = _source(job, device)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    signature = {}
    for param in kernel.params:
        if param.is_constexpr:
            signature[param.name] = "constexpr"
        else:
            signature[param.name] = f"*{dtypes[param.name]}" if param.name in pointers else param.annotation_type
    attributes: dict[tuple[int, ...], Any] = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers
    }
    target = GPUTarget("cuda", int(job.arch[3:]), 32)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def _source(job: Job, device: DeviceSpec) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, the element type behind each pointer, and the constexpr arguments of a job."""
    from .fused_forward import fused_forward
    from .one_launch import one_launch_backward
    from .two_launch import expand_slab, expand_tiles, project

    if job.kernel.startswith("exact_"):
        entry = job.entry
        return exact_compile.source(
            job.kernel, job.variant, entry.config, entry.bits, entry.adapter, entry.aligned, device
        )
    cast, flags = VARIANTS[job.variant]
    entry, config, P = job.entry, job.entry.config, job.entry.adapter
    dtype, name = torch.bfloat16, "bf16"
    lora = "fp32" if cast else name
    dtypes = dict.fromkeys(("dy_ptr", "x_ptr", "xa_ptr", "left_ptr", "right_ptr", "t_ptr", "dx_ptr", "y_ptr"), name)
    dtypes |= dict.fromkeys(("dA_ptr", "dB_ptr", "db_ptr", "parts_ptr"), "fp32") | {"seed_ptr": "i64"}
    dtypes |= {"lora_A_ptr": lora, "lora_B_ptr": lora, "weight_ptr": name, "bias_ptr": name}
    if isinstance(config, OneLaunchConfig):
        aligned = entry.aligned
        constants = one_launch_constants(job.rank, P, dtype, flags, aligned, aligned, config, device)
        return one_launch_backward, dtypes, constants
    if isinstance(config, ForwardConfig):
        return fused_forward, dtypes, forward_constants(P, dtype, True, flags.dropout, entry.aligned, config)
    assert isinstance(config, TwoLaunchConfig)
    if job.kernel == "project":
        return project, dtypes, project_constants(job.rank, P, dtype, flags, entry.aligned, config, device)
    expand = expand_slab if keeps_t(job.rank, config) else expand_tiles
    return expand, dtypes, expand_constants(job.rank, P, dtype, flags, entry.aligned, config, device)


def _problems(job: Job, row: Row, device: DeviceSpec) -> Iterable[str]:
    if row.stack or row.spills:
        yield f"spills: {row.stack} bytes of stack, {row.spills} LDL/STL"
    if row.broken:
        yield f"{row.broken} descriptors of wgmma with a wrong upper half: ptxas has taken another register"
    if row.serialised:
        yield f"{row.serialised} HGMMA that ptxas waits for one by one"
    if row.shared > device.shared_bytes:
        yield f"{row.shared} bytes of shared memory, {device.shared_bytes} exist"
    if job.entry.bits == 8 and row.eight_bits == 0:
        yield "no QGMMA, IGMMA or IMMA: the product is not taken in 8 bits"
    if job.entry.bits <= 16 and not job.kernel.startswith("exact_quantize"):
        if job.arch == "sm_80" and row.hmma == 0:
            yield "no HMMA"
        if job.arch == "sm_90" and row.hgmma == 0:
            yield "no HGMMA"
        if job.arch == "sm_90" and job.entry.aligned and row.hmma > 0:
            yield f"{row.hmma} HMMA: a product does not use wgmma"


def broken_descriptors(sass: str) -> list[str]:
    """Instructions that add the upper half of wgmma's matrix descriptor to something else than zero.

    A descriptor is an address, which fits the lower 32 bits, plus constants. ptxas 12.8 (Triton 3.6 carries it) once
    took, for both halves, a register that held neither: every product but the first read from anywhere.
    """
    found, defined = [], dict[str, str]()
    for line in sass.splitlines():
        parts = _INSTRUCTION.match(line)
        if parts is None:
            continue
        name, arguments = parts[1], parts[2].split(", ")
        if name == "UIADD3.X":
            constants = [int(value, 16) for value in arguments if re.fullmatch(r"-?0x[0-9a-f]+", value)]
            registers = [value for value in arguments[1:] if re.fullmatch(r"UR\d+", value)]
            upper_half = any(abs(value) >= 1 << 28 for value in constants)
            if upper_half and any(defined.get(register) != "UMOV URZ" for register in registers):
                found.append(f"{name} {parts[2]}")
        target = re.fullmatch(r"UR(\d+)", arguments[0])
        if target is not None:
            width = 4 if ".128" in name else 2 if "64" in name or "WIDE" in name else 1
            for register in range(int(target[1]), int(target[1]) + width):
                defined[f"UR{register}"] = f"{name} {', '.join(arguments[1:])}"
    return found


def serialised(sass: str, ptx: str) -> int:
    """The wgmma instructions of a kernel, if each is a group of its own, which the source (`ptx`) does not ask for.

    ptxas does so to all of a kernel, and tells nobody, where anything else touches an accumulator in flight: a copy
    that LLVM has left at the edge of a loop is enough.
    """
    products = re.findall(r"\b[HQI]GMMA\b.*", sass)
    waited = sum("gsb0" in product for product in products)
    asked = ptx.count("wgmma.commit_group") < ptx.count("wgmma.mma_async")
    return waited if products and waited == len(products) and asked else 0


def _count(sass: str, instruction: str) -> int:
    return len(re.findall(rf"\b{instruction}\b", sass))


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """SASS and resource usage, by the tools that Triton's wheel carries."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)

        def output(*command: str) -> str:
            return subprocess.run([tools / command[0], *command[1:], path], capture_output=True, text=True).stdout

        return output("nvdisasm"), output("cuobjdump", "-res-usage")


def read_committed(triton_version: str) -> dict[str, dict[str, Any]]:
    """The committed rows of a Triton version, by "arch name"; empty for a version that was never recorded."""
    return _recorded().get(triton_version, {})


def _recorded() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def differences(rows: Iterable[Row], triton_version: str) -> list[str]:
    """What differs from the committed rows of this Triton version; nothing for a version without any."""
    committed = read_committed(triton_version)
    if not committed:
        return []
    found = []
    for row in rows:
        expected = committed.get(_key(row))
        if expected is None:
            found.append(f"{_key(row)}: not in the committed table")
        elif expected != _numbers(row):
            found.append(f"{_key(row)}: {_numbers(row)}, committed {expected}")
    return found


def write_committed(rows: Iterable[Row], triton_version: str) -> None:
    """Record `rows` as this Triton version's; one line a kernel."""
    table = _recorded()
    table[triton_version] = {_key(row): _numbers(row) for row in rows}
    versions = []
    for version in sorted(table):
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(numbers)}" for key, numbers in table[version].items())
        versions.append(f"  {json.dumps(version)}: {{\n{lines}\n  }}")
    TABLE.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def _key(row: Row) -> str:
    return f"{row.arch} {row.name}"


def _numbers(row: Row) -> dict[str, Any]:
    numbers = {name: getattr(row, name) for name in ("registers", "stack", "spills", "shared", "hmma", "hgmma")}
    return numbers | {name: value for name in ("eight_bits", "broken", "serialised") if (value := getattr(row, name))}
