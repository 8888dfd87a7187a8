"""Our weights as one .safetensors file, or as a folder that other people's code opens: config.json and a
.safetensors file.
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

from mhla_lightning.backbones import IMAGE_CLASSIFIERS, CausalLM, VideoDiT, build_backbone
from mhla_lightning.conversion.formats.base import Export, Trained, shapes
from mhla_lightning.conversion.formats.classifier import timm
from mhla_lightning.conversion.formats.language import hf
from mhla_lightning.conversion.formats.plain import plain
from mhla_lightning.conversion.formats.video import diffusers, wan
from mhla_lightning.errors import UserError, unknown_name
from mhla_lightning.weights.disk_errors import complaint
from mhla_lightning.weights.files import weight_files
from mhla_lightning.weights.stored import Stored, open_safetensors
from mhla_lightning.weights.streaming import parts_of, write_safetensors
from mhla_lightning.weights.target import file_header

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class _Format:
    """A way to write weights.

    Attributes:
        export: makes it.
        needs: the models that it is for, in words.
        fits: whether it is for a backbone, by name and by what it builds.
        alone: whether the file of tensors says enough without the folder around it.
    """

    export: Callable[[Trained, nn.Module], Export]
    needs: str
    fits: Callable[[str, nn.Module], bool]
    alone: bool = False


_FORMATS = {
    "diffusers": _Format(
        diffusers, "video models", lambda name, model: isinstance(model, VideoDiT), alone=True
    ),
    "wan": _Format(wan, "video models", lambda name, model: isinstance(model, VideoDiT), alone=True),
    "plain": _Format(plain, "all models", lambda name, model: True, alone=True),
    "hf": _Format(hf, "language models", lambda name, model: isinstance(model, CausalLM)),
    "timm": _Format(
        timm,
        f"image classifiers ({', '.join(IMAGE_CLASSIFIERS)})",
        lambda name, model: name in IMAGE_CLASSIFIERS,
    ),
}
FORMATS = tuple(_FORMATS)


def read_imported(path: Path) -> Trained:
    """A file that `mhla import` wrote, or a folder that holds one.

    Raises:
        UserError: no such file, or one whose header does not say what it is for.
    """
    file = path
    if path.is_dir():
        files = weight_files(path, "RUN")
        if len(files) != 1:
            raise UserError(f"RUN {path} holds weights in {len(files)} parts, which mhla import never writes")
        file = files[0]
    if file.suffix != SUFFIX:
        raise UserError(f"RUN {file} is no run and no .safetensors file of mhla import")
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
            f"RUN {file} was not written by mhla import: its header does not name a backbone; import it first"
        ) from error
    return Trained(
        open_safetensors(file, "RUN"),
        backbone,
        attention,
        options,
        f"{file.name}, imported from {header.get('source', 'elsewhere')}",
    )


def plan(trained: Trained, format: str | None = None, one_file: bool = False) -> Export:
    """What is written.

    Args:
        format: one of FORMATS; None is diffusers for the folder of a video model and plain, our own names,
            for all else.
        one_file: the file of tensors stands alone.

    Raises:
        UserError: an unknown format, one that the backbone has not, weights that do not fit the backbone.
    """
    if format is not None and format not in FORMATS:
        raise UserError(unknown_name("--format", format, FORMATS))
    with torch.device("meta"):
        model = build_backbone(trained.backbone, attention=trained.attention, **trained.options)
    chosen = format or ("diffusers" if isinstance(model, VideoDiT) and not one_file else "plain")
    kind = _FORMATS[chosen]
    if not kind.fits(trained.backbone, model):
        raise UserError(
            f"--format {chosen} is for {kind.needs}, and {trained.source} holds a "
            f"{trained.backbone}; leave it out or take plain"
        )
    if one_file and not kind.alone:
        raise UserError(
            f"--format {chosen} writes a folder; name one with --to that does not end in {SUFFIX}"
        )
    export = kind.export(replace(trained, weights=_checked(trained, model)), model)
    if not (one_file and chosen == "plain"):
        return export
    return replace(
        export, metadata=file_header(trained.backbone, trained.attention, trained.options, trained.source)
    )


def bare(weights: Stored, source: str) -> Export:
    """Weights of which nothing is known but their names, as one file."""
    parts = parts_of(weights)
    return Export("", parts, {"format": "pt", "source": source}, {}, shapes(parts))


def is_file(target: Path) -> bool:
    """Whether --to names one file rather than a folder."""
    return target.suffix == SUFFIX


def write(export: Export, target: Path, dtype: torch.dtype | None = None) -> None:
    """Makes the folder, or the file where the name ends in .safetensors, at once: whole or not at all.

    Args:
        dtype: of the tensors; None leaves them.

    Raises:
        UserError: a target that holds something, or one that cannot be made; a disk that is full.
    """
    check_target(target)
    with _replacing(target) as temporary:
        if is_file(target):
            write_safetensors(temporary, export.parts, export.metadata, dtype)
            return
        temporary.mkdir()
        write_safetensors(temporary / export.file, export.parts, export.metadata, dtype)
        config = json.dumps(export.config, indent=2) + "\n"
        for name, content in {**export.files, "config.json": config.encode()}.items():
            (temporary / name).write_bytes(content)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A name beside `target`; what lies there at the end becomes the target. Raises UserError for the
    disk's errors.
    """
    temporary = target.absolute().parent / f".{target.name}-{os.getpid()}"
    try:
        yield temporary
        os.replace(temporary, target)  # an empty folder of that name gives way
    except OSError as error:
        raise UserError(complaint(error, temporary.parent)) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def check_target(target: Path) -> None:
    """Raises UserError for what cannot be written, or is there already."""
    if not target.absolute().parent.is_dir():
        raise UserError(f"--to {target}: there is no folder {target.absolute().parent}")
    if is_file(target) and target.exists():
        raise UserError(f"--to {target} exists already; name a new file")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to {target} holds something already; name a new folder")


def _checked(trained: Trained, model: nn.Module) -> Stored:
    """The weights in the model's order. Raises UserError where they are not all of the model's, and no
    others.
    """
    weights, state = trained.stored(), model.state_dict()
    own = {
        name: tuple(value.shape) for name, value in state.items() if value.is_floating_point()
    }  # an average holds nothing else
    given = {name: tuple(value.shape) for name, value in weights.outline.items() if value.is_floating_point()}
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if wrong:
        raise UserError(
            f"{trained.source} does not fit {trained.backbone}: {len(wrong)} tensors differ "
            f"({', '.join(wrong[:4])})"
        )
    return weights.renamed({name: name for name in state if name in weights})
