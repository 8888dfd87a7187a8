"""`mhla run` as a user types it: real shards, a real Trainer, real event files, real signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mhla_lightning.cli.main import main
from mhla_lightning.data.prepare.pack import PackOptions, pack
from mhla_lightning.runs.folder import complete_checkpoints, read_metrics
from mhla_lightning.runs.lock import hold

TRAIN_TAGS = {
    "loss",
    "lr",
    "grad_norm",
    "samples_per_second",
    "tokens_per_second",
    "time_data",
    "time_compute",
    "skipped",
    "skipped_steps",
}


def run_folder(tmp_path: Path, name: str = "r") -> Path:
    return tmp_path / "runs" / name


def fit(recipe: Path, *extra: str, name: str = "r") -> int:
    return main(["run", str(recipe), "--run-id", name, *extra])


def test_a_run_leaves_everything_others_read(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(recipe) == 0
    folder = run_folder(tmp_path)
    out = capsys.readouterr().out
    assert f"mhla monitor {folder} (or: tensorboard --logdir {folder.parent})" in out
    assert "step 12/12" in out
    assert f"use it: mhla predict {folder} IMAGE, or mhla export {folder} --to FOLDER" in out
    assert out.count("the val split has 20 samples") == 1

    series = read_metrics(folder / "metrics.jsonl")
    assert {tag.removeprefix("train/") for tag in series if tag.startswith("train/")} == TRAIN_TAGS
    assert [step for step, _ in series["train/loss"]] == list(range(1, 13))
    for tag in ("val/loss", "val/top1", "val_ema/loss", "val_ema/top1"):
        assert [step for step, _ in series[tag]] == [4, 8, 12]

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(series)
    for tag, values in series.items():
        assert [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(tag)] == values
    assert [e.step for e in events.Images("weights/mixing")] == [4, 8, 12]
    groups = sorted({tag.split("/")[0] for kind in ("scalars", "images") for tag in events.Tags()[kind]})
    assert groups == ["train", "val", "val_ema", "weights"]  # TensorBoard shows them in this order
    values = [tag for tag in events.Tags()["tensors"] if tag.startswith("mixing_values/")]
    assert [[e.step for e in events.Tensors(tag)] for tag in values] == 2 * [[4, 8, 12]]

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["last"]["val/top1"] == series["val/top1"][-1][1]
    assert summary["best"]["val/top1"] == max(v for _, v in series["val/top1"])
    assert summary["best"]["val/loss"] == min(v for _, v in series["val/loss"])
    assert summary["parameters"] > 0
    assert summary["flops_per_sample"] > 0
    assert summary["samples_per_second"] > 0
    progress = json.loads((folder / "progress.json").read_text())
    assert (progress["state"], progress["step"], progress["consumed"], progress["epoch"]) == (
        "finished",
        12,
        192,
        3,
    )
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["model"]["init_args"]["num_classes"] == 4
    assert json.loads((folder / "environment.json").read_text())["versions"]["lightning"]
    assert not (folder / "lock").exists()

    saved = complete_checkpoints(folder)
    assert [c.name for c in saved] == ["step-00000008", "step-00000012"]
    state = json.loads((saved[-1] / "state.json").read_text())
    assert (state["step"], state["consumed"], state["world_size"], state["format"]) == (12, 192, 1, 1)
    average = load_file(saved[-1] / "ema" / "weights.safetensors")
    assert all(t.dtype == torch.float32 for t in average.values())
    mixing = [t for name, t in average.items() if name.endswith("mixing.weight")]
    assert len(mixing) == 2
    assert all(0 <= t.min() <= t.max() <= 1 for t in mixing)
    assert torch.load(saved[-1] / "trainer.ckpt", weights_only=True)["global_step"] == 12


def test_a_finished_run_says_so_and_fresh_starts_another(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(recipe), "--trainer.max_steps", "4"]
    assert main(command) == 0
    (first,) = (tmp_path / "runs").iterdir()
    before = (first / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(command) == 0
    assert f"run {first.name} is finished" in capsys.readouterr().out
    assert (first / "metrics.jsonl").read_bytes() == before
    assert main([*command, "--fresh"]) == 0
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {first.name, f"{first.name}-2"}
    assert main([*command, "--model.optimizer.lr", "1e-4"]) == 0  # another recipe is another run
    assert len(list((tmp_path / "runs").iterdir())) == 3


@pytest.mark.parametrize("size", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"], ids=["torchrun", "srun"])
def test_processes_started_together_choose_no_folder_each(
    recipe: Path,
    tmp_path: Path,
    size: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second process would choose another folder for its part of every checkpoint."""
    monkeypatch.setenv(size, "2")
    assert fit(recipe, "--fresh") == 2
    assert capsys.readouterr().err.startswith("error: --fresh: ")
    assert not run_folder(tmp_path).exists()


def start(recipe: Path, *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mhla_lightning", "run", str(recipe), *extra]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def interrupt(recipe: Path, folder: Path, number: signal.Signals, steps: int = 100_000) -> tuple[int, str]:
    """Start a run, send a signal once it has a checkpoint; return its exit code and its output."""
    with start(recipe, "--run-id", folder.name, "--trainer.max_steps", str(steps)) as process:
        deadline = time.monotonic() + 120
        while not complete_checkpoints(folder) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.usefixtures("forked")
def test_a_killed_run_resumed_by_the_same_command_ends_as_if_never_killed(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every number is equal, bit for bit; the checkpoints are at the borders of epochs here."""
    assert fit(recipe, "--trainer.max_steps", "24", name="whole") == 0
    folder = run_folder(tmp_path, "cut")
    _, said = interrupt(recipe, folder, signal.SIGKILL, steps=24)
    saved = complete_checkpoints(folder)
    assert saved, said
    assert not (folder / "summary.json").exists(), "the run ended before it could be killed"
    assert (folder / "lock").exists()  # left by the kill, and taken over
    capsys.readouterr()
    assert fit(recipe, "--trainer.max_steps", "24", name="cut") == 0
    assert f"resumed from {saved[-1].name}" in capsys.readouterr().out

    whole, cut = (read_metrics(run_folder(tmp_path, name) / "metrics.jsonl") for name in ("whole", "cut"))
    exact = ["train/loss", "train/lr", "train/grad_norm", *(tag for tag in whole if tag.startswith("val"))]
    assert {tag: cut[tag] for tag in exact} == {tag: whole[tag] for tag in exact}
    weights = [
        load_file(complete_checkpoints(run_folder(tmp_path, name))[-1] / "ema" / "weights.safetensors")
        for name in ("whole", "cut")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.usefixtures("forked")
def test_sigterm_is_no_success(recipe: Path, tmp_path: Path) -> None:
    code, said = interrupt(recipe, run_folder(tmp_path, "term"), signal.SIGTERM)
    assert code == 75, said
    newest = complete_checkpoints(run_folder(tmp_path, "term"))[-1].name
    assert f"stopped by SIGTERM; the same command resumes from {newest}" in said
    assert (
        json.loads((run_folder(tmp_path, "term") / "progress.json").read_text())["last_checkpoint"] == newest
    )
    assert not (run_folder(tmp_path, "term") / "lock").exists()
    assert json.loads((run_folder(tmp_path, "term") / "progress.json").read_text())["state"] == "preempted"


@pytest.mark.usefixtures("forked")
def test_ctrl_c_says_how_to_go_on(recipe: Path, tmp_path: Path) -> None:
    code, said = interrupt(recipe, run_folder(tmp_path, "stop"), signal.SIGINT)
    assert code == 130, said
    assert "stopped by Ctrl-C; the same command resumes from step-" in said
    assert "Traceback" not in said


@pytest.mark.usefixtures("forked")
@pytest.mark.slow  # tests/strategies/test_zero.py: two processes of ddp learn what one does
def test_two_processes(recipe: Path, tmp_path: Path) -> None:
    """Real gloo: each step takes 16 samples over both, and the padded validation counts every sample once."""
    with start(
        recipe,
        "--run-id",
        "two",
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
        "--trainer.max_steps",
        "4",
    ) as process:
        out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    state = json.loads((complete_checkpoints(run_folder(tmp_path, "two"))[-1] / "state.json").read_text())
    assert (state["world_size"], state["consumed"]) == (2, 64)
    top1 = read_metrics(run_folder(tmp_path, "two") / "metrics.jsonl")["val/top1"][-1][1]
    assert (top1 * 20) == pytest.approx(round(top1 * 20), abs=1e-4)
    assert {p.name for p in (complete_checkpoints(run_folder(tmp_path, "two"))[-1] / "rng").iterdir()} == {
        "rank-0.safetensors",
        "rank-1.safetensors",
    }


def test_accumulation_counts_optimizer_steps(recipe: Path, tmp_path: Path) -> None:
    assert fit(recipe, "--data.micro_batch_size", "4", "--trainer.max_steps", "8") == 0
    series = read_metrics(run_folder(tmp_path) / "metrics.jsonl")
    assert [step for step, _ in series["train/loss"]] == list(range(1, 9))
    assert [step for step, _ in series["val/loss"]] == [4, 8]
    state = json.loads((complete_checkpoints(run_folder(tmp_path))[-1] / "state.json").read_text())
    assert state["consumed"] == 128


def test_validate_and_test_a_checkpoint(
    recipe: Path, tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(recipe, "--trainer.max_steps", "8") == 0
    folder = run_folder(tmp_path)
    before = (folder / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert fit(recipe, "--trainer.max_steps", "8", "--mode", "validate") == 0
    out = capsys.readouterr().out
    last = read_metrics(folder / "metrics.jsonl")
    for tag in ("val/top1", "val/loss", "val_ema/loss"):
        assert f"{last[tag][-1][1]:.4f}" in out
    older = folder / "checkpoints" / "step-00000004"
    assert (
        main(["run", str(recipe), "--run-id", "elsewhere", "--mode", "validate", "--ckpt", str(older)]) == 0
    )
    assert f"{last['val/loss'][0][1]:.4f}" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert not run_folder(tmp_path, "elsewhere").exists()
    progress = (folder / "progress.json").read_bytes()
    assert fit(recipe, "--mode", "test") == 2
    assert "test split" in capsys.readouterr().err
    assert fit(recipe, "--mode", "validate", "--model.backbone_options.embed_dim", "16") == 2
    assert str(folder / "checkpoints") in capsys.readouterr().err
    assert (folder / "progress.json").read_bytes() == progress
    with_test = tmp_path / "with-test"
    shutil.copytree(shards, with_test)
    shutil.copytree(shards / "val", with_test / "test")
    assert fit(recipe, "--data.path", str(with_test), "--mode", "test", "--ckpt", "r") == 0
    assert "test_ema/top1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_mixture_shows_how_much_of_each_source_it_took(recipe: Path, shards: Path, tmp_path: Path) -> None:
    pack(str(shards.parent / "source"), tmp_path / "again", PackOptions(shards=3, seed=1))
    mix = (
        f"[{{path: {shards}, weight: 3}}, {{path: {tmp_path / 'again'}, name: other, when_exhausted: drop}}]"
    )
    assert fit(recipe, "--data.path", "null", "--data.mix", mix, "--trainer.max_steps", "30") == 0
    series = read_metrics(run_folder(tmp_path) / "metrics.jsonl")
    assert [
        a + b
        for (_, a), (_, b) in zip(
            series["train/consumed/shards"], series["train/consumed/other"], strict=True
        )
    ] == list(range(16, 496, 16))
    assert series["train/consumed/other"][15][1] == pytest.approx(64, abs=10), "a quarter of 256"
    assert series["train/consumed/other"][-1] == (30, 64), "all of it, once"
    assert len(series["val/top1"]) == 8
    state = json.loads((complete_checkpoints(run_folder(tmp_path))[-1] / "state.json").read_text())
    assert (state["consumed"], state["epoch"]) == (480, 3)


def test_print_config_turns_epochs_into_steps(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(recipe), "--trainer.max_steps", "null", "--data.epochs", "2.5", "--print_config"]
    assert main(arguments) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["trainer"]["max_steps"] == 10  # 2.5 x 64 / 16
    assert shown["model"]["init_args"]["checkpoint_activations"] == "none"  # defaults are filled in
    assert shown["checkpoint"] == {
        "every_n_steps": 4,
        "keep_last": 2,
        "keep_best": 0,
        "monitor": None,
        "asynchronous": False,
    }


def spoiled(shards: Path, tmp_path: Path, samples: int) -> Path:
    """The shards with the pixels of `samples` images overwritten: well-formed tar, wrong inside."""
    copy = tmp_path / f"spoiled-{samples}"
    shutil.copytree(shards, copy)
    left = samples
    for shard in sorted((copy / "train").glob("*.tar")):
        data = bytearray(shard.read_bytes())
        offsets = (
            np.load(f"{shard}.offsets.npy")
            if Path(f"{shard}.offsets.npy").exists()
            else np.load(shard.with_suffix(".offsets.npy"))
        )
        for start_, stop in zip(offsets[:-1], offsets[1:], strict=True):
            at = data.find(b"\x89PNG", int(start_), int(stop))
            if left and at >= 0:
                data[at : at + 60] = b"x" * 60
                left -= 1
        shard.write_bytes(data)
    assert left == 0
    return copy


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_undecodable_samples_are_skipped_counted_and_limited(
    recipe: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    few = [
        "--data.path",
        str(spoiled(shards, tmp_path, 3)),
        "--data.verify",
        "size",
        "--data.num_workers",
        workers,
    ]
    assert fit(recipe, *few, "--data.max_skipped_share", "0.5") == 0
    skipped = read_metrics(run_folder(tmp_path) / "metrics.jsonl")["train/skipped"][-1][1]
    assert 3 <= skipped <= 15  # three in each of three to five epochs read
    many = [
        "--data.path",
        str(spoiled(shards, tmp_path, 40)),
        "--data.verify",
        "size",
        "--data.num_workers",
        workers,
    ]
    capsys.readouterr()
    assert fit(recipe, *many, "--data.max_skipped_share", "0.5", name="many") == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "--data.reading.max_skipped_share" in error


def test_a_run_folder_is_held_by_one_process(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path)
    folder.mkdir(parents=True)
    with hold(folder):
        assert fit(recipe) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}: ")
    assert f"process {os.getpid()} " in error


def test_another_recipe_under_the_same_run_id_is_refused_by_key(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(recipe, "--trainer.max_steps", "4") == 0
    capsys.readouterr()
    for stopped in (False, True):  # finished, and as if it had been stopped before its end
        if stopped:
            (run_folder(tmp_path) / "summary.json").unlink()
        assert fit(recipe, "--trainer.max_steps", "4", "--model.label_smoothing", "0.2") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {run_folder(tmp_path)}: ")
        assert "model.label_smoothing 0.1 -> 0.2" in error
    assert fit(recipe, "--trainer.max_steps", "8", "--accept-changes") == 0  # trains on
    assert [step for step, _ in read_metrics(run_folder(tmp_path) / "metrics.jsonl")["train/loss"]] == list(
        range(1, 9)
    )
    assert json.loads((run_folder(tmp_path) / "summary.json").read_text())["steps"] == 8


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
def test_other_data_under_the_same_run_is_refused(
    recipe: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    assert fit(recipe, "--trainer.max_steps", "4") == 0
    if not finished:
        (run_folder(tmp_path) / "summary.json").unlink()
    pack(str(shards.parent / "source"), tmp_path / "packed-again", PackOptions(shards=6))
    capsys.readouterr()
    assert fit(recipe, "--trainer.max_steps", "4", "--data.path", str(tmp_path / "packed-again")) == 2
    assert capsys.readouterr().err.startswith(f"error: {run_folder(tmp_path)}: ")
    assert fit(recipe, "--trainer.max_steps", "4", "--data.path", str(tmp_path / "nowhere")) == 2
    assert "nowhere" in capsys.readouterr().err
