"""Image classification (paper Sec. 5.1; SPEC 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from mhla_lightning.errors import UserError
from mhla_lightning.randomness import run_seed
from mhla_lightning.tasks.base import Drawing, Task
from mhla_lightning.tasks.batches import Stage, entry, keys, keys_of, named, real_rows
from mhla_lightning.tasks.mixup import MIXUP, PairDraws, PairMix
from mhla_lightning.tasks.sizes import sizes_of

_FEWEST = 2  # classes


@dataclass(frozen=True)
class ClassificationLossConfig:
    """The loss of a classifier: cross entropy, softened by smoothing and by mixed images.

    Args:
        label_smoothing: mass spread over all classes.
        mixup: alpha of mixup's Beta distribution; 0 is off.
        cutmix: alpha of cutmix's; 0 is off.
        mixup_prob: share of pairs that are mixed.
        mixup_switch_prob: share of mixed pairs that take cutmix when both are on.
    """

    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5


class ClassificationTask(Task):
    """Classifies images, with mixup and cutmix; logs the loss, top-1 and top-5.

    Args:
        backbone, attention, backbone_options: see :class:`Task`.
        num_classes: classes of the data; `auto` takes their number from the data module before training.
        loss: None takes the defaults.
        eval_sizes: sizes of images in pixels, numbers or [height, width], besides the trained one at which
            validation images are evaluated: `val_64/loss` and so on. None adds none.
        task: further arguments of :class:`Task`: optimizer, schedule, init_from and so on.

    Raises:
        UserError: see :class:`Task`.
    """

    def __init__(
        self,
        backbone: str,
        attention: str | Mapping[str, Any] | Sequence[Any] = "mhla",
        backbone_options: Mapping[str, Any] | None = None,
        num_classes: int | Literal["auto"] = 1000,
        loss: ClassificationLossConfig | None = None,
        eval_sizes: list[int | list[int]] | None = None,
        **task: Any,
    ) -> None:
        self._waits = num_classes == "auto"
        known = _FEWEST if isinstance(num_classes, str) else num_classes  # with auto, until the data tell it
        super().__init__(backbone, attention, {**(backbone_options or {}), "num_classes": known}, **task)
        self.eval_sizes = sizes_of("eval_sizes", eval_sizes, self._image_size())
        if self.eval_sizes:
            self._let_take(self._weightless())
        self.loss_config = loss or ClassificationLossConfig()
        self.label_smoothing = self.loss_config.label_smoothing
        self._take_classes(known)

    def _take_classes(self, num_classes: int) -> None:
        if num_classes < _FEWEST:
            raise UserError("num_classes", f"{num_classes} is too few; a classifier needs at least {_FEWEST}")
        self.num_classes, self.mixup, loss = num_classes, None, self.loss_config
        if loss.mixup > 0 or loss.cutmix > 0:
            self.mixup = PairMix(
                loss.mixup,
                loss.cutmix,
                loss.mixup_prob,
                loss.mixup_switch_prob,
                loss.label_smoothing,
                num_classes,
            )
        self.metrics = nn.ModuleDict({tag: _metrics(num_classes) for tag in self.tags()})

    @property
    def waits_for_data(self) -> bool:
        return self._waits

    def take_from_data(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        if not self._waits:
            return {}
        self._demand_images(facts)
        if not facts["classes"]:
            raise UserError("num_classes", "it is auto, and the data names no classes; give their number")
        self._take_classes(int(facts["classes"]))
        self.backbone_options["num_classes"] = self.num_classes
        self._measure(self._weightless())
        self._waits = False
        return {"num_classes": self.num_classes}

    def configure_model(self) -> None:
        if self._waits:
            raise UserError(
                "num_classes",
                "auto takes the number from a data module of ours with shards, and there is none here; give "
                "the number",
            )
        super().configure_model()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, classes) of images (batch, channels, height, width)."""
        return self.built_backbone()(images)

    def draws_ahead(self, training: bool) -> Drawing | None:
        return PairDraws(self.mixup, run_seed()) if training and self.mixup is not None else None

    def entries(self, batch: Any, stage: Stage) -> dict[str, Any]:
        """Return `image` and `label` of (image, label), or of a mapping with both.

        A prediction needs no labels. Raises UserError where they do not fit this model.
        """
        found = named(batch, ("image", "label"))
        images = found.get("image")
        size = tuple(images.shape[2:]) if isinstance(images, Tensor) else ()
        size = size if size in (*self.eval_sizes, *self.train_sizes) else self._image_size()
        shape = (None, self.backbone_options.get("in_chans", 3), *size)
        images = entry(found, "image", shape, "float", "normalised pixels")
        if stage == "predict":
            return found
        labels = entry(found, "label", (len(images),), "int64", f"classes from 0 to {self.num_classes - 1}")
        self.label_checks.within(labels, self.num_classes, "num_classes")
        if stage == "train":
            self.check_batch(len(images))
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self.completed(batch, batch_idx, "train")
        images, labels = batch["image"], batch["label"]
        if self.mixup is None:
            loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        else:
            if MIXUP in batch:
                images, targets = self.mixup.mix(images, labels, batch[MIXUP].view(torch.float32))
            else:
                images, targets = self.mixup(images, labels, batch["epoch"], batch["index"], run_seed())
            loss = F.cross_entropy(self(images), targets)
        return loss

    def evaluate(self, batch: Mapping[str, Tensor], prefix: str) -> None:
        """Add a batch to the metrics under a prefix, one of PREFIXES.

        Samples of weight 0 are padding and count nowhere.
        """
        real = batch["weight"] > 0
        logits, labels = self(batch["image"])[real].float(), batch["label"][real]
        tag = self.tag(prefix, batch["image"].shape[2:])
        metrics = cast(dict[str, Metric], self.metrics[tag])
        if len(labels):
            metrics["loss"].update(F.cross_entropy(logits, labels), weight=len(labels))
            for accuracy in metrics.keys() - {"loss"}:
                metrics[accuracy].update(logits, labels)
        for name, metric in metrics.items():
            self.log(
                f"{tag}/{name}",
                metric,
                prog_bar=tag == "val" and name != "top5",
                batch_size=max(1, len(labels)),
            )

    def run_backbone(self, batch: Mapping[str, Tensor]) -> None:
        self(batch["image"])

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Return `key`, `logits` and `probabilities`, (images, classes), without padding."""
        batch = self.completed(batch, batch_idx, "predict")
        kept = real_rows(batch)
        logits = self(batch["image"])[kept].float()
        return {"key": keys_of(batch, kept), "logits": logits, "probabilities": logits.softmax(-1)}

    def example_batch(self, samples: int) -> dict[str, Tensor]:
        return {
            "image": torch.empty(samples, 3, *self.largest_size(self._image_size()), device="meta"),
            "label": torch.zeros(samples, dtype=torch.int64),
            **keys(samples),
        }

    def _image_size(self) -> tuple[int, int]:
        size = self.backbone_options.get("img_size", 224)
        return (size, size) if isinstance(size, int) else tuple(size)

    def check_data(self, facts: Mapping[str, Any], micro_batch: int) -> None:
        """Refuse data that this model cannot take, before training.

        Raises:
            UserError: no images, another number of classes or pixels, or an odd batch with mixup.
        """
        self._demand_images(facts)
        num_classes = facts["classes"]
        if num_classes != self.num_classes:
            raise UserError(
                "num_classes",
                f"it is {self.num_classes} and the data has {num_classes} classes; set it to {num_classes} "
                "or auto",
            )
        self.take_sizes(facts)
        self.check_batch(micro_batch)

    def take_sizes(self, facts: Mapping[str, Any]) -> None:
        """Refuse images of another size than the model's, and let it take those of buckets."""
        size = facts.get("image_size")
        if size is not None and tuple(size) != self._image_size():
            raise UserError(
                "backbone_options.img_size",
                f"it is {self._image_size()} and `data.image_size` {tuple(size)}; they must be equal",
            )
        super().take_sizes(facts)

    def _demand_images(self, facts: Mapping[str, Any]) -> None:
        if facts["kind"] != "images":
            raise UserError(None, f"classification needs images, and the data holds {facts['kind']}")

    def check_batch(self, micro_batch: int) -> None:
        if self.mixup is not None and micro_batch % 2:
            raise UserError(
                "loss.mixup",
                f"mixup and cutmix pair the samples of a batch, and a micro batch of {micro_batch} is odd; "
                "choose an even `data.micro_batch_size`",
            )


def _metrics(num_classes: int) -> nn.ModuleDict:
    """Return loss and accuracies; the five likeliest of five classes or fewer are always right."""
    metrics = {"loss": MeanMetric(), "top1": MulticlassAccuracy(num_classes, top_k=1, average="micro")}
    if num_classes > 5:
        metrics["top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
    return nn.ModuleDict(metrics)
