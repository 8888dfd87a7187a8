"""The position of a checkpoint in the sequence of training samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhla_lightning.errors import UserError

# The key of a position in a checkpoint -> the argument that gives it.
_ARGUMENTS = {
    "format": None,
    "buckets": "order.buckets",
    "seed": "order.seed",
    "lanes": "order.lanes",
    "window": "order.window",
    "data_hash": "path",
    "mix_by": "order.mix_by",
    "batch_size": "batch_size",
}


def check_position(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Refuse a position in another sequence.

    Args:
        own: state of the data module.
        state: of the checkpoint.

    Raises:
        UserError: the first argument that differs.
    """
    # Most checkpoints have no mix_by and no buckets.
    usual = {"mix_by": "sample", "buckets": None}
    own, state = usual | dict(own), usual | dict(state)
    for key, argument in _ARGUMENTS.items():
        if key in state and state[key] != own[key]:
            raise UserError(
                argument,
                f"the checkpoint's position belongs to data with {key} {state[key]}, and here it is "
                f"{own[key]}: samples would be dropped and repeated; set it back, or start anew with "
                "`fresh`",
            )
