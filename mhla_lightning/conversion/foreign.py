"""Other people's checkpoints as weights of our backbones, with every tensor accounted for."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mhla_lightning.backbones import Backbone, build_backbone
from mhla_lightning.conversion.wan import wan_target
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import FORMAT
from mhla_lightning.weights.target import Entry, ImportTarget, State, Wish, file_header
from mhla_lightning.weights.wan_names import from_wan

Shapes = list[tuple[str, tuple[int, ...]]]


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
        """See :func:`table_rows`."""
        return table_rows({"copied": self.copied, "created": self.created, "left": self.left})

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file: every name, and the rows."""
        names = {state: [name for name, _ in getattr(self, state)] for state in ("copied", "created", "left")}
        return {"format": FORMAT, **names, "rows": self.rows()}


def table_rows(parts: Mapping[str, Shapes]) -> list[dict[str, Any]]:
    """One row a kind of tensor, layers taken together: state (the key of `parts`), name, tensors, shape,
    parameters.
    """
    found: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for state, shapes in parts.items():
        for name, shape in shapes:
            key = (state, re.sub(r"^blocks\.\d+\.", "blocks.*.", name), shape)
            found[key] = found.get(key, 0) + 1
    return [
        {
            "state": state,
            "name": name,
            "tensors": count,
            "shape": list(shape),
            "parameters": count * math.prod(shape),
        }
        for (state, name, shape), count in found.items()
    ]


def convert(state: State, target: ImportTarget, seed: int = 0, source: str = "the checkpoint") -> Imported:
    """Weights of `target` out of a foreign checkpoint; what that cannot have (mixing, gate, convolutions)
    keeps its initialisation.

    Args:
        state: the checkpoint's tensors, by our names or by names that the backbone knows.
        seed: of that initialisation, so that the same command writes the same file.
        source: the checkpoint's path, for messages.

    Raises:
        UserError: a checkpoint of another size: a tensor of another shape, one that is missing, or one too
            many.
    """
    with torch.device("meta"):
        model = _build(target)
    own = model.state_dict()
    try:
        found, left = _renamed(state, cast(Backbone, model))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    left += _without_place(found, own, target, source)
    created = [name for name in own if name not in found]
    weights = _fresh(target, seed, created) if created else {}
    weights |= {name: value.to(own[name].dtype).contiguous() for name, value in found.items() if name in own}
    return Imported(
        {name: weights[name] for name in own},
        copied=_shapes((name, value) for name, value in own.items() if name in found),
        created=_shapes((name, own[name]) for name in created),
        left=left,
    )


def _build(target: ImportTarget) -> nn.Module:
    return build_backbone(target.backbone, attention=target.attention, **target.options)


def _fresh(target: ImportTarget, seed: int, names: Iterable[str]) -> dict[str, Tensor]:
    """The target's own initialisation of these tensors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = _build(target).state_dict()
    return {name: weights[name] for name in names}


def _without_place(found: State, own: State, target: ImportTarget, source: str) -> Shapes:
    """Tensors of the file that the target has not but may do without. Raises UserError for all others that
    differ.
    """
    wrong, left = f"{source} is a checkpoint of another size: ", []
    for name, value in found.items():
        if name not in own:
            if not target.optional.search(name) and (name.startswith("blocks.") or not target.stray):
                raise UserError(f"{wrong}{name} {tuple(value.shape)} has no place in {target.backbone}")
            left.append((name, tuple(value.shape)))
        elif own[name].shape != value.shape:
            needed = tuple(own[name].shape)
            raise UserError(f"{wrong}{name} is {tuple(value.shape)}, and {target.backbone} needs {needed}")
    for name, value in own.items():
        if name not in found and not target.optional.search(name):
            raise UserError(
                f"{wrong}it has no {name}, and {target.backbone} needs one of {tuple(value.shape)}"
            )
    return left


def _renamed(state: State, model: Backbone) -> tuple[dict[str, Tensor], Shapes]:
    """The file's tensors under our names, taken one by one so that none is lost; and those that the
    backbone has no use for.
    """
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


def save_weights(path: Path, imported: Imported, target: ImportTarget, source: str) -> None:
    """Replaces a .safetensors file at once; its header says what the weights are for and where they come
    from.
    """
    header = file_header(target.backbone, target.attention, target.options, source)
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
        target: the backbone for tensors (by our names where `rename` makes them) and what the command asks
            for.
        rename: from the file's names to ours, where that takes the whole file: joined tensors.
    """

    target: Callable[[State, Wish], ImportTarget]
    rename: Callable[[State], dict[str, Tensor]] = dict

    def convert(self, state: State, wish: Wish, seed: int = 0) -> tuple[Imported, ImportTarget]:
        """Weights of the backbone that is meant, and that backbone. Raises UserError, see :func:`convert`."""
        try:
            state = self.rename(state)
        except UserError as error:
            raise UserError(f"{wish.source}: {error}") from error
        target = self.target(state, wish)
        return convert(state, target, seed, wish.source), target


def _dit_target(state: State, wish: Wish) -> ImportTarget:
    """The named backbone, or the public one; as the checkpoint was trained where nothing else is asked
    for.
    """
    attention, options = _dit_facts(state)
    return ImportTarget(
        wish.backbone or "dit_xl2",
        attention if wish.attention is None else wish.attention,
        {**options, **wish.options},
        re.compile(r"^pos_embed$|\.(attn\.(attention|lepe|gate|norm|q_norm|k_norm|out_norm)|cpe|dw_conv)\."),
    )


def _dit_facts(state: State) -> tuple[Entry, dict[str, Any]]:
    """Softmax, or the authors' MHLA with as many blocks as its mixing matrices have rows."""
    options = {"dwconv": True} if any(".dw_conv." in name for name in state) else {}
    rows = next((len(value) for name, value in state.items() if ".piece_attn." in name), None)
    if rows is None:
        return "softmax", options
    return {"name": "mhla", "preset": "release", "blocks": math.isqrt(rows)}, options


FAMILIES: dict[str, Family] = {"dit": Family(_dit_target), "wan": Family(wan_target, from_wan)}
