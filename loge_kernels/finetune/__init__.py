"""Fine-tune a real model with PEFT's exact LoRA and with LoGE, from the same start on the same batches.

    from loge_kernels.finetune import FinetuneOptions, run
    metrics = run(FinetuneOptions(steps=40, out="out"))

`python -m loge_kernels finetune` is this function. Needs the `demo` extra (transformers, peft, matplotlib).
"""

from .job import run
from .options import FinetuneError, FinetuneOptions, Interrupted

__all__ = ["FinetuneError", "FinetuneOptions", "Interrupted", "run"]
