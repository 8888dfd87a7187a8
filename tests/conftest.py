"""Options and fixtures shared by all tests."""

from __future__ import annotations

import gc
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.images import TINY_RECIPE, write_images
from tests.helpers.oracles import ORACLES
from tests.helpers.ranks import Nursery

pytest.register_assert_rewrite("tests.helpers.causal_layers", "tests.helpers.zero_runs")
pytest_plugins = ["tests.helpers.cluster_stubs", "tests.helpers.interpreter", "tests.helpers.loopback"]
SPARE_BYTES = 3 * 2**29  # address space that a test of `little_memory` may take on top of what is in use


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
    gc.disable()


def pytest_collection_finish() -> None:
    """Modules and tests live to the end; each collection of garbage would look at them again."""
    gc.freeze()
    gc.enable()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "oracle" in metafunc.fixturenames:
        folders = [Path(p) for p in metafunc.config.getoption("oracles")] or [ORACLES]
        cases = sorted(case for folder in folders for case in folder.glob("*.npz"))
        if not cases:
            raise pytest.UsageError(f"no oracle cases (*.npz) in {', '.join(map(str, folders))}")
        halves = {
            half.name
            for folder in folders
            for suffix, other in ((".npz", ".json"), (".json", ".npz"))
            for half in folder.glob(f"*{suffix}")
            if not half.with_suffix(other).is_file()
        }
        if halves:
            raise pytest.UsageError(f"an oracle case is NAME.npz and NAME.json; alone: {sorted(halves)}")
        metafunc.parametrize("oracle", cases, ids=[case.stem for case in cases])


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """The process that forks commands, for all tests: importing everything once takes 8 s of a core."""
    nursery = Nursery(tmp_path_factory.mktemp("ranks"))
    yield nursery
    nursery.close()


@pytest.fixture
def forked(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m mhla_lightning ARGUMENTS` of a test is forked from the nursery: no import, 8 s less."""
    start = subprocess.Popen

    def popen(command: Sequence[str], **options: Any) -> Any:
        if list(command[:3]) != [sys.executable, "-m", "mhla_lightning"]:
            return start(command, **options)
        return nursery.popen(command[3:], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


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
