"""Weights from elsewhere: warm start (`init_from`) and freezing (`train_only`)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor, nn

from mhla_lightning.errors import UserError, inside
from mhla_lightning.finite import check_finite, not_finite
from mhla_lightning.runs.folder import newest_checkpoint
from mhla_lightning.weights.adapted import Adapted, DoubtfulWeights, Geometry, WeightState
from mhla_lightning.weights.files import is_deepspeed, read_tensors, refusal, weight_files
from mhla_lightning.weights.rank_files import FOLDER, holds_rank_files

_AVERAGES = ("ema/weights.safetensors", "ema")
_RAW = ("weights.safetensors", "model.safetensors", FOLDER, "trainer.ckpt")
_PLACES = (*_AVERAGES, *_RAW)
"""Where a folder may keep its weights; the first one found is taken.

`ema` and the folder of rank files hold a file of every rank where a run was split.
"""

_HEAD = "head.weight"  # of a classifier, by the name of timm's ViTs


@dataclass(frozen=True)
class InitFrom:
    """Weights to start from, and what their files do not tell.

    Args:
        path: a file, a folder or a run.
        weights: which ones: of a training checkpoint the key that holds them, such as `model` or `model_ema`;
            of a run `ema` or `raw`. None takes the average where there is one.
        grid: tokens per axis of the model that they come from, such as [14, 14]; None takes what the files
            tell.
    """

    path: str
    weights: str | None = None
    grid: list[int] | None = None

    @classmethod
    def of(cls, given: str | InitFrom) -> InitFrom:
        """Return a path as the weights that it names."""
        return cls(given) if isinstance(given, str) else given


@dataclass
class WarmStart:
    """Report of a warm start, by parameter name of the backbone.

    Attributes:
        source: the file or folder that was read.
        key: the argument that named it.
        copied: names with a value from the source, as it is.
        resampled: names with a value that was resampled, and from what to what.
        fresh: names of the model that the source lacks.
        left: names of the source that the model lacks, or has in another shape or at other places.
        notes: what else to know: which of several weights were read, and what is not known of them.
    """

    source: Path
    key: str = "init_from"
    copied: list[str] = field(default_factory=list)
    resampled: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.key} {self.source}: {len(self.copied)} tensors copied"]
        resampled = [f"{name} {change}" for name, change in self.resampled.items()]
        for title, names in (
            ("resampled", resampled),
            ("new here", self.fresh),
            ("left over", self.left),
        ):
            if names:
                parts.append(
                    f"{len(names)} {title} ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})"
                )
        return "; ".join([*parts, *self.notes])


class NamesOthersWeights(Protocol):
    """A model that knows the names of its weights in other libraries."""

    def adapt_state_dict(
        self, state: Mapping[str, Tensor], grid: Sequence[int] | None = None
    ) -> dict[str, Tensor]: ...


def start_from(
    model: nn.Module,
    source: str | InitFrom,
    key: str,
    describe: Callable[[WeightState], Geometry | None] = lambda state: state.geometry,
) -> WarmStart:
    """Read weights and copy every tensor that fits into a model.

    Args:
        model: a backbone.
        source: a file, a folder or a run.
        key: the argument that names the source, for errors.
        describe: returns the geometry of the model that the weights come from, where it is known.

    Raises:
        UserError: nothing there, no plain tensors, weights of another size, weights that are not finite, or
            no tensor that fits.
    """
    given = InitFrom.of(source)
    path, state = read_weights(given, key)
    state.geometry = describe(state)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DoubtfulWeights)  # the report says it, once for all ranks
            adapted = cast(NamesOthersWeights, model).adapt_state_dict(state, *_told(given))
    except UserError as error:
        if error.key == "grid":
            raise UserError(f"{key}.grid", f"{path}: {error.reason}") from error
        raise UserError(key, f"{path}: {error.reason}") from error
    report = load_matching(model, adapted, path, key)
    if state.taken:
        report.notes.insert(0, f"these are {state.taken}")
    return report


def _told(given: InitFrom) -> tuple[list[int], ...]:
    """Return the further arguments of `adapt_state_dict`; a user's backbone may take none."""
    return () if given.grid is None else (given.grid,)


def read_weights(source: str | InitFrom, key: str = "init_from") -> tuple[Path, WeightState]:
    """Return a source's path and its tensors.

    Args:
        source: a .safetensors or torch file, a folder that holds one, or a run. Of a run the newest
            checkpoint is read, its average when it has one.
        key: the argument that names the source, for errors.

    Raises:
        UserError: nothing there, or a file that is not plain tensors (nothing is unpickled).
    """
    given = InitFrom.of(source)
    path = weight_file(given, key)
    inside_a_file = path.is_file() and Path(given.path).is_file()
    with inside(key):
        state = read_tensors(path, key.rpartition(".")[2], given.weights if inside_a_file else None)
    if not inside_a_file and any(path.match(f"*/{place}") for place in _AVERAGES):
        state.taken = "the averaged weights (`weights` raw takes those as trained)"
    return path, state


def weight_file(source: str | InitFrom, key: str = "init_from") -> Path:
    """Return the file behind a source, or the folder where a model is in several files.

    Such folders are Wan2.1's, diffusers', and those that `mhla export` or the ranks of a run write.

    Args:
        source: a file, a folder or a run.
        key: the argument that names the source, for errors.

    Raises:
        UserError: nothing there, or files missing.
    """
    given = InitFrom.of(source)
    path = Path(given.path)
    if path.is_file():
        folder = path.parent / FOLDER
        return folder if path.name == "trainer.ckpt" and holds_rank_files(folder) else path
    if not path.is_dir():
        raise UserError(key, f"{path} does not exist")
    if is_deepspeed(path):
        raise UserError(key, refusal(path))
    folder = newest_checkpoint(path) or path
    places = _chosen_places(given, key)
    if holds_rank_files(folder) and given.weights is None:
        return folder
    for place in places:
        if (folder / place).is_file() or holds_rank_files(folder / place):
            return folder / place
    if given.weights is not None:
        raise UserError(f"{key}.weights", f"{folder} holds no {given.weights} weights ({', '.join(places)})")
    if any(list(place.glob("*.safetensors")) for place in (path, path / "transformer")):
        weight_files(path, key)  # raises where they are not one model
        return path
    raise UserError(key, f"{path} holds none of {', '.join(_PLACES)}")


def _chosen_places(given: InitFrom, key: str) -> tuple[str, ...]:
    """Return where the weights of a folder may be."""
    choices = {None: _PLACES, "ema": _AVERAGES, "raw": _RAW}
    if given.weights not in choices:
        raise UserError(
            f"{key}.weights",
            f"{given.path} is a folder, of which ema or raw can be chosen, not '{given.weights}'",
        )
    return choices[given.weights]


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
        UserError: not one tensor fits, or one is not finite in the model's precision.
    """
    report = WarmStart(source, key)
    own = model.state_dict()
    resampled = state.resampled if isinstance(state, Adapted) else {}
    fitting = Adapted() if isinstance(state, Adapted) else dict[str, Tensor]()
    for name, value in state.items():
        if name not in own:
            report.left.append(name)
        elif own[name].shape != value.shape:
            report.left.append(f"{name} {tuple(value.shape)} for {tuple(own[name].shape)}")
            if name == _HEAD and value.shape[1:] == own[name].shape[1:]:
                report.notes.append(
                    f"its head of {len(value)} classes is replaced by a new one of {len(own[name])}"
                )
        else:
            fitting[name] = value
            if name in resampled:
                report.resampled[name] = resampled[name]
            else:
                report.copied.append(name)
    if isinstance(state, Adapted):
        report.left += [f"{name}: {reason}" for name, reason in state.omitted.items()]
        report.notes += [text for text in state.warnings() if text.partition(":")[0] not in state.omitted]
    if not fitting:
        raise UserError(
            key,
            f"no tensor of {source} fits the model; it has {', '.join(list(state)[:4])}, the model "
            f"{', '.join(list(own)[:4])}",
        )
    _check_numbers(fitting, own, source, key)
    model.load_state_dict(fitting, strict=False)
    report.fresh = [name for name in own if name not in fitting]
    return report


def _check_numbers(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], source: Path, key: str) -> None:
    """Refuse tensors that hold NaN, or numbers beyond the model's precision.

    Raises:
        UserError: such a tensor.
    """
    if not isinstance(tensors, Adapted):  # a backbone has checked those
        check_finite(tensors, key, f"{source}: ")
    for name, value in tensors.items():
        kind = own[name].dtype
        narrows = value.is_floating_point() and kind.is_floating_point and kind != value.dtype
        if narrows and not_finite(value.to(kind)):
            raise UserError(
                key,
                f"{source}: {name} holds {float(value.abs().max()):.4g}, beyond the range of "
                f"{str(kind).removeprefix('torch.')}",
            )


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
