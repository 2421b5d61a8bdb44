"""Choosing without a GPU and without Triton: the cost model, devices, tables, the user's cache and the reasons."""

from __future__ import annotations

import functools
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from loge_kernels import triton_kernels as tk
from loge_kernels.triton_kernels import availability, dispatch, explanation, tuning
from loge_kernels.triton_kernels.configs import (
    Entry,
    OneLaunchConfig,
    TwoLaunchConfig,
    architecture,
    best_entry,
    padded,
    parse_table,
    shipped,
    to_json,
)
from loge_kernels.triton_kernels.cost_model import Flags, estimate_one_launch
from loge_kernels.triton_kernels.devices import DEFAULT, KNOWN, device_spec, from_properties
from loge_kernels.triton_kernels.exact_choice import choose_exact

H200 = "NVIDIA H200"
BAD_RATES = (
    *("7", '{"hbm": 4000.0}', '{"hbm_gbs": "4000"}', '{"hbm_gbs": NaN}', '{"skinny": 62}', '{"gap_us": true}'),
    *('{"narrow": []}', '{"narrow": [[272, 0.5], [144, 0.4]]}', '{"narrow": [[144, 7]]}', '{"narrow": 0.5}'),
)
ENTRY = Entry("one_launch", 16, 64, 16, True, OneLaunchConfig(64, 64, 64, 4, 3))


@pytest.fixture(autouse=True)
def fresh_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tuning, "_warned", set())
    choices = (dispatch.forward_wins, choose_exact, explanation.explain)
    for cached in (device_spec, dispatch._tables, dispatch.form_configs, *choices):
        cached.cache_clear()


class TestModel:
    @pytest.mark.parametrize("R", [16, 64, 128, 256, 512])
    @pytest.mark.parametrize("M", [1, 100, 8192])
    def test_explain_orders_its_candidates(self, M: int, R: int) -> None:
        explained = tk.explain(M, 4096, 4096, R, 16, torch.bfloat16, H200)
        forms = {c.form for c in explained.candidates}
        some = {"one_launch"}
        assert forms == {"torch", "two_launch", "cuda sm90"} | (set() if R > 256 else some)
        assert set(explained.passed_over) == (some if R > 256 else set())
        times = [c.predicted_us for c in explained.candidates]
        assert times == sorted(times)
        assert all(math.isfinite(time) and time > 0 for time in times)
        assert explained.choice == explained.candidates[0].form
        assert all(word in str(explained) for word in (*forms, "HBM MB", H200))
        assert all(c.flops >= explained.useful_flops for c in explained.candidates)

    def test_flops_of_the_formula(self) -> None:
        explained = tk.explain(10, 20, 30, 4, 2, torch.float32, H200, Flags())
        assert explained.useful_flops == 2 * 10 * (4 * (20 + 30) + 20 * 2 + 30 * 2 + 30 * 2 + 20 * 2)

    def test_more_work_takes_longer(self) -> None:
        rest = (4096, 4096, 128, 16, ENTRY.config, Flags(), DEFAULT)
        times = [estimate_one_launch(M, *rest).predicted_us for M in (4096, 16384, 65536)]
        assert times == sorted(times)
        assert times[2] > 3 * times[1]

    def test_unsupported_problems_leave_the_composition(self) -> None:
        for arguments, dtype in (((64, 64, 64, 16, 200), torch.bfloat16), ((64, 64, 64, 16, 8), torch.float64)):
            explained = tk.explain(*arguments, dtype, H200)
            assert explained.choice == "torch"
            assert set(explained.passed_over) == {"one_launch", "two_launch", "cuda sm90"}

    def test_the_fused_forward_is_for_small_problems(self) -> None:
        assert tk.forward_wins(64, 576, 576, 16, torch.bfloat16, H200)
        assert not tk.forward_wins(16384, 8192, 8192, 16, torch.bfloat16, H200)
        assert not tk.forward_wins(64, 576, 576, 16, torch.float64, H200)

    def test_sizes_choose_between_two_configurations_only(self) -> None:
        spec = KNOWN[H200]
        chosen = {
            dispatch.choose_config(M, N, K, 128, 16, torch.bfloat16, Flags(), True, spec)
            for M in (1, 64, 1000, 8192, 100000)
            for N in (576, 4096, 14336)
            for K in (576, 4096, 14336)
        }
        assert {type(config) for config in chosen} == {OneLaunchConfig, TwoLaunchConfig}
        assert len(chosen) == 2


class TestDevices:
    def test_no_gpu_is_no_error(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        assert device_spec("cuda:0") is DEFAULT
        assert device_spec(None) is DEFAULT
        assert tk.explain(64, 64, 64, 16, 8).device == DEFAULT.name

    def test_an_unknown_gpu_is_described_by_its_properties(self) -> None:
        properties = SimpleNamespace(
            name="NVIDIA B999",
            major=10,
            minor=3,
            multi_processor_count=200,
            L2_cache_size=100 << 20,
            shared_memory_per_block_optin=232448,
            memory_clock_rate=4_000_000,
            memory_bus_width=8192,
        )
        spec = from_properties(properties)
        assert (spec.sms, spec.capability, spec.l2_bytes) == (200, (10, 3), 100 << 20)
        assert spec.hbm_gbs == pytest.approx(0.9 * 4e9 * 2 * 8192 / 8 / 1e9)
        assert spec.tflops_16 > DEFAULT.tflops_16
        assert architecture(spec.capability) == "sm_90"

    def test_less_shared_memory_leaves_smaller_tiles(self) -> None:
        ada = from_properties(SimpleNamespace(name="NVIDIA L4", major=8, minor=9, multi_processor_count=58))
        assert ada.shared_bytes == 101376
        for R, P in ((16, 8), (128, 16), (256, 16), (256, 64)):
            for aligned in (True, False):
                one = dispatch.config_for("one_launch", torch.bfloat16, R, P, aligned, ada)
                assert isinstance(one, OneLaunchConfig)
        held = dispatch.config_for("one_launch", torch.bfloat16, 256, 16, True, ada)
        assert held != dispatch.config_for("one_launch", torch.bfloat16, 256, 16, True, KNOWN["NVIDIA A100-SXM4-80GB"])

    def test_a_gpu_without_properties_has_defaults(self) -> None:
        spec = from_properties(SimpleNamespace(name="something", multi_processor_count=0))
        assert min(spec.sms, spec.hbm_gbs, spec.tflops_16, spec.tflops_32, spec.shared_bytes) > 0
        assert architecture((8, 9)) == architecture((12, 0)) == "sm_80"


class TestTables:
    @pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
    @pytest.mark.parametrize("aligned", [False, True])
    @pytest.mark.parametrize(("rank", "adapter"), [(16, 16), (128, 16), (256, 64)])
    def test_every_rank_is_served(self, rank: int, adapter: int, aligned: bool, arch: str) -> None:
        bits = 16
        for kernel in ("one_launch", "two_launch"):
            assert best_entry((shipped(arch),), kernel, bits, rank, adapter, aligned) is not None
        assert best_entry((shipped(arch),), "two_launch", bits, availability.MAX_RANK, adapter, aligned) is not None
        assert best_entry((shipped(arch),), "forward", bits, 16, adapter, aligned) is not None

    def test_round_trip(self) -> None:
        for arch in ("sm_80", "sm_90"):
            assert parse_table(to_json(shipped(arch), arch, "test"), arch) == shipped(arch)

    def test_padding(self) -> None:
        assert [padded(r) for r in (0, 1, 16, 17, 64, 100, 256)] == [16, 16, 16, 32, 64, 128, 256]

    @pytest.mark.parametrize(
        "damage",
        [
            *("", "[]", "null", "[" * 100_000, "1" * 10_000, '{"schema": 1e999}', "\x00", "half"),
            ("{", "["),
            ('"schema": 1', '"schema": 2'),
            ('"device": "here"', '"device": "elsewhere"'),
            ('"block_m": 64', '"block_m": 48'),
            ('"block_m": 64', '"block_m": 4096'),
            ('"block_m": 64', '"block_m": "64"'),
            ('"block_m": 64', '"block_q": 64'),
            ('"num_stages": 3', '"num_stages": 1000'),
            ('"kernel": "one_launch"', '"kernel": "other"'),
            ('"bits": 16', '"bits": 12'),
            ('"aligned": true', '"aligned": 1'),
            ('"entries": [', '"entries": [7, '),
            *(('"entries"', f'"rates": {rates}, "entries"') for rates in BAD_RATES),
        ],
        ids=lambda damage: repr(damage)[:40],
    )
    def test_a_damaged_table(self, damage: str | tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
        """Or one of another device: it is ignored with one warning, and written anew."""
        path = tuning.table_path("here")
        path.parent.mkdir(parents=True)
        whole = to_json((ENTRY,), "here", "test")
        text = damage if isinstance(damage, str) else whole.replace(*damage)
        text = whole[: len(whole) // 2] if damage == "half" else text
        assert text != whole
        path.write_text(text)
        with caplog.at_level(logging.WARNING, "loge_kernels"):
            assert tuning.read_table("here") == ()
            assert tuning.read_table("here") == ()
        assert len(caplog.records) == 1
        assert str(path) in caplog.text
        tuning.write_entries("here", [ENTRY], "test")
        assert tuning.read_table("here") == (ENTRY,)

    def test_written_entries_are_read_and_merged(self, caplog: pytest.LogCaptureFixture) -> None:
        assert tuning.read_table("here") == ()
        assert not caplog.records, "a missing table is nothing to speak of"
        other, better = replace(ENTRY, rank=128), replace(ENTRY, config=OneLaunchConfig(128, 32, 32, 4, 2))
        tuning.write_entries("here", [ENTRY], "test")
        tuning.write_entries("here", [other], "test")
        assert tuning.read_table("here") == (ENTRY, other)
        tuning.write_entries("here", [better], "test")
        assert tuning.read_table("here") == (better, other)

    def test_processes_that_tune_at_once_lose_nothing(self) -> None:
        script = (
            "import sys\n"
            "from loge_kernels.triton_kernels import tuning\n"
            "from loge_kernels.triton_kernels.configs import Entry, OneLaunchConfig\n"
            "who = int(sys.argv[1])\n"
            "for i in range(25):\n"
            "    entry = Entry('one_launch', 16, 1 + i + 100 * who, 16, True, OneLaunchConfig(64, 64, 64, 4, 3))\n"
            "    tuning.write_entries('here', [entry], 'test')\n"
        )
        processes = [subprocess.Popen([sys.executable, "-c", script, str(who)]) for who in range(2)]
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
        assert len(tuning.read_table("here")) == 50

    def test_measured_rates_lie_beside_the_configurations(self) -> None:
        before = device_spec(H200)
        rates = {"hbm_gbs": 2150.0, "tflops_16": 395.0, "skinny": 0.8, "narrow": [[144, 0.9], [4096, 1.0]]}
        tuning.write_entries("nvidia_h200", [ENTRY], "test")
        tuning.write_rates("nvidia_h200", rates, "test")
        tuning.write_entries("nvidia_h200", [replace(ENTRY, rank=128)], "test")
        tuning.write_rates("nvidia_h200", {"gap_us": 2.5}, "test")
        assert len(tuning.read_table("nvidia_h200")) == 2
        assert device_spec(H200) is before, "until the choices are forgotten"
        device_spec.cache_clear()
        spec = device_spec(H200)
        assert (spec.hbm_gbs, spec.tflops_16, spec.skinny, spec.gap_us) == (2150.0, 395.0, 0.8, 2.5)
        assert spec.narrow == ((144, 0.9), (4096, 1.0))
        assert spec.tflops_16_sustained == pytest.approx(before.tflops_16_sustained / 2)
        assert device_spec("NVIDIA H100 80GB HBM3") is KNOWN["NVIDIA H100 80GB HBM3"]
        slower = tk.explain(8192, 4096, 4096, 64, 16, device=H200)
        explanation.explain.cache_clear()
        device_spec.cache_clear()
        tuning.table_path("nvidia_h200").unlink()
        faster = tk.explain(8192, 4096, 4096, 64, 16, device=H200)
        assert slower.candidates[0].predicted_us > 1.3 * faster.candidates[0].predicted_us

    def test_rates_that_cannot_be_are_not_written(self) -> None:
        with pytest.raises(ValueError, match="hbm_gbs=-1"):
            tuning.write_rates("here", {"hbm_gbs": -1}, "test")
        assert not tuning.table_path("here").exists()

    def test_cache_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOGE_CACHE", "off")
        assert tuning.read_table("here") == ()
        with pytest.raises(ValueError, match="LOGE_CACHE=off"):
            tuning.write_entries("here", [ENTRY], "test")

    def test_the_users_table_comes_first(self) -> None:
        mine = replace(ENTRY, config=OneLaunchConfig(128, 32, 32, 4, 2))
        tuning.write_entries("nvidia_h200", [mine], "test")
        assert dispatch.config_for("one_launch", torch.bfloat16, 64, 16, True, KNOWN[H200]) == mine.config
        unaffected = dispatch.config_for("one_launch", torch.bfloat16, 256, 16, True, KNOWN[H200])
        assert unaffected == best_entry((shipped("sm_90"),), "one_launch", 16, 256, 16, True).config

    @pytest.mark.parametrize("kernel", ["one_launch", "two_launch", "forward"])
    def test_the_search_space_is_made_of_valid_entries(self, kernel: str) -> None:
        bits = 16
        entries = tuple(Entry(kernel, bits, 128, 16, True, c) for c in tuning.search_space(kernel, bits, 128, 16))
        assert 0 < len(entries) < 60
        assert parse_table(to_json(entries, "here", "test"), "here") == entries


class TestReasons:
    CPU = torch.device("cpu")

    def reason(self, monkeypatch: pytest.MonkeyPatch, **problem: object) -> str | None:
        monkeypatch.setattr(availability, "triton_missing", lambda: None)
        monkeypatch.setattr(availability, "interpreter_broken", lambda: None)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        return tk.why_not(**({"dtype": torch.float32, "device": self.CPU, "R": 16, "P": 8} | problem))

    def test_nothing_against_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.reason(monkeypatch) is None
        assert self.reason(monkeypatch, dtype=torch.float16, lora_dtype=torch.float32) is None
        assert self.reason(monkeypatch, R=0, need_dx=False) is None

    @pytest.mark.parametrize(
        ("problem", "words"),
        [
            ({"dtype": torch.float64}, "float64"),
            ({"dtype": torch.bfloat16}, "bfloat16"),
            ({"R": 10000}, "R=10000"),
            ({"P": 65}, "P=65"),
            ({"R": 0}, "without factors"),
            ({"lora_dtype": torch.float16}, "lora_A and lora_B"),
            ({"device": torch.device("meta")}, "meta"),
        ],
    )
    def test_reasons(self, problem: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
        assert words in str(self.reason(monkeypatch, **problem))

    def test_on_a_gpu_float32_stays_with_pytorch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(availability, "why_not_here", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        problem = {"device": torch.device("cuda"), "R": 16, "P": 8}
        assert "float32" in str(availability.why_not(dtype=torch.float32, **problem))
        assert availability.why_not(dtype=torch.bfloat16, lora_dtype=torch.float32, **problem) is None

    def test_a_device_with_too_little_shared_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small = from_properties(SimpleNamespace(name="tiny", major=8, minor=6, shared_memory_per_block_optin=16384))
        monkeypatch.setattr(dispatch, "device_spec", lambda device: small)
        monkeypatch.setattr(availability, "interpreted", lambda: False)
        monkeypatch.setattr(availability, "why_not", lambda **problem: None)
        reason = tk.why_not(dtype=torch.float16, device=torch.device("cuda"), R=256, P=64)
        assert "16384 bytes of shared memory" in str(reason)

    @pytest.mark.parametrize(
        ("version", "old"), [("3.5.1", True), ("3.6.0", False), ("3.10.0+git1", False), ("2.9", True)]
    )
    def test_versions(self, version: str, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(availability.metadata, "version", lambda name: version)
        reason = availability.triton_missing.__wrapped__()
        assert (reason is not None and "too old" in reason) == old

    def test_without_triton(self) -> None:
        script = (
            "import sys\n"
            "sys.modules['triton'] = None\n"
            "from importlib import metadata\n"
            "found = metadata.version\n"
            "def version(name):\n"
            "    if name == 'triton':\n"
            "        raise metadata.PackageNotFoundError(name)\n"
            "    return found(name)\n"
            "metadata.version = version\n"
            "import torch\n"
            "from loge_kernels import triton_kernels as tk\n"
            "assert tk.why_not_here() == 'Triton is not installed', tk.why_not_here()\n"
            "why = tk.why_not(dtype=torch.float32, device=torch.device('cuda'), R=16, P=8)\n"
            "assert why == 'Triton is not installed', why\n"
            "assert tk.explain(8192, 4096, 4096, 128, 16, device='NVIDIA H200').candidates\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_the_tightest_entry_of_all_tables_serves_and_the_users_wins_a_tie() -> None:
    def entry(rank: int, block_n: int) -> Entry:
        return replace(ENTRY, rank=rank, config=replace(ENTRY.config, block_n=block_n))

    user, shipped_table = (entry(256, 32),), (entry(64, 64), entry(256, 128))
    tables = (user, shipped_table)
    assert best_entry(tables, "one_launch", 16, 64, 16, True) == entry(64, 64)
    assert best_entry(tables, "one_launch", 16, 256, 16, True) == entry(256, 32)
    assert best_entry(tables, "one_launch", 16, 512, 16, True) is None


@pytest.mark.parametrize("R", [64, 128])  # a slab that keeps T, and tiles of T
def test_rows_are_counted_along_the_first_dimension_of_a_grid(R: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others hold 65,535 blocks."""
    pytest.importorskip("triton")
    launch = import_module("loge_kernels.triton_kernels.launch")
    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *arguments, **constants: None

    for name in ("project", "expand_slab", "expand_tiles"):
        monkeypatch.setattr(launch, name, Kernel())
    config = TwoLaunchConfig(
        block_m=16, block_n=32, project_r=64, block_k=32, slab_stages=2, tile_k=64, tile_r=32, num_warps=4, num_stages=2
    )
    rows, N, K, P = 70_000, 40, 200, 8
    make = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    operands = (make(16 * rows, N), make(16 * rows, K), make(16 * rows, P), make(N, R), make(R, K), make(P, K))
    launch.backward(*operands, make(N, P), 1.0, config=config)
    project, expand = grids
    assert project[0] % rows == 0
    assert math.prod(expand) % rows == 0
    assert max(*project[1:], *expand[1:], 0) <= 65_535
