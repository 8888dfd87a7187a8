"""`mhla compare` end to end on the real CPU recipe, made tiny."""

from __future__ import annotations

import io
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mhla_lightning.cli.compare import print_table
from mhla_lightning.cli.main import main
from mhla_lightning.compare.comparison import score
from mhla_lightning.compare.student import half_width
from mhla_lightning.evaluation import EVALUATIONS, Evaluation
from mhla_lightning.runs.folder import RunFolder, read_metrics
from mhla_lightning.weights.warm_start import read_weights

RECIPE = "classification/deit_tiny_mhla_mnist_cpu"
SMALL = """
trainer.max_steps: 2
trainer.val_check_interval: 1
trainer.log_every_n_steps: 1
model.schedule.warmup_steps: 0
model.backbone_options.depth: 1
model.backbone_options.embed_dim: 24
data.num_workers: 0
data.batch_size: 8
"""


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 shapes of two classes as shards: squares left or right."""
    from mhla_lightning.data.prepare.pack import PackOptions, pack

    root = tmp_path_factory.mktemp("digits")
    for index in range(64):
        label = index % 2
        image = Image.new("RGB", (28, 28), (index, index, index))
        image.paste((255, 255, 255), (2 + 14 * label, 6 + index % 8, 12 + 14 * label, 16 + index % 8))
        folder = root / "images" / "ab"[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.png")
    pack(str(root / "images"), str(root / "shards"), PackOptions(val=16, shards=2))
    return root / "shards"


@pytest.fixture
def small(digits: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that make the recipe a matter of seconds."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MHLA_RUNS", raising=False)
    lines = [line.split(": ") for line in SMALL.strip().splitlines()]
    return [
        f"--{key}={value}" for key, value in [*lines, ["data.path", str(digits)], ["model.num_classes", "2"]]
    ]


@pytest.mark.usefixtures("forked")
def test_compare_end_to_end(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    over = "model.attention=[linear, {name: mhla, mix_init: uniform}]"
    command = [
        "compare",
        RECIPE,
        "--over",
        over,
        "--seeds",
        "0,1",
        "--runs",
        str(tmp_path),
        "--json",
        str(tmp_path / "copy.json"),
        *small,
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    (folder,) = tmp_path.glob("compare-*")
    ids = [f"{row}-seed{seed}" for row in ("linear", "mhla-mix_init-uniform") for seed in (0, 1)]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(ids)

    table = json.loads((folder / "table.json").read_text())
    assert json.loads((tmp_path / "copy.json").read_text()) == table
    summaries = [json.loads((folder / run_id / "summary.json").read_text()) for run_id in ids]
    assert [seed for row in table["rows"] for seed in row["seeds"]] == [
        {"seed": n % 2, **found} for n, found in enumerate(summaries)
    ]
    for row, own in zip(table["rows"], (summaries[:2], summaries[2:]), strict=True):
        losses = [found["last"]["val/loss"] for found in own]
        assert losses[0] != losses[1], "the seeds did not reach the runs"
        assert row["mean"]["val/loss"] == pytest.approx(statistics.fmean(losses))
        assert row["spread"]["val/loss"] == pytest.approx(statistics.stdev(losses))
        averaged = [found["last"]["val_ema/loss"] for found in own]
        assert score(row["mean"]["val_ema/loss"], half_width(averaged)) in shown
    difference = next(one for one in table["differences"] if one["tag"] == "val/loss")
    means = [row["mean"]["val/loss"] for row in table["rows"]]
    assert (difference["row"], difference["against"]) == (table["rows"][1]["name"], table["rows"][0]["name"])
    assert difference["mean"] == pytest.approx(means[1] - means[0])
    assert "val/top1, with 95 % intervals over seeds" in shown
    assert table["rows"][1]["overrides"] == {"model.attention": {"name": "mhla", "mix_init": "uniform"}}
    assert "mhla mix_init=uniform, seed 1: val/top1 " in shown
    assert f"curves: {folder / 'curves.png'}" in shown
    check_picture(folder / "curves.png")
    check_narrow_table(table["rows"])

    logs = {run_id: (folder / f"{run_id}.log").read_bytes() for run_id in ids}
    again = time.monotonic()
    assert main(command) == 0
    assert time.monotonic() - again < 5, "finished runs are read, not started"
    assert {run_id: (folder / f"{run_id}.log").read_bytes() for run_id in ids} == logs
    assert capsys.readouterr().out.count("(finished before)") == 4
    assert json.loads((folder / "table.json").read_text()) == table


def check_narrow_table(rows: list[dict[str, Any]]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    print_table(console, "title", rows)
    shown = console.export_text()
    assert "…" not in shown
    assert all(
        word in shown for word in ("parameters", "GFLOPs", "val_ema/", f"{rows[0]['mean']['val/loss']:.4f}")
    )


def check_picture(path: Path) -> None:
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        assert image.size[0] > 1000
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (np.ptp(pixels, axis=-1) > 60).sum() > 2000, "no curves to be seen"


@pytest.mark.slow
def test_a_failing_run_ends_the_comparison_and_the_same_command_goes_on(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = tmp_path / "variants.yaml"
    variants.write_text(
        "good: {model.attention: linear}\nbad: {model.backbone_options.img_size: 32}\nnever: {}\n"
    )
    command = ["compare", RECIPE, "--variants", str(variants), "--runs", str(tmp_path), *small]
    assert main(command) == 2
    shown = capsys.readouterr()
    (folder,) = tmp_path.glob("compare-*")
    assert (
        f"row 'bad', seed 0 stopped with exit code 2; all it said is in {folder / 'bad-seed0.log'}"
        in shown.err
    )
    assert "error: " in (folder / "bad-seed0.log").read_text()
    assert (folder / "bad-seed0.log").read_text().splitlines()[-1] in shown.err
    assert "good, seed 0: val/top1 " in shown.out
    assert read_metrics(folder / "good-seed0" / "metrics.jsonl")
    assert not (folder / "never-seed0").exists()
    assert not (folder / "table.json").exists()
    assert main(command) == 2
    assert "good, seed 0: " in (again := capsys.readouterr().out)
    assert "(finished before)" in again


@dataclass(frozen=True)
class TakeOptions:
    place: int = 0


@pytest.mark.slow
def test_an_evaluation_is_run_once_on_every_finished_run(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any function of a run folder and options: here how large the trained bias of the classifier is at
    some place.
    """
    looked: list[str] = []

    def measure(run: RunFolder, options: TakeOptions) -> dict[str, float]:
        looked.append(run.run_id)
        _, weights = read_weights(str(run.path))
        return {"bias": weights["head.bias"][options.place].abs().item(), "place": float(options.place)}

    monkeypatch.setitem(EVALUATIONS, "take", Evaluation(TakeOptions, measure, frozenset({"bias"})))
    command = [
        "compare",
        RECIPE,
        "--over",
        "model.attention=[linear, softmax]",
        "--seeds",
        "0,1",
        "--runs",
        str(tmp_path),
        *small,
    ]
    ids = [f"{row}-seed{seed}" for row in ("linear", "softmax") for seed in (0, 1)]
    assert main([*command, "--eval", "take"]) == 0
    assert looked == ids
    (folder,) = tmp_path.glob("compare-*")
    table = json.loads((folder / "table.json").read_text())
    assert table["evaluations"] == {"take": {"place": 0}}
    for row in table["rows"]:
        biases = [run["eval"]["take"]["bias"] for run in row["seeds"]]
        assert biases[0] != biases[1]
        assert row["mean"]["take/bias"] == pytest.approx(statistics.fmean(biases))
        assert row["spread"]["take/bias"] == pytest.approx(statistics.stdev(biases))
    console = Console(
        width=250, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    print_table(console, "title", table["rows"])
    best = max(row["mean"]["take/bias"] for row in table["rows"])
    assert f"\x1b[1m{best:.4f}" in console.export_text(styles=True)

    assert main([*command, "--eval", "take"]) == 0
    assert looked == ids
    assert capsys.readouterr().out.count("(measured before)") == 4
    assert json.loads((folder / "table.json").read_text()) == table
    assert main([*command, "--eval", "take: {place: 1}"]) == 0
    assert looked == ids * 2
    assert main(command) == 0
    assert "take/bias" not in json.loads((folder / "table.json").read_text())["rows"][0]["mean"]
    assert list(tmp_path.glob("compare-*")) == [folder], "an evaluation makes no other comparison"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--over", "model.optimizer.lr=[1e-3, fast]"], ["row 'fast': ", "model.optimizer.lr"]),
        (
            ["--over", "model.attention=[linear, {name: mhla, mix_int: uniform}]"],
            ["row 'mhla mix_int=uniform': ", "did you mean 'mix_init'"],
        ),
        (
            ["--over", "model.attention=[linear]", "--model.optimzer.lr", "1"],
            ["row 'linear': ", "did you mean"],
        ),
        (["--over", "model.attention=[linear]", "--variants", "v.yaml"], ["exactly one way"]),
        ([], ["exactly one way"]),
        (["--over", "model.attention=[linear]", "--seeds", "a"], ["--seeds: "]),
        (["--over", "seed_everything=[0, 1]"], ["--seed_everything: ", "--seeds"]),
        (
            ["--over", "model.attention=[linear]", "--seed_everything", "3"],
            ["--seed_everything: ", "--seeds"],
        ),
        (["--over", "model.attention=[linear]", "--json", "nowhere/t.json"], ["--json: nowhere/t.json"]),
        (
            ["--over", "model.attention=[linear]", "--eval", "sampels"],
            ["unknown evaluation 'sampels'", "did you mean 'samples'"],
        ),
        (
            ["--over", "model.attention=[linear]", "--eval", "samples: {clasifier: a}"],
            ["unknown option 'clasifier'"],
        ),
        (
            ["--over", "model.attention=[linear]", "--eval", "samples: {classifier: a}"],
            ["--eval.samples.classifier"],
        ),
        (["--over", "model.attention=[linear]", "more"], ["unexpected argument 'more'"]),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", RECIPE, "--runs", str(tmp_path / "runs"), *arguments]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
