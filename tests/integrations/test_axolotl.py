"""The plug-in for axolotl: its section, what it refuses, and the model that comes out of its hook."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from models import lora, modules_of
from pages import ROOT, blocks
from situations import batch

import loge_kernels as loge

pydantic = pytest.importorskip("pydantic", reason="pydantic is not installed: axolotl brings it")
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: axolotl brings it")
section: Any = import_module("loge_kernels.integrations.axolotl_section")

LOW: dict[str, Any] = {"rank": 0.25, "exact_layers": 0.5, "exact_dtype": None}


def axolotl() -> Any:
    """Its module of plug-ins, where it is installed."""
    return pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed: pip install axolotl")


def config(**options: Any) -> dict[str, Any]:
    return {"adapter": "lora", **dict.fromkeys(section.KERNELS, False), **options}


def refusal(**options: Any) -> str:
    """Of a whole config, as axolotl validates it: with the plug-in's arguments among its own."""

    class Config(section.LogeArgs):
        model_config = pydantic.ConfigDict(extra="allow")

    with pytest.raises(pydantic.ValidationError) as error:
        Config(**options)
    return str(error.value)


def policies(model: Any) -> list[Any]:
    layers = [m for m in model.modules() if isinstance(m, loge.LoGELinear)]
    return [(layer.factors and layer.factors.rank, layer.exact_dtype) for layer in layers]


def test_the_section_takes_the_arguments_of_apply() -> None:
    arguments = inspect.signature(loge.apply).parameters
    fields = section.LogeSection.model_fields
    assert set(fields) == set(arguments) - {"model"}
    assert {name: field.default for name, field in fields.items()} == {n: arguments[n].default for n in fields}


def test_a_pair_of_ranks_is_a_list_of_yaml() -> None:
    assert section.LogeSection(rank=[0.125, 0.375]).rank == (0.125, 0.375)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rnk": 4}, "loge has no option 'rnk'; its options are rank, subspace, "),
        ({"rank": 0}, "rank=0; give an int from 1 up, or a float in (0, 1]"),
        ({"rank": "two"}, "loge.rank"),
        ({"rank": True}, "loge.rank"),
        ({"rank": [0.1, 2.0]}, "rank=(0.1, 2.0); a pair is of two shares in (0, 1]"),
        ({"exact_layers": 0.5}, "exact_layers=0.5 is for a low-rank backward, and rank is None"),
        ({"rank": 8, "exact_dtype": "fp4"}, "exact_dtype='fp4' is unknown"),
        ({"rank": 8, "calibration": "file", "subspace": "svd"}, "calibration goes with subspace='gradient'"),
        ({"rank": 8, "backend": "metal"}, "'metal' is not a backend"),
        ({"targets": 3}, "loge.targets"),
    ],
)
def test_what_a_section_refuses(given: dict[str, Any], said: str) -> None:
    assert said in refusal(loge=given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lora_qkv_kernel": True, "lora_o_kernel": True}, "set lora_qkv_kernel: false, lora_o_kernel: false"),
        ({"fsdp_config": {"offload_params": False}}, "set fsdp_version: 2"),
        ({"fsdp_config": {"cpu_ram_efficient_loading": True}, "fsdp_version": 2}, "cpu_ram_efficient_loading gives"),
        ({"adapter": "lora", "rl": "dpo"}, "leave the plug-in out"),
    ],
)
def test_what_it_cannot_stand_beside(given: dict[str, Any], said: str) -> None:
    assert said in refusal(**given)
    with pytest.raises(ValueError, match=r"loge|false|out"):
        section.apply_section(config(**given), lora())


def test_axolotls_kernels_stay_off_unless_they_are_asked_for() -> None:
    cfg = {"lora_mlp_kernel": True}
    assert section.leave_kernels_off(cfg) == ["lora_qkv_kernel", "lora_o_kernel"]
    assert cfg == {"lora_mlp_kernel": True, "lora_qkv_kernel": False, "lora_o_kernel": False}


def test_the_model_is_applied_as_the_section_says(tmp_path: Path) -> None:
    expected = lora()
    loge.apply(expected, **LOW)
    # What axolotl keeps of a section after it was validated: nothing that is null.
    kept = section.LogeArgs(loge={**LOW, "targets": None}).model_dump(exclude_none=True)
    model = lora()
    report = section.apply_section(config(**kept), model)
    assert report is not None
    assert policies(model) == policies(expected)
    assert len(set(policies(model))) == 2

    exact = lora()
    section.apply_section(config(), exact)
    assert len(modules_of(exact, loge.LoGELinear)) == 14

    statistics = loge.calibrate(lora().train(), [batch(seed) for seed in range(2)])
    statistics.save(tmp_path / "calibration.safetensors")
    model = lora()
    section.apply_section(config(loge={"rank": 8, "calibration": str(tmp_path / "calibration.safetensors")}), model)
    factors = [m.factors for m in model.modules() if isinstance(m, loge.LoGELinear)]
    assert {f.method for f in factors if f is not None} == {"gradient"}


@pytest.mark.parametrize("purpose", ["inference", "merge_lora"])
def test_nothing_is_applied_where_nothing_is_trained(purpose: str) -> None:
    model = lora()
    assert section.apply_section(config(**{purpose: True}), model) is None
    assert not modules_of(model, loge.LoGELinear)


def test_the_page_has_a_config_that_is_valid() -> None:
    (block,) = [b for b in blocks(ROOT / "docs" / "trainers.md", "yaml") if "LogePlugin" in b.text]
    written = yaml.safe_load(block.text)
    assert written["plugins"] == ["loge_kernels.integrations.axolotl.LogePlugin"]
    assert set(written) == {"adapter", "plugins", "loge"}
    section.LogeArgs(**written)


def test_without_axolotl_the_plug_in_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "axolotl", None)
    monkeypatch.delitem(sys.modules, "loge_kernels.integrations.axolotl", raising=False)
    with pytest.raises(ImportError, match=r"this plug-in is for axolotl, .*: pip install axolotl"):
        import loge_kernels.integrations.axolotl  # noqa: F401


def test_axolotls_own_manager_takes_the_plug_in() -> None:
    base = axolotl()
    plugin = base.load_plugin("loge_kernels.integrations.axolotl.LogePlugin")
    assert isinstance(plugin, base.BasePlugin)
    module, name = plugin.get_input_args().rsplit(".", 1)
    assert getattr(sys.modules[module], name) is section.LogeArgs
    cfg = {"adapter": "lora", "loge": {"rank": 8}}
    plugin.register(cfg)
    assert cfg == config(loge={"rank": 8})
    model = lora()
    plugin.post_model_load(cfg, model)
    assert len(modules_of(model, loge.LoGELinear)) == 14
