"""Samples of a text-to-image run on held-out captions, for the evaluation `samples`.

The shards of the run's data have labels beside the captions, and the classifier is one of these labels. A
caption of a picture with the label `7 in the upper left` asks for that, in other words. Importing this
module imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mhla_lightning.data.modules.captioned_images import CaptionedImageDataModule
    from mhla_lightning.evaluation.networks import ClassifierRun
    from mhla_lightning.evaluation.sample_options import SampleOptions
    from mhla_lightning.inference.diffusion.text_images import TextImageRun

_BETWEEN = " in the "  # what and where of a class, as in `7 in the upper left`


@dataclass(frozen=True)
class DrawnTexts:
    """Images of held-out captions.

    Attributes:
        images: uint8 (n, H, W, 3).
        labels: (n,), of the pictures whose captions they are.
        classes: names by label.
        seconds: of sampling, without loading the weights.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    seconds: float


def check_text_samples(options: SampleOptions, data: Any, classifier: ClassifierRun) -> None:
    """Check that a text-to-image run with this data can be measured.

    Args:
        options: of the evaluation.
        data: the run's data module; its shards are looked at where they exist already.
        classifier: that judges the images.

    Raises:
        UserError: data without captions and labels, other classes than the classifier's, or more images
            than held-out captions.
    """
    from mhla_lightning.data.modules.captioned_images import CaptionedImageDataModule
    from mhla_lightning.runs.classes import kept_classes

    if not isinstance(data, CaptionedImageDataModule):
        raise UserError(
            "eval",
            f"samples asks for held-out captions whose label a classifier knows, and {type(data).__name__} "
            "has none (CaptionedImageDataModule)",
        )
    if not data.is_ready():
        return
    val, count = data.index("val"), classifier.task.num_classes
    if val.classes != kept_classes(classifier.run.path, count):
        raise UserError(
            "classifier",
            f"{options.classifier} knows {count} classes, and they are not the {len(val.classes)} of "
            f"{data.path}; train it on the same data",
        )
    if options.n > val.samples:
        raise UserError(
            "n", f"{options.n} is too large; {data.path} has {val.samples} held-out captions to draw"
        )


def draw_text_samples(found: TextImageRun, options: SampleOptions, device: torch.device) -> DrawnTexts:
    """Draw one image for each of the first n held-out captions.

    Args:
        found: the run.
        options: of the evaluation.
        device: where the images are drawn.

    Raises:
        UserError: see :func:`check_text_samples`.
    """
    import numpy as np
    import torch

    from mhla_lightning.diffusion import Guidance, default_sampler
    from mhla_lightning.diffusion.drawing import draw_samples
    from mhla_lightning.inference.diffusion.parts import batches
    from mhla_lightning.inference.diffusion.text_images import TextDrawing
    from mhla_lightning.inference.rebuilding import load_backbone

    data: Any = found.data
    asked = data.captions("val")[: options.n]
    text, null = data.encode_text([caption for caption, _ in asked]), data.null_text()
    process = found.task.process
    sampler = options.sampler or default_sampler(process)
    drawing = TextDrawing(None, options.seed, sampler, options.steps, Guidance(float(options.guidance)))
    task = load_backbone(found.task, found.weights, device)
    started, drawn = time.perf_counter(), []
    for images in batches(len(asked), options.batch_size):
        keys = [(options.seed, "sample", image) for image in images]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            samples = draw_samples(task, text[list(images)], null, task.sample_shape, keys, drawing)
        drawn.append(data.to_images(samples).cpu().numpy())
    labels = np.array([label for _, label in asked])
    return DrawnTexts(np.concatenate(drawn), labels, data.index("val").classes, time.perf_counter() - started)


def agreements(wanted: np.ndarray, seen: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Return the shares of images in which a classifier sees what was asked for.

    Args:
        wanted: labels that were asked for, (n,).
        seen: labels that the classifier finds likeliest, (n,).
        classes: names by label.

    Returns:
        agreement: of the whole class.
        what, where: of its two parts, where all names have the form `WHAT in the WHERE`.
    """

    found = {"agreement": float((wanted == seen).mean())}
    parts = [name.split(_BETWEEN) for name in classes]
    if all(len(part) == 2 for part in parts):
        for number, name in enumerate(("what", "where")):
            same = [
                parts[one][number] == parts[other][number] for one, other in zip(wanted, seen, strict=True)
            ]
            found[name] = sum(same) / len(same)
    return found


def real_agreement(data: CaptionedImageDataModule, network: Any) -> tuple[Any, float]:
    """Return the features of held-out pictures, and the share that the classifier reads right.

    Args:
        data: the run's data module.
        network: the classifier (networks.OwnFeatures).
    """
    from mhla_lightning.evaluation.images import validation_samples

    images, labels = validation_samples(data)
    features = network(images)
    return features, float((features.probabilities.argmax(1) == labels).mean())
