"""What every test starts from: one thread, a fixed seed, a cache of its own and no backend chosen from outside; and
fixtures of several files."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import base, finished, tiny, whole  # noqa: F401 (fixtures)

from loge_kernels.numerics import four_bit, matmul
from loge_kernels.op import linear

# The package exports a function of the same name, so `from loge_kernels import backends` is not the module.
backends = import_module("loge_kernels.backend.choice")


# What the package can do without, and some tests cannot.
_OPTIONAL = "accelerate|bitsandbytes|datasets|gguf|matplotlib|peft|tokenizers|torchao|transformers|triton|trl|typer"
_MISSING = re.compile(rf"ModuleNotFoundError: .*\b({_OPTIONAL})\b")


# Files of which one or a few tests take a minute. They come first: begun last, they would keep one process busy and
# leave the others idle.
_LONG = ("test_fsdp.py", "test_triton_interpreter.py", "test_cuda_emulation.py", "test_triton_exact.py", "test_tune.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """A file whose import needs a package that is not installed is skipped, and says which."""
    report: Any = yield
    missing = _MISSING.search(str(report.longrepr)) if report.outcome == "failed" else None
    if missing is not None:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs {missing[1]}")
    return report


@pytest.fixture(params=[False, True], ids=["16-bit instructions", "float32 blocks"])
def either_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A CPU that has matrix instructions for 16 bits, and one that has none, whatever this one is."""
    monkeypatch.setattr(matmul, "slow_on_cpu", lambda dtype: request.param and dtype.itemsize == 2)
    return request.param


@pytest.fixture
def without_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """dY in 4 bits rounded to nearest, so that two ways can be compared."""
    codes = four_bit._codes
    monkeypatch.setattr(four_bit, "_codes", lambda values, stochastic: codes(values, False))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    gc.collect()  # DDP's reducer must not outlive the group
    torch.distributed.destroy_process_group()


@pytest.fixture
def compiler() -> Iterator[Any]:
    """What torch counts of its graphs; none is there before the test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def clean_slate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOGE_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_announced", set())
    monkeypatch.setattr(linear, "_SMALL_ON_CPU", -1)  # layers of tests stand for large ones
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
