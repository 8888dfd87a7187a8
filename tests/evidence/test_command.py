"""`mhla reproduce` on a tiny study: whole, killed and continued, with a row that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.runs.lock import is_held
from tests.helpers.images import write_images

STUDY = """
title: A tiny study
about: Two rows of a few steps.
value: 1
minutes: 1
seeds: [0, 1, 2]
recipe: classification/deit_tiny_mhla_mnist_cpu
overrides:
  trainer.max_steps: 4
  trainer.val_check_interval: 4
  trainer.log_every_n_steps: 1
  trainer.callbacks: []
  model.schedule.warmup_steps: 0
  model.backbone_options.depth: 1
  model.backbone_options.embed_dim: 24
  model.num_classes: 4
  data.batch_size: 8
  data.path: PATH
  data.reading.num_workers: 0
rows:
  linear: {model.attention: {name: linear, pos_conv: none}}
  mhla: {model.attention: {name: mhla, block_size: 4, pos_conv: none}}
metrics: {val/top1: top-1, val/loss: loss}
plots: [{metrics: [val/loss]}]
claims:
  - {says: MHLA is better., paper: Table 2, metric: val/loss, lower: mhla, than: linear}
"""
SEEDS = ["--seeds", "0,1"]
RUNS = [f"{row}-seed{seed}" for seed in (0, 1) for row in ("linear", "mhla")]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MHLA_RUNS", raising=False)
    path = tmp_path / "tiny.yaml"
    path.write_text(STUDY.replace("PATH", str(write_images(tmp_path / "images"))))
    return path


def command(study: Path, place: str) -> list[str]:
    to = ["--runs", str(study.parent / place), "--page", str(study.parent / f"{place}.md")]
    return ["reproduce", str(study), *SEEDS, *to]


def folder(study: Path, place: str) -> Path:
    (found,) = (study.parent / place / "evidence").glob("tiny-*")
    return found


def timeless(page: Path) -> list[str]:
    """The lines of a page without times, and without the commit: a checkout may change during the test.

    Links hold the page's name.
    """
    timed = ("- Date: ", "- Total: ", "- Largest load ", "It took ")
    lines = page.read_text().replace(f"({page.stem}/", "(page/").splitlines()
    return [line for line in lines if not line.startswith(timed) and "; torch " not in line]


@pytest.mark.slow  # trains eight runs, some of them in processes of their own: a minute
@pytest.mark.usefixtures("forked")
def test_a_killed_study_continues_and_repeats_nothing(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(study, "whole")) == 0
    said = capsys.readouterr().out.splitlines()
    order = [line.partition(": ")[0] for line in said if ", seed " in line]
    assert sorted(order[:2]) == ["linear, seed 0", "mhla, seed 0"], "seed by seed"
    assert sorted(path.name for path in folder(study, "whole").iterdir() if path.is_dir()) == sorted(RUNS)

    words = [sys.executable, "-c", "import sys; from mhla_lightning.cli.main import main; main(sys.argv[1:])"]
    parent = subprocess.Popen([*words, *command(study, "killed")], cwd=study.parent)
    deadline = time.monotonic() + 300
    while not list((study.parent / "killed").glob("evidence/tiny-*/*/summary.json")):
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    assert parent.wait(30) == -signal.SIGKILL
    place = folder(study, "killed")
    finished = {path: path.stat().st_mtime_ns for path in place.glob("*/summary.json")}
    assert 0 < len(finished) < len(RUNS)

    assert main(command(study, "killed")) == 0
    said = capsys.readouterr().out.splitlines()
    assert sum("(finished before)" in line for line in said) >= len(finished)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert timeless(study.parent / "killed.md") == timeless(study.parent / "whole.md")
    pictures = [(study.parent / name / "tiny-1.png").read_bytes() for name in ("whole", "killed")]
    assert pictures[0] == pictures[1]
    assert not any(is_held(place / run) for run in RUNS)

    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert main(command(study, "killed")) == 0
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before, "nothing is left to do"


@pytest.mark.slow  # trains three runs: fifteen seconds
@pytest.mark.usefixtures("forked")
def test_a_failing_row_is_named_and_the_others_go_on(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = study.read_text().replace("rows:\n", "rows:\n  bad: {model.backbone_options.img_size: 32}\n")
    study.write_text(text)
    words = [*command(study, "runs"), "--seeds", "0"]
    assert main(words) == 1
    shown = capsys.readouterr()
    log = folder(study, "runs") / "bad-seed0.log"
    line = f"row 'bad', seed 0 stopped with exit code 2; all it said is in {log}"
    assert shown.err.count(line) == 2  # when it happens, and at the end
    assert log.read_text().splitlines()[-1] in shown.err
    assert "linear, seed 0: val/top1 " in shown.out
    assert "mhla, seed 0: val/top1 " in shown.out
    page = (study.parent / "runs.md").read_text()
    assert "| bad | 0 | - | - |" in page
    assert "2 of 3 runs are finished" in page


@pytest.mark.slow  # starts a process that trains: half a minute
def test_ctrl_c_ends_the_children_and_says_how_to_go_on(study: Path) -> None:
    words = [sys.executable, "-m", "mhla_lightning", *command(study, "runs")]
    study.write_text(study.read_text().replace("max_steps: 4", "max_steps: 5000"))
    parent = subprocess.Popen(
        words, cwd=study.parent, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not list((study.parent / "runs").glob("evidence/tiny-*/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.1)
    os.kill(parent.pid, signal.SIGINT)
    _, said = parent.communicate(timeout=120)
    assert parent.returncode == 130
    assert "the same command continues" in said
    assert not any(is_held(path) for path in folder(study, "runs").iterdir() if path.is_dir())
