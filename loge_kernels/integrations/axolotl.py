"""A plug-in for axolotl, tried with version 0.19: `plugins: [loge_kernels.integrations.axolotl.LogePlugin]`.

Its `loge:` section holds the arguments of `apply` (`axolotl_section`); without the section they have their defaults.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .axolotl_section import LogeArgs, apply_section, leave_kernels_off

try:
    from axolotl.integrations.base import BasePlugin
    from axolotl.utils.logging import get_logger
except ImportError as error:
    raise ImportError(
        f"this plug-in is for axolotl, which cannot be imported here ({error}): pip install axolotl"
    ) from error

LOG = get_logger(__name__)


class LogePlugin(BasePlugin):
    """Applies `loge_kernels` to the model that axolotl has loaded and adapted, before the trainer is made."""

    def register(self, cfg: Any) -> None:
        switched_off = leave_kernels_off(cfg)
        if switched_off:
            LOG.info("loge: %s off, which would run in the place of the layers", ", ".join(switched_off))

    def get_input_args(self) -> str:
        return f"{LogeArgs.__module__}.{LogeArgs.__name__}"

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        # Later than `post_lora_load`: the model is on its device, by which exact_dtype "auto" chooses.
        report = apply_section(cfg, model)
        if report is not None:
            LOG.info(report.summary())
