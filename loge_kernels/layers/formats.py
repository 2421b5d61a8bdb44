"""Which quantised layers there are, of the libraries that are loaded."""

from __future__ import annotations

import sys

from torch import nn

from .quantized import QuantizedLinear


def layer_class(module: nn.Module) -> type[QuantizedLinear] | None:
    """What a quantised linear layer becomes; None for any other module.

    A library that is not loaded has no layers, so none is imported here for the first time.
    """
    if "bitsandbytes" in sys.modules:
        from .bnb import CLASSES

        found = CLASSES.get(type(module))
        if found is not None:
            return found
    if "torchao" in sys.modules:
        from .torchao import LoGETorchaoLinear, holds

        if holds(module):
            return LoGETorchaoLinear
    return None
