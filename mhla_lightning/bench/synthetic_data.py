"""Training batches of the right shape for a recipe whose data is not there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.kinds import Kind
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.data.modules.options import OrderConfig, ReadingConfig
from mhla_lightning.data.stream import Batch
from mhla_lightning.errors import UserError
from mhla_lightning.tasks import (
    ClassificationTask,
    ImageDiffusionTask,
    LanguageTask,
    Task,
    TextDiffusionTask,
)

_TOKENS = 256  # ids drawn: few, so that associative recall finds a key again


class SyntheticData(ShardDataModule):
    """A data module without shards: random batches for one process, made as they are asked for.

    Args:
        task: what they are made for.
        like: the recipe's data module, whose batch sizes count.

    Raises:
        UserError: a task of another kind than the platform's four.
    """

    def __init__(self, task: Task, like: ShardDataModule) -> None:
        super().__init__(
            "synthetic",
            None,
            like.batch_size,
            like.micro_batch_size,
            None,
            OrderConfig(seed=0),
            ReadingConfig(num_workers=0, max_skipped_share=0.0, verify="size"),
        )
        self._task = task
        self._facts, self._tensors = _of(task)

    @property
    def data_hash(self) -> str:
        """Of no data."""
        return "synthetic"

    @property
    def samples(self) -> int:
        """As many as a batch has: nothing here comes again."""
        return self.batch_size

    def consumed_by_source(self) -> dict[str, int]:
        """There are no sources."""
        return {}

    def check(self, world_size: int) -> None:
        """Only that the batch divides. Raises UserError."""
        self.micro_batch(world_size)

    def kind(self, index: ShardIndex) -> Kind:
        """There are no shards to read."""
        raise UserError("data", "synthetic batches are not read from shards")

    def facts(self) -> dict[str, Any]:
        """What the task wants to hear."""
        return self._facts

    def null_text(self) -> Tensor:
        """Features of the empty prompt, (tokens, channels)."""
        return torch.zeros(self._facts["text"])

    def train_dataloader(self) -> Iterator[Batch]:
        """Yield micro batches without end.

        Samples are numbered on, so that noise and mixup differ.
        """
        size, _ = self.micro_batch(1)
        rng, first = torch.Generator().manual_seed(0), 0
        while True:
            index = torch.arange(first, first + size)
            zeros = torch.zeros(size, dtype=torch.int64)
            keys = [f"synthetic-{n}" for n in index.tolist()]
            columns = {
                "key": keys,
                "index": index,
                "epoch": zeros,
                "source": zeros,
                "weight": torch.ones(size),
                "skipped": torch.tensor(0),
            }
            yield columns | {
                name: _draw(shape, below, size, rng) for name, (shape, below) in self._tensors.items()
            }
            first += size


Tensors = Mapping[str, tuple[tuple[int, ...], int | None]]
"""Key in the batch -> shape of a sample, and how many integers it is drawn from: None is a normal float."""


def _draw(shape: tuple[int, ...], below: int | None, size: int, rng: torch.Generator) -> Tensor:
    return (
        torch.randn(size, *shape, generator=rng)
        if below is None
        else torch.randint(below, (size, *shape), generator=rng)
    )


def _of(task: Task) -> tuple[dict[str, Any], Tensors]:
    """Facts as a data module tells them, and what a batch holds."""
    if isinstance(task, ClassificationTask):
        side = task.backbone_options.get("img_size", 224)
        size = (side, side) if isinstance(side, int) else tuple(side)
        facts: dict[str, Any] = {"kind": "images", "classes": task.num_classes, "image_size": size}
        return facts, {"image": ((3, *size), None), "label": ((), task.num_classes)}
    if isinstance(task, LanguageTask):
        row = {"length": task.context, "val_length": math.lcm(task.context, *task.eval_lengths)}
        facts = {"kind": "tokens", "vocabulary": task.vocab_size, "token_bytes": None, **row}
        return facts, {
            "tokens": ((task.context,), min(_TOKENS, task.vocab_size)),
            "documents": ((task.context,), 1),
        }
    if isinstance(task, ImageDiffusionTask):
        facts = {
            "kind": "latents",
            "classes": task.num_classes,
            "vae": SimpleNamespace(shape=task.sample_shape),
        }
        return facts, {"latent": (task.sample_shape, None), "label": ((), task.num_classes)}
    if isinstance(task, TextDiffusionTask):
        facts = {"kind": task.wording.kinds[-1], "shapes": [task.sample_shape], "text": task.text_shape}
        return facts, {"latent": (task.sample_shape, None), "text": (task.text_shape, None)}
    raise UserError(
        "data.path",
        "the recipe's data is not there, and the batches of "
        f"{type(task).__name__} cannot be made up; pack its data first",
    )
