"""Any labelled image set of torchvision.datasets that comes in training and test parts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mhla_lightning.data.sources.base import Source, SourceSample, png_bytes
from mhla_lightning.errors import DataError, UserError, unknown_name

DEFAULT_ROOT = Path("~/.cache/torchvision")
_VALUES = {"train": ("train", "trainval"), "val": ("val", "valid", "test")}  # of the argument `split`, the first that the class takes


def open_torchvision(name: str, root: str | None = None) -> Source:
    """torchvision.datasets.NAME at `root` (default ~/.cache/torchvision), which torchvision downloads when it is not there.

    val is the set's validation part, else its test part. Raises UserError for an unknown name or a set that is not labelled images, DataError
    when its files are missing.
    """
    from torchvision import datasets

    usable = [known for known in datasets.__all__ if _has_parts(getattr(datasets, known))]
    if name not in usable:
        raise UserError(unknown_name("torchvision data set", name, usable))
    folder = str(Path(root or DEFAULT_ROOT).expanduser())
    parts = {split: _open_part(getattr(datasets, name), split, folder) for split in _VALUES}
    for part in parts.values():
        _demand_labelled(name, part)
    return Source(_class_names(parts), {split: _Part(name, part) for split, part in parts.items()})


def _parameters(dataset: Any) -> set[str]:
    return set(inspect.signature(dataset.__init__).parameters)


def _has_parts(dataset: Any) -> bool:
    return bool(_parameters(dataset) & {"train", "split"})


def _open_part(dataset: Any, split: str, root: str) -> Any:
    options: dict[str, Any] = {"download": True} if "download" in _parameters(dataset) else {}
    choices: Sequence[dict[str, Any]] = [{"split": value} for value in _VALUES[split]]
    if "train" in _parameters(dataset):
        choices = [{"train": split == "train"}]
    for choice in choices:
        try:
            return dataset(root, **choice, **options)
        except ValueError:  # this class has no part of that name
            continue
        except (OSError, RuntimeError) as error:
            raise DataError(f"torchvision's {dataset.__name__} is not in {root} and could not be downloaded ({error})") from error
    raise UserError(f"torchvision's {dataset.__name__} has no part named {' or '.join(_VALUES[split])}: export it to an image folder and pack that")


def _demand_labelled(name: str, part: Any) -> None:
    sample = part[0]
    if not (isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[0], Image.Image) and isinstance(sample[1], int)):
        raise UserError(f"torchvision's {name} does not give (image, class number), so it cannot be packed as labelled images")


def _class_names(parts: dict[str, Any]) -> tuple[str, ...]:
    """The set's own names, or the numbers where it has none."""
    names = getattr(parts["train"], "classes", None)
    if names is None:
        names = range(1 + max(label for part in parts.values() for _, label in part))
    return tuple(str(name) for name in names)


@dataclass(frozen=True)
class _Part:
    """One part of a torchvision set; images are stored as PNG, which loses nothing."""

    name: str
    part: Any

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, position: int) -> SourceSample:
        image, label = self.part[position]
        return SourceSample(f"{self.name}-{position}", png_bytes(image), "png", int(label))
