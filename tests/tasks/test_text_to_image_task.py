"""The text-to-image task: its text and mask, its randomness, a run from the recipe to drawn images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from mhla_lightning.cli.main import main
from mhla_lightning.data import LatentDataModule
from mhla_lightning.data.index import VAE
from mhla_lightning.data.modules.options import ReadingConfig
from mhla_lightning.diffusion import Guidance, guided
from mhla_lightning.runs.folder import RunFolder
from mhla_lightning.tasks import (
    OptimizerConfig,
    PredictSettings,
    ScheduleConfig,
    TextDiffusionLossConfig,
    TextToImageTask,
    VideoDiffusionTask,
)
from tests.helpers.errors import refused
from tests.helpers.killed_runs import continued_alike
from tests.helpers.ranks import Nursery
from tests.helpers.text_images import CHANNELS, SIDE, TEXT, write_latents, write_recipe

OPTIONS: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "cross_heads": 2,
    "text_dim": 6,
    "text_length": 5,
}
MHLA: dict[str, Any] = {"name": "mhla", "blocks": 2}
CALLBACKS = """[{class_path: mhla_lightning.callbacks.SampleLog},
  {class_path: mhla_lightning.callbacks.EMA, init_args: {decay: 0.9}},
  {class_path: mhla_lightning.callbacks.SampleGrids, init_args: {grids: 1, first: 4, steps: 2, per_class: 2,
    prompts: [a bar at the left, a bar at the top]}}]"""
FACTS: dict[str, Any] = {"kind": "latents", "shapes": [(3, 8, 8)], "text": (5, 6), "vae": None, "classes": 0}


def make_task(**loss: Any) -> Any:
    """Return a task whose weights are all random: a fresh model predicts zeros."""
    task = TextToImageTask("sana_tiny", MHLA, OPTIONS, loss=TextDiffusionLossConfig(**loss))
    task.configure_model()
    assert task.backbone is not None
    drawn = torch.Generator().manual_seed(0)
    for parameter in task.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=drawn)
    return task


def make_batch(rows: int = 6, shape: tuple[int, ...] = (3, 8, 8)) -> dict[str, Any]:
    """Texts of 2, 3 or 4 rows."""
    rng = np.random.default_rng(0)
    text = torch.from_numpy(rng.standard_normal((rows, 5, 6)).astype(np.float32))
    for number in range(rows):
        text[number, 2 + number % 3 :] = 0
    return {
        "image": torch.from_numpy(rng.uniform(-1, 1, (rows, *shape)).astype(np.float32)),
        "text": text,
        "index": torch.arange(rows),
        "epoch": torch.zeros(rows, dtype=torch.int64),
        "weight": torch.ones(rows),
    }


def losses(task: Any, batch: dict[str, Any], dropout: float) -> Tensor:
    with torch.no_grad():
        return task._losses(batch, [0] * len(batch["index"]), "diffusion", dropout)[0]["loss"]


def test_rows_of_zeros_are_padding() -> None:
    """A text is the same alone and filled up: the model does not see rows of zeros."""
    task, batch = make_task(), make_batch(3)
    t = torch.tensor([300.0, 700.0, 20.0])
    with torch.no_grad():
        filled = task(batch["image"], t, batch["text"])
        for number in range(3):
            row = slice(number, number + 1)
            alone = task(batch["image"][row], t[row], batch["text"][row, : 2 + number])
            torch.testing.assert_close(filled[row], alone, rtol=1e-4, atol=1e-5)


def test_a_sample_has_its_own_randomness() -> None:
    """The losses of a batch are those of its halves."""
    task, whole = make_task(), make_batch(6)
    halves = [{key: value[part] for key, value in whole.items()} for part in (slice(0, 2), slice(2, 6))]
    found = torch.cat([losses(task, half, 0.5) for half in halves])
    torch.testing.assert_close(losses(task, whole, 0.5), found, rtol=1e-4, atol=1e-5)


def test_a_dropped_text_is_the_empty_prompt() -> None:
    task, batch = make_task(), make_batch()
    other = {**batch, "text": batch["text"].flip(0)}
    before = losses(task, batch, 1.0), losses(task, batch, 0.0)
    assert torch.equal(before[0], losses(task, other, 1.0))
    assert not torch.isclose(before[1], losses(task, other, 0.0)).any()
    task.null_text[:2].normal_(generator=torch.Generator().manual_seed(1))
    assert not torch.isclose(before[0], losses(task, batch, 1.0)).any()
    assert torch.equal(before[1], losses(task, batch, 0.0))


def test_guidance_with_texts_of_several_lengths() -> None:
    """u + scale (c - u), of texts and of the empty prompt, in one forward."""
    task, batch = make_task(), make_batch(2)
    null, t = torch.zeros(5, 6), torch.tensor([300.0, 700.0])
    null[:1] = torch.randn(1, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        c, u = task(batch["image"], t, batch["text"]), task(batch["image"], t, null.expand(2, -1, -1))
        found = guided(task, batch["text"], null, Guidance(3.0))(batch["image"], t)
    torch.testing.assert_close(found, u + 3 * (c - u), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(c, u, atol=1e-3)


def test_images_of_other_sizes() -> None:
    task = make_task()
    for shape in ((3, 12, 16), (3, 4, 8)):
        task.check_data(FACTS | {"shapes": [shape]}, 1)
        assert losses(task, make_batch(2, shape), 0.1).isfinite().all()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"diffusion": "ddpm"}, "diffusion"),
        ({"backbone": "dit_s2", "backbone_options": {}}, "backbone"),
        ({"backbone": "wan_tiny", "backbone_options": {}}, "backbone"),
        ({"backbone_options": OPTIONS | {"input_size": 9}}, "backbone_options.input_size"),
    ],
)
def test_wrong_options(options: dict[str, Any], key: str) -> None:
    with refused(key):
        TextToImageTask(
            **{"backbone": "sana_tiny", "attention": MHLA, "backbone_options": OPTIONS, **options}
        )


def test_videos_need_a_model_of_videos() -> None:
    with refused("backbone"):
        VideoDiffusionTask("sana_tiny", MHLA, OPTIONS)


@pytest.mark.parametrize(
    ("facts", "key"),
    [
        (FACTS | {"kind": "video_latents"}, None),
        (FACTS | {"kind": "images"}, None),
        (FACTS | {"shapes": [(3, 8, 8), (16, 8, 8)]}, "backbone_options.in_channels"),
        (FACTS | {"shapes": [(3, 8, 9)]}, "backbone_options.input_size"),
        (FACTS | {"text": None, "classes": 4}, None),
        (FACTS | {"text": (5, 7)}, "backbone_options.text_dim"),
        (FACTS | {"text": (6, 6)}, "backbone_options.text_length"),
    ],
    ids=str,
)
def test_data_that_does_not_fit(facts: dict[str, Any], key: str | None) -> None:
    task = make_task()
    task.check_data(FACTS, 4)
    with refused(key):
        task.check_data(facts, 4)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"text": None}, "batch.text"),
        ({"text": torch.zeros(6, 9, 6)}, "batch.text"),
        ({"text": torch.zeros(6, 5, 7)}, "batch.text"),
        ({"image": torch.zeros(6, 3, 2, 8, 8)}, "batch.image"),
        ({"image": torch.zeros(6, 4, 8, 8)}, "batch.image"),
    ],
    ids=["no text", "long text", "wide text", "clip", "channels"],
)
def test_batches_that_do_not_fit(change: dict[str, Any], key: str) -> None:
    task = make_task()
    assert task.training_step({**make_batch(), "key": [""] * 6}, 0).isfinite()
    with refused(key):
        task.completed(
            {name: value for name, value in {**make_batch(), **change}.items() if name != "key"}, 0, "train"
        )


def test_latents_with_texts_come_from_shards(tmp_path: Path) -> None:
    """What the recipe's data module gives is what the task takes, the empty prompt included."""
    vae = VAE("bars", 0.4, 0.0, (CHANNELS, SIDE, SIDE))
    data = LatentDataModule(
        vae, str(write_latents(tmp_path)), 8, reading=ReadingConfig(num_workers=0), text_encoder=TEXT
    )
    data.check(1)
    options = OPTIONS | {"patch_size": 1, "in_channels": CHANNELS, "text_dim": 8, "text_length": 6}
    task: Any = TextToImageTask("sana_tiny", MHLA, options)
    task.check_data(data.facts(), 8)
    task.configure_model()
    batch = next(iter(data.train_dataloader()))
    assert (batch["latent"].shape, batch["text"].shape) == ((8, CHANNELS, SIDE, SIDE), (8, 6, 8))
    assert batch["text"].ne(0).any(-1).sum(-1).tolist() == [5] * 8  # words
    assert data.null_text().ne(0).any(-1).sum() == 1
    assert task.training_step(batch, 0).isfinite()


def test_a_text_read_by_mhla_trains_and_resumes_bit_for_bit_under_a_plain_trainer(tmp_path: Path) -> None:
    """The mixing matrices stay in their range, although the learning rate throws them out of it."""
    vae, shards = VAE("bars", 0.4, 0.0, (CHANNELS, SIDE, SIDE)), str(write_latents(tmp_path))
    options = OPTIONS | {"patch_size": 1, "in_channels": CHANNELS, "text_dim": 8, "text_length": 6}
    options |= {"depth": 1, "cross_attention": {"name": "mhla", "blocks": 2, "context_blocks": 3}}
    runs = {}
    for name, parts in (("whole", [3]), ("cut", [2, 3])):
        checkpoint = None
        for steps in parts:
            torch.manual_seed(0)
            task: Any = TextToImageTask(
                "sana_tiny",
                "linear",
                options,
                optimizer=OptimizerConfig(lr=0.5),
                schedule=ScheduleConfig("constant"),
            )
            data = LatentDataModule(vae, shards, 8, reading=ReadingConfig(num_workers=0), text_encoder=TEXT)
            trainer = pl.Trainer(
                default_root_dir=tmp_path / name,
                max_steps=steps,
                limit_val_batches=0,
                accelerator="cpu",
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
            )
            trainer.fit(task, data, ckpt_path=checkpoint)
            checkpoint = str(tmp_path / f"{name}-{steps}.ckpt")
            trainer.save_checkpoint(checkpoint)
        runs[name] = task.backbone.state_dict()
    for key, value in runs["whole"].items():
        assert torch.equal(value, runs["cut"][key]), key
    mixing = runs["whole"]["blocks.0.cross_attn.mixing.weight"]
    assert mixing.shape == (4, 3)
    assert 0 == mixing.min() <= mixing.max() <= 1


@pytest.mark.slow  # three runs, with an autoencoder of diffusers
def test_a_run_draws_resumes_bit_for_bit_and_is_exported(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path)
    whole = continued_alike(nursery, recipe, "--trainer.callbacks", CALLBACKS)
    tags = {json.loads(line)["tag"] for line in (whole / "metrics.jsonl").read_text().splitlines()}
    assert {"train/loss", "val/loss", "val_ema/loss"} <= tags
    events = EventAccumulator(str(RunFolder(whole).tensorboard), size_guidance={"images": 0})
    events.Reload()
    (grid,) = events.Images("samples")
    assert (grid.step, grid.width, grid.height) == (40, 67, 67)  # 2 prompts, 2 noises, 32 pixels and borders
    assert main(["export", "whole", "--to", "whole.safetensors"]) == 0
    assert main(["export", "whole", "--to", "folder"]) == 0
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["_class_name"] == "SanaTransformer2DModel"
    assert main(["import", "sana", "folder", "--out", "again.safetensors"]) == 0
    one, other = load_file("whole.safetensors"), load_file("again.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow  # a run with an autoencoder of diffusers
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"classes": [0]}, "SampleGrids.classes: the model reads a text"),
        ({"prompts": ["one two three four five six seven"]}, "SampleGrids.prompts"),
    ],
    ids=["classes", "a long prompt"],
)
def test_wrong_grids_are_refused_before_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path)
    values = yaml.safe_load(recipe.read_text())
    values["trainer"]["callbacks"][1]["init_args"] = options
    recipe.write_text(yaml.safe_dump(values))
    assert main(["run", str(recipe), "--run-id", "bad"]) == 2
    assert says in capsys.readouterr().err


def test_predict_draws_an_image_for_each_text() -> None:
    task, batch = make_task(), make_batch(3)
    task.sampling = PredictSettings(steps=2, guidance=Guidance(1.0), pixels=False)
    trainer: Any = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )

    def drawn(text: Tensor) -> Tensor:
        rows = [{"image": batch["image"][row], "text": text[row]} for row in range(3)]
        (found,) = trainer.predict(task, DataLoader(cast(Any, rows), batch_size=3))
        return found["sample"]

    one, other = drawn(batch["text"]), drawn(batch["text"].flip(0))
    assert one.shape == (3, 3, 8, 8)
    torch.testing.assert_close(one[1], other[1])
    assert not torch.isclose(one[0], other[0]).all()
