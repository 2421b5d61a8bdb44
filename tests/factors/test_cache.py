"""Factors on disk: found again, never in the way. What is damaged or hostile: `test_security`."""

from __future__ import annotations

import pwd
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

import loge_kernels as loge
from loge_kernels import files
from loge_kernels.factors import cache
from loge_kernels.factors.cache import cached_factors, fingerprint
from loge_kernels.triton_kernels import tuning

factors_module = import_module("loge_kernels.factors.factors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "factors"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """One entry per decomposition."""
    calls: list[tuple[Any, ...]] = []

    def spy(*arguments: Any) -> loge.Factors:
        calls.append(arguments)
        return factors_module.factorize(*arguments)

    monkeypatch.setattr(cache, "factorize", spy)
    return calls


def assert_equal(first: loge.Factors, second: loge.Factors) -> None:
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    assert (first.energy, first.method, first.rank) == (second.energy, second.method, second.rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_second_time_nothing_is_computed(dtype: torch.dtype, computed: list[tuple[Any, ...]]) -> None:
    weight = torch.nn.Parameter(torch.randn(20, 30).to(dtype))
    first, second = cached_factors(weight, 8), cached_factors(weight, 8)
    assert len(computed) == 1
    assert_equal(first, second)
    assert_equal(first, loge.factorize(weight, 8))
    assert second.left.dtype == dtype
    for factors in (first, second):
        assert factors.made_of.bound
        assert not factors.made_of.changed(weight)


def test_the_key_is_content_dtype_shape_and_rank(computed: list[tuple[Any, ...]], folder: Path) -> None:
    weight = torch.randn(20, 30)
    changed = weight.clone()
    changed[19, 29] += 1e-6
    weights = [
        weight,
        changed,
        weight.view(30, 20),
        weight.double(),
        torch.zeros(4, 4),
        torch.zeros(4, 4).int().float().half(),
    ]
    for other in weights:
        cached_factors(other, 4)
    cached_factors(weight, 5)
    assert len(computed) == len(weights) + 1
    assert len(list(folder.iterdir())) == len(weights) + 1
    cached_factors(weight.t().contiguous().t(), 4)  # the same content in other strides
    cached_factors(weight.clone(), 4)
    assert len(computed) == len(weights) + 1
    assert fingerprint(torch.zeros(2, 4)) != fingerprint(torch.zeros(4, 2))
    assert fingerprint(torch.zeros(2, 4)) != fingerprint(torch.zeros(2, 4, dtype=torch.int32))


def test_a_share_and_its_rank_are_one_entry(computed: list[tuple[Any, ...]]) -> None:
    weight = torch.randn(64, 40)
    assert_equal(cached_factors(weight, 0.4), cached_factors(weight, 16))
    assert len(computed) == 1


def test_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, computed: list[tuple[Any, ...]]) -> None:
    monkeypatch.setenv("LOGE_CACHE", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)
    weight = torch.randn(20, 30)
    assert_equal(cached_factors(weight, 4), cached_factors(weight, 4))
    assert len(computed) == 2
    assert list(tmp_path.iterdir()) == []
    assert files.cache_dir() is None


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOGE_CACHE", "~/mine")
    assert files.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("LOGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_dir() == tmp_path / "xdg" / "loge_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_dir() == tmp_path / ".cache" / "loge_kernels"


@pytest.mark.parametrize(
    ("chosen", "named"), [("", "neither HOME nor XDG_CACHE_HOME"), ("~/mine", "LOGE_CACHE='~/mine'")]
)
def test_a_user_without_a_home(
    chosen: str, named: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container that runs under a number that its list of users does not have."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("LOGE_CACHE", chosen)
    files._tell_homeless.cache_clear()
    weight = torch.randn(20, 30)
    assert_equal(cached_factors(weight, 4), loge.factorize(weight, 4))
    assert files.cache_dir() is None
    assert tuning.table_path("here") is None
    (record,) = caplog.records
    assert named in record.getMessage()
    assert "set LOGE_CACHE to a folder" in record.getMessage()


def under_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "cache"


def name_too_long(tmp_path: Path) -> Path:
    return tmp_path / ("a" * 300)


@pytest.mark.parametrize("place", [under_a_file, name_too_long])
def test_an_unusable_directory_costs_time_only(
    place: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOGE_CACHE", str(place(tmp_path)))
    weight = torch.randn(20, 30)
    assert_equal(cached_factors(weight, 4), loge.factorize(weight, 4))
    assert caplog.records
    assert str(place(tmp_path).name) in caplog.text


def test_a_failed_write_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    weight = torch.randn(20, 30)
    assert_equal(cached_factors(weight, 4), loge.factorize(weight, 4))
    assert "No space left" in caplog.text
    assert list(folder.iterdir()) == []


def test_a_weight_that_is_not_finite_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="NaN"):
        cached_factors(torch.full((20, 30), float("nan")), 4)
    assert not folder.exists()


def test_writers_at_once_do_not_share_a_temporary_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight = torch.randn(20, 30)
    together, write = Barrier(4, timeout=60), cache.save_file

    def save(*arguments: Any, **options: Any) -> None:
        together.wait()
        write(*arguments, **options)
        together.wait()

    monkeypatch.setattr(cache, "save_file", save)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: cached_factors(weight, 4), range(4)))
    for other in results:
        assert_equal(other, loge.factorize(weight, 4))
    assert caplog.records == []
    assert len(list(folder.iterdir())) == 1


def corner(weight: torch.Tensor, rank: int) -> loge.Factors:
    """Stands for a decomposition: LAPACK's locks may be held by the threads of an earlier test when we fork."""
    return loge.Factors(weight[:, :rank].clone(), weight[:rank].clone(), "svd", 0.5)


def fill() -> None:
    """What each of several processes does to one cache."""
    torch.manual_seed(4)
    for _ in range(20):
        weight = torch.randn(20, 30)
        assert_equal(cached_factors(weight, 4), corner(weight, 4))


def test_processes_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "factorize", corner)
    processes = [get_context("fork").Process(target=fill) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"] * 20
