"""The evaluation `samples`: a classifier judges guided samples of a diffusion run.

The run draws classes, or the held-out captions of its data.

Importing this module imports no torch.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, cast

from mhla_lightning.errors import UserError
from mhla_lightning.evaluation.sample_options import SampleOptions
from mhla_lightning.evaluation.text_samples import (
    agreements,
    check_text_samples,
    draw_text_samples,
    real_agreement,
)
from mhla_lightning.runs.folder import RunFolder

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mhla_lightning.data.modules.captioned_images import CaptionedImageDataModule
    from mhla_lightning.data.modules.images import ImageDataModule
    from mhla_lightning.inference.diffusion.images import ImageRun

DRAWN_AGREEMENTS = ("agreement", "what", "where")  # shares of the drawn images
AGREEMENTS = (*DRAWN_AGREEMENTS, "real_agreement")
_MOST = 10_000_000  # images


def interval(share: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval of a share that n images showed: Wilson's for a binomial.

    Args:
        share: of the images, from 0 to 1.
        images: n.
    """
    z = 1.959964
    scale = 1 + z * z / images
    centre = (share + z * z / (2 * images)) / scale
    half = z * math.sqrt(share * (1 - share) / images + (z / images / 2) ** 2) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def fix_samples(options: SampleOptions, runs: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Replace the classifier's name by its folder, and identify it by its weights.

    Returns:
        values that replace options, and values that identify them in stored results.

    Raises:
        UserError: no such classifier run.
    """
    from mhla_lightning.evaluation.networks import find_classifier

    try:
        found = find_classifier(options.classifier, runs)
    except UserError as error:
        raise UserError("classifier", error.reason if error.key == "run" else str(error)) from error
    return {"classifier": str(found.run.path)}, {"classifier": found.sha256}


def check_samples(options: SampleOptions, task: Any, data: Any) -> None:
    """Check that this run can be measured, before anything is trained or drawn.

    Args:
        options: of the evaluation.
        task: of the run, without weights.
        data: the run's data module.

    Raises:
        UserError: no image diffusion model, a sampler for another process, other classes than the
            classifier's, or nothing to compare with.
    """
    from mhla_lightning.data.modules.images import ImageDataModule
    from mhla_lightning.diffusion import check_sampler, default_sampler
    from mhla_lightning.evaluation.networks import find_classifier
    from mhla_lightning.tasks import ImageDiffusionTask, TextToImageTask

    if not isinstance(task, (ImageDiffusionTask, TextToImageTask)):
        raise UserError(
            "eval",
            f"samples draws images, and {type(task).__name__} is no image diffusion model "
            "(ImageDiffusionTask, TextToImageTask)",
        )
    check_sampler(options.sampler or default_sampler(task.process), task.process, options.steps)
    if options.n > _MOST:
        raise UserError("n", f"{options.n} is too large; it must be at most {_MOST:,}")
    classifier = find_classifier(options.classifier)
    if isinstance(task, TextToImageTask):
        check_text_samples(options, data, classifier)
        return
    classes = classifier.task.num_classes
    if classes != task.num_classes:
        raise UserError(
            "classifier",
            f"{options.classifier} has {classes} classes and the diffusion model {task.num_classes}; they "
            "must be equal",
        )
    if options.n % classes:
        raise UserError(
            "n",
            f"{options.n} images are no multiple of the {classes} classes; take "
            f"{-(-options.n // classes) * classes}",
        )
    if options.reference is None and not isinstance(data, ImageDataModule):
        raise UserError(
            "reference",
            "the run's data hold latents and no images to compare with; name REF.npz or a folder of "
            "image shards",
        )


def measure_samples(run: RunFolder, options: SampleOptions) -> dict[str, float]:
    """Draw samples of all classes, or of held-out captions, and compare them with real images.

    Returns:
        agreement: share of samples whose likeliest class is the requested one.
        what, where, real_agreement: of text-to-image models; see text_samples.agreements. The last is the
            agreement of all held-out pictures, which a perfect model would reach.
        fd, sfd, class_score, precision, recall: see image_metrics.image_metrics.
        images_per_second: of sampling, without loading the weights.

    Raises:
        UserError: see :func:`check_samples`; a reference that cannot be read.
    """
    from mhla_lightning.inference.rebuilding import trains
    from mhla_lightning.tasks import TextToImageTask

    return _measure_texts(run, options) if trains(run, TextToImageTask) else _measure_classes(run, options)


def _measure_classes(run: RunFolder, options: SampleOptions) -> dict[str, float]:
    from mhla_lightning.evaluation.image_metrics import image_metrics
    from mhla_lightning.evaluation.networks import OwnFeatures, find_classifier
    from mhla_lightning.inference.diffusion.images import find_image_run
    from mhla_lightning.inference.weights import choose_device

    found, device = find_image_run(str(run.path), ema=options.ema), choose_device(options.device)
    check_samples(options, found.task, found.data)
    images, labels, seconds = _draw(found, options, device)
    network = OwnFeatures(find_classifier(options.classifier), device)
    reference = _reference(found, options, network, images.shape[1:3])
    features = network(images)
    agreement = (features.probabilities.argmax(1) == labels).mean()
    numbers = image_metrics(features, reference, network.published, device)
    return {"agreement": float(agreement), **numbers, "images_per_second": len(images) / seconds}


def _measure_texts(run: RunFolder, options: SampleOptions) -> dict[str, float]:
    from mhla_lightning.evaluation.image_metrics import Reference, image_metrics
    from mhla_lightning.evaluation.images import read_reference
    from mhla_lightning.evaluation.networks import OwnFeatures, find_classifier
    from mhla_lightning.inference.diffusion.text_images import find_text_image_run
    from mhla_lightning.inference.weights import choose_device

    found, device = find_text_image_run(str(run.path), ema=options.ema), choose_device(options.device)
    check_samples(options, found.task, found.data)
    drawn = draw_text_samples(found, options, device)
    network = OwnFeatures(find_classifier(options.classifier), device)
    real, bound = real_agreement(cast("CaptionedImageDataModule", found.data), network)
    reference = (
        Reference.of("val", real)
        if options.reference is None
        else read_reference(options.reference, network, (drawn.images.shape[1], drawn.images.shape[2]))
    )
    features = network(drawn.images)
    return {
        **agreements(drawn.labels, features.probabilities.argmax(1), drawn.classes),
        "real_agreement": bound,
        **image_metrics(features, reference, network.published, device),
        "images_per_second": len(drawn.images) / drawn.seconds,
    }


def _draw(
    found: ImageRun, options: SampleOptions, device: torch.device
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return images uint8 (n, H, W, 3), labels (n,), and seconds."""
    import numpy as np

    from mhla_lightning.diffusion import Guidance, default_sampler
    from mhla_lightning.inference.diffusion.images import Drawing, load_task, sample_images

    labels = [number % found.task.num_classes for number in range(options.n)]
    drawing = Drawing(
        options.seed,
        options.sampler or default_sampler(found.task.process),
        options.steps,
        Guidance(float(options.guidance)),
    )
    task = load_task(found, device)
    started = time.perf_counter()
    images = sample_images(found, task, labels, drawing, options.batch_size)
    return images, np.array(labels), time.perf_counter() - started


def _reference(found: ImageRun, options: SampleOptions, network: Any, size: tuple[int, int]) -> Any:
    from mhla_lightning.evaluation.image_metrics import Reference
    from mhla_lightning.evaluation.images import read_reference, validation_images

    if options.reference is not None:
        return read_reference(options.reference, network, size)
    images = validation_images(cast("ImageDataModule", found.data))  # check_samples has refused latents
    return Reference.of("val", network(images))
