"""The video diffusion task: its text, its randomness, what a teacher adds, which data it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mhla_lightning.diffusion import Guidance, guided
from mhla_lightning.tasks import (
    Distillation,
    ImageDiffusionLossConfig,
    ImageDiffusionTask,
    TextDiffusionLossConfig,
    VideoDiffusionTask,
)
from tests.helpers import diffusion_models
from tests.helpers.errors import refused

OPTIONS: dict[str, Any] = {
    "input_size": [4, 8, 8],
    "patch_size": [1, 2, 2],
    "in_channels": 3,
    "embed_dim": 24,
    "ffn_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "freq_dim": 16,
    "text_dim": 6,
    "text_length": 5,
}
MHLA: dict[str, Any] = {"name": "mhla", "blocks": 2}
FACTS: dict[str, Any] = {"kind": "clips", "shapes": [(3, 4, 8, 8)], "text": (5, 6), "vae": None, "classes": 0}


def make_task(attention: Any = MHLA, checkpointing: Any = "none", **loss: Any) -> Any:
    """Return a task whose weights are all random: a fresh model predicts zeros.

    Args:
        loss: arguments of its loss.
    """
    config = TextDiffusionLossConfig(**loss)
    task = VideoDiffusionTask(
        "wan_tiny", attention, OPTIONS, loss=config, checkpoint_activations=checkpointing
    )
    task.configure_model()
    assert task.backbone is not None
    drawn = torch.Generator().manual_seed(0)
    for parameter in task.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=drawn)
    return task


def make_batch(rows: int = 6, shape: tuple[int, ...] = (3, 4, 8, 8)) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "clip": torch.from_numpy(rng.uniform(-1, 1, (rows, *shape)).astype(np.float32)),
        "text": torch.from_numpy(rng.standard_normal((rows, 5, 6)).astype(np.float32)),
        "index": torch.arange(rows),
        "epoch": torch.zeros(rows, dtype=torch.int64),
        "weight": torch.ones(rows),
    }


def losses(task: Any, batch: dict[str, Any], dropout: float) -> Tensor:
    with torch.no_grad():
        return task._losses(batch, [0] * len(batch["index"]), "diffusion", dropout)[0]["loss"]


def test_a_sample_has_its_own_randomness() -> None:
    """The losses of a batch are those of its halves: noise, time and dropped text do not depend on the
    company.
    """
    task, whole = make_task(), make_batch(6)
    halves = [{key: value[part] for key, value in whole.items()} for part in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(
        losses(task, whole, 0.5),
        torch.cat([losses(task, half, 0.5) for half in halves]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_dropped_text_is_the_empty_prompt() -> None:
    """With every text dropped the text of a sample changes nothing, and the empty prompt's features do;
    with none it is the other way round.
    """
    task, batch = make_task(), make_batch()
    other = {**batch, "text": batch["text"].flip(0)}
    before = losses(task, batch, 1.0), losses(task, batch, 0.0)
    assert torch.equal(before[0], losses(task, other, 1.0))
    assert not torch.isclose(before[1], losses(task, other, 0.0)).any()
    task.null_text.normal_(generator=torch.Generator().manual_seed(1))
    assert not torch.isclose(before[0], losses(task, batch, 1.0)).any()
    assert torch.equal(before[1], losses(task, batch, 0.0))


def test_guidance_with_text() -> None:
    """u + scale (c - u), of texts and of the empty prompt, in one forward."""
    task, batch = make_task(), make_batch(2)
    null, t = torch.randn(5, 6, generator=torch.Generator().manual_seed(2)), torch.tensor([300.0, 700.0])
    with torch.no_grad():
        c, u = task(batch["clip"], t, batch["text"]), task(batch["clip"], t, null.expand(2, -1, -1))
        found = guided(task, batch["text"], null, Guidance(3.0))(batch["clip"], t)
    torch.testing.assert_close(found, u + 3 * (c - u), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(c, u, atol=1e-3)


def test_images_are_videos_of_one_frame() -> None:
    """A model that divides no time takes other lengths, one frame among them, and other sizes."""
    task = make_task({"name": "mhla", "blocks": [1, 2, 2]})
    for shape in ((3, 1, 8, 8), (3, 7, 8, 8), (3, 2, 12, 16)):
        task.check_data(FACTS | {"shapes": [shape]}, 1)
        assert losses(task, make_batch(2, shape), 0.1).isfinite().all()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"diffusion": "ddpm"}, "diffusion"),
        ({"backbone": "dit_s2", "backbone_options": {}}, "backbone"),
        ({"backbone_options": OPTIONS | {"input_size": [4, 9, 8]}}, "backbone_options.input_size"),
        (
            {"loss": TextDiffusionLossConfig(distill=Distillation("nowhere.safetensors"))},
            "loss.distill.teacher",
        ),
        (
            {"loss": TextDiffusionLossConfig(distill=Distillation("nowhere.safetensors", "softmx"))},
            "loss.distill.attention.name",
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], key: str) -> None:
    with refused(key):
        VideoDiffusionTask(
            **{"backbone": "wan_tiny", "attention": MHLA, "backbone_options": OPTIONS, **options}
        )


@pytest.mark.parametrize(
    ("facts", "key"),
    [
        (FACTS | {"kind": "images"}, None),
        (FACTS | {"shapes": [(3, 4, 8, 8), (16, 4, 8, 8)]}, "backbone_options.in_channels"),
        (FACTS | {"shapes": [(3, 4, 8, 8), (3, 4, 8, 9)]}, "backbone_options.input_size"),
        (FACTS | {"text": None}, None),
        (FACTS | {"text": (5, 7)}, "backbone_options.text_dim"),
        (FACTS | {"text": (6, 6)}, "backbone_options.text_length"),
    ],
)
def test_data_that_does_not_fit(facts: dict[str, Any], key: str | None) -> None:
    task = make_task()
    task.check_data(FACTS, 4)
    with refused(key):
        task.check_data(facts, 4)


# Distillation: any family


def teacher_file(task: Any, path: Path) -> str:
    save_file({name: value.contiguous() for name, value in task.backbone.state_dict().items()}, path)
    return str(path)


def train_once(task: Any, batch: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The total loss of a training step, and what was logged."""
    logged: dict[str, float] = {}
    task.log = lambda name, value, **_: logged.__setitem__(name, float(value))
    task.teacher.prepare(torch.device("cpu"))
    total = task.training_step(batch, 0)
    total.backward()
    return float(total.detach()), logged


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(
    tmp_path: Path, checkpointing: Any
) -> None:
    weights = teacher_file(make_task("softmax"), tmp_path / "teacher.safetensors")
    batch = make_batch(3)
    student = make_task("softmax", checkpointing, distill=Distillation(weights), text_dropout=0.0)
    total, logged = train_once(student, batch)
    assert logged == {"train/distill_output": 0.0, "train/distill_layers": 0.0}
    assert total == pytest.approx(float(losses(student, batch, 0.0).mean()), rel=1e-6)


def test_the_teacher_s_errors_are_those_of_outputs_and_attention_layers(tmp_path: Path) -> None:
    """By hand: forward hooks on both models' attention, on the same noisy input."""
    teacher = make_task("softmax")
    config = Distillation(teacher_file(teacher, tmp_path / "teacher.safetensors"), output=0.5, layers=2.0)
    student, batch = make_task(distill=config, text_dropout=0.0), make_batch(3)
    total, logged = train_once(student, batch)
    seen: list[list[Tensor]] = [[], []]
    data = 0.0
    for task, found in zip((teacher, student), seen, strict=True):
        for block in task.backbone.blocks:
            block.attn.register_forward_hook(lambda module, inputs, output, found=found: found.append(output))
        data = float(losses(task, batch, 0.0).mean())  # in the end the student's
    layers = float(
        torch.stack([(mine - theirs).square().mean() for mine, theirs in zip(*seen, strict=True)]).mean()
    )
    assert logged["train/distill_layers"] == pytest.approx(layers, rel=1e-5)
    assert total == pytest.approx(data + 0.5 * logged["train/distill_output"] + 2.0 * layers, rel=1e-5)
    assert logged["train/distill_output"] > 0
    assert all(parameter.grad is not None for parameter in student.backbone.parameters())
    assert all(parameter.grad is None for parameter in student.teacher.model.parameters())
    assert not any("teacher" in name for name in student.state_dict()), "a checkpoint holds the student alone"


def test_layers_alone_pull_the_attention_towards_the_teacher(tmp_path: Path) -> None:
    config = Distillation(
        teacher_file(make_task("softmax"), tmp_path / "teacher.safetensors"), output=0.0, layers=100.0
    )
    student, batch = make_task(distill=config), make_batch(3)
    optimizer = torch.optim.Adam(student.backbone.parameters(), lr=1e-2)
    errors = []
    for _ in range(15):
        optimizer.zero_grad()
        errors.append(train_once(student, batch)[1]["train/distill_layers"])
        optimizer.step()
    assert errors[-1] < 0.5 * errors[0]


def test_images_learn_from_a_teacher_too(tmp_path: Path) -> None:
    weights = teacher_file(diffusion_models.make_task("softmax"), tmp_path / "teacher.safetensors")
    loss = ImageDiffusionLossConfig(distill=Distillation(weights))
    student = ImageDiffusionTask("dit_s2", MHLA, diffusion_models.OPTIONS, loss=loss)
    student.configure_model()
    _, logged = train_once(student, diffusion_models.make_batch(3))
    assert logged["train/distill_output"] > 0
    assert logged["train/distill_layers"] > 0


def test_a_teacher_that_lacks_tensors_is_named(tmp_path: Path) -> None:
    weights = teacher_file(make_task("linear"), tmp_path / "teacher.safetensors")
    state = dict(make_task("linear").backbone.state_dict())
    del state["head.head.weight"]
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "less.safetensors")
    make_task(distill=Distillation(weights, "linear")).teacher.prepare(torch.device("cpu"))
    student = make_task(distill=Distillation(str(tmp_path / "less.safetensors"), "linear"))
    with refused("loss.distill.teacher") as error:
        student.teacher.prepare(torch.device("cpu"))
    assert "less.safetensors" in str(error.value)
    assert "head.head.weight" in str(error.value)


def test_a_distillation_that_learns_nothing_is_refused() -> None:
    with refused("loss.distill"):
        Distillation("anywhere", output=0.0, layers=0.0)
    with refused("loss.distill.output"):
        Distillation("anywhere", output=-1.0)


@pytest.mark.parametrize(
    ("options", "key"), [({"text_dropout": -0.1}, "loss.text_dropout"), ({"time_bins": 0}, "loss.time_bins")]
)
def test_wrong_losses(options: dict[str, Any], key: str) -> None:
    with refused(key):
        TextDiffusionLossConfig(**options)
