"""A change that is refused, crashes or is stopped at its start leaves the run folder as it was."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule

from mhla_lightning.cli.main import main
from mhla_lightning.runs.folder import RunFolder
from mhla_lightning.tasks import ClassificationTask
from tests.helpers.images import TINY_RECIPE

SHORT = ["--trainer.max_steps", "4"]
LONGER = ["--trainer.max_steps", "8", "--accept-changes"]


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    log = "{class_path: mhla_lightning.callbacks.SampleLog}"
    text = TINY_RECIPE.replace("PATH", str(shards)).replace("callbacks: [", f"callbacks: [{log}, ")
    (folder / "tiny.yaml").write_text(text)
    place = ["--runs", str(folder / "runs"), "--run-id", "r"]
    assert main(["run", str(folder / "tiny.yaml"), *place, *SHORT]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MHLA_RUNS", raising=False)
    return tmp_path / "runs" / "r"


def fit(*changes: str) -> int:
    return main(["run", "tiny.yaml", "--run-id", "r", *changes])


def contents(run: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.rglob("*")
        if path.is_file()
    }


def assert_still_finished(run: Path, before: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert contents(run) == before
    capsys.readouterr()
    assert fit(*SHORT) == 0
    assert "run r is finished" in capsys.readouterr().out
    assert contents(run) == before


REFUSED = {
    "ranks": (["--trainer.devices", "3"], "--data.batch_size"),
    "strategy": (["--trainer.strategy", "nothing"], "--trainer.strategy"),
    "depth": (["--model.backbone_options.depth", "3"], "--model.backbone_options.depth: "),
    "width": (["--model.backbone_options.embed_dim", "16"], "--model.backbone_options.embed_dim: "),
    "attention": (["--model.attention.blocks", "4"], "--model.attention.blocks: "),
    "constructor": (["--model.optimizer.lr", "-1"], "--model.optimizer.lr"),
    "data": (["--data.path", "nowhere"], "nowhere"),
    "length": (["--trainer.max_steps", "2"], "--trainer.max_steps: it makes 2 steps"),
    "nothing to train": (["--trainer.max_steps", "4", "--model.optimizer.lr", "1"], "--trainer.max_steps: "),
}


def test_a_refused_change_is_one_sentence_and_changes_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    for change, (words, says) in REFUSED.items():
        capsys.readouterr()
        assert fit(*LONGER, *words) == 2, change
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: "), change
        assert says in error
        assert contents(run) == before, change
    assert_still_finished(run, before, capsys)


def _crash(self: LightningModule, *_: object) -> None:
    raise RuntimeError("crashed at the start")


def _interrupt(self: LightningModule, *_: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _terminate(self: LightningModule, *_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


ENDS = [
    ("check_data", _terminate, 75),
    ("configure_model", _crash, 1),
    ("on_train_start", _crash, 1),
    ("on_fit_start", _terminate, 75),
    ("on_train_start", _interrupt, 130),
]


def test_an_attempt_that_ends_before_its_first_step_changes_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run)
    for hook, happens, code in ENDS:
        with monkeypatch.context() as patch:
            patch.setattr(ClassificationTask, hook, happens)
            if code == 1:
                with pytest.raises(RuntimeError, match="crashed at the start"):
                    fit(*LONGER)
            else:
                assert fit(*LONGER) == code, hook
        for number in (signal.SIGTERM, signal.SIGUSR1):  # ignored since the stop, until the process ends
            signal.signal(number, signal.SIG_DFL)
        assert contents(run) == before, hook
    assert_still_finished(run, before, capsys)


def test_after_the_first_step_the_folder_shows_the_new_attempt(run: Path) -> None:
    old = (run / "recipe.yaml").read_text()
    assert fit(*LONGER) == 0
    assert (run / "recipe.yaml").read_text() != old
    assert (run / "recipe.yaml").read_text() == (
        run / "checkpoints" / "step-00000008" / "recipe.yaml"
    ).read_text()
    assert RunFolder(run).finished()
    assert len((run / "samples" / "rank-0.jsonl").read_text().splitlines()) == 8
