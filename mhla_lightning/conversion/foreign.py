"""Convert checkpoints of other projects to weights of our backbones.

Every tensor is accounted for: copied, new, or left over.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mhla_lightning.backbones import Backbone, build_backbone, known_geometry
from mhla_lightning.backbones.adapting import source_geometry
from mhla_lightning.conversion.sana import CLASSES as SANA_CLASSES
from mhla_lightning.conversion.sana import sana_target
from mhla_lightning.conversion.wan import CLASSES as WAN_CLASSES
from mhla_lightning.conversion.wan import wan_geometry, wan_target
from mhla_lightning.errors import UserError
from mhla_lightning.finite import check_finite
from mhla_lightning.runs.folder import FORMAT, replacing
from mhla_lightning.weights.adapted import Adapted, DoubtfulWeights, Geometry, WeightState
from mhla_lightning.weights.facts import PIXELS
from mhla_lightning.weights.sana_names import from_sana
from mhla_lightning.weights.target import Entry, ImportTarget, State, Wish, file_header
from mhla_lightning.weights.wan_names import from_wan

Shapes = list[tuple[str, tuple[int, ...]]]


STATES = ("copied", "resampled", "created", "left")
"""Fates of a tensor in an import."""


@dataclass
class Imported:
    """The result of an import: the weights, and the fate of every tensor.

    Attributes:
        weights: all tensors of the target, by our names.
        copied: (name, shape) of tensors from the file.
        resampled: of tensors from the file that were resampled to another grid.
        created: of tensors with the target's own initialisation.
        left: of tensors of the file that the target does not use.
        notes: what else to know, in words.
    """

    weights: dict[str, Tensor]
    copied: Shapes = field(default_factory=list)
    resampled: Shapes = field(default_factory=list)
    created: Shapes = field(default_factory=list)
    left: Shapes = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of a table: see :func:`table_rows`."""
        return table_rows({state: getattr(self, state) for state in STATES})

    def as_dict(self) -> dict[str, Any]:
        """Return every name and the rows, for a JSON file."""
        names = {state: [name for name, _ in getattr(self, state)] for state in STATES}
        return {"format": FORMAT, **names, "rows": self.rows()}


def table_rows(parts: Mapping[str, Shapes]) -> list[dict[str, Any]]:
    """Count tensors by state, name and shape, all layers together.

    Args:
        parts: (name, shape) of the tensors of each state.

    Returns:
        a row with state, name, tensors, shape and parameters for each kind of tensor.
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


def convert(
    state: State,
    target: ImportTarget,
    seed: int = 0,
    source: str = "the checkpoint",
    geometry: Geometry | None = None,
) -> Imported:
    """Convert the tensors of a foreign checkpoint to weights of `target`.

    Tensors that the checkpoint cannot have (mixing, gate, convolutions) keep their initialisation.

    Args:
        state: the checkpoint's tensors, by our names or by names that the backbone knows.
        target: the backbone.
        seed: of the initialisation, so that the same command writes the same file.
        source: the checkpoint's path, the key of errors.
        geometry: of the checkpoint's model; None takes what the state tells.

    Raises:
        UserError: a tensor that is not finite or has another shape, one that is missing, one too many, or one
            that is there twice.
    """
    with torch.device("meta"):
        model = _build(target)
    own = model.state_dict()
    try:
        found, left = _renamed(state, cast(Backbone, model), geometry or source_geometry(state))
    except UserError as error:
        raise UserError(source, error.reason if error.key == "state" else str(error)) from error
    left += _without_place(found, own, target, source)
    created = [name for name in own if name not in found]
    weights = _fresh(target, seed, created) if created else {}
    weights |= {name: value.to(own[name].dtype).contiguous() for name, value in found.items() if name in own}
    check_finite(weights, source)  # also what has become infinite in our precision
    return Imported(
        {name: weights[name] for name in own},
        copied=_shapes(
            (name, value) for name, value in own.items() if name in found and name not in found.resampled
        ),
        resampled=_shapes((name, own[name]) for name in found.resampled if name in own),
        created=_shapes((name, own[name]) for name in created),
        left=left,
        notes=found.warnings(),
    )


def _build(target: ImportTarget) -> nn.Module:
    return build_backbone(target.backbone, attention=target.attention, **target.options)


def _fresh(target: ImportTarget, seed: int, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the target's own initialisation of these tensors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = _build(target).state_dict()
    return {name: weights[name] for name in names}


def _without_place(found: State, own: State, target: ImportTarget, source: str) -> Shapes:
    """List the file's tensors that the target may ignore.

    Raises:
        UserError: any other difference between the file and the target.
    """
    wrong, left = "this checkpoint has another size: ", []
    for name, value in found.items():
        if name not in own:
            if not target.optional.search(name) and (name.startswith("blocks.") or not target.stray):
                raise UserError(
                    source, f"{wrong}{name} {tuple(value.shape)} has no place in {target.backbone}"
                )
            left.append((name, tuple(value.shape)))
        elif own[name].shape != value.shape:
            needed = tuple(own[name].shape)
            raise UserError(
                source, f"{wrong}{name} is {tuple(value.shape)}, and {target.backbone} needs {needed}"
            )
    for name, value in own.items():
        if name not in found and not target.optional.search(name):
            raise UserError(
                source, f"{wrong}it has no {name}, and {target.backbone} needs one of {tuple(value.shape)}"
            )
    return left


def _renamed(state: State, model: Backbone, geometry: Geometry) -> tuple[Adapted, Shapes]:
    """Rename the file's tensors one at a time, and list those that the backbone ignores.

    Raises:
        UserError: two tensors with the same name of ours.
    """
    found = Adapted()
    left: Shapes = []
    for name, value in state.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DoubtfulWeights)  # the notes of the import say it
            ours = model.adapt_state_dict({name: value}, geometry)
        for renamed in ours.keys() & found.keys():
            raise UserError(
                renamed, f"the checkpoint holds two tensors for this name; the second is called {name}"
            )
        found.update(ours)
        found.resampled |= ours.resampled
        found.doubts |= ours.doubts
        if not ours:
            left.append((name, tuple(value.shape)))
    return found, left


def _shapes(tensors: Iterable[tuple[str, Tensor]]) -> Shapes:
    return [(name, tuple(value.shape)) for name, value in tensors]


def save_weights(
    path: Path,
    imported: Imported,
    target: ImportTarget,
    source: str,
    pixels: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Replace a .safetensors file completely or not at all.

    Args:
        path: of the file.
        imported: the weights.
        target: their backbone, which the header names.
        source: their origin, for the header.
        pixels: mean and std of the images that they were trained on; None where they are not known.
    """
    header = file_header(target.backbone, target.attention, target.options, source)
    if pixels:
        header[PIXELS] = json.dumps({name: list(values) for name, values in pixels.items()})
    with replacing(path) as temporary:
        save_file(imported.weights, temporary, metadata=header)


@dataclass(frozen=True)
class CheckpointFamily:
    """One kind of foreign checkpoint.

    Attributes:
        target: chooses the backbone from the tensors (by our names if `rename` is given) and the request.
        rename: maps the file's names to ours where this takes the whole file, such as for joined tensors.
        geometry: of the file's model, by tensors of our names; None where only the file tells it.
        classes: values of `_class_name` in the config.json of such a checkpoint.
    """

    target: Callable[[State, Wish], ImportTarget]
    rename: Callable[[State], dict[str, Tensor]] = dict
    geometry: Callable[[State, Wish], Geometry | None] = lambda state, wish: None
    classes: tuple[str, ...] = ()

    def convert(self, state: State, wish: Wish, seed: int = 0) -> tuple[Imported, ImportTarget]:
        """Convert a checkpoint; return the weights and their backbone.

        Raises:
            UserError: see :func:`convert`.
        """
        told = source_geometry(state, known_geometry(state) if isinstance(state, WeightState) else None)
        try:
            state = self.rename(state)
        except UserError as error:
            raise UserError(wish.source, str(error)) from error
        target = self.target(state, wish)
        geometry = self.geometry(state, wish) or told
        return convert(state, target, seed, wish.source, geometry), target


def _dit_target(state: State, wish: Wish) -> ImportTarget:
    """Return the requested backbone, or DiT-XL/2 with the attention of the checkpoint."""
    attention, options = _dit_facts(state)
    return ImportTarget(
        wish.backbone or "dit_xl2",
        attention if wish.attention is None else wish.attention,
        {**options, **wish.options},
        re.compile(r"^pos_embed$|\.(attn\.(attention|lepe|gate|norm|q_norm|k_norm|out_norm)|cpe|dw_conv)\."),
    )


def _dit_facts(state: State) -> tuple[Entry, dict[str, Any]]:
    """Return softmax, or the MHLA authors' operator with one block per row of a mixing matrix."""
    options = {"dwconv": True} if any(".dw_conv." in name for name in state) else {}
    rows = next((len(value) for name, value in state.items() if ".piece_attn." in name), None)
    if rows is None:
        return "softmax", options
    return {"name": "mhla", "preset": "release", "blocks": math.isqrt(rows)}, options


FAMILIES: dict[str, CheckpointFamily] = {
    "dit": CheckpointFamily(_dit_target),
    "sana": CheckpointFamily(sana_target, from_sana, classes=SANA_CLASSES),
    "wan": CheckpointFamily(wan_target, from_wan, wan_geometry, WAN_CLASSES),
}
