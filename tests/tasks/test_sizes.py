"""Tasks that train on images of several sizes and are evaluated at others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from mhla_lightning.backbones.sizes import TakesSizes
from mhla_lightning.data import (
    Augmentation,
    BucketConfig,
    CaptionedImageDataModule,
    ImageDataModule,
    LatentDataModule,
    OrderConfig,
    ReadingConfig,
    TextEncoding,
)
from mhla_lightning.data.corpus import DataSource
from mhla_lightning.data.index import VAE, ShardIndex
from mhla_lightning.data.prepare.samples import latent_sample
from mhla_lightning.data.prepare.writer import write_split
from mhla_lightning.tasks import (
    ClassificationTask,
    ImageDiffusionTask,
    LanguageTask,
    Task,
    TextToImageTask,
)
from mhla_lightning.tasks.optimization import ScheduleConfig
from tests.helpers.captioned_images import write_captioned
from tests.helpers.errors import refused
from tests.helpers.images import write_images

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*")
QUIET: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
)
SMALL = {"embed_dim": 12, "depth": 1, "num_heads": 2, "patch_size": 2}
RELATIVE = {"name": "mhla", "block_size": 2, "mix_form": "relative"}
ABSOLUTE = {"name": "mhla", "block_size": 2}
SIZES = [4, 16, [8, 12]]
TAGS = {"val", "val_4", "val_16", "val_8x12"}
PLAIN = Augmentation(auto_augment=None, color_jitter=None, re_prob=0.0, crop_pct=1.0)


def classifier(attention: Any = RELATIVE, sizes: Any = SIZES, **options: Any) -> ClassificationTask:
    return ClassificationTask(
        "deit_tiny",
        attention,
        {"img_size": 8, "token_multiple": 1, **SMALL, **options},
        num_classes=4,
        eval_sizes=sizes,
        schedule=ScheduleConfig(warmup_steps=0),
    )


def diffusion(attention: Any = RELATIVE, sizes: Any = SIZES, **options: Any) -> ImageDiffusionTask:
    return ImageDiffusionTask(
        "dit_s2",
        attention,
        {"input_size": 8, "in_channels": 3, "num_classes": 4, **SMALL, **options},
        "flow",
        eval_sizes=sizes,
        schedule=ScheduleConfig(warmup_steps=0),
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def data_of(shards: Path, sizes: Any = (4, 8, 12)) -> ImageDataModule:
    return ImageDataModule(
        str(shards),
        16,
        8,
        image_size=8,
        augmentation=PLAIN,
        reading=ReadingConfig(num_workers=0),
        order=OrderConfig(buckets=None if sizes is None else BucketConfig(list(sizes))),
    )


class Shapes(pl.Callback):
    """Keeps the shape of every training batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        samples = batch["image"] if "image" in batch else batch["latent"]
        self.seen.append(tuple(samples.shape[2:]))


@pytest.mark.parametrize("build", [classifier, diffusion], ids=["classification", "diffusion"])
def test_a_plain_trainer_trains_on_buckets_and_validates_at_other_sizes(shards: Path, build: Any) -> None:
    pl.seed_everything(0, verbose=False)
    task, data, shapes = build(), data_of(shards), Shapes()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=6,
        val_check_interval=12,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=2,
        num_sanity_val_steps=0,
        callbacks=[shapes],
        **QUIET,
    )
    trainer.fit(task, data)
    assert set(shapes.seen) == {(4, 4), (8, 8), (12, 12)}
    assert shapes.seen[0::2] == shapes.seen[1::2]  # one size an optimizer step
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {name.partition("/")[0] for name in found if name.endswith("/loss")} - {"train"} == TAGS
    assert len({found[f"{tag}/loss"] for tag in TAGS}) == len(TAGS)
    (alone,) = trainer.validate(task, data, verbose=False)
    for tag in TAGS:
        assert alone[f"{tag}/loss"] == pytest.approx(found[f"{tag}/loss"])


@pytest.mark.parametrize("limit", [1, 0.5])
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_a_limit_that_would_leave_out_sizes_is_refused(
    shards: Path, limit: float, stage: str, tmp_path: Path
) -> None:
    for split, source in (("train", "train"), ("val", "val"), ("test", "val")):
        shutil.copytree(shards / source, tmp_path / split)
    limits: dict[str, Any] = {"limit_val_batches": limit, "limit_test_batches": limit}
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=1, **QUIET, **limits)
    task, steps = classifier("softmax", [16]), []
    task.on_train_batch_end = lambda *args: steps.append(args)  # type: ignore[method-assign]
    with refused("model.eval_sizes"):
        getattr(trainer, stage)(task, data_of(tmp_path, None))
    assert not steps


def test_limits_that_leave_out_nothing_pass(shards: Path) -> None:
    for limit, tags in ((1.0, {"val", "val_16"}), (1000, {"val", "val_16"}), (0, set())):
        trainer = pl.Trainer(accelerator="cpu", devices=1, **QUIET, limit_val_batches=limit)
        found = trainer.validate(classifier("softmax", [16]), data_of(shards, None), verbose=False)
        assert {name.partition("/")[0] for one in found for name in one if name.endswith("/loss")} == tags


def test_the_loss_at_another_size_is_that_of_a_model_built_for_it(shards: Path, tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    task = classifier("softmax", [16])
    task.configure_model()
    alone = classifier("softmax", None, img_size=16)
    alone.configure_model()
    assert isinstance(alone.backbone, torch.nn.Module)
    assert isinstance(task.backbone, torch.nn.Module)
    geometry: Any = task.backbone.geometry
    alone.backbone.load_state_dict(
        alone.backbone.adapt_state_dict(task.backbone.state_dict(), geometry)  # type: ignore[operator]
    )
    trainer = pl.Trainer(accelerator="cpu", devices=1, **QUIET)
    (found,) = trainer.validate(task, data_of(shards, None), verbose=False)
    data = ImageDataModule(
        str(shards), 16, 8, image_size=16, augmentation=PLAIN, reading=ReadingConfig(num_workers=0)
    )
    (wanted,) = trainer.validate(alone, data, verbose=False)
    assert found["val_16/loss"] == pytest.approx(wanted["val/loss"], rel=1e-5)
    assert found["val_16/top1"] == wanted["val/top1"]
    trainer.save_checkpoint(tmp_path / "alone.ckpt", weights_only=True)
    again = ClassificationTask.load_from_checkpoint(tmp_path / "alone.ckpt", eval_sizes=[8])
    (other,) = trainer.validate(again, data, verbose=False)
    assert other["val/loss"] == wanted["val/loss"]
    assert other["val_8/loss"] != other["val/loss"]


@pytest.mark.parametrize("build", [classifier, diffusion], ids=["classification", "diffusion"])
def test_sizes_that_the_model_cannot_take_are_refused_before_training(shards: Path, build: Any) -> None:
    for attention, sizes in ((ABSOLUTE, [16]), (RELATIVE, [9]), (RELATIVE, [[8, 8, 8]]), (RELATIVE, [0])):
        with refused("eval_sizes"):
            build(attention, sizes)
    with refused("eval_sizes") as error:
        build(ABSOLUTE, [4, 8, 16, 24])
    assert "4, 16, 24" in str(error.value)
    assert "mix_form: relative" in str(error.value)
    task = build(ABSOLUTE, None)
    with refused("attention") as error:
        task.check_data(data_of(shards).facts(), 8)
    assert "4, 12" in str(error.value)
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=1, accumulate_grad_batches=2, **QUIET)
    with refused("model.attention"):
        trainer.fit(build(ABSOLUTE, None), data_of(shards))


def test_a_backbone_of_one_size_says_so() -> None:
    with refused("eval_sizes") as error:
        ClassificationTask("convnet_tiny", "none", eval_sizes=[256])
    assert "takes samples of one size" in str(error.value)


def test_a_teacher_sees_one_size(shards: Path) -> None:
    task = diffusion(sizes=None)
    task.teacher = object()  # type: ignore[assignment]
    with refused("loss.distill"):
        task.check_data(data_of(shards).facts(), 8)


def test_the_mean_of_all_sizes_is_planned(shards: Path) -> None:
    task = classifier(sizes=None)
    task.check_data(data_of(shards, (4, 8, 12)).facts(), 8)
    flops = []
    for size in (4, 8, 12):
        flops.append(classifier(sizes=None, img_size=size).flops_per_sample)
    assert task.flops_per_sample == round(sum(flops) / 3)
    assert task.largest_flops == flops[-1]
    assert task.example_batch(2)["image"].shape == (2, 3, 12, 12)


@pytest.mark.parametrize("door", ["fit", "validate"])
@pytest.mark.parametrize("build", [classifier, diffusion], ids=["classification", "diffusion"])
def test_another_size_of_data_than_of_the_model_is_refused_at_every_door(
    shards: Path, build: Any, door: str
) -> None:
    data = ImageDataModule(
        str(shards), 16, image_size=16, augmentation=PLAIN, reading=ReadingConfig(num_workers=0)
    )
    task: Task = build(sizes=None)
    key = "img_size" if isinstance(task, ClassificationTask) else "input_size"
    with refused(f"backbone_options.{key}"):
        task.check_data(data.facts(), 16)
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=1, **QUIET)
    with refused(f"model.backbone_options.{key}"):
        getattr(trainer, door)(task, data)


def test_other_tasks_have_one_size() -> None:
    task = LanguageTask("lm_tiny", "softmax", {"embed_dim": 8, "depth": 1, "context": 8})
    assert task.eval_sizes == ()
    assert isinstance(classifier()._weightless(), TakesSizes)


def write_latents(root: Path, sides: tuple[int, ...]) -> LatentDataModule:
    """Latents of images of several sizes, a source each; the first is the recipe's."""
    rng = np.random.default_rng(0)
    for side in sides:
        header = ShardIndex("latents", (), ("a", "b"), vae=VAE("tiny", 1.0, 0.0, (4, side, side)))
        shape = (4, side, side)
        for split in ("train", "val"):
            made = [
                latent_sample(header, f"s{n}", rng.normal(size=shape).astype(np.float32), label=n % 2)
                for n in range(12)
            ]
            write_split(root / str(side) / split, header, made, 100_000)
    return LatentDataModule(
        VAE("tiny", 1.0, 0.0, (4, sides[0], sides[0])),
        batch_size=4,
        mix=[DataSource(str(root / str(side))) for side in sides],
        order=OrderConfig(mix_by="batch"),
        reading=ReadingConfig(num_workers=0),
    )


def test_latents_of_several_sizes_train_one_model(tmp_path: Path) -> None:
    for side in (8, 12):
        (tmp_path / str(side)).mkdir()
    data, shapes = write_latents(tmp_path, (8, 12)), Shapes()
    options = {"in_channels": 4, "num_classes": 2}
    for attention, sizes, key in ((ABSOLUTE, None, "attention"), (RELATIVE, [16], "eval_sizes")):
        with refused(key):
            diffusion(attention, sizes, **options).check_data(data.facts(), 4)
    task = diffusion(RELATIVE, [12], **options)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, num_sanity_val_steps=0, callbacks=[shapes], **QUIET
    )
    trainer.fit(task, data)
    assert set(shapes.seen) == {(8, 8), (12, 12)}
    found = trainer.callback_metrics
    assert {"val/loss", "val_12/loss"} <= found.keys()
    assert task.train_sizes == {(8, 8): 0.5, (12, 12): 0.5}


def test_sana_trains_on_captioned_images_of_several_sizes(tmp_path: Path) -> None:
    words = TextEncoding("words:8", 6, 8)
    data = CaptionedImageDataModule(
        words,
        str(write_captioned(tmp_path / "shards")),
        4,
        image_size=8,
        augmentation=PLAIN,
        order=OrderConfig(buckets=BucketConfig([8, [8, 16], 12])),
        reading=ReadingConfig(num_workers=0),
    )
    options = {"embed_dim": 24, "depth": 1, "num_heads": 3, "text_dim": 8, "text_length": 6}
    for attention, refuses in ((ABSOLUTE, True), (RELATIVE, False)):
        task = TextToImageTask("sana_tiny", attention, {"input_size": 8, **options})
        if refuses:
            with refused("backbone_options.input_size"):
                task.check_data(data.facts(), 4)
    shapes = Shapes()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, num_sanity_val_steps=0, callbacks=[shapes], **QUIET
    )
    trainer.fit(task, data)
    assert set(shapes.seen) == {(8, 8), (8, 16), (12, 12)}
    assert trainer.callback_metrics["val/loss"].isfinite()
