"""Weights from elsewhere: warm start (`init_from`) and freezing (`train_only`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import newest_checkpoint
from mhla_lightning.weights.files import is_deepspeed, read_tensors, refusal, weight_files
from mhla_lightning.weights.rank_files import holds_shards

_PLACES = (
    "ema/weights.safetensors",
    "ema",
    "weights.safetensors",
    "model.safetensors",
    "shards",
    "trainer.ckpt",
)
"""Where a folder keeps its weights, the first one found; `ema` and `shards` hold a file of every rank
where a run was split.
"""


@dataclass
class WarmStart:
    """What a warm start did, by parameter name of the backbone."""

    source: Path
    copied: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"init_from {self.source}: {len(self.copied)} tensors copied"]
        for title, names in (("new here", self.fresh), ("left over", self.left)):
            if names:
                parts.append(
                    f"{len(names)} {title} ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})"
                )
        return "; ".join(parts)


def read_weights(source: str) -> tuple[Path, dict[str, Tensor]]:
    """Tensors of a .safetensors or torch file, of a folder that holds one, or of a run's newest checkpoint
    (its average when it has one).

    Raises:
        UserError: nothing there, or a file that is not plain tensors (nothing is unpickled).
    """
    path = weight_file(source)
    return path, read_tensors(path, "model.init_from")


def weight_file(source: str) -> Path:
    """The file behind `init_from`, or the folder of a model's parts (Wan2.1's, diffusers', what `mhla export`
    or the ranks of a run write).

    Raises:
        UserError: nothing there, or parts missing.
    """
    path = Path(source)
    if path.is_file():
        shards = path.parent / "shards"
        return shards if path.name == "trainer.ckpt" and holds_shards(shards) else path
    if not path.is_dir():
        raise UserError(f"model.init_from: {path} does not exist")
    if is_deepspeed(path):
        raise UserError(f"model.init_from: {refusal(path)}")
    folder = newest_checkpoint(path) or path
    if holds_shards(folder):
        return folder
    for place in _PLACES:
        if (folder / place).is_file() or holds_shards(folder / place):
            return folder / place
    if any(list(place.glob("*.safetensors")) for place in (path, path / "transformer")):
        weight_files(path, "model.init_from")  # says what is wrong
        return path
    raise UserError(f"model.init_from: {path} holds none of {', '.join(_PLACES)}")


def load_matching(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> WarmStart:
    """Copies every tensor whose name and shape the model has.

    Raises:
        UserError: not one tensor fits.
    """
    report = WarmStart(source)
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
            f"init_from: no tensor of {source} fits the model; it has {', '.join(list(state)[:4])}, "
            f"the model {', '.join(list(own)[:4])}"
        )
    model.load_state_dict({name: state[name] for name in report.copied}, strict=False)
    report.fresh = [name for name in own if name not in set(report.copied)]
    return report


def freeze_except(model: nn.Module, patterns: Sequence[str]) -> None:
    """Leaves only the parameters trainable whose name a pattern finds.

    Raises:
        UserError: a pattern that is no regular expression or finds no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        try:
            found = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise UserError(f"model.train_only: '{pattern}' is no regular expression ({error})") from error
        if not found:
            raise UserError(
                f"model.train_only: '{pattern}' matches no parameter; they are named like "
                f"{', '.join(names[:3])}"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            parameter.requires_grad and any(re.search(pattern, name) for pattern in patterns)
        )
