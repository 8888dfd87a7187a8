"""Write our weights as one .safetensors file, or as a folder that other libraries open.

The folder holds config.json and a .safetensors file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mhla_lightning.backbones import IMAGE_CLASSIFIERS, CausalLM, SanaDiT, VideoDiT, build_backbone
from mhla_lightning.conversion.formats.base import Export, TrainedModel, shapes
from mhla_lightning.conversion.formats.classifier import timm
from mhla_lightning.conversion.formats.language import hf
from mhla_lightning.conversion.formats.plain import plain
from mhla_lightning.conversion.formats.sana import sana_diffusers
from mhla_lightning.conversion.formats.video import diffusers, wan
from mhla_lightning.errors import UserError, unknown_name
from mhla_lightning.runs.disk_errors import complaint
from mhla_lightning.weights.files import weight_files
from mhla_lightning.weights.stored import Stored, open_safetensors
from mhla_lightning.weights.streaming import parts_of, write_safetensors
from mhla_lightning.weights.target import file_header

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class _Format:
    """One export format.

    Attributes:
        export: builds the content of the file or folder.
        needs: the models it is for, in words.
        fits: whether it is for a backbone, by its name and its built model.
        alone: whether its .safetensors file is usable without the folder around it.
    """

    export: Callable[[TrainedModel, nn.Module], Export]
    needs: str
    fits: Callable[[str, nn.Module], bool]
    alone: bool = False


def _diffusers(trained: TrainedModel, model: nn.Module) -> Export:
    return (sana_diffusers if isinstance(model, SanaDiT) else diffusers)(trained, model)


# The first that fits is what a folder has where nobody names a format.
_FORMATS = {
    "diffusers": _Format(
        _diffusers,
        "video models and SANA",
        lambda name, model: isinstance(model, VideoDiT | SanaDiT),
        alone=True,
    ),
    "wan": _Format(wan, "video models", lambda name, model: isinstance(model, VideoDiT), alone=True),
    "hf": _Format(hf, "language models", lambda name, model: isinstance(model, CausalLM)),
    "timm": _Format(
        timm,
        f"image classifiers ({', '.join(IMAGE_CLASSIFIERS)})",
        lambda name, model: name in IMAGE_CLASSIFIERS,
    ),
    "plain": _Format(plain, "all models", lambda name, model: True, alone=True),
}
FORMATS = tuple(_FORMATS)


def read_imported(path: Path) -> TrainedModel:
    """Open a file that `mhla import` wrote, or a folder that holds one.

    Raises:
        UserError: no such file, or a header that names no backbone.
    """
    file = path
    if path.is_dir():
        files = weight_files(path, "run")
        if len(files) != 1:
            raise UserError(
                str(path), f"this folder holds weights in {len(files)} files, and mhla import writes one"
            )
        file = files[0]
    if file.suffix != SUFFIX:
        raise UserError(str(file), f"neither a run nor a {SUFFIX} file of mhla import")
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
        backbone, attention, options = (
            header["backbone"],
            json.loads(header["attention"]),
            json.loads(header["backbone_options"]),
        )
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        raise UserError(
            str(file), "mhla import did not write this file: its header names no backbone; import it first"
        ) from error
    return TrainedModel(
        open_safetensors(file, "run"),
        backbone,
        attention,
        options,
        f"{file.name}, imported from {header.get('source', 'elsewhere')}",
    )


def plan_export(trained: TrainedModel, format: str | None = None, one_file: bool = False) -> Export:
    """Build the content of an export.

    Args:
        trained: the weights and their model.
        format: one of FORMATS. None means plain (our own names) for one file. For a folder it means hf for
            language models, timm for image classifiers, diffusers for models of text, else plain.
        one_file: write the .safetensors file alone.

    Raises:
        UserError: an unknown format, a format for other models, or weights that do not fit the backbone.
    """
    if format is not None and format not in FORMATS:
        raise UserError("format", unknown_name("format", format, FORMATS))
    with torch.device("meta"):
        model = build_backbone(trained.backbone, attention=trained.attention, **trained.options)
    fitting_ones = [name for name, kind in _FORMATS.items() if kind.fits(trained.backbone, model)]
    chosen = format or ("plain" if one_file else fitting_ones[0])
    kind = _FORMATS[chosen]
    if not kind.fits(trained.backbone, model):
        raise UserError(
            "format",
            f"{chosen} is for {kind.needs}, and {trained.source} holds a {trained.backbone}; valid: "
            f"{', '.join(fitting_ones)}, or leave it out",
        )
    if one_file and not kind.alone:
        raise UserError("format", f"{chosen} writes a folder; the name in `to` must not end in {SUFFIX}")
    export = kind.export(replace(trained, weights=fitting(trained, model)), model)
    if not one_file:
        return export
    export = replace(export, opened_by=None)  # those calls open folders
    if chosen != "plain":
        return export
    return replace(
        export, metadata=file_header(trained.backbone, trained.attention, trained.options, trained.source)
    )


def bare(weights: Stored, source: str) -> Export:
    """Plan one file of weights of which only the names are known."""
    parts = parts_of(weights)
    return Export("", parts, {"format": "pt", "source": source}, {}, shapes(parts))


def is_file(to: Path) -> bool:
    """Return whether `to` names one file rather than a folder."""
    return to.suffix == SUFFIX


def write(export: Export, to: Path, dtype: torch.dtype | None = None) -> None:
    """Write the folder, or the file if the name ends in .safetensors, completely or not at all.

    Args:
        export: the content.
        to: the file or folder.
        dtype: of the tensors; None keeps theirs.

    Raises:
        UserError: `to` exists with content or cannot be made, or the disk is full.
    """
    check_target(to)
    with _replacing(to) as temporary:
        if is_file(to):
            write_safetensors(temporary, export.parts, export.metadata, dtype)
            return
        temporary.mkdir()
        write_safetensors(temporary / export.file, export.parts, export.metadata, dtype)
        config = json.dumps(export.config, indent=2) + "\n"
        for name, content in {**export.files, "config.json": config.encode()}.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(content)


@contextmanager
def _replacing(to: Path) -> Iterator[Path]:
    """Yield a temporary name beside `to`; its content replaces `to` at the end.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    temporary = to.absolute().parent / f".{to.name}-{os.getpid()}"
    try:
        yield temporary
        os.replace(temporary, to)  # this also replaces an empty folder
    except OSError as error:
        raise UserError("to", complaint(error, temporary.parent)) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def check_target(to: Path) -> None:
    """Check that `to` can be written and holds nothing yet.

    Raises:
        UserError: its parent folder is missing, or it has content.
    """
    if not to.absolute().parent.is_dir():
        raise UserError("to", f"{to} is in a folder that does not exist, {to.absolute().parent}")
    if is_file(to) and to.exists():
        raise UserError("to", f"{to} exists already; name a new file")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError("to", f"{to} is not empty; name a new folder")


def fitting(trained: TrainedModel, model: nn.Module) -> Stored:
    """Return the weights in the model's order.

    Raises:
        UserError: they are not exactly the model's.
    """
    weights, state = trained.stored(), model.state_dict()
    # An average holds floating-point tensors only.
    own = {name: tuple(value.shape) for name, value in state.items() if value.is_floating_point()}
    given = {name: tuple(value.shape) for name, value in weights.outline.items() if value.is_floating_point()}
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if wrong:
        raise UserError(
            trained.source,
            f"these weights do not fit {trained.backbone}: {len(wrong)} tensors differ "
            f"({', '.join(wrong[:4])})",
        )
    return weights.renamed({name: name for name in state if name in weights})
