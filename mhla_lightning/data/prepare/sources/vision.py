"""Labelled image sets of torchvision.datasets that come in training and test parts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.pixels import BadImage
from mhla_lightning.data.prepare.samples import Sample, image_sample
from mhla_lightning.data.prepare.sources.base import SampleSource, files_fingerprint, png_bytes
from mhla_lightning.data.prepare.walking import walk
from mhla_lightning.errors import DataError, UserError, unknown_name

DEFAULT_ROOT = Path("~/.cache/torchvision")
# Values of the argument `split`; the first that the class takes is used.
_VALUES = {"train": ("train", "trainval"), "val": ("val", "valid", "test")}


def open_torchvision(name: str, root: str | None = None) -> SampleSource:
    """Open torchvision.datasets.NAME; torchvision downloads it when it is missing.

    val is the set's validation part, else its test part.

    Args:
        name: of the class in torchvision.datasets.
        root: folder of the data; None is ~/.cache/torchvision.

    Raises:
        UserError: an unknown name, or a set without labelled images.
        DataError: its files are missing and cannot be downloaded.
    """
    import torchvision
    from torchvision import datasets

    usable = [known for known in datasets.__all__ if _has_parts(getattr(datasets, known))]
    if name not in usable:
        raise UserError("source", unknown_name("torchvision data set", name, usable))
    folder = Path(root or DEFAULT_ROOT).expanduser().absolute()
    parts = {split: _open_part(name, split, str(folder), download=True) for split in _VALUES}
    for part in parts.values():
        _demand_labelled(name, part)
    header = ShardIndex("images", (), _class_names(parts))
    listed = files_fingerprint(folder, walk(folder, _every, _every).files)
    places = {
        split: _Places(header, name, str(folder), split, range(len(part))) for split, part in parts.items()
    }
    return SampleSource(header, {**places}, f"torchvision {torchvision.__version__} {listed}")


def _every(name: str) -> bool:
    return True


def _parameters(dataset: Any) -> set[str]:
    return set(inspect.signature(dataset.__init__).parameters)


def _has_parts(dataset: Any) -> bool:
    return bool(_parameters(dataset) & {"train", "split"})


def _open_part(name: str, split: str, root: str, download: bool) -> Any:
    from torchvision import datasets

    dataset = getattr(datasets, name)
    options: dict[str, Any] = {"download": download} if "download" in _parameters(dataset) else {}
    choices: Sequence[dict[str, Any]] = [{"split": value} for value in _VALUES[split]]
    if "train" in _parameters(dataset):
        choices = [{"train": split == "train"}]
    for choice in choices:
        try:
            return dataset(root, **choice, **options)
        except ValueError:  # this class has no part of that name
            continue
        except (OSError, RuntimeError) as error:
            raise DataError(
                root, f"torchvision's {dataset.__name__} is missing and could not be downloaded ({error})"
            ) from error
    raise UserError(
        "source",
        f"torchvision's {dataset.__name__} has no part named {' or '.join(_VALUES[split])}; "
        "export it to an image folder and pack that",
    )


@lru_cache(maxsize=2)
def _opened(name: str, split: str, root: str) -> Any:
    """Return a part that is on the disk: each process opens it once, rather than receive it."""
    return _open_part(name, split, root, download=False)


def _demand_labelled(name: str, part: Any) -> None:
    sample = part[0]
    if not (
        isinstance(sample, tuple)
        and len(sample) == 2
        and isinstance(sample[0], Image.Image)
        and isinstance(sample[1], int)
    ):
        raise UserError(
            "source",
            f"torchvision's {name} does not give (image, class number), so it cannot be packed as "
            "labelled images",
        )


def _class_names(parts: dict[str, Any]) -> tuple[str, ...]:
    """Return the names that the set gives, or numbers where it has none."""
    names = getattr(parts["train"], "classes", None)
    if names is None:
        names = range(1 + max(label for part in parts.values() for _, label in part))
    return tuple(str(name) for name in names)


@dataclass(frozen=True)
class _Places:
    """Some positions of one part of a torchvision set.

    Images are stored as PNG, which loses nothing.
    """

    header: ShardIndex
    name: str
    root: str
    split: str
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Sample]:
        part = _opened(self.name, self.split, self.root)
        for position in self.positions:
            image, label = part[position]
            try:
                encoded = png_bytes(image)
            except BadImage as reason:
                raise DataError(self.root, f"image {position} of {self.split}: {reason}") from reason
            yield image_sample(self.header, f"{self.name}-{position}", encoded, int(label))

    def take(self, positions: Sequence[int]) -> _Places:
        return _Places(
            self.header,
            self.name,
            self.root,
            self.split,
            [self.positions[position] for position in positions],
        )
