"""The `loge:` section of an axolotl config, and what the plug-in does with it. It needs pydantic, and no axolotl."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, StrictFloat, StrictInt, field_validator, model_validator
from torch import nn

from ..conversion.apply import apply
from ..conversion.options import ApplyOptions
from ..conversion.report import Report
from ..factors.statistics import Statistics

# Axolotl's kernels that compute adapter and frozen weight by themselves, in the place of the layers' forward. It turns
# them on where a config says nothing of them.
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


class LogeSection(BaseModel):
    """The arguments of `loge_kernels.apply` that a file can hold; they mean what they mean there.

    Two are written differently. `calibration` is the path of a file that `calibrate(..., file=)` or `Statistics.save`
    wrote. `exact_dtype: none` is None: axolotl drops an option that is null.
    """

    rank: StrictInt | StrictFloat | tuple[StrictFloat, StrictFloat] | None = None
    subspace: str | None = None
    calibration: str | None = Field(None, description="path of a file of calibration statistics")
    targets: str | list[str] | None = None
    exact_layers: StrictInt | StrictFloat = 0.0
    exact_every: StrictInt | None = None
    exact_dtype: str = "auto"
    base_dtype: str | None = None
    low_rank_dtype: str | None = None
    exact_fraction: StrictInt | StrictFloat = 0.0
    residual: StrictInt | StrictFloat = 0.0
    salience: str = "taylor"
    freeze_below: StrictInt | None = None
    backend: str | None = None

    @field_validator("exact_dtype", mode="before")
    @classmethod
    def _name_null(cls, value: Any) -> Any:
        return "none" if value is None else value

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        unknown = [name for name in data if name not in cls.model_fields] if isinstance(data, dict) else []
        if unknown:
            raise ValueError(f"loge has no option {unknown[0]!r}; its options are {', '.join(cls.model_fields)}")
        return data

    @model_validator(mode="after")
    def _check_values(self) -> LogeSection:
        """By the rules of `apply`, before a model is loaded."""
        given = self.model_dump(exclude={"targets", "calibration", "exact_dtype"})
        calibration = None if self.calibration is None else ()  # a stand-in: the file may be on another machine
        try:
            ApplyOptions(**given, calibration=calibration, exact_dtype=_dtype(self.exact_dtype))
        except TypeError as error:
            raise ValueError(str(error)) from None  # pydantic lets a TypeError through, without the option's place
        return self


class LogeArgs(BaseModel):
    """What the plug-in adds to axolotl's config: the section, and refusals of what it cannot stand beside."""

    loge: LogeSection | None = None

    @model_validator(mode="after")
    def _refuse_rivals(self) -> LogeArgs:
        reason = why_not(self)
        if reason is not None:
            raise ValueError(reason)
        return self


def leave_kernels_off(cfg: Any) -> list[str]:
    """Write `false` for each of axolotl's kernels of which an unparsed config says nothing; their names."""
    unsaid = [name for name in KERNELS if cfg.get(name) is None]
    cfg.update(dict.fromkeys(unsaid, False))
    return unsaid


def why_not(cfg: Any) -> str | None:
    """Why `apply` and what a config asks for exclude each other, or None where they do not."""
    kernels = [name for name in KERNELS if _get(cfg, name)]
    if kernels:
        off = ", ".join(f"{name}: false" for name in kernels)
        return f"axolotl's fused LoRA kernels run in the place of the layers, and loge would change nothing: set {off}"
    fsdp = _get(cfg, "fsdp_config")
    if (fsdp or _get(cfg, "fsdp")) and str(_get(cfg, "fsdp_version") or _get(fsdp, "fsdp_version")) != "2":
        return "FSDP1 flattens the weights, and loge needs them as they are: set fsdp_version: 2"
    if _get(fsdp, "cpu_ram_efficient_loading"):
        return (
            "fsdp_config.cpu_ram_efficient_loading gives one rank alone its weights before loge is applied: set it to "
            "false"
        )
    if _get(cfg, "adapter") and _get(cfg, "rl") in ("dpo", "ipo", "kto"):
        return (
            "with rl: dpo, ipo or kto axolotl leaves the adapter to TRL's trainer, which adds it after loge would be "
            "applied: leave the plug-in out"
        )
    return None


def apply_section(cfg: Any, model: nn.Module) -> Report | None:
    """`apply` to a model that has its adapter, as the config's `loge:` section says; None where nothing is trained.

    Raises ValueError for a config that excludes it, and whatever `apply` raises.
    """
    if _get(cfg, "inference") or _get(cfg, "merge_lora"):
        return None
    reason = why_not(cfg)
    if reason is not None:
        raise ValueError(reason)
    arguments = LogeSection(**(_get(cfg, "loge") or {})).model_dump()
    arguments["exact_dtype"] = _dtype(arguments["exact_dtype"])
    if arguments["calibration"] is not None:
        arguments["calibration"] = Statistics.load(arguments["calibration"])
    return apply(model, **arguments)


def _dtype(name: str) -> str | None:
    return None if name == "none" else name


def _get(cfg: Any, name: str) -> Any:
    """An option of a config, which is a pydantic model while it is validated and a dict afterwards."""
    return cfg.get(name) if isinstance(cfg, dict) else getattr(cfg, name, None)
