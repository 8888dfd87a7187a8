"""A checkpoint folder as DeepSpeed itself writes it, which other code may have made. Ours hold no pickles
(strategies/zero.py).
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


def read_deepspeed(path: Path, trusted: bool, what: str) -> Stored:
    """The float32 weights of ZeRO 1, 2 or 3, put together one at a time. Unpickles: this runs whatever code
    the files hold.

    Args:
        trusted: whether the user has said that the files may be unpickled.
        what: the argument that names the folder, for the error.

    Raises:
        UserError: not trusted; files that DeepSpeed cannot read; a name that stands twice.
    """
    if not trusted:
        raise UserError(f"{what} {refusal(path)}")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it prints its progress
            found = get_fp32_state_dict_from_zero_checkpoint(str(path), lazy_mode=True)
    except Exception as error:  # noqa: BLE001  an error of any kind, DeepSpeed's or the pickles'
        raise UserError(
            f"{what} {path} cannot be read by DeepSpeed ({' '.join(str(error).split())[:200]})"
        ) from error
    names = {strip_wrappers(name): name for name in found}
    if len(names) < len(found):
        raise UserError(f"{what} {path} holds a name twice once module., model. and the like are taken off")
    outline = {
        name: torch.empty(tuple(found[given].shape), dtype=found[given].dtype, device="meta")
        for name, given in names.items()
    }
    return Stored(outline, lambda name: found[names[name]].contiguous())
