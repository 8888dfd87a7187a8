"""Every file that the project writes, damaged: each reader ends in a result or in one sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.evaluation.registry import RequestedEvaluation
from mhla_lightning.runs.folder import RunFolder, newest_checkpoint, read_metrics, write_json
from tests.helpers import diffusion_models, images, language_runs
from tests.helpers.written_files import DAMAGES, WRITTEN, Written, damage, entry_of

RUN = ["run", "lm.yaml", "--run-id", "lm"]
SAMPLE = ["sample", "dit", "--classes", "0-1", "--n", "4", "--steps", "2", "--batch-size", "2"]
KEPT = RequestedEvaluation("samples", None, {"n": 1})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which every verb that needs no other machine has written its files, in seconds."""
    root = tmp_path_factory.mktemp("made")
    before = Path.cwd()
    os.chdir(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MHLA_RUNS", str(root / "runs"))
        try:
            _make(root)
            yield root
        finally:
            os.chdir(before)


def _make(root: Path) -> None:
    for name in ("given", "out", "pictures"):
        (root / name).mkdir()
    language_runs.write_text(root / "given").rename(root / "data")
    recipe = language_runs.RECIPE.replace("PATH", "data")
    for old, new in (
        ("max_steps: 10, val_check_interval: 5", "max_steps: 6, val_check_interval: 3"),
        ("every_n_steps: 5, keep_last: 1", "every_n_steps: 3, keep_last: 2"),
        ("{decay: 0.9}}]", "{decay: 0.9}}, {class_path: mhla_lightning.callbacks.SampleLog}]"),
    ):
        assert old in recipe
        recipe = recipe.replace(old, new)
    (root / "lm.yaml").write_text(recipe)
    images.write_images(root / "pictures")
    shutil.rmtree(root / "pictures" / "source")
    diffusion_models.write_recipe(root / "dit.yaml", Path("pictures/shards"))
    for command in (
        RUN,
        ["run", "dit.yaml", "--run-id", "dit", "--trainer.max_steps", "2", "--checkpoint.every_n_steps", "1"],
        SAMPLE,
        ["plan", "lm.yaml", "--json", "out/plan.json"],
        ["generate", "lm", "--prompt", "the", "--max-new-tokens", "2", "--json", "out/text.json"],
        ["status", "--json", "out/status.json"],
        ["recipes", "list", "--json", "out/recipes.json"],
        ["export", "dit", "--to", "out/exported"],
        ["data", "verify", "data", "--workers", "1", "--json", "out/verify.json"],
        ["data", "preview", "data", "--to", "out/preview.txt"],
    ):
        assert main(command) == 0, command
    run = RunFolder(root / "runs" / "lm")
    write_json(KEPT.file(run), {"format": 1, "values": {"top1": 0.5}})
    (run.path / "slurm").mkdir()
    (run.path / "slurm" / "attempts").write_text("7 0 started - 0 - 1\n7 0 preempted 75 0 3 9\n")
    (run.path / "slurm" / "cancelled").write_text("8\n")
    write_json(run.job, {"format": 1, "run_id": "lm", "jobs": ["7"]})
    write_json(run.path / "lock", {"host": os.uname().nodename, "pid": 0, "started": "0", "job": None})


def test_every_file_is_in_the_list(made: Path) -> None:
    """A new kind of file needs an entry in tests/helpers/written_files.py, with the commands that read it."""
    found = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    found = {path for path in found if path not in ("lm.yaml", "dit.yaml") and not path.startswith("given/")}
    assert not sorted(path for path in found if entry_of(path) is None)
    kinds = {entry.pattern for path in found if (entry := entry_of(path)) is not None}
    assert len(kinds) > 25, sorted(kinds)


def _run(root: Path) -> int:
    """Train as after a kill behind the last checkpoint: the end is as it was, number by number."""
    run = RunFolder(root / "runs" / "lm")
    before = json.loads((root / "losses.json").read_text())
    code = main(RUN)
    if code == 0:
        assert run.finished()
        assert newest_checkpoint(run.path) == run.checkpoints / "step-00000006"
        assert all(row in before for row in _losses(run))
        assert _losses(run) == before or "metrics" in (root / "damaged").read_text()
    return code


def _losses(run: RunFolder) -> list[list[float]]:
    return [[step, value] for step, value in read_metrics(run.metrics).get("train/loss", [])]


def _curves(root: Path) -> int:
    series = read_metrics(root / "runs" / "lm" / "metrics.jsonl")
    assert all(isinstance(value, float | int) for rows in series.values() for _, value in rows)
    return 0


def _kept(root: Path) -> int:
    kept = KEPT.kept(RunFolder(root / "runs" / "lm"))
    assert kept in (None, {"top1": 0.5})
    return 0


READERS: dict[str, Callable[[Path], int]] = {
    "status": lambda root: main(["status", "lm"]),
    "run": _run,
    "generate": lambda root: main(["generate", "lm", "--prompt", "the", "--greedy", "--max-new-tokens", "2"]),
    "sample": lambda root: main(SAMPLE),
    "export": lambda root: main(["export", "dit", "--to", "again"]),
    "validate": lambda root: main([*RUN, "--mode", "validate"]),
    "curves": _curves,
    "kept": _kept,
    "resume": lambda root: main(["resume", "lm", "--dry-run"]),
    "verify": lambda root: main(["data", "verify", "data", "--workers", "1"]),
    "preview": lambda root: main(["data", "preview", "data"]),
    "train": lambda root: main(["run", "lm.yaml", "--run-id", "new", "--trainer.max_steps", "1"]),
    "import": lambda root: main(
        [
            "run",
            "dit.yaml",
            "--run-id",
            "warm",
            "--trainer.max_steps",
            "1",
            "--model.init_from",
            "out/exported",
        ]
    ),
    "warm": lambda root: main(
        ["run", "lm.yaml", "--run-id", "warm", "--trainer.max_steps", "1", "--model.init_from", "runs/lm"]
    ),
}
QUICK = {"status", "curves", "kept", "generate"}
ELSEWHERE = {"continue": "tests/data/test_damaged_work.py"}


def _cases() -> Iterator[object]:
    for one in WRITTEN:
        for how in DAMAGES:
            for reader in one.readers:
                if reader in ELSEWHERE:
                    continue
                marks = () if reader in QUICK and how in ("truncated", "empty") else (pytest.mark.slow,)
                yield pytest.param(one, how, reader, id=f"{one.pattern}-{how}-{reader}", marks=marks)


@pytest.mark.parametrize(("one", "how", "reader"), list(_cases()))
def test_a_damaged_file(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one: Written,
    how: str,
    reader: str,
) -> None:
    of_diffusion = reader in ("sample", "export", "import")
    folders = ["runs/dit", "pictures", "out"] if of_diffusion else ["runs/lm", "data"]
    for name in folders:
        shutil.copytree(made / name, tmp_path / name)
    for name in ("lm.yaml", "dit.yaml"):
        shutil.copy(made / name, tmp_path / name)
    found = [
        path for path in tmp_path.rglob("*") if re.fullmatch(one.pattern, str(path.relative_to(tmp_path)))
    ]
    if not found:
        pytest.skip("no command of this test writes it; the list names the test that does")
    chosen = max(found)  # of checkpoints the newest
    if reader == "run":
        run = RunFolder(tmp_path / "runs" / "lm")
        (tmp_path / "losses.json").write_text(json.dumps(_losses(run)))
        if chosen not in (run.summary, run.progress):
            run.summary.unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MHLA_RUNS", str(tmp_path / "runs"))
    damage(chosen, how)
    (tmp_path / "damaged").write_text(chosen.name)
    capsys.readouterr()
    code = READERS[reader](tmp_path)
    shown = capsys.readouterr()
    assert code in ((0, 2) if reader in one.refuses else (0,)), shown.err
    assert "Traceback" not in shown.out + shown.err
    if code and reader == "verify":
        assert re.search(r"[1-9]\d* problems? found", shown.out)
    elif code:
        (line,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert line.isprintable()
