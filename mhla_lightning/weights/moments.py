"""Moments of a checkpoint for an optimizer that may have other settings and groups."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mhla_lightning.errors import UserError

log = logging.getLogger(__name__)
GROUPS = "optimizer_groups"
OPTIMIZER = "optimizer_class"
"""Keys of a checkpoint: for each group its settings and `names`, and the name of the optimizer's class."""

_SETTINGS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "momentum")
_SAME_STATE = {"DeepSpeedCPUAdam": "AdamW"}
_ONLY_SETTINGS = ("torch.optim.", "deepspeed.")  # packages whose groups hold nothing that training changes


def optimizer_class(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of an optimizer's class; one name for classes with the same state."""
    name = type(optimizer).__name__
    return _SAME_STATE.get(name, name)


def keeps_moments(optimizer: torch.optim.Optimizer, saved: str | None) -> bool:
    """Whether a checkpoint's state is of the same class of optimizer; warn where it is not.

    Args:
        optimizer: of this attempt.
        saved: class in the checkpoint; None, in earlier checkpoints, is taken for the same.
    """
    own = optimizer_class(optimizer)
    if saved in (None, own):
        return True
    rank_zero_only(log.warning)(f"the optimizer is {own} and was {saved}: it starts without moments")
    return False


def carry_over(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[dict[str, Any]],
    names: Sequence[Sequence[str]],
    saved: Sequence[Mapping[str, Any]],
) -> None:
    """Write into groups what training had changed there; the settings stay those of the recipe.

    Optimizers of torch and DeepSpeed have settings alone in their groups. Those of other packages may count
    steps or adapt a rate there.

    Args:
        optimizer: of this attempt.
        groups: of this attempt.
        names: parameters of every group.
        saved: groups of the checkpoint, with `names`.
    """
    if f"{type(optimizer).__module__}.".startswith(_ONLY_SETTINGS):
        return
    for group, members in zip(groups, names, strict=True):
        same = next((one for one in saved if list(one["names"]) == list(members)), {})
        left_out = (*_SETTINGS, "params", "names")
        group.update({key: same[key] for key in group if key in same and key not in left_out})


def tell_new(names: Sequence[Sequence[str]], saved: Sequence[Sequence[str]]) -> None:
    """Log a warning that names the parameters that a checkpoint's optimizer did not train.

    Args:
        names, saved: parameters of every group here and in the checkpoint.
    """
    before = {name for group in saved for name in group}
    new = [name for group in names for name in group if name not in before]
    if new:
        shown = f"{', '.join(new[:3])}{', ...' if len(new) > 3 else ''}"
        rank_zero_only(log.warning)(f"{len(new)} parameters start without moments: {shown}")


def label(checkpoint: Mapping[str, Any]) -> None:
    """Write names and class from a checkpoint into the states of its optimizers, in place.

    :func:`fitted` reads them there: torch passes it nothing else.
    """
    groups = checkpoint.get(GROUPS, ())
    for state in checkpoint.get("optimizer_states", ()):
        if len(state.get("param_groups", ())) == len(groups):
            state[OPTIMIZER] = checkpoint.get(OPTIMIZER)
            for group, saved in zip(state["param_groups"], groups, strict=True):
                group["names"] = list(saved["names"])


def fitted(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], names: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Return the moments of a saved state by name, with the settings of this optimizer.

    Args:
        optimizer: newly built.
        saved: a state_dict of an optimizer, labelled.
        names: parameters of every group of `optimizer`, in order.

    Raises:
        UserError: other groups in a state without names.
    """
    own = optimizer.state_dict()["param_groups"]
    if not keeps_moments(optimizer, saved.get(OPTIMIZER)):
        return {"state": {}, "param_groups": own}
    groups = _named(saved["param_groups"], names)
    tell_new(names, [group["names"] for group in groups])
    numbers = {
        name: number for group in groups for name, number in zip(group["names"], group["params"], strict=True)
    }
    state = {
        number: saved["state"][numbers[name]]
        for group, members in zip(own, names, strict=True)
        for name, number in zip(members, group["params"], strict=True)
        if numbers.get(name) in saved["state"]
    }
    carry_over(optimizer, own, names, groups)
    return {"state": state, "param_groups": own}


def _named(saved: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> list[Mapping[str, Any]]:
    """Return saved groups with `names`.

    Groups without names take those here, where the sizes agree. Raises UserError elsewhere.
    """
    if all("names" in group for group in saved):
        return list(saved)
    if [len(group["params"]) for group in saved] != [len(group) for group in names]:
        raise UserError(
            "ckpt_path",
            "the groups of its optimizer differ from those here, and it does not name their parameters: set "
            "`train_only` and the optimizer's decay back",
        )
    return [{**group, "names": members} for group, members in zip(saved, names, strict=True)]
