"""Checks before samples of a trained run are drawn."""

from __future__ import annotations

from mhla_lightning.diffusion import Guidance
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import RunFolder


def check_guided_channels(run: RunFolder, guidance: Guidance, channels: int) -> None:
    """Check that samples of `channels` channels have the channels that are guided.

    Raises:
        UserError: they have fewer.
    """
    if (guidance.channels or 0) > channels:
        raise UserError(
            "guidance.channels",
            f"{guidance.channels} is too many; the samples of run {run.run_id} have {channels}",
        )
