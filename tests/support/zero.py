"""DeepSpeed on gloo ranks, without what it would compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from ranks import launched


@contextmanager
def deepspeed_on(rank: int) -> Iterator[None]:
    """DeepSpeed takes this rank's process group for its own."""
    with pytest.MonkeyPatch.context() as patch:
        launched(patch, rank)
        patch.setenv("DS_ACCELERATOR", "cpu")
        import deepspeed

        # Collectives in shared memory, which it would compile for minutes: gloo's are enough.
        patch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        deepspeed.init_distributed("gloo", dist_init_required=False)
        yield


def engine(model: Any, stage: int, lr: float = 1e-3) -> Any:
    """The model as `deepspeed.initialize` makes it, with AdamW."""
    import deepspeed

    parameters = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,  # its default is 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would be compiled
    }
    made, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameters,
        optimizer=torch.optim.AdamW(parameters, lr=lr),
        config=config,
        dist_init_required=False,
    )
    return made
