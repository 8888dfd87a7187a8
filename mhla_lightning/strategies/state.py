"""Collection and restoring of weights and optimizer state for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from mhla_lightning.checkpoints.source import CheckpointSource
from mhla_lightning.errors import UserError
from mhla_lightning.strategies.local import Fragment, LocalWeights
from mhla_lightning.strategies.sharding import sharding_of
from mhla_lightning.weights.moments import OPTIMIZER, keeps_moments
from mhla_lightning.weights.rank_files import WEIGHT, Stretch

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
LOSS_SCALE = "loss_scale"


def saved_lots(local: LocalWeights, module: nn.Module) -> list[list[Fragment]]:
    """Return the fragments that this rank saves, by what is in memory at one time.

    There is at least one lot, which may be empty.
    """
    return local.lots([fragment for fragment in local.fragments(module) if fragment.owned]) or [[]]


def stretches(lot: Sequence[Fragment], optimizer: Any) -> list[Stretch]:
    """Return this rank's stretches of weights and optimizer state of a lot in memory.

    Args:
        lot: fragments, loaded.
        optimizer: DeepSpeed's.
    """
    found = []
    for fragment in lot:
        kinds, scalars = _optimizer_state(fragment, optimizer.optimizer)
        found.append(
            Stretch(
                fragment.name, fragment.shape, fragment.start, {WEIGHT: fragment.values, **kinds}, scalars
            )
        )
    return found


def saved_bytes(lot: Sequence[Fragment], optimizer: Any) -> int:
    """Return the bytes of the tensors that :func:`stretches` gives, loaded or not."""
    return sum(
        f.size * f.values.element_size() * (1 + len(_elementwise(f, optimizer.optimizer))) for f in lot
    )


def whole_numbers(module: nn.Module) -> list[Stretch]:
    """Return the module's integer buffers, which rank 0 saves."""
    return [
        Stretch(name, tuple(value.shape), 0, {WEIGHT: value.view(-1)})
        for name, value in _whole_numbers(module).items()
    ]


def _whole_numbers(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in module.state_dict(keep_vars=True).items()
        if not value.is_floating_point()
    }


def _kept(fragment: Fragment, optimizer: Any) -> Mapping[str, Any]:
    """Return the optimizer's state of the tensor that a fragment is a part of."""
    return optimizer.state.get(fragment.flat, {}) if fragment.flat is not None else {}


def _elementwise(fragment: Fragment, optimizer: Any) -> dict[str, Tensor]:
    return {
        key: value
        for key, value in _kept(fragment, optimizer).items()
        if isinstance(value, Tensor) and value.ndim
    }


def _optimizer_state(fragment: Fragment, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the optimizer's state of a fragment: its tensors, and its single numbers."""
    kinds = {
        key: value.narrow(0, fragment.offset, fragment.size)
        for key, value in _elementwise(fragment, optimizer).items()
    }
    return kinds, {key: float(value) for key, value in _kept(fragment, optimizer).items() if key not in kinds}


@torch.no_grad()
def restore(local: LocalWeights, module: nn.Module, source: CheckpointSource, optimizer: Any) -> None:
    """Fill the weights of this rank and the moments of its optimizer; settings stay.

    Args:
        local: the weights as this rank holds them.
        module: whose weights.
        source: the checkpoint.
        optimizer: DeepSpeed's; None leaves it as it is.

    Raises:
        UserError: a checkpoint of another model, or weights that are not finite.
    """
    _check(module, source)
    if not local.sharded:
        for name, tensor in module.state_dict(keep_vars=True).items():
            tensor.copy_(source.restored(name))
        return
    for name, value in _whole_numbers(module).items():
        value.copy_(source.whole(name))
    kept = optimizer is not None and keeps_moments(optimizer.optimizer, source.checkpoint.get(OPTIMIZER))
    for lot in local.lots(local.fragments(module)):
        with local.loaded(lot, changed=True) as fragments:
            for fragment in fragments:
                fragment.values.copy_(source.restored(fragment.name, WEIGHT, fragment.start, fragment.size))
                if kept:
                    _restore_optimizer(fragment, source, optimizer.optimizer)
    local.publish(module)
    if optimizer is not None:
        _restore_scale(optimizer, source.checkpoint.get(LOSS_SCALE))


def _check(module: nn.Module, source: CheckpointSource) -> None:
    own, given = set(module.state_dict(keep_vars=True)), set(source.names())
    if own != given:
        named = ", ".join(sorted(own ^ given)[:4])
        raise UserError(
            str(source.path),
            f"the checkpoint does not fit this model: {len(own - given)} tensors missing, "
            f"{len(given - own)} left over ({named})",
        )


def _restore_optimizer(fragment: Fragment, source: CheckpointSource, optimizer: Any) -> None:
    # Before its first step an optimizer has no state.
    if fragment.flat is None or not source.kinds(fragment.name):
        return
    state = optimizer.state[fragment.flat]
    for kind in source.kinds(fragment.name):
        if kind not in state:
            state[kind] = torch.zeros_like(fragment.flat)
        state[kind].narrow(0, fragment.offset, fragment.size).copy_(
            source.restored(fragment.name, kind, fragment.start, fragment.size)
        )
    for key, value in source.scalars(fragment.name).items():
        state[key] = (
            torch.tensor(value, dtype=torch.float32)
            if isinstance(optimizer, torch.optim.AdamW)
            else int(value)
        )


def loss_scale(optimizer: Any) -> dict[str, float]:
    """Return the state of float16's loss scale; empty without one."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return {
        name: getattr(scaler, name)
        for name in _SCALER
        if getattr(optimizer, "dynamic_loss_scale", False) and hasattr(scaler, name)
    }


def _restore_scale(optimizer: Any, saved: Mapping[str, float] | None) -> None:
    for name, value in (saved or {}).items():
        setattr(optimizer.loss_scaler, name, value)


def optimizer_groups(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return the settings of every optimizer group, and `names`, its parameters in order."""
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in trainer.optimizers[0].param_groups
    ]
    names = sharding_of(trainer.strategy).group_names()
    return [{**group, "names": members} for group, members in zip(settings, names, strict=True)]
