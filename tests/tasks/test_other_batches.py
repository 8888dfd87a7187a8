"""Batches of other people's loaders: tuples, bare mappings, transformers' names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from mhla_lightning.callbacks import EMA
from mhla_lightning.tasks import (
    ClassificationLossConfig,
    ClassificationTask,
    ImageDiffusionTask,
    LanguageTask,
    PredictSettings,
    ScheduleConfig,
    Task,
    VideoDiffusionTask,
)
from mhla_lightning.tasks.batches import FIRST
from tests.helpers.errors import refused
from tests.helpers.marks import every_nth
from tests.helpers.pretended_gpu import PretendedAccelerator, PretendedStrategy, pretended_gpu

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*", "ignore:You defined a `validation_step`"
)
QUIET: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
)
DIT = {"input_size": 8, "in_channels": 3, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 4}
WAN = {"input_size": [8, 16, 16], "embed_dim": 32, "ffn_dim": 48, "depth": 1, "num_heads": 2, "freq_dim": 16}


class Rows(Dataset[dict[str, Tensor]]):
    """Samples as mappings, as transformers' and other data sets give them."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: values[row] for name, values in self.columns.items()}


def classifier(classes: int = 4, mixup: float = 0.0) -> ClassificationTask:
    size = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2}
    loss = ClassificationLossConfig(mixup=mixup)
    return ClassificationTask("deit_tiny", {"name": "mhla", "blocks": 2}, size, classes, loss=loss)


def language(**options: Any) -> LanguageTask:
    size = {"context": 16, "embed_dim": 16, "depth": 1, "intermediate": 32, "vocab_size": 40}
    attention = {"name": "mhla", "chunk_size": 8, "max_chunks": 8, "heads": 2}
    return LanguageTask("lm_tiny", attention, size, **options)


def drawer() -> ImageDiffusionTask:
    return ImageDiffusionTask("dit_s2", {"name": "mhla", "blocks": 2}, DIT, "flow")


IMAGES, LABELS = torch.randn(10, 3, 8, 8), torch.arange(10) % 4
TOKENS = torch.randint(0, 40, (10, 12), generator=torch.Generator().manual_seed(0))
VIDEO = {"clip": torch.randn(4, 3, 8, 16, 16), "text": torch.randn(4, 5, 8)}
CASES: dict[str, tuple[Callable[[], Task], Dataset[Any], dict[str, tuple[int, ...]]]] = {
    "tuples": (classifier, TensorDataset(IMAGES, LABELS), {"logits": (10, 4)}),
    "mappings": (classifier, Rows(image=IMAGES, label=LABELS), {"probabilities": (10, 4)}),
    "images": (drawer, TensorDataset(IMAGES, LABELS), {"sample": (10, 3, 8, 8)}),
    "input_ids": (language, Rows(input_ids=TOKENS), {"prompt": (10, 6), "continuation": (10, 6)}),
    "labels": (
        language,
        Rows(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), labels=TOKENS),
        {"continuation": (10, 6)},
    ),
}


@pytest.mark.parametrize("case", every_nth(CASES, 2))
def test_a_plain_loader_trains_validates_and_predicts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, rows, shapes = CASES[case]
    monkeypatch.setattr(ImageDiffusionTask, "sampling", PredictSettings(steps=1))
    loader = DataLoader(rows, batch_size=4)
    pl.seed_everything(0, verbose=False)
    task = make()
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, log_every_n_steps=1, callbacks=[EMA(0.5)], **QUIET)
    trainer.fit(task, loader, loader)
    assert trainer.global_step == 3
    assert {"train/loss", "val/loss", "val_ema/loss"} <= trainer.callback_metrics.keys()
    found: Any = trainer.predict(task, loader)
    assert len({key for part in found for key in part["key"]}) == 10, "each sample has its own key"
    for name, shape in shapes.items():
        assert tuple(torch.cat([part[name] for part in found]).shape) == shape


def test_a_tuple_gives_the_numbers_of_our_own_batch() -> None:
    task = classifier()
    task.configure_model()
    own = {"image": IMAGES, "label": LABELS, "key": ["x"] * 10, "weight": torch.ones(10)}
    own |= {"index": torch.arange(10), "epoch": torch.zeros(10, dtype=torch.int64)}
    assert torch.equal(task.training_step(own, 0), task.training_step((IMAGES, LABELS), 0))


def test_random_numbers_follow_the_position() -> None:
    task = drawer()
    one, again, later = (task.completed((IMAGES, LABELS), number, "train") for number in (0, 0, 1))
    assert torch.equal(one["index"], again["index"])
    assert not set(one["index"].tolist()) & set(later["index"].tolist())


def test_the_loss_of_input_ids_is_transformers() -> None:
    """Labels are shifted, -100 does not count, padding on either side changes nothing."""
    task = language()
    task.configure_model()
    labels = TOKENS.clone()
    labels[:, :5] = -100
    loss = task.training_step({"input_ids": TOKENS, "labels": labels}, 0)
    logits = task(TOKENS)
    wanted = F.cross_entropy(logits[:, 4:-1].flatten(0, 1), TOKENS[:, 5:].flatten())
    torch.testing.assert_close(loss, wanted)
    plain = task.training_step({"input_ids": TOKENS}, 0)
    ones = torch.ones_like(TOKENS)
    for side in ((0, 4), (4, 0)):
        batch = {"input_ids": F.pad(TOKENS, side), "attention_mask": F.pad(ones, side)}
        torch.testing.assert_close(task.training_step(batch, 0), plain)


def test_a_video_batch_of_another_loader() -> None:
    size = WAN | {"text_dim": 8, "text_length": 6}
    task = VideoDiffusionTask("wan_tiny", {"name": "mhla", "blocks": [2, 2, 2]}, size)
    task.configure_model()
    assert task.training_step(VIDEO, 0).isfinite()
    with refused("batch.text"):
        task.completed({"clip": VIDEO["clip"]}, 0, "train")
    with refused("batch.clip"):
        task.completed((VIDEO["clip"][0], VIDEO["text"]), 0, "train")


@pytest.mark.parametrize(
    ("make", "batch", "key"),
    [
        (classifier, (IMAGES,), "batch.label"),
        (classifier, {"pixel_values": IMAGES, "label": LABELS}, "batch.image"),
        (classifier, (IMAGES[:, :, :4], LABELS), "batch.image"),
        (classifier, ((IMAGES * 255).to(torch.uint8), LABELS), "batch.image"),
        (classifier, (IMAGES, LABELS.float()), "batch.label"),
        (classifier, (IMAGES, LABELS[:4]), "batch.label"),
        (classifier, (IMAGES, LABELS, LABELS), "batch"),
        (classifier, "images", "batch"),
        (lambda: classifier(3), (IMAGES, LABELS), "num_classes"),
        (lambda: classifier(4, 0.5), (IMAGES[:3], LABELS[:3]), "loss.mixup"),
        (drawer, (IMAGES, LABELS + 1), "backbone_options.num_classes"),
        (drawer, (IMAGES[:, :1], LABELS), "batch.image"),
        (language, (TOKENS, TOKENS), "batch"),
        (language, {"input_ids": TOKENS + 1}, "backbone_options.vocab_size"),
        (language, {"input_ids": TOKENS, "labels": TOKENS - 7}, "backbone_options.vocab_size"),
        (language, {"input_ids": torch.zeros(2, 17, dtype=torch.int64)}, "batch.input_ids"),
        (language, {"input_ids": TOKENS, "attention_mask": TOKENS[:, :3]}, "batch.attention_mask"),
        (language, {"input_ids": TOKENS, "position_ids": TOKENS}, "batch.position_ids"),
        (language, {"text": ["a"]}, "batch.input_ids"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(make: Callable[[], Task], batch: Any, key: str) -> None:
    with refused(key):
        make().completed(batch, 0, "train")


def test_too_few_classes_are_refused_before_the_first_step() -> None:
    task = classifier(3)
    before: list[Tensor] = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            before.extend(parameter.clone() for parameter in module.parameters())

    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[Watch()], **QUIET)
    with refused("num_classes"):
        trainer.fit(task, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=5))
    assert before
    assert all(torch.equal(one, other) for one, other in zip(before, task.parameters(), strict=True))


def test_labels_on_a_gpu_are_read_in_the_first_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later batches make nobody wait; on the host all labels are read."""
    task, steps = classifier(), FIRST + 3
    with pretended_gpu(monkeypatch) as record:

        class Phase(pl.Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
                record.phase = str(batch_idx)

        there: Any = {"strategy": PretendedStrategy(), "accelerator": PretendedAccelerator()}
        trainer = pl.Trainer(max_steps=steps, log_every_n_steps=0, callbacks=[Phase()], **there, **QUIET)
        rows = TensorDataset(IMAGES.repeat(3, 1, 1, 1), LABELS.repeat(3))
        trainer.fit(task, DataLoader(rows, batch_size=2))
        assert trainer.global_step == steps
        waits = [[place for place in record.of(str(step)) if "batches.py" in place] for step in range(steps)]
        with refused("num_classes"):
            classifier(3).completed((IMAGES.to("cuda"), LABELS.to("cuda")), 0, "train")
    assert all(waits[:FIRST])
    assert not any(waits[FIRST:])
    late = classifier(3)
    for number in range(FIRST + 1):
        late.completed((IMAGES[:3], LABELS[:3]), number, "train")
    with refused("num_classes"):
        late.completed((IMAGES, LABELS), FIRST + 1, "train")


def test_the_cosine_ends_with_the_epochs_of_a_plain_loader() -> None:
    task = classifier()
    assert task.schedule_config == ScheduleConfig("cosine")
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, **QUIET)
    trainer.fit(task, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
