"""Times of operators measured on a GPU, and the roofline's beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mhla_lightning.attention import Context, build_attention
from mhla_lightning.attention.arithmetic import ceil_div
from mhla_lightning.backbones.layers import GridRotation
from mhla_lightning.bench.kernel_launches import (
    Gpu,
    OperatorCase,
    OperatorTimes,
    flash_times,
    kernel_work,
    modelled_gpu,
    seconds_of,
)
from mhla_lightning.bench.language_launches import LanguageSizes, TrainingCase
from mhla_lightning.bench.timing import Case, operator_case, spread, take_turns

PATHS = ("triton", "torch", "flash")


def predicted(
    name: str, shape: tuple[int, ...], gpu: Gpu, *, layout: Mapping[str, Any], causal: bool
) -> tuple[float, float] | None:
    """Return the roofline's seconds of forward and step in bf16.

    None means that no launch is modelled.

    Args:
        name: of the operator.
        shape: (batch, tokens, heads, dim).
        gpu: whose rates are taken.
        layout: of mhla: `grid`, `blocks` and `normalize`, with `causal` its `chunk_size`.
        causal: whether tokens see earlier ones only.
    """
    batch, tokens, heads, dim = shape
    if name == "softmax":
        forward, backward = flash_times(batch * heads, tokens, dim, gpu, causal)
        return forward, forward + backward
    if name not in ("mhla", "linear") or (causal and name == "linear"):
        return None
    if causal:
        size = layout["chunk_size"]
        sizes = LanguageSizes(batch, heads, dim, dim, size, ceil_div(tokens, size))
        both = kernel_work(TrainingCase(name, sizes, rotary=False), gpu.major)
    else:
        blocks = tuple(layout["blocks"]) if name == "mhla" else None
        normalize = layout["normalize"] or name == "linear"
        case = OperatorCase(name, batch, heads, dim, tuple(layout["grid"]), blocks, normalize)
        both = kernel_work(case, gpu.major)
    forward, backward = (seconds_of(works, gpu) for works in both)
    return forward, forward + backward


def measured_times(
    cases: Sequence[OperatorCase], turns: int, device: torch.device, on_case: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return a row a case: forward and backward on Triton, on torch, and of FlashAttention.

    The paths of a case take turns. Seconds that the roofline predicts are beside them where the GPU is known.

    Args:
        cases: in bf16.
        turns: measured turns after a warm-up.
        device: the GPU.
        on_case: called with the name of each measurement when it begins.
    """
    name = torch.cuda.get_device_name(device)
    gpu, rows = modelled_gpu(name), []
    for case in cases:
        group = [_path(case, path, device) for path in PATHS]
        take_turns(group, turns, device, _naming(case, on_case))
        row: dict[str, Any] = {"case": case.name, "gpu": name, "form": case.form}
        for path, one in zip(PATHS, group, strict=True):
            result = one.row()
            row[f"{path}_ms"] = 1e3 * result["step_seconds"]
            row[f"{path}_forward_ms"] = 1e3 * result["forward_seconds"]
            row[f"{path}_spread_ms"] = 1e3 * spread(one.step)
            row[f"{path}_runs"] = one.on_gpu.get("softmax", one.on_gpu["step_runs"])
            one.release()
        rows.append(row | _modelled(case, gpu))
    return rows


def _naming(case: OperatorCase, on_case: Callable[[str], None]) -> Callable[[Case], None]:
    return lambda one: on_case(f"{one.operator} of {case.name}")


def _path(case: OperatorCase, path: str, device: torch.device) -> Case:
    """Return one path of a case; a row of `softmax` runs FlashAttention."""
    entry: dict[str, Any] = {"name": "linear", "kernel": path}
    if case.blocks is not None:
        norm = "block" if case.normalize else "none"
        entry = {"name": "mhla", "kernel": path, "blocks": list(case.blocks), "normalizer": norm}
    softmax = path == "flash"
    operator = build_attention(
        "softmax" if softmax else entry, heads=case.heads, dim_k=case.dim, dim_v=case.dim, grid=case.grid
    )
    context = None
    if case.rotary and not softmax:
        context = Context(rotary=GridRotation(case.grid, case.dim, device))
    shape = (case.batch, case.partition.tokens, case.heads, case.dim)
    name = "softmax" if softmax else path
    return operator_case(name, operator.to(device), shape, torch.bfloat16, device, context)


def _modelled(case: OperatorCase, gpu: Gpu | None) -> dict[str, float]:
    if gpu is None:
        return {}
    row = OperatorTimes(case, case.torch_work(), kernel_work(case, gpu.major), gpu).row()
    return {f"{path}_modelled_ms": row[f"{path}_ms"] for path in PATHS}
