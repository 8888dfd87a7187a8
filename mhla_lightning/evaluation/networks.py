"""The networks behind image_metrics: Inception as in ADM, or a classifier run of ours."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mhla_lightning.data.modules.images import ImageDataModule
from mhla_lightning.data.transforms import eval_transform
from mhla_lightning.errors import UserError, missing_extra
from mhla_lightning.evaluation.image_metrics import FeatureNetwork, ImageFeatures
from mhla_lightning.inference.rebuilding import open_run
from mhla_lightning.inference.weights import FoundRun
from mhla_lightning.tasks import ClassificationTask

INCEPTION = "inception"
_BATCH = 64
_SPATIAL_CHANNELS = 7  # as in ADM's sFID


def open_network(
    features: str, runs: str | None = None, device: torch.device | str = "cpu"
) -> FeatureNetwork:
    """Load a feature network.

    Args:
        features: `inception`, or a classifier run by id or folder.
        runs: folder of all run folders; None means $MHLA_RUNS, else ./runs.
        device: of the network.

    Raises:
        UserError: no such run, no classifier, no package, or no weights.
    """
    if features == INCEPTION:
        return Inception(device)
    return OwnFeatures(find_classifier(features, runs), device)


class Inception:
    """The Inception network of published FIDs, by torch-fidelity.

    It has the weights, the resizing and the average pooling of the TensorFlow graph. sFID uses the first 7
    channels of `mixed_6/conv`, the inception score the class logits without their bias, as in ADM's
    evaluator.

    Raises:
        UserError: the package or the weights are missing; nothing is downloaded.
    """

    name, published = "Inception", True

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (
                URL_INCEPTION_V3,
                FeatureExtractorInceptionV3,
            )
        except ImportError as error:
            raise UserError("features", missing_extra("torch-fidelity", "eval", "inception")) from error
        path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
        if not path.is_file():
            raise UserError(
                "features",
                f"inception needs its weights at {path}: download {URL_INCEPTION_V3} to there, or name a "
                "classifier run",
            )
        try:
            # torch-fidelity itself would unpickle anything.
            torch.load(path, map_location="meta", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(
                str(path), f"this file holds no plain tensors ({str(error).splitlines()[0]})"
            ) from error
        self._network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path)).to(
            device
        )
        self._device, self._seen = device, torch.empty(0)
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: Tensor) -> None:
        self._seen = output[:, :_SPATIAL_CHANNELS]

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> ImageFeatures:
        """Return 2048 pooled and 7 x 17 x 17 spatial features and 1008 probabilities of each image.

        Args:
            images: uint8 (N, H, W, 3).
        """
        parts = []
        for first in range(0, len(images), _BATCH):
            batch = torch.from_numpy(images[first : first + _BATCH]).permute(0, 3, 1, 2).to(self._device)
            pooled, logits = self._network(batch)
            parts.append((pooled, channels_last(self._seen), logits))
        return _features(parts)


@dataclass(frozen=True)
class ClassifierRun(FoundRun):
    """A run of an image classifier.

    Attributes:
        task: built from recipe.yaml, without weights.
        data: defines how images are resized and normalised; no shards are opened.
    """

    task: ClassificationTask
    data: ImageDataModule

    @property
    def sha256(self) -> str:
        """Return the hash of the file of weights."""
        with self.weights.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def find_classifier(run: str, runs: str | None = None) -> ClassifierRun:
    """Find a run and its newest checkpoint, and build the task without weights.

    Averaged weights are taken where the checkpoint has them.

    Args:
        run, runs: see :func:`open_run`.

    Raises:
        UserError: no such run, no checkpoint yet, or no image classifier.
    """
    opened = open_run(run, ClassificationTask, "features come from an image classifier", runs)
    return ClassifierRun(opened.folder, opened.weights, opened.task, cast(ImageDataModule, opened.data))


class OwnFeatures:
    """A classifier run of ours as a feature network.

    Its features are the input of its last layer, its last feature map and its probabilities. Images of any
    size are resized, cropped and normalised as in the run's validation. The registry's image classifiers
    have timm's methods `forward_features` and `forward_head`.

    Raises:
        UserError: the weights belong to another model.
    """

    published = False

    def __init__(self, found: ClassifierRun, device: torch.device | str = "cpu") -> None:
        self.name, self._device = f"classifier {found.run.run_id}", device
        self.classes = found.task.num_classes
        self._transform = eval_transform(found.data.image_size, found.data.augmentation)
        found.task.configure_model()
        assert found.task.backbone is not None
        found.weights.load(found.task.backbone)
        self._backbone: Any = found.task.backbone.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> ImageFeatures:
        """Return the features of images, uint8 (N, H, W, 3)."""
        parts = []
        for first in range(0, len(images), _BATCH):
            batch = torch.stack(
                [self._transform(Image.fromarray(image)) for image in images[first : first + _BATCH]]
            ).to(self._device)
            last = self._backbone.forward_features(batch)
            spatial = (
                channels_last(last[:, :_SPATIAL_CHANNELS])
                if last.dim() == 4
                else last[..., :_SPATIAL_CHANNELS].flatten(1)
            )
            parts.append(
                (
                    self._backbone.forward_head(last, pre_logits=True),
                    spatial,
                    self._backbone.forward_head(last),
                )
            )
        return _features(parts)


def channels_last(maps: Tensor) -> Tensor:
    """Flatten (N, C, H, W) to (N, H W C), TensorFlow's order, which ADM's files use."""
    return maps.permute(0, 2, 3, 1).flatten(1)


def _features(parts: list[tuple[Tensor, Tensor, Tensor]]) -> ImageFeatures:
    """Join (pooled, spatial, logits) of all batches."""
    pooled, spatial, logits = (
        torch.cat([part[column].float().cpu() for part in parts]) for column in range(3)
    )
    return ImageFeatures(pooled.numpy(), spatial.numpy(), logits.double().softmax(-1).numpy())
