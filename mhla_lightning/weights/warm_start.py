"""Weights from elsewhere: warm start (`init_from`) and freezing (`train_only`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor, nn

from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import newest_checkpoint
from mhla_lightning.weights.files import is_deepspeed, read_tensors, refusal, weight_files
from mhla_lightning.weights.rank_files import FOLDER, holds_rank_files

_PLACES = (
    "ema/weights.safetensors",
    "ema",
    "weights.safetensors",
    "model.safetensors",
    FOLDER,
    "trainer.ckpt",
)
"""Where a folder may keep its weights; the first one found is taken.

`ema` and the folder of rank files hold a file of every rank where a run was split.
"""


@dataclass
class WarmStart:
    """Report of a warm start, by parameter name of the backbone.

    Attributes:
        source: the file or folder that was read.
        key: the argument that named it.
        copied: names with a value from the source.
        fresh: names of the model that the source lacks.
        left: names of the source that the model lacks, or has in another shape.
    """

    source: Path
    key: str = "init_from"
    copied: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.key} {self.source}: {len(self.copied)} tensors copied"]
        for title, names in (("new here", self.fresh), ("left over", self.left)):
            if names:
                parts.append(
                    f"{len(names)} {title} ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})"
                )
        return "; ".join(parts)


class NamesOthersWeights(Protocol):
    """A model that knows the names of its weights in other libraries."""

    def adapt_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


def start_from(model: nn.Module, source: str, key: str) -> WarmStart:
    """Read weights and copy every tensor that fits into a model.

    Args:
        model: a backbone.
        source: a file, a folder or a run.
        key: the argument that names the source, for errors.

    Raises:
        UserError: nothing there, no plain tensors, weights of another size, or no tensor that fits.
    """
    path, state = read_weights(source, key)
    try:
        adapted = cast(NamesOthersWeights, model).adapt_state_dict(state)
    except UserError as error:
        raise UserError(key, f"{path}: {error.reason}") from error
    return load_matching(model, adapted, path, key)


def read_weights(source: str, key: str = "init_from") -> tuple[Path, dict[str, Tensor]]:
    """Return a source's path and its tensors.

    Args:
        source: a .safetensors or torch file, a folder that holds one, or a run. Of a run the newest
            checkpoint is read, its average when it has one.
        key: the argument that names the source, for errors.

    Raises:
        UserError: nothing there, or a file that is not plain tensors (nothing is unpickled).
    """
    path = weight_file(source, key)
    return path, read_tensors(path, key)


def weight_file(source: str, key: str = "init_from") -> Path:
    """Return the file behind a source, or the folder where a model is in several files.

    Such folders are Wan2.1's, diffusers', and those that `mhla export` or the ranks of a run write.

    Args:
        source: a file, a folder or a run.
        key: the argument that names the source, for errors.

    Raises:
        UserError: nothing there, or files missing.
    """
    path = Path(source)
    if path.is_file():
        folder = path.parent / FOLDER
        return folder if path.name == "trainer.ckpt" and holds_rank_files(folder) else path
    if not path.is_dir():
        raise UserError(key, f"{path} does not exist")
    if is_deepspeed(path):
        raise UserError(key, refusal(path))
    folder = newest_checkpoint(path) or path
    if holds_rank_files(folder):
        return folder
    for place in _PLACES:
        if (folder / place).is_file() or holds_rank_files(folder / place):
            return folder / place
    if any(list(place.glob("*.safetensors")) for place in (path, path / "transformer")):
        weight_files(path, key)  # raises where they are not one model
        return path
    raise UserError(key, f"{path} holds none of {', '.join(_PLACES)}")


def load_matching(
    model: nn.Module, state: Mapping[str, Tensor], source: Path, key: str = "init_from"
) -> WarmStart:
    """Copy every tensor whose name and shape the model has.

    Args:
        model: gets the values.
        state: tensors by the model's names.
        source: their file, for the report.
        key: the argument that names the source, for the report and errors.

    Raises:
        UserError: not one tensor fits.
    """
    report = WarmStart(source, key)
    own = model.state_dict()
    for name, value in state.items():
        if name not in own:
            report.left.append(name)
        elif own[name].shape != value.shape:
            report.left.append(f"{name} {tuple(value.shape)} for {tuple(own[name].shape)}")
        else:
            report.copied.append(name)
    if not report.copied:
        raise UserError(
            key,
            f"no tensor of {source} fits the model; it has {', '.join(list(state)[:4])}, the model "
            f"{', '.join(list(own)[:4])}",
        )
    model.load_state_dict({name: state[name] for name in report.copied}, strict=False)
    report.fresh = [name for name in own if name not in set(report.copied)]
    return report


def freeze_except(model: nn.Module, patterns: Sequence[str]) -> None:
    """Leave only the parameters trainable whose name a pattern finds.

    Raises:
        UserError: a pattern that is no regular expression or finds no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        try:
            found = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise UserError("train_only", f"'{pattern}' is no regular expression ({error})") from error
        if not found:
            raise UserError(
                "train_only",
                f"'{pattern}' matches no parameter; they are named like {', '.join(names[:3])}",
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            parameter.requires_grad and any(re.search(pattern, name) for pattern in patterns)
        )
