"""Which checkpoint of a run can be read: a failing disk may damage one that was complete."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mhla_lightning.checkpoints.source import FILE, open_source
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import complete_checkpoints, read_object


def damage_of(checkpoint: Path) -> str | None:
    """Return what is damaged in a complete checkpoint, in words; None where all files open.

    Tensors are not read, so this takes milliseconds.
    """
    if "step" not in read_object(checkpoint / "state.json"):
        return "state.json is damaged"
    try:
        open_source(checkpoint / FILE)
    except UserError as error:
        return f"{Path(error.key or FILE).name}: {error.reason}"
    for file in sorted(checkpoint.rglob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{file.relative_to(checkpoint)} is damaged ({error})"
    return None


def newest_whole(run: Path, on_damage: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint of a run that is not damaged.

    Where every one is damaged, it is the newest, whose reader then says what is wrong. None where the run has
    no checkpoint at all.

    Args:
        run: the run folder.
        on_damage: called with a sentence for every later checkpoint that is passed over.
    """
    found = complete_checkpoints(run)
    damaged: list[str] = []
    for checkpoint in reversed(found):
        damage = damage_of(checkpoint)
        if damage is None:
            for text in damaged:
                on_damage(f"{text}; {checkpoint.name}, before it, is used")
            return checkpoint
        damaged.append(f"checkpoint {checkpoint.name} is passed over: {damage}")
    return found[-1] if found else None
