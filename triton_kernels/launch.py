"""Host entry points: `backward` and `forward` launch, on the tensors' device and its current stream.

What can be decided from (R, P, dtypes, flags, device) is decided once and kept; a call then checks shapes, allocates
the outputs and launches. Nothing is tuned here, nothing is compiled after the first call of a key, and the host never
waits for the device.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from . import forward as forward_kernels
from . import one_launch, two_launch
from .configs import ForwardConfig, OneLaunchConfig, TwoLaunchConfig, padded
from .dispatch import Flags, choose_form, config_for, splits_for

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
