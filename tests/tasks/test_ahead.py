"""Random numbers drawn ahead of a step are those that the step would draw."""

from __future__ import annotations

import pickle

import pytest
import torch

from mhla_lightning.randomness import run_seed
from mhla_lightning.tasks import ClassificationLossConfig, ClassificationTask
from tests.helpers.diffusion_models import make_batch, make_task


@pytest.mark.parametrize("training", [True, False])
def test_noise_drawn_ahead_is_that_of_the_step(training: bool) -> None:
    task, batch = make_task(), make_batch(6)
    draw = pickle.loads(pickle.dumps(task.draws_ahead(training)))
    epochs = batch["epoch"].tolist() if training else [0] * 6
    arguments = (epochs, "diffusion", task.dropout) if training else (epochs, "validation", 0.0)
    alone, times = task._losses(batch, *arguments)
    ahead, times_ahead = task._losses({**batch, **draw(batch)}, *arguments)
    assert torch.equal(alone["loss"], ahead["loss"])
    assert torch.equal(times, times_ahead)


def test_mixtures_drawn_ahead_are_those_of_the_step() -> None:
    task = ClassificationTask(
        "deit_tiny",
        backbone_options={"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2},
        num_classes=4,
        loss=ClassificationLossConfig(mixup=0.8, cutmix=1.0),
    )
    task.configure_model()
    batch = {**task.example_batch(8), "image": torch.randn(8, 3, 8, 8)}
    draw = task.draws_ahead(True)
    assert draw is not None
    assert task.draws_ahead(False) is None
    assert task.mixup is not None
    table = task.mixup.table((8, 8), batch["epoch"], batch["index"], run_seed())
    assert torch.equal(draw(batch)["mixup"].view(torch.float32), table)
    assert torch.equal(task.training_step(batch, 0), task.training_step({**batch, **draw(batch)}, 0))
