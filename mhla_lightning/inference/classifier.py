"""Put an image classifier of a run to use: likeliest classes of image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mhla_lightning.data import ImageDataModule
from mhla_lightning.data.pixels import FILE_FORMATS, BadImage, decode
from mhla_lightning.data.prepare.walking import files_below, visible
from mhla_lightning.data.transforms import Augmentation, eval_transform
from mhla_lightning.errors import UserError
from mhla_lightning.inference.rebuilding import load_backbone, open_run
from mhla_lightning.inference.weights import FoundRun
from mhla_lightning.runs.classes import kept_classes
from mhla_lightning.tasks import ClassificationTask

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
"""Of files that are taken from folders; a file that is named itself may have any."""


@dataclass(frozen=True)
class ImageClassifierRun(FoundRun):
    """A run of an image classifier.

    Attributes:
        task: built from recipe.yaml, without weights.
        image_size: (height, width) in pixels that the model takes.
        augmentation: of the recipe; its preprocessing of validation is used.
        classes: names, by label.
    """

    task: ClassificationTask
    image_size: tuple[int, int]
    augmentation: Augmentation
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Classified:
    """An image file and its likeliest classes, the likeliest first.

    Attributes:
        file: as it was given or found.
        classes: their names.
        probabilities: of these classes.
        image: upright RGB, before preprocessing; None where it cannot be used.
        problem: why it cannot be used; None where it can.
    """

    file: Path
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    image: Image.Image | None = None
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, without pixels."""
        if self.problem is not None:
            return {"file": str(self.file), "problem": self.problem}
        rated = {"classes": list(self.classes), "probabilities": list(self.probabilities)}
        return {"file": str(self.file), **rated}


def find_classifier(
    run: str, *, runs: str | None = None, ckpt: str | None = None, ema: bool = True
) -> ImageClassifierRun:
    """Find a run and its checkpoint, and build the task without weights.

    Args:
        run, runs, ckpt, ema: see :func:`open_run`.

    Raises:
        UserError: no such run or checkpoint, or it trains no classifier of images.
    """
    needed = "predict needs an image classifier"
    opened = open_run(run, ClassificationTask, needed, runs, ckpt, ema)
    folder, task, data = opened.folder, opened.task, opened.data
    if not isinstance(data, ImageDataModule):
        raise UserError(folder.run_id, f"reads its data by {type(data).__name__}; {needed}, ImageDataModule")
    classes = kept_classes(folder.path, task.num_classes)
    return ImageClassifierRun(folder, opened.weights, task, data.image_size, data.augmentation, classes)


def image_files(places: Sequence[str]) -> list[Path]:
    """Return files, and the image files in and below folders, each folder's sorted by name.

    Args:
        places: files and folders.

    Raises:
        UserError: a place that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = files_below(place, lambda name: visible(name) and name.lower().endswith(_SUFFIXES))
            if not inside:
                raise UserError("images", f"{place} holds no images ({', '.join(_SUFFIXES)})")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise UserError("images", f"{place} is no file and no folder")
    return found


def classify(
    found: ImageClassifierRun, files: Sequence[Path], top_k: int, batch_size: int, device: torch.device
) -> Iterator[Classified]:
    """Yield the likeliest classes of each file, in order; the pixels are those of validation.

    Args:
        found: the run.
        files: images.
        top_k: classes of each, at most all.
        batch_size: images at once.
        device: of the model.

    Raises:
        UserError: the weights belong to another model.
    """
    task = load_backbone(found.task, found.weights, device)
    prepare = eval_transform(found.image_size, found.augmentation)
    for first in range(0, len(files), batch_size):
        read = [_read(file) for file in files[first : first + batch_size]]
        pixels = [prepare(one.image) for one in read if one.image is not None]
        if pixels:
            with torch.inference_mode():
                logits = task(torch.stack(pixels).to(device)).float()
            best = logits.softmax(-1).topk(min(top_k, task.num_classes))
            rows = iter(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        for one in read:
            if one.image is None:
                yield one
            else:
                labels, probabilities = next(rows)
                names = tuple(found.classes[label] for label in labels)
                yield Classified(one.file, names, tuple(probabilities), one.image)


def _read(file: Path) -> Classified:
    """Decode a file as `mhla data pack` and training do."""
    try:
        return Classified(file, image=decode(file.read_bytes(), FILE_FORMATS).image.convert("RGB"))
    except OSError as error:
        return Classified(file, problem=f"cannot be read ({error.strerror})")
    except BadImage as reason:
        return Classified(file, problem=f"is no image that can be used ({reason})")
