"""The LightningDataModule: arguments, pre-flight checks, and real fits."""

import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from jsonargparse import ArgumentParser
from PIL import Image

from mhla_lightning.data import Augmentation, ImageDataModule
from mhla_lightning.data.corpus import DataSource
from mhla_lightning.data.loader import Loading, ignore_signals
from mhla_lightning.data.prepare.pack import PackOptions, pack
from mhla_lightning.errors import DataError
from tests.helpers.data_modules import build
from tests.helpers.errors import refused
from tests.helpers.probe import Probe

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
    pack(source, target, PackOptions(val=12, shards=4))  # 32 training and 12 validation samples
    return target


def _module(path: Path | None, **options: Any) -> ImageDataModule:
    defaults: dict[str, Any] = {"batch_size": 8, "image_size": 8, "num_workers": 0, "augmentation": PLAIN}
    return build(ImageDataModule, path=None if path is None else str(path), **(defaults | options))


def _trainer(**options: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", num_sanity_val_steps=0, **(quiet | options))


# Lightning 2.6.6 with torch 2.14: its own use of a deprecated pytree test, and advice about workers.
lightning_warnings = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*"
)


@lightning_warnings
@pytest.mark.parametrize("workers", [0, 2])
def test_fit_with_accumulation(packed: Path, workers: int) -> None:
    data, model = _module(packed, micro_batch_size=4, num_workers=workers), Probe()
    trainer = _trainer(
        max_steps=2,
        max_epochs=-1,
        accumulate_grad_batches=2,
        val_check_interval=4,
        check_val_every_n_epoch=None,
    )
    trainer.fit(model, data)
    assert (trainer.global_step, len(model.indices), len(set(model.indices))) == (2, 16, 16)
    assert trainer.num_training_batches == 8, "an epoch of 32 samples"
    assert model.weight == 12
    assert not data._loaders, "teardown ended the workers"


@lightning_warnings
def test_fit_goes_beyond_an_epoch(packed: Path) -> None:
    model = Probe()
    _trainer(max_steps=8, max_epochs=-1, limit_val_batches=0).fit(model, _module(packed))
    assert sorted(model.indices[:32]) == sorted(model.indices[32:]) == list(range(32))
    assert model.indices[:32] != model.indices[32:]


@lightning_warnings
@pytest.mark.parametrize("workers", [0, 2])
def test_a_fit_goes_on_with_the_next_sample(packed: Path, tmp_path: Path, workers: int) -> None:
    """Lightning alone, from its own checkpoint, in the middle of an epoch: the module's state is all that
    is needed.
    """
    whole, first, second = Probe(), Probe(), Probe()
    _trainer(max_steps=11, max_epochs=-1, limit_val_batches=0).fit(whole, _module(packed))
    trainer = _trainer(max_steps=6, max_epochs=-1, limit_val_batches=0)
    trainer.fit(first, _module(packed, num_workers=workers))
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    data = _module(packed, num_workers=workers)
    _trainer(max_steps=11, max_epochs=-1, limit_val_batches=0).fit(
        second, data, ckpt_path=tmp_path / "stopped.ckpt", weights_only=True
    )
    assert first.indices + second.indices == whole.indices
    assert data.consumed == 88


def test_the_state_is_the_position(packed: Path) -> None:
    data = _module(packed, seed=3)
    assert data.state_dict() == {
        "format": 1,
        "seed": 3,
        "epoch": 0,
        "consumed": 0,
        "lanes": 48,
        "window": 2048,
        "data_hash": data.data_hash,
    }
    data.load_state_dict(data.state_dict() | {"consumed": 33})
    assert (data.consumed, data.state_dict()["epoch"]) == (33, 1)
    whole, expected = _module(packed, seed=3).train_dataloader(), []
    for batch in islice(whole, 8):
        expected += batch["index"].tolist()
    assert next(iter(data.train_dataloader()))["index"].tolist() == expected[33:41]


@pytest.mark.parametrize(("key", "value"), [("seed", 1), ("lanes", 24), ("window", 100), ("data_hash", "ab")])
def test_a_position_in_another_sequence_is_refused(packed: Path, key: str, value: object) -> None:
    data = _module(packed)
    data.load_state_dict(data.state_dict() | {key: value})
    with refused("data.path" if key == "data_hash" else f"data.order.{key}"):
        data.train_dataloader()


def test_a_mixture_counts_its_sources(packed: Path, source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "more", PackOptions(val=4, shards=2))  # 40 training and 4 validation samples
    mix = [DataSource(str(packed), 3.0, "old"), DataSource(str(tmp_path / "more"), 1.0)]
    data = _module(None, mix=mix)
    data.check(1)
    assert (data.samples, data.consumed_by_source()) == (72, {"old": 0, "more": 0})
    data.load_state_dict(data.state_dict() | {"consumed": 4000})
    assert data.consumed_by_source() == {"old": 3000, "more": 1000}
    batches = list(islice(data.train_dataloader(), 10))
    sources = [s for batch in batches for s in batch["source"].tolist()]
    assert (len(sources), set(sources)) == (80, {0, 1})
    validated = [i for batch in data.val_dataloader() for i in batch["index"].tolist()]
    assert validated == list(range(16)), "the val splits of both"


@lightning_warnings
def test_a_mixture_that_runs_out_is_told_before_training(packed: Path) -> None:
    data = _module(None, mix=[DataSource(str(packed), when_exhausted="stop")])
    with refused("data.mix"):
        _trainer(max_steps=6, max_epochs=-1).fit(Probe(), data)
    model = Probe()
    _trainer(max_steps=4, max_epochs=-1, limit_val_batches=0).fit(
        model, _module(None, mix=[DataSource(str(packed), when_exhausted="stop")])
    )
    assert sorted(model.indices) == list(range(32))


@lightning_warnings
def test_foreign_accumulation_is_refused(packed: Path) -> None:
    with refused("trainer.accumulate_grad_batches"):
        _trainer(max_steps=2, accumulate_grad_batches=3).fit(Probe(), _module(packed, micro_batch_size=4))


@lightning_warnings
def test_errors_in_workers_stay_one_sentence(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "data", PackOptions(val=12, shards=2))
    for shard in (tmp_path / "data" / "train").glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[:4096])
    with pytest.raises(DataError) as error:
        _trainer(max_steps=2).fit(Probe(), _module(tmp_path / "data", num_workers=2))
    assert "\n" not in str(error.value)
    assert error.value.key in {str(path) for path in (tmp_path / "data" / "train").glob("*.tar")}


@lightning_warnings
def test_test_split(source: Path, packed: Path, tmp_path: Path) -> None:
    with refused(str(packed), DataError):
        _module(packed).test_dataloader()
    for split in ("train", "val", "test"):
        (tmp_path / "folders" / split).parent.mkdir(exist_ok=True)
        (tmp_path / "folders" / split).symlink_to(source)
    data = _module(tmp_path / "data", source=str(tmp_path / "folders"))
    model = Probe()
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
    ("options", "key"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"num_workers": -1}, "reading.num_workers"),
        ({"window": 0}, "order.window"),
        ({"lanes": 0}, "order.lanes"),
        ({"mix": [DataSource("a")]}, "path"),
        ({"epochs": 0.0}, "epochs"),
        ({"max_skipped_share": 1.5}, "reading.max_skipped_share"),
        ({"image_size": 0}, "image_size"),
        ({"augmentation": Augmentation(auto_augment="x")}, "augmentation.auto_augment"),
    ],
)
def test_bad_arguments(packed: Path, options: dict, key: str) -> None:
    with refused(key):
        _module(packed, **options)


@pytest.mark.parametrize(
    ("options", "world", "key"),
    [
        ({"batch_size": 9}, 2, "batch_size"),
        ({"micro_batch_size": 3}, 2, "micro_batch_size"),
        ({"verify": "all"}, 1, "reading.verify"),
    ],
)
def test_check_refuses_before_training(packed: Path, options: dict, world: int, key: str) -> None:
    with refused(key):
        _module(packed, **options).check(world)


@pytest.mark.parametrize(
    ("mix", "key"),
    [
        ([DataSource("a", 0.0)], "mix"),
        ([DataSource("a", float("nan"))], "mix"),
        ([DataSource("x/a"), DataSource("y/a/")], "mix"),
        ([], "path"),
    ],
)
def test_bad_mixtures(mix: list[DataSource], key: str) -> None:
    with refused(key):
        _module(None, mix=mix)


def test_a_bad_loading_section() -> None:
    with refused("reading.loading.prefetch_factor"):
        Loading(prefetch_factor=0)


def test_more_readers_than_shards(packed: Path) -> None:
    """Four shards, and 5 ranks with 3 workers each: lanes split shards."""
    _module(packed, batch_size=10, num_workers=3).check(5)


def test_check_needs_data(packed: Path, tmp_path: Path) -> None:
    _module(packed).check(4)
    with refused(str(tmp_path / "train/index.json"), DataError):
        _module(tmp_path).check(1)


def test_arguments_from_yaml(packed: Path) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(ImageDataModule, "data")
    arguments = [
        f"--data.path={packed}",
        "--data.image_size=[8, 16]",
        "--data.augmentation.hflip=0",
        "--data.augmentation.auto_augment=null",
    ]
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


@pytest.mark.slow
def test_a_program_with_an_open_loader_exits(packed: Path) -> None:
    """Workers ignore SIGTERM, by which Python ends its children at exit: without our own end it waits for
    ever.
    """
    code = f"""
from mhla_lightning.data import ImageDataModule, ReadingConfig
data = ImageDataModule({str(packed)!r}, batch_size=4, image_size=8, reading=ReadingConfig(num_workers=2))
batches = iter(data.train_dataloader())
next(batches)
"""
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True).returncode
        == 0
    )
