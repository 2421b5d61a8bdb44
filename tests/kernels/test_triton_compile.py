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
        ("expand_slab 16-bit R<=256", 2, ["n64"] * 16),  # for dA and for the adapter's part
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
