"""Memory of a GPU that runs out: the files beside the message, and no error that hides the first."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from mhla_lightning.config.recipes import load_recipe
from mhla_lightning.config.resolve import resolve
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import RunFolder
from mhla_lightning.training.memory_errors import MemorySnapshot
from mhla_lightning.training.session import Session

BLOCKS = [{"address": 1, "total_size": 2**20, "segment_pool_id": (0, 0), "blocks": [{"size": 512}]}]
SAID = "CUDA out of memory. Tried to allocate 2.00 GiB"


class NoMemory(pl.Callback):
    """Has no memory left in the second step."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 1:
            raise torch.OutOfMemoryError(SAID)


def message(recipe: Path, folder: Path) -> str:
    """Return the error of a run of the recipe that has no memory left."""
    resolved = resolve(load_recipe(str(recipe)).values)
    resolved.trainer["callbacks"].append(NoMemory())
    (folder / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        Session(resolved, RunFolder(folder), None).fit()
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    assert "out of memory after step 1 with" in str(error.value)
    assert "Tried to allocate" not in str(error.value).split("CUDA out of memory")[0]
    return str(error.value)


def test_the_memory_is_written_and_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda: "a table")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: BLOCKS)
    said = message(recipe, tmp_path / "run")
    summary, blocks = (tmp_path / "run" / "memory" / f"rank-0.{suffix}" for suffix in ("txt", "json"))
    assert said.endswith(f"the memory as it ran out: {summary}, {blocks}")
    assert summary.read_text() == "a table"
    assert json.loads(blocks.read_text())[0]["blocks"] == [{"size": 512}]


def _fails(error: Exception) -> Callable[[], Any]:
    def failing() -> Any:
        raise error

    return failing


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("CUDA error: unspecified launch failure"),
    ],
    ids=["disk", "driver"],
)
def test_a_second_error_does_not_hide_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda: "a table")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", _fails(error))
    snapshot = MemorySnapshot(tmp_path)
    trainer: Any = SimpleNamespace(global_rank=3)
    snapshot.on_exception(trainer, pl.LightningModule(), torch.OutOfMemoryError(SAID))
    assert snapshot.files == [tmp_path / "memory" / "rank-3.txt"]
    assert str(error) in caplog.text


def test_other_errors_write_nothing(tmp_path: Path) -> None:
    snapshot = MemorySnapshot(tmp_path)
    trainer: Any = SimpleNamespace(global_rank=0)
    snapshot.on_exception(trainer, pl.LightningModule(), MemoryError("no memory"))
    assert not list(tmp_path.iterdir())
