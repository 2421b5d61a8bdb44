"""The shipped configurations, compiled ahead of time without a GPU, against the committed table of resources."""

from __future__ import annotations

import re

import pytest
from interpreter import INTERPRETED, needs_triton

from loge_kernels.triton_kernels import compile_check
from loge_kernels.triton_kernels.compile_check import ARCHITECTURES, Row, compile_job, jobs_for

pytestmark = [
    needs_triton,
    pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in Triton's interpreter"),
]


def triton_version() -> str:
    import triton

    return triton.__version__


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("sm_80", "one_launch_backward 16-bit R<=64 P<=16 aligned plain"),
        ("sm_90", "one_launch_backward 16-bit R<=256 P<=16 aligned plain"),
    ],
)
def test_one_configuration_of_each_architecture(arch: str, name: str) -> None:
    job = next(job for job in jobs_for(arch) if job.name == name)
    row = compile_job(job)
    assert row.problems == ()
    assert compile_check.differences([row], triton_version()) == []


def steps(ptx: str) -> list[list[str]]:
    """Of each loop that multiplies: its products, by their width, and its waits for them, in order."""
    lines = ptx.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\$L__BB\w+):", line))}
    loops = []
    for end, line in enumerate(lines):
        found = re.search(r"bra(?:\.uni)?\s+(\$L__BB\w+)", line)
        if found and labels.get(found[1], end) < end:
            body = "\n".join(lines[labels[found[1]] : end])
            events = re.findall(r"wgmma\.mma_async\S*\.m64(n\d+)k16|wgmma\.(wait_group)\S* (\d)", body)
            loops.append(["".join(event) for event in events])
    return [loop for loop in loops if any(event.startswith("n") for event in loop)]


@pytest.mark.parametrize(
    ("name", "waits", "wide"),
    [
        ("project 16-bit R<=8192", 1, ["n256"] * 4 + ["n16"] * 4),  # for dB
        ("expand_tiles 16-bit R<=8192", 0, ["n256"] * 4),
    ],
)
def test_wide_products_are_in_flight_over_a_step(name: str, waits: int, wide: list[str]) -> None:
    """A step drains no product but the thin ones that it issues before the wide one."""
    job = next(job for job in jobs_for("sm_90") if job.name == f"{name} P<=16 aligned plain")
    loop = max(steps(compile_check.compile_kernel(job).asm["ptx"]), key=len)
    assert loop.count("wait_group0") == waits
    drained = max((i for i, event in enumerate(loop) if event == "wait_group0"), default=-1)
    assert [event for event in loop[drained + 1 :] if event.startswith("n")] == wide


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_configuration(arch: str) -> None:
    rows = compile_check.run([arch])
    assert [row for row in rows if row.problems] == []
    assert compile_check.differences(rows, triton_version()) == []


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_the_committed_table_is_whole_and_clean(version: str) -> None:
    committed = compile_check.read_committed(version)
    jobs = {f"{arch} {job.name}": (arch, job) for arch in ARCHITECTURES for job in jobs_for(arch)}
    assert set(committed) == set(jobs)
    for key, numbers in committed.items():
        arch, job = jobs[key]
        row = Row(arch=arch, name=job.name, **numbers)
        assert list(compile_check._problems(job, row, ARCHITECTURES[arch])) == [], key
        if arch == "sm_90" and job.kernel == "exact_product" and job.variant in ("int8", "int8 base"):
            assert 2 * 8 * 32 * row.registers <= 65536, key  # two blocks on a multiprocessor


BROKEN = """\
        /*53a0*/                   UMOV UR4, URZ ;                                 /* 0x0000003f00047c82 */
        /*53b0*/                   ULEA UR5, UR9, UR7, 0xe ;
        /*53c0*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8].tnspA.tnspB, RZ, !UPT ;
        /*53d0*/                   UIADD3 UR10, UP0, UR5, 0x20, URZ ;
        /*53e0*/                   UIADD3 UR8, UP1, UR8, 0x80, URZ ;
        /*53f0*/                   UIADD3.X UR11, UR5, -0x3ffffff0, URZ, UP0, !UPT ;
        /*5400*/                   UIADD3.X UR9, UR4, 0x40000040, URZ, UP1, !UPT ;
"""


def test_a_descriptor_that_points_elsewhere_is_found() -> None:
    """As ptxas 12.8 wrote it once: the lower half of an address, or anything, where its upper half should be."""
    (found,) = compile_check.broken_descriptors(BROKEN)
    assert found == "UIADD3.X UR11, UR5, -0x3ffffff0, URZ, UP0, !UPT"
    whole = BROKEN.replace("UR5, 0x20", "UR6, 0x20").replace("ULEA UR5, UR9, UR7, 0xe", "UMOV UR5, URZ")
    assert compile_check.broken_descriptors(whole) == []
    over = whole.replace("HGMMA", "ULDC.64 UR4, c[0x0][0x250] ;\n  HGMMA")  # two registers, and neither is zero
    assert len(compile_check.broken_descriptors(over)) == 2
    assert compile_check.broken_descriptors(whole.replace("-0x3ffffff0", "0x10")) == []  # of a pointer
    job = jobs_for("sm_90")[0]
    row = Row(arch="sm_90", name=job.name, registers=1, stack=0, spills=0, shared=0, hmma=0, hgmma=1, broken=1)
    (problem,) = compile_check._problems(job, row, ARCHITECTURES["sm_90"])
    assert "descriptor" in problem
    assert compile_check._numbers(row)["broken"] == 1


def test_products_that_are_waited_for_one_by_one_are_counted() -> None:
    """As ptxas writes them where a copy of an accumulator is in the way: each is a group of its own."""
    ptx = "wgmma.mma_async a; wgmma.mma_async b; wgmma.commit_group"
    apart = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;\nWARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n" * 2
    assert compile_check.serialised(apart, ptx) == 2
    assert compile_check.serialised(apart.replace(", gsb0", "", 1), ptx) == 0
    assert compile_check.serialised(apart, ptx.replace("wgmma.mma_async b;", "")) == 0  # the source asks for it
    assert compile_check.serialised("HMMA.16816.F32 R4, R8 ;", "") == 0
    job = jobs_for("sm_90")[0]
    row = Row(arch="sm_90", name=job.name, registers=1, stack=0, spills=0, shared=0, hmma=0, hgmma=1, serialised=2)
    (problem,) = compile_check._problems(job, row, ARCHITECTURES["sm_90"])
    assert "one by one" in problem


def test_a_difference_is_reported() -> None:
    job = jobs_for("sm_90")[0]
    numbers = compile_check.read_committed("3.9.0")[f"sm_90 {job.name}"]
    row = Row(arch="sm_90", name=job.name, **numbers)
    assert compile_check.differences([row], "3.9.0") == []
    worse = Row(arch="sm_90", name=job.name, **(numbers | {"registers": 1}))
    assert len(compile_check.differences([worse], "3.9.0")) == 1
    assert compile_check.differences([worse], "0.0.0") == []


def test_unknown_architectures_raise() -> None:
    with pytest.raises(ValueError, match="sm_70"):
        compile_check.run(["sm_70"])


def test_sizes_do_not_specialise() -> None:
    """Every runtime number has a type of its own and no specialisation: a new M, N, K or stride compiles nothing."""
    from loge_kernels.triton_kernels.fused_forward import fused_forward
    from loge_kernels.triton_kernels.one_launch import one_launch_backward
    from loge_kernels.triton_kernels.two_launch import expand_slab, expand_tiles, project

    for kernel in (one_launch_backward, project, expand_slab, expand_tiles, fused_forward):
        numbers = [p for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
        assert {"M", "scaling" if kernel in (project, fused_forward) else "M"} <= {p.name for p in numbers}
        assert all(p.do_not_specialize for p in numbers)
        assert {p.annotation_type for p in numbers} <= {"i32", "i64", "fp32"}
