"""The LightningDataModule: arguments, pre-flight checks, and real fits."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from mhla_lightning.data import Augmentation, ImageDataModule
from mhla_lightning.data.loader import ignore_signals
from mhla_lightning.data.pack import pack
from mhla_lightning.errors import DataError, UserError

PLAIN = Augmentation(auto_augment=None, re_prob=0.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    for number in range(44):
        path = root / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (12, 10), (5 * number, 0, 0)).save(path)
    return root


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "data"
    pack(source, target, val=12, shards=4)  # 32 training and 12 validation samples
    return target


def _module(path: Path, **options: Any) -> ImageDataModule:
    defaults: dict[str, Any] = {"batch_size": 8, "image_size": 8, "num_workers": 0, "augmentation": PLAIN}
    return ImageDataModule(str(path), **(defaults | options))


class _Probe(pl.LightningModule):
    """Learns nothing much and remembers what it was given."""

    def __init__(self, pixels: int = 3 * 8 * 8) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(pixels, 3)
        self.indices: list[int] = []
        self.weight = 0.0

    def training_step(self, batch: dict, batch_number: int) -> torch.Tensor:
        self.indices += batch["index"].tolist()
        return torch.nn.functional.cross_entropy(self.layer(batch["image"].flatten(1)), batch["label"])

    def validation_step(self, batch: dict, batch_number: int) -> None:
        self.weight += batch["weight"].sum().item()

    def test_step(self, batch: dict, batch_number: int) -> None:
        self.weight += batch["weight"].sum().item()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def _trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", num_sanity_val_steps=0, **(quiet | options))


# Lightning 2.6.6 with torch 2.14: its own use of a deprecated pytree test, and advice about workers.
lightning_warnings = pytest.mark.filterwarnings("ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*")


@lightning_warnings
@pytest.mark.parametrize("workers", [0, 2])
def test_fit_with_accumulation(packed: Path, workers: int) -> None:
    data, model = _module(packed, micro_batch_size=4, num_workers=workers), _Probe()
    trainer = _trainer(max_steps=2, max_epochs=-1, accumulate_grad_batches=2, val_check_interval=4, check_val_every_n_epoch=None)
    trainer.fit(model, data)
    assert (trainer.global_step, len(model.indices), len(set(model.indices))) == (2, 16, 16)
    assert trainer.num_training_batches == 4
    assert model.weight == 12
    assert not data._loaders, "teardown ended the workers"


@lightning_warnings
def test_fit_goes_beyond_an_epoch(packed: Path) -> None:
    model = _Probe()
    _trainer(max_steps=8, max_epochs=-1, limit_val_batches=0).fit(model, _module(packed))
    assert sorted(model.indices[:32]) == sorted(model.indices[32:]) == list(range(32))
    assert model.indices[:32] != model.indices[32:]


@lightning_warnings
def test_a_resumed_fit_starts_with_its_epoch(packed: Path) -> None:
    whole, resumed = _Probe(), _Probe()
    _trainer(max_steps=8, max_epochs=-1, limit_val_batches=0).fit(whole, _module(packed))
    data = _module(packed)
    data.consumed = 33
    _trainer(max_steps=2, max_epochs=-1, limit_val_batches=0).fit(resumed, data)
    assert resumed.indices == whole.indices[32:48]


@lightning_warnings
def test_foreign_accumulation_is_refused(packed: Path) -> None:
    with pytest.raises(UserError, match="trainer.accumulate_grad_batches is 3, but .* give 2"):
        _trainer(max_steps=2, accumulate_grad_batches=3).fit(_Probe(), _module(packed, micro_batch_size=4))


@lightning_warnings
def test_errors_in_workers_stay_one_sentence(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "data", val=12, shards=2)
    for shard in (tmp_path / "data" / "train").glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[:4096])
    with pytest.raises(DataError) as error:
        _trainer(max_steps=2).fit(_Probe(), _module(tmp_path / "data", num_workers=2))
    assert "\n" not in str(error.value)
    assert ".tar" in str(error.value)


@lightning_warnings
def test_test_split(source: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no test split; splits: train, val"):
        _module(packed).test_dataloader()
    for split in ("train", "val", "test"):
        (tmp_path / "folders" / split).parent.mkdir(exist_ok=True)
        (tmp_path / "folders" / split).symlink_to(source)
    data = _module(tmp_path / "data", source=str(tmp_path / "folders"))
    model = _Probe()
    _trainer().test(model, data, verbose=False)
    assert model.weight == 44


def test_prepare_data_packs_once(source: Path, tmp_path: Path) -> None:
    data = _module(tmp_path / "data", source=str(source))
    data.prepare_data()
    written = (tmp_path / "data" / "train" / "index.json").stat().st_mtime_ns
    _module(tmp_path / "data", source="no such folder").prepare_data()
    assert (tmp_path / "data" / "train" / "index.json").stat().st_mtime_ns == written
    assert (data.samples, data.num_classes, data.index("val").samples, len(data.data_hash)) == (35, 3, 9, 64)
    data.check(1)


def test_sizes_need_not_be_square(packed: Path) -> None:
    data = _module(packed, image_size=(8, 24))
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))["image"].shape == (8, 3, 8, 24)
    assert len(data.val_dataloader()) == 2


def test_seed(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert (_module(packed).seed, _module(packed, seed=4).seed) == (0, 4)
    monkeypatch.setenv("PL_GLOBAL_SEED", "9")
    assert _module(packed).seed == 9


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "data.batch_size is 0; it must be at least 1"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer is 0"),
        ({"prefetch_factor": 0}, "data.prefetch_factor is 0"),
        ({"epochs": 0.0}, "data.epochs is 0.0"),
        ({"max_skipped_share": 1.5}, "data.max_skipped_share is 1.5"),
        ({"image_size": 0}, "data.image_size is 0"),
        ({"augmentation": Augmentation(auto_augment="x")}, "data.augmentation.auto_augment 'x'"),
    ],
)
def test_bad_arguments(packed: Path, options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        _module(packed, **options)


@pytest.mark.parametrize(
    ("options", "world", "sentence"),
    [
        ({"batch_size": 9}, 2, "data.batch_size 9 cannot be divided over 2 ranks"),
        ({"micro_batch_size": 3}, 2, "data.micro_batch_size 3 must divide the 4 samples"),
        (
            {"num_workers": 4},
            2,
            "has 4 shards, fewer than 2 ranks x 4 data.num_workers = 8: use data.num_workers 2 or less, or pack again with --shards 8",
        ),
        ({"num_workers": 0, "batch_size": 10}, 5, "4 shards, fewer than 5 ranks x 1 data.num_workers = 5: pack again with --shards 5"),
        ({"verify": "all"}, 1, "unknown data.verify 'all'"),
    ],
)
def test_check_tells_before_training(packed: Path, options: dict, world: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        _module(packed, **options).check(world)


def test_check_needs_data(packed: Path, tmp_path: Path) -> None:
    _module(packed).check(4)
    with pytest.raises(DataError, match=f"index.json does not exist: make it with 'mhla data pack SOURCE --to {tmp_path}'"):
        _module(tmp_path).check(1)


def test_arguments_from_yaml(packed: Path) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(ImageDataModule, "data")
    arguments = [f"--data.path={packed}", "--data.image_size=[8, 16]", "--data.augmentation.hflip=0", "--data.augmentation.auto_augment=null"]
    data = parser.instantiate(parser.parse_args(arguments)).data
    assert (data.image_size, data.augmentation) == ((8, 16), Augmentation(hflip=0.0, auto_augment=None))


def test_workers_ignore_the_jobs_signals() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        ignore_signals(0)
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 3
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_program_with_an_open_loader_exits(packed: Path) -> None:
    """Workers ignore SIGTERM, by which Python ends its children at exit: without our own end it waits for ever."""
    code = f"""
from mhla_lightning.data import ImageDataModule
data = ImageDataModule({str(packed)!r}, batch_size=4, image_size=8, num_workers=2)
batches = iter(data.train_dataloader())
next(batches)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True).returncode == 0
