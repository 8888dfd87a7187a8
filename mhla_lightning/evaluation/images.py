"""Read images to evaluate: sample files, reference files in ADM's layout, and shards.

Nothing is unpickled.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import numpy as np

from mhla_lightning.data.corpus import Corpus
from mhla_lightning.data.index import read_index
from mhla_lightning.data.kinds import Images
from mhla_lightning.data.modules.images import ImageDataModule
from mhla_lightning.data.prepare.places import find_splits
from mhla_lightning.data.split import Split
from mhla_lightning.data.stream import EvalStream
from mhla_lightning.data.transforms import Augmentation
from mhla_lightning.errors import DataError
from mhla_lightning.evaluation.image_metrics import FeatureNetwork, Gaussian, Reference

_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
# As for validation: resized and cropped to the middle, nothing else.
_PIXELS = Augmentation(crop_pct=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
_BATCH = 64


def read_npz(path: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read those of the named arrays that an npz file holds.

    Raises:
        DataError: the file cannot be read, or holds Python objects.
    """
    try:
        with open(path, "rb") as file:  # numpy would leave a damaged file open
            if not is_zipfile(file):
                raise ValueError("it is no zip file")
            file.seek(0)
            arrays = np.load(file, allow_pickle=False)
            return {name: arrays[name] for name in names if name in arrays.files}
    except FileNotFoundError as error:
        raise DataError(path, "there is no such file") from error
    except (OSError, ValueError, EOFError, BadZipFile, MemoryError, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(path, f"this is no readable npz file of arrays ({reason})") from error


def read_samples(path: str) -> np.ndarray:
    """Read the images of a sample file (arr_0): uint8 (N, H, W, 3).

    Raises:
        DataError: the file holds no such images.
    """
    found = read_npz(path, ("arr_0",))
    if "arr_0" not in found:
        raise DataError(
            path, "holds no arr_0; samples are uint8 (N, H, W, 3) under that name, as mhla sample writes them"
        )
    return _checked(found["arr_0"], path)


def _checked(images: np.ndarray, path: str) -> np.ndarray:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise DataError(path, f"arr_0 is {images.dtype} {images.shape}; images are uint8 (N, H, W, 3)")
    return images


def read_reference(path: str, network: FeatureNetwork, size: tuple[int, int]) -> Reference:
    """Read statistics of real images.

    Args:
        path: a reference file of ADM, an npz file of images, or a folder or address of shards (the val
            split if there are several).
        network: computes the features.
        size: (height, width) of the samples, to which images of shards are resized and cropped.

    Raises:
        DataError: none of these, or statistics without images for a network that did not make them.
    """
    if not path.endswith(".npz"):
        images, name = read_shards(path, size)
        return Reference.of(name, network(images))
    found = read_npz(path, (*_STATISTICS, "arr_0"))
    name = Path(path).name
    if network.published and "mu" in found and "sigma" in found:
        spatial = (
            _gaussian(found, "mu_s", "sigma_s", path) if "mu_s" in found and "sigma_s" in found else None
        )
        features = network(_checked(found["arr_0"], path)).pooled if "arr_0" in found else None
        return Reference(name, _gaussian(found, "mu", "sigma", path), spatial, features)
    if "arr_0" not in found:
        needed = "arr_0 (images)" if not network.published else "arr_0 (images) or mu and sigma"
        raise DataError(
            path,
            f"holds {', '.join(found) or 'none of the arrays of a reference'}; for features of "
            f"{network.name} it "
            f"must hold {needed}",
        )
    return Reference.of(name, network(_checked(found["arr_0"], path)))


def _gaussian(found: dict[str, np.ndarray], mean: str, covariance: str, path: str) -> Gaussian:
    mu, sigma = found[mean], found[covariance]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise DataError(
            path,
            f"{mean} {mu.dtype} {mu.shape} and {covariance} {sigma.dtype} {sigma.shape} are no mean and "
            "covariance",
        )
    return Gaussian(mu, sigma)


def read_shards(path: str, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Read the images of a split of shards, the val split if there are several.

    Returns:
        images uint8 (N, *size, 3), and the name of the split.

    Raises:
        DataError: no shards of images.
    """
    splits = find_splits(path)
    name = "val" if "val" in splits else next(iter(splits))
    index = read_index(splits[name])
    kind = Images(len(index.classes), size, _PIXELS)
    kind.check(index, path)
    images, _ = _decode([Split(index, splits[name])], kind)
    return images, f"{path} ({name})" if len(splits) > 1 else path


def validation_images(data: ImageDataModule) -> np.ndarray:
    """Read the val split of a data module, processed as for validation: uint8 (N, H, W, 3).

    Raises:
        UserError: there is no val split.
    """
    return validation_samples(data)[0]


def validation_samples(data: ImageDataModule) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of :func:`validation_images`, and their labels (N,)."""
    augmentation = Augmentation(
        crop_pct=data.augmentation.crop_pct,
        crop_mode=data.augmentation.crop_mode,
        eval_interpolation=data.augmentation.eval_interpolation,
        mean=_PIXELS.mean,
        std=_PIXELS.std,
    )
    return _decode(data.splits("val"), Images(len(data.index("val").classes), data.image_size, augmentation))


def _decode(splits: list[Split], kind: Images) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for batch in EvalStream(Corpus(splits), kind, _BATCH):
        real = batch["weight"] > 0
        images.append((batch["image"][real] * 255).round().byte().permute(0, 2, 3, 1).numpy())
        labels.append(batch["label"][real].numpy())
    return np.concatenate(images), np.concatenate(labels)
