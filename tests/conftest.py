"""Options and fixtures shared by all tests."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.ranks import Nursery

pytest_plugins = ["tests.helpers.cluster_stubs", "tests.helpers.loopback"]
SPARE_BYTES = 3 * 2**29  # address space that a test of `little_memory` may take on top of what is in use
ORACLES = Path(__file__).parent / "oracles"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--oracles",
        action="append",
        default=[],
        help="another folder of oracle cases (NAME.npz + NAME.json), several times if need be",
    )


def pytest_configure(config: pytest.Config) -> None:
    """A shell's background job starts with Ctrl-C ignored, and so would every process that a test
    interrupts.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "oracle" in metafunc.fixturenames:
        folders = [Path(p) for p in metafunc.config.getoption("oracles")] or [ORACLES]
        cases = sorted(case for folder in folders for case in folder.glob("*.npz"))
        if not cases:
            raise pytest.UsageError(f"no oracle cases (*.npz) in {', '.join(map(str, folders))}")
        metafunc.parametrize("oracle", cases, ids=[case.stem for case in cases])


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """What forks ranks, for all tests: importing everything once takes 8 s of a core."""
    nursery = Nursery(tmp_path_factory.mktemp("ranks"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def write_images(root: Path) -> Path:
    """64 training and 20 validation images of 4 classes in 8 and 4 real tar shards; 8 x 8 pixels, class
    shown by brightness.
    """
    from mhla_lightning.data.prepare.pack import PackOptions, pack

    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 5)):
        for label in range(4):
            folder = root / "source" / split / f"class{label}"
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = np.clip(60 * label + rng.normal(30, 12, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{n:03d}.png")
    pack(str(root / "source"), root / "shards", PackOptions(shards=8))
    return root / "shards"


TINY_RECIPE = """
seed_everything: 0
trainer: {accelerator: cpu, devices: 1, max_steps: 12, val_check_interval: 4, log_every_n_steps: 1, callbacks: [
  {class_path: mhla_lightning.callbacks.EMA, init_args: {decay: 0.9}}]}
model:
  class_path: mhla_lightning.tasks.ClassificationTask
  init_args:
    backbone: deit_tiny
    attention: {name: mhla, blocks: 2}
    num_classes: 4
    backbone_options: {img_size: 8, patch_size: 2, embed_dim: 12, depth: 2, num_heads: 2}
    optimizer: {lr: 2.0e-3}
    schedule: {warmup_steps: 2}
data:
  class_path: mhla_lightning.data.ImageDataModule
  init_args: {path: PATH, image_size: 8, batch_size: 16, num_workers: 0, augmentation: {scale: [0.6, 1.0], auto_augment: null, crop_pct: 1.0}}
checkpoint: {every_n_steps: 4, keep_last: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny recipe on `shards`, 4 steps an epoch; runs go to tmp_path/runs."""
    monkeypatch.setenv("MHLA_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.replace("PATH", str(shards)))
    return path


@pytest.fixture
def little_memory() -> Iterator[None]:
    """At most SPARE_BYTES more address space, here and in workers: who believes a header that claims 100
    GB gets a MemoryError.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
