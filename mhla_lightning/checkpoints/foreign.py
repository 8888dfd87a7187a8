"""Other people's checkpoints as weights of our backbones, with every tensor accounted for."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from mhla_lightning.backbones import Backbone, build_backbone
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import FORMAT

Entry = str | Mapping[str, Any] | Sequence[Any]
State = Mapping[str, Tensor]
Shapes = list[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Target:
    """The backbone that the weights are for.

    Attributes:
        backbone: name in the registry.
        attention: attention entry.
        options: the backbone's own options.
        optional: finds the names that may be new in the target or left over of the file; every other tensor must have its place on both sides.
    """

    backbone: str
    attention: Entry
    options: Mapping[str, Any]
    optional: re.Pattern[str]


@dataclass
class Imported:
    """What became of every tensor.

    Attributes:
        weights: all of the target's, by our names.
        copied: (name, shape) of those that came from the file.
        created: of those that are the target's own initialisation.
        left: of the file's that have no place in the target.
    """

    weights: dict[str, Tensor]
    copied: Shapes = field(default_factory=list)
    created: Shapes = field(default_factory=list)
    left: Shapes = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """One row a kind of tensor, layers taken together: state, name, tensors, shape, parameters."""
        found: dict[tuple[str, str, tuple[int, ...]], int] = {}
        for state in ("copied", "created", "left"):
            for name, shape in getattr(self, state):
                key = (state, re.sub(r"^blocks\.\d+\.", "blocks.*.", name), shape)
                found[key] = found.get(key, 0) + 1
        return [
            {"state": state, "name": name, "tensors": count, "shape": list(shape), "parameters": count * math.prod(shape)}
            for (state, name, shape), count in found.items()
        ]

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file: every name, and the rows."""
        names = {state: [name for name, _ in getattr(self, state)] for state in ("copied", "created", "left")}
        return {"format": FORMAT, **names, "rows": self.rows()}


def convert(state: State, target: Target, seed: int = 0) -> Imported:
    """Weights of `target` out of a foreign checkpoint; what that cannot have (mixing, gate, convolutions) keeps its initialisation.

    Args:
        state: the checkpoint's tensors by their own names.
        seed: of that initialisation, so that the same command writes the same file.

    Raises:
        UserError: a checkpoint of another size: a tensor of another shape, one that is missing, or one too many.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_backbone(target.backbone, attention=target.attention, **target.options)
    weights = model.state_dict()
    found, left = _renamed(state, cast(Backbone, model))
    for name, value in found.items():
        if name not in weights:
            if name.startswith("blocks.") and not target.optional.search(name):
                raise UserError(f"a checkpoint of another size: {name} {tuple(value.shape)} has no place in {target.backbone}")
            left.append((name, tuple(value.shape)))
        elif weights[name].shape != value.shape:
            needed = tuple(weights[name].shape)
            raise UserError(f"a checkpoint of another size: {name} is {tuple(value.shape)}, and {target.backbone} needs {needed}")
    for name, value in weights.items():
        if name not in found and not target.optional.search(name):
            raise UserError(f"a checkpoint of another size: it has no {name}, and {target.backbone} needs one of {tuple(value.shape)}")
    return Imported(
        {name: found[name].to(value.dtype).contiguous() if name in found else value for name, value in weights.items()},
        copied=_shapes((name, value) for name, value in weights.items() if name in found),
        created=_shapes((name, value) for name, value in weights.items() if name not in found),
        left=left,
    )


def _renamed(state: State, model: Backbone) -> tuple[dict[str, Tensor], Shapes]:
    """The file's tensors under our names, taken one by one so that none is lost; and those that the backbone has no use for."""
    found: dict[str, Tensor] = {}
    left: Shapes = []
    for name, value in state.items():
        ours = model.adapt_state_dict({name: value})
        for renamed in ours.keys() & found.keys():
            raise UserError(f"the checkpoint holds {renamed} twice; the second is called {name}")
        found |= ours
        if not ours:
            left.append((name, tuple(value.shape)))
    return found, left


def _shapes(tensors: Iterable[tuple[str, Tensor]]) -> Shapes:
    return [(name, tuple(value.shape)) for name, value in tensors]


def save_weights(path: Path, imported: Imported, target: Target, source: str) -> None:
    """Replaces a .safetensors file at once; its header says what the weights are for and where they come from."""
    entry, options = json.dumps(target.attention), json.dumps(dict(target.options))
    header = {"format": str(FORMAT), "source": source, "backbone": target.backbone, "attention": entry, "backbone_options": options}
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        save_file(imported.weights, temporary, metadata=header)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Family:
    """Checkpoints of one kind.

    Attributes:
        backbone: the one that is meant when none is named.
        optional: see :class:`Target`.
        facts: what a checkpoint says of its own attention entry and backbone options.
    """

    backbone: str
    optional: re.Pattern[str]
    facts: Callable[[State], tuple[Entry, dict[str, Any]]]

    def target(self, state: State, backbone: str | None, attention: Entry | None, options: Mapping[str, Any]) -> Target:
        """The named backbone, or the family's; as the checkpoint was trained where nothing else is asked for."""
        own_attention, own_options = self.facts(state)
        return Target(backbone or self.backbone, own_attention if attention is None else attention, {**own_options, **options}, self.optional)


def _dit_facts(state: State) -> tuple[Entry, dict[str, Any]]:
    """Softmax, or the authors' MHLA with as many blocks as its mixing matrices have rows."""
    options = {"dwconv": True} if any(".dw_conv." in name for name in state) else {}
    rows = next((len(value) for name, value in state.items() if ".piece_attn." in name), None)
    if rows is None:
        return "softmax", options
    return {"name": "mhla", "preset": "release", "blocks": math.isqrt(rows)}, options


FAMILIES: dict[str, Family] = {
    "dit": Family(
        "dit_xl2",
        re.compile(r"^pos_embed$|\.(attn\.(attention|lepe|gate|norm|q_norm|k_norm|out_norm)|cpe|dw_conv)\."),
        _dit_facts,
    ),
}
