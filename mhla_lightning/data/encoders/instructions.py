"""What a text encoder reads before every text, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache

from mhla_lightning.errors import UserError, missing_extra, unknown_name


def _sana() -> str:
    """Return SANA's complex human instruction, the default of diffusers' SanaPipeline."""
    try:
        from diffusers import SanaPipeline
    except ImportError as error:
        raise UserError(None, missing_extra("diffusers", "diffusion", "the instruction of SANA")) from error
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


INSTRUCTIONS: dict[str, Callable[[], str]] = {"sana": _sana}


@cache
def instruction_text(name: str) -> str:
    """Return the text of an instruction.

    Raises:
        UserError: an unknown name, or the package that has the text is missing.
    """
    if name not in INSTRUCTIONS:
        raise UserError("text_encoder.instruction", unknown_name("instruction", name, INSTRUCTIONS))
    return INSTRUCTIONS[name]()
