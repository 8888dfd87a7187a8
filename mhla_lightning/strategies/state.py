"""Between this rank's stretches and a checkpoint: what is written, and how it is filled again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from mhla_lightning.checkpoints.source import Source
from mhla_lightning.errors import UserError
from mhla_lightning.strategies.local import Fragment, LocalWeights, ZeroWeights
from mhla_lightning.weights.rank_files import WEIGHT, Stretch

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
LOSS_SCALE = "loss_scale"


def saved_lots(local: ZeroWeights, module: nn.Module) -> list[list[Fragment]]:
    """What this rank saves, by what is in memory at one time; at least one lot, if an empty one."""
    return local.lots([fragment for fragment in local.fragments(module) if fragment.owned]) or [[]]


def stretches(lot: Sequence[Fragment], optimizer: Any) -> list[Stretch]:
    """What this rank writes of a lot that is loaded: its stretches of weights and optimizer state.

    Args:
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
    """Of the tensors that :func:`stretches` gives, loaded or not."""
    return sum(
        f.size * f.values.element_size() * (1 + len(_elementwise(f, optimizer.optimizer))) for f in lot
    )


def whole_numbers(local: ZeroWeights, module: nn.Module) -> list[Stretch]:
    """The module's integer buffers, which rank 0 writes."""
    numbers = _whole_numbers(module) if local.rank == 0 else {}
    return [Stretch(name, tuple(value.shape), 0, {WEIGHT: value.view(-1)}) for name, value in numbers.items()]


def _whole_numbers(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in module.state_dict(keep_vars=True).items()
        if not value.is_floating_point()
    }


def _kept(fragment: Fragment, optimizer: Any) -> Mapping[str, Any]:
    """What the optimizer keeps of the tensor that a fragment is a part of."""
    return optimizer.state.get(fragment.flat, {}) if fragment.flat is not None else {}


def _elementwise(fragment: Fragment, optimizer: Any) -> dict[str, Tensor]:
    return {
        key: value
        for key, value in _kept(fragment, optimizer).items()
        if isinstance(value, Tensor) and value.ndim
    }


def _optimizer_state(fragment: Fragment, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the optimizer keeps of a fragment: elementwise, and once."""
    kinds = {
        key: value.narrow(0, fragment.offset, fragment.size)
        for key, value in _elementwise(fragment, optimizer).items()
    }
    return kinds, {key: float(value) for key, value in _kept(fragment, optimizer).items() if key not in kinds}


@torch.no_grad()
def restore(local: LocalWeights, module: nn.Module, source: Source, optimizer: Any) -> None:
    """Fills the weights of this rank, and its optimizer state.

    Args:
        optimizer: DeepSpeed's; None leaves it.

    Raises:
        UserError: a checkpoint of another model.
    """
    _check(module, source)
    if not local.sharded:
        for name, tensor in module.state_dict(keep_vars=True).items():
            tensor.copy_(source.whole(name))
        return
    for name, value in _whole_numbers(module).items():
        value.copy_(source.whole(name))
    for lot in local.lots(local.fragments(module)):
        with local.loaded(lot, changed=True) as fragments:
            for fragment in fragments:
                fragment.values.copy_(source.read(fragment.name, WEIGHT, fragment.start, fragment.size))
                if optimizer is not None:
                    _restore_optimizer(fragment, source, optimizer.optimizer)
    local.publish(module)
    if optimizer is not None:
        for group, saved in zip(optimizer.optimizer.param_groups, source.groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "names"})
        _restore_scale(optimizer, source.checkpoint.get(LOSS_SCALE))


def _check(module: nn.Module, source: Source) -> None:
    own, given = set(module.state_dict(keep_vars=True)), set(source.names())
    if own != given:
        named = ", ".join(sorted(own ^ given)[:4])
        raise UserError(
            f"the checkpoint does not fit this model: {len(own - given)} tensors missing, "
            f"{len(given - own)} left over ({named})"
        )


def _restore_optimizer(fragment: Fragment, source: Source, optimizer: Any) -> None:
    if fragment.flat is None or not source.kinds(
        fragment.name
    ):  # before its first step an optimizer keeps nothing
        return
    state = optimizer.state[fragment.flat]
    for kind in source.kinds(fragment.name):
        if kind not in state:
            state[kind] = torch.zeros_like(fragment.flat)
        state[kind].narrow(0, fragment.offset, fragment.size).copy_(
            source.read(fragment.name, kind, fragment.start, fragment.size)
        )
    for key, value in source.scalars(fragment.name).items():
        state[key] = (
            torch.tensor(value, dtype=torch.float32)
            if isinstance(optimizer, torch.optim.AdamW)
            else int(value)
        )


def loss_scale(optimizer: Any) -> dict[str, float]:
    """Where the loss scale of float16 training stands; empty without one."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return {
        name: getattr(scaler, name)
        for name in _SCALER
        if getattr(optimizer, "dynamic_loss_scale", False) and hasattr(scaler, name)
    }


def _restore_scale(optimizer: Any, saved: Mapping[str, float] | None) -> None:
    for name, value in (saved or {}).items():
        setattr(optimizer.loss_scaler, name, value)


def optimizer_groups(trainer: pl.Trainer, module: nn.Module) -> list[dict[str, Any]]:
    """Of every group of the optimizer its settings, and `names`, its parameters in order."""
    optimizer = trainer.optimizers[0]
    names = getattr(trainer.strategy, "group_names", None) or group_names(optimizer, module)
    settings = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    return [{**group, "names": members} for group, members in zip(settings, names, strict=True)]


def group_names(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[list[str]]:
    """Names of the parameters of every group."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
