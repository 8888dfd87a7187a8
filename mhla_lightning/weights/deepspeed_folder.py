"""Checkpoint folders that DeepSpeed itself has written, in other projects.

Our own checkpoints under DeepSpeed hold no pickles (strategies/zero).
"""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from mhla_lightning.errors import UserError
from mhla_lightning.weights.files import refusal, strip_wrappers
from mhla_lightning.weights.stored import Stored


def read_deepspeed(path: Path, trusted: bool, key: str) -> Stored:
    """Return the float32 weights of ZeRO 1, 2 or 3, put together one tensor at a time.

    It unpickles: this runs any code that the files hold.

    Args:
        path: the folder that holds `latest`.
        trusted: whether the user has said that the files may be unpickled.
        key: the argument that names the folder, for errors.

    Raises:
        UserError: not trusted; files that DeepSpeed cannot read; a name that occurs twice.
    """
    if not trusted:
        raise UserError(key, refusal(path))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it at import
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # DeepSpeed prints its progress
            found = get_fp32_state_dict_from_zero_checkpoint(str(path), lazy_mode=True)
    except Exception as error:  # noqa: BLE001  DeepSpeed and unpickling raise any kind
        found_reason = " ".join(str(error).split())[:200]
        raise UserError(key, f"{path} cannot be read by DeepSpeed ({found_reason})") from error
    names = {strip_wrappers(name): name for name in found}
    if len(names) < len(found):
        raise UserError(
            key, f"{path} holds a name twice once prefixes such as `module.` and `model.` are removed"
        )
    outline = {
        name: torch.empty(tuple(found[given].shape), dtype=found[given].dtype, device="meta")
        for name, given in names.items()
    }
    return Stored(outline, lambda name: found[names[name]].contiguous())
