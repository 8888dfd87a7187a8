"""Which checkpoints a run keeps, writing beside the training, and disks that take no more."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mhla_lightning.checkpoints.atomic import Keep, best_checkpoints, commit
from mhla_lightning.checkpoints.saving import Parts, Writer, copied, tensor_bytes
from mhla_lightning.checkpoints.source import open_source
from mhla_lightning.cli.main import main
from mhla_lightning.runs.disk_errors import lack_of_room
from mhla_lightning.runs.folder import complete_checkpoints, read_metrics
from mhla_lightning.tasks import ClassificationTask
from tests.helpers.killed_runs import exact_metrics

OPTIONS = [
    "--trainer.max_steps",
    "16",
    "--trainer.val_check_interval",
    "4",
    "--checkpoint.every_n_steps",
    "4",
]


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in complete_checkpoints(run)]


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_last_and_the_best_are_kept(recipe: Path, tmp_path: Path, asynchronous: bool) -> None:
    keep = ["--checkpoint.keep_last", "1", "--checkpoint.keep_best", "2", "--checkpoint.monitor", "val/loss"]
    rising = [
        "--model.optimizer.lr",
        "0.5",
        "--checkpoint.asynchronous",
        str(asynchronous).lower(),
    ]  # far too high: the loss goes up and down
    assert main(["run", str(recipe), "--run-id", "best", *OPTIONS, *keep, *rising]) == 0
    run = tmp_path / "runs" / "best"
    losses = dict(read_metrics(run / "metrics.jsonl")["val/loss"])
    assert sorted(losses) == [4, 8, 12, 16]
    best = sorted(losses, key=lambda step: (losses[step], -step))[:2]
    assert steps(run) == sorted({16, *best})
    assert not list((run / "checkpoints").glob(".tmp-*"))
    state = json.loads((complete_checkpoints(run)[-1] / "state.json").read_text())
    assert state["metrics"]["val/loss"] == losses[16]


@pytest.mark.slow
def test_writing_beside_the_training_changes_no_number(recipe: Path, tmp_path: Path) -> None:
    """The copies are those of the step, although training goes on while they are written."""
    for name in ("true", "false"):
        assert (
            main(
                [
                    "run",
                    str(recipe),
                    "--run-id",
                    name,
                    *OPTIONS,
                    "--checkpoint.keep_last",
                    "9",
                    "--checkpoint.asynchronous",
                    name,
                ]
            )
            == 0
        )
    beside, in_turn = (tmp_path / "runs" / name for name in ("true", "false"))
    assert exact_metrics(beside) == exact_metrics(in_turn)
    assert steps(beside) == steps(in_turn) == [4, 8, 12, 16]
    for one, other in zip(complete_checkpoints(beside), complete_checkpoints(in_turn), strict=True):
        first, second = (open_source(path / "trainer.ckpt") for path in (one, other))
        assert all(first.whole(name).equal(second.whole(name)) for name in first.names())
        assert (one / "ema" / "weights.safetensors").read_bytes() == (
            other / "ema" / "weights.safetensors"
        ).read_bytes()
        assert (one / "recipe.yaml").read_text()


@pytest.mark.parametrize("asynchronous", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_a_checkpoint_is_complete_once_the_numbers_of_its_step_are_written(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: str
) -> None:
    """A run killed between the two would go on behind the step and leave a hole in its curves."""
    written: dict[int, bool] = {}

    def watched(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
        tags = ("train/loss", "val/loss") if step == 4 else ("train/loss",)
        series = read_metrics(tmp_path / "runs" / "watched" / "metrics.jsonl")
        written[step] = all(step in dict(series[tag]) for tag in tags)
        return commit(folder, step, state)

    monkeypatch.setattr("mhla_lightning.callbacks.checkpoint.commit", watched)
    lengths = [
        "--trainer.max_steps",
        "6",
        "--trainer.val_check_interval",
        "4",
        "--checkpoint.every_n_steps",
        "1",
        "--checkpoint.keep_last",
        "9",
    ]
    logged = ["--trainer.log_every_n_steps", "1", "--checkpoint.asynchronous", asynchronous]
    assert main(["run", str(recipe), "--run-id", "watched", *lengths, *logged]) == 0
    assert written == dict.fromkeys(range(1, 7), True)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_an_error_before_the_numbers_are_written_leaves_no_hole(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: str
) -> None:
    """As when another rank dies between a save and the end of the step: the checkpoint of that step does
    not count.
    """

    def fails(task: ClassificationTask, *_: Any) -> None:
        if task.trainer.global_step == 4:
            raise RuntimeError("the other rank is gone")

    run = [
        "run",
        str(recipe),
        "--run-id",
        "hole",
        "--trainer.max_steps",
        "6",
        "--trainer.val_check_interval",
        "6",
        "--checkpoint.every_n_steps",
        "1",
    ]
    run += [
        "--checkpoint.keep_last",
        "9",
        "--trainer.log_every_n_steps",
        "1",
        "--checkpoint.asynchronous",
        asynchronous,
    ]
    with monkeypatch.context() as patched:
        patched.setattr(ClassificationTask, "on_train_batch_end", fails)
        with pytest.raises(RuntimeError, match="the other rank is gone"):
            main(run)
    assert steps(tmp_path / "runs" / "hole") == [1, 2, 3]
    assert main(run) == 0
    assert [step for step, _ in read_metrics(tmp_path / "runs" / "hole" / "metrics.jsonl")["train/loss"]] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--checkpoint.keep_best", "2"], ["checkpoint.keep_best", "checkpoint.monitor"]),
        (["--checkpoint.monitor", "val/loss"], ["checkpoint.keep_best", "checkpoint.monitor"]),
        (
            ["--checkpoint.keep_best", "1", "--checkpoint.monitor", "val/lost"],
            ["--checkpoint.monitor: ", "'val/lost'", "val/loss"],
        ),
    ],
)
def test_a_wrong_monitor_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: list[str]
) -> None:
    assert main(["run", str(recipe), *OPTIONS, *options]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert all(text in error for text in named)


def test_of_equal_checkpoints_the_newest_is_best(tmp_path: Path) -> None:
    for step, loss in ((1, 0.5), (2, 0.25), (3, 0.25), (5, math.nan)):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / "state.json").write_text(json.dumps({"metrics": {"val/loss": loss}}))
    (tmp_path / "4").mkdir()
    found = [tmp_path / str(step) for step in (1, 2, 3, 4, 5)]
    assert [path.name for path in best_checkpoints(found, Keep(1, 2, "val/loss"))] == ["3", "2"]
    assert [path.name for path in best_checkpoints(found, Keep(1, 1, "val/loss", highest=True))] == ["1"]
    assert len(best_checkpoints(found, Keep(1, 9, "val/loss"))) == 3, (
        "4 was not validated, and the loss of 5 is no number"
    )
    assert best_checkpoints(found, Keep(1)) == []


def test_a_writer_tells_what_another_rank_met(tmp_path: Path) -> None:
    """Threads of two ranks speak through files; rank 0 does not finish what rank 1 could not write."""
    finished = []

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    first, second = Parts(tmp_path, 0), Parts(tmp_path, 1)
    first.add("a", 0, Path.touch)
    second.add("b", 0, fail)
    writers = [Writer(parts, 2, lambda: finished.append(1)) for parts in (first, second)]
    errors = [writer.wait(20) for writer in writers]
    assert not finished
    assert all(error is not None and "is full" in error for error in errors)


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    import torch

    values = {"a": [torch.zeros(1000), {"b": torch.zeros(10, dtype=torch.bfloat16)}], "c": 3}
    assert tensor_bytes(values) == 4020
    kept = copied(values)
    assert kept["a"][0].data_ptr() != values["a"][0].data_ptr()  # type: ignore[index]
    assert lack_of_room(tmp_path, 1000) is None
    sentence = lack_of_room(tmp_path, 2**60)
    assert sentence is not None
    assert "does not fit" in sentence


Mount = Callable[[str], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Mount]:
    """Makes a small disk of its own, with mount options."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"mounting a small disk needs root: {done.stderr.strip()}")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_leaves_the_last_checkpoint(
    recipe: Path, disk: Mount, capsys: pytest.CaptureFixture[str], asynchronous: str
) -> None:
    root = disk("size=1500k")
    keep = [
        "--checkpoint.keep_last",
        "99",
        "--checkpoint.asynchronous",
        asynchronous,
        "--checkpoint.every_n_steps",
        "1",
    ]
    assert (
        main(
            ["run", str(recipe), "--runs", str(root), "--run-id", "full", "--trainer.max_steps", "40", *keep]
        )
        == 75
    )
    error = capsys.readouterr().err
    last = complete_checkpoints(root / "full")[-1]
    assert "MiB are free" in error
    assert f"{root / 'full' / 'checkpoints'}: " in error
    assert last.name in error
    assert "Traceback" not in error
    assert open_source(last / "trainer.ckpt").names()
    assert not list((root / "full" / "checkpoints").glob(".tmp-*"))


def test_a_disk_that_cannot_be_written(
    recipe: Path, disk: Mount, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = disk("size=4m,ro")
    assert main(["run", str(recipe), "--runs", str(root), "--run-id", "never"]) == 2
    assert f"{root / 'never'}: " in capsys.readouterr().err
    run = tmp_path / "runs" / "later"
    assert main(["run", str(recipe), "--run-id", "later", "--trainer.max_steps", "8"]) == 0
    (run / "summary.json").unlink()
    subprocess.run(["mount", "--bind", str(run / "checkpoints"), str(run / "checkpoints")], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(run / "checkpoints")], check=True)
        assert (
            main(["run", str(recipe), "--run-id", "later", "--trainer.max_steps", "12", "--accept-changes"])
            == 75
        )
    finally:
        subprocess.run(
            ["umount", "-l", str(run / "checkpoints")], check=True
        )  # the checkpoint that was resumed is mapped
    error = capsys.readouterr().err
    assert str(run / "checkpoints") in error
    assert "step-00000008" in error
    assert steps(run)[-1] == 8
