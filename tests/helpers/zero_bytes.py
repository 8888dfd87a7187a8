"""One of two processes that take a step under every ZeRO stage; rank 0 prints its bytes as JSON.

tests/planning/test_plan_memory.py runs it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from mhla_lightning.planning.step_memory import build, find_precision
from mhla_lightning.strategies.config import deepspeed_config
from mhla_lightning.strategies.zero.patches import leave_out_shared_memory
from mhla_lightning.tasks import LanguageTask, Task

# class -> attributes of the flat weights and of the flat float32 masters of this rank
_HELD = {
    "DeepSpeedZeroOptimizer": ("bit16_groups_flat", "single_partition_of_fp32_groups"),
    "DeepSpeedZeroOptimizer_Stage3": ("fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat"),
}


def make_task() -> Task:
    """Return a task of odd sizes, so that parts are padded."""
    return LanguageTask("lm_tiny", "mhla", {"vocab_size": 301, "context": 64, "intermediate": 77, "depth": 2})


def entry(stage: int) -> dict[str, Any]:
    """Return a preset that splits small tensors too."""
    small = {"reduce_bucket_size": 4096}
    if stage == 3:
        small |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 4096}
    return {"name": f"zero{stage}", "zero_optimization": small}


def held(stage: int, precision: str) -> dict[str, int]:
    """Return the bytes of this rank's weights and optimizer after a step."""
    import deepspeed

    task = make_task().rehearsal()
    build(task, find_precision(precision))
    for parameter in task.parameters():
        parameter.grad = None
    config = deepspeed_config(
        entry(stage),
        micro_batch=2,
        accumulation=1,
        gradient_clip=None,
        precision=precision,
        accelerator="cpu",
    )
    engine, *_ = deepspeed.initialize(
        model=task, optimizer=task.build_optimizer(), config=config, dist_init_required=False
    )
    batch = task.example_batch(2)
    loss = engine(batch["tokens"]).float().square().mean()
    engine.backward(loss)
    engine.step()
    zero = engine.optimizer
    flat, masters = (getattr(zero, name) for name in _HELD[type(zero).__name__])
    known = {x.data_ptr() for x in flat}
    state = [
        x
        for tensors in zero.optimizer.state.values()
        for x in tensors.values()
        if isinstance(x, torch.Tensor)
    ]
    own = [x for x in masters if x.data_ptr() not in known or stage < 3]
    return {"weights": sum(x.nbytes for x in flat), "optimizer": sum(x.nbytes for x in [*state, *own])}


def main() -> None:
    import deepspeed  # not where the test reads this file: it starts what it needs at the import

    leave_out_shared_memory()
    deepspeed.init_distributed("gloo", verbose=False)
    cases = {
        f"{stage} {precision}": held(stage, precision)
        for stage in (1, 2, 3)
        for precision in ("32-true", "bf16-mixed", "bf16-true")
    }
    if os.environ["RANK"] == "0":
        sys.stdout.write("\nBYTES " + json.dumps(cases) + "\n")


if __name__ == "__main__":
    main()
