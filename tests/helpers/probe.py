"""A LightningModule that shows what a data module gives it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch


class Probe(pl.LightningModule):
    """Learns nothing much and remembers what it was given.

    Attributes:
        indices: of the training samples, in their order.
        weight: the sum of the weights of the validated and tested samples.
        validations: batches that were validated.
    """

    def __init__(self, pixels: int = 3 * 8 * 8) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(pixels, 4)
        self.indices: list[int] = []
        self.weight = 0.0
        self.validations = 0

    def training_step(self, batch: dict[str, Any], batch_number: int) -> torch.Tensor:
        self.indices += batch["index"].tolist()
        return torch.nn.functional.cross_entropy(self.layer(batch["image"].flatten(1)), batch["label"])

    def validation_step(self, batch: dict[str, Any], batch_number: int) -> None:
        self.validations += 1
        self.weight += batch["weight"].sum().item()

    def test_step(self, batch: dict[str, Any], batch_number: int) -> None:
        self.weight += batch["weight"].sum().item()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)
