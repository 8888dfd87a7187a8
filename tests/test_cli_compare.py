"""`mhla compare`: rows, names and statistics by themselves; the verb end to end on the real CPU recipe, made tiny."""

from __future__ import annotations

import io
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mhla_lightning.analysis.comparison import best_rows, cost, headline, higher_is_better, score, spread, table_row, validation_tags
from mhla_lightning.analysis.curves import colors, curves_figure, finite, mean_curve, smooth, smoothing_width
from mhla_lightning.analysis.variants import Row, arguments, describe, identity, merged, parse_seeds, rows_from_file, rows_over, slug
from mhla_lightning.cli.compare import print_table
from mhla_lightning.cli.main import main
from mhla_lightning.config.recipes import apply_overrides, load_recipe, parse_overrides, recipe_names, variants_file
from mhla_lightning.config.resolve import resolve
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import check_run_id, read_metrics

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


# rows


def names(rows: list[Row]) -> list[str]:
    return [row.name for row in rows]


def test_over_makes_a_row_for_each_value() -> None:
    rows = rows_over(["model.attention=[linear, {name: mhla, mix_init: uniform}, [softmax, mhla]]"])
    assert names(rows) == ["linear", "mhla mix_init=uniform", "attention=[softmax, mhla]"]
    assert [row.slug for row in rows] == ["linear", "mhla-mix_init-uniform", "attention-softmax-mhla"]
    assert rows[1].overrides == {"model.attention": {"name": "mhla", "mix_init": "uniform"}}


def test_several_over_multiply_and_the_first_changes_slowest() -> None:
    rows = rows_over(["model.attention=[linear, mhla]", "model.optimizer.lr=[1e-3, 1e-4]"])
    assert names(rows) == ["linear, lr=0.001", "linear, lr=0.0001", "mhla, lr=0.001", "mhla, lr=0.0001"]
    assert rows[3].overrides == {"model.attention": "mhla", "model.optimizer.lr": 1e-4}


def test_rows_that_read_alike_get_a_number() -> None:
    rows = rows_over(["model.attention=[mhla, {name: mhla}, MHLA]"])
    assert names(rows) == ["mhla", "mhla (2)", "MHLA (3)"]
    assert len({row.slug.lower() for row in rows}) == 3


def test_values_that_only_python_takes_for_equal_are_two_rows() -> None:
    assert names(rows_over(["model.x=[1, true, 1.0]"])) == ["x=1", "x=true", "x=1.0"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("mhla", "mhla"),
        ("", 'attention=""'),
        (None, "attention=null"),
        (False, "attention=false"),
        (8, "attention=8"),
        ([], "attention=[]"),
        ({}, "attention=()"),
        ({"name": "mhla"}, "mhla"),
        ({"heads": 2, "gate": True}, "heads=2 gate=true"),
        ({"name": "mhla", "mix_init_options": {"sigma": 2}}, "mhla mix_init_options=(sigma=2)"),
        ({"class_path": "mhla_lightning.callbacks.EMA", "init_args": {"decay": 0.9}}, "EMA decay=0.9"),
    ],
)
def test_describe(value: Any, text: str) -> None:
    assert describe("model.attention", value) == text


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["model.attention"], "KEY=YAML-LIST"),
        (["=[a]"], "KEY=YAML-LIST"),
        (["model.attention=mhla"], "needs a YAML list"),
        (["model.attention=[]"], "needs a YAML list"),
        (["model.attention="], "needs a YAML list with at least one value, not nothing"),
        (["model.attention=[a"], "no YAML"),
        (["model.attention=[a, b, a]"], "lists a twice"),
        (["x=[1]", "x=[2]"], "--over x is given twice"),
    ],
)
def test_over_refuses(given: list[str], word: str) -> None:
    with pytest.raises(UserError, match=word.replace("[", r"\[")):
        rows_over(given)


def test_variants_file(tmp_path: Path) -> None:
    file = tmp_path / "variants.yaml"
    file.write_text("base:\nsmall lr: {model.optimizer.lr: 1e-4}\n2: {model.attention: linear}\n")
    rows = rows_from_file(file)
    assert names(rows) == ["base", "small lr", "2"]
    assert [row.overrides for row in rows] == [{}, {"model.optimizer.lr": 1e-4}, {"model.attention": "linear"}]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no mapping"),
        ("[a, b]", "no mapping"),
        ("a: {", "no YAML"),
        ("a: {x: 1}\nb: {x: 2}\na: {x: 3}", "key 'a' stands twice"),
        ("a: linear", "row 'a' is 'linear'"),
    ],
)
def test_variants_file_refuses(text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "variants.yaml").write_text(text)
    with pytest.raises(UserError, match=word):
        rows_from_file(tmp_path / "variants.yaml")


@pytest.mark.parametrize(
    ("name", "recipe"), [("language_quality", "language/lm_tiny_mhla_stdlib_cpu"), ("language_recall", "language/lm_tiny_mhla_mqar_cpu")]
)
def test_packaged_rows_fit_their_recipe(name: str, recipe: str) -> None:
    rows = rows_from_file(variants_file(name))
    assert len(rows) == 24
    assert len({str(row.overrides["model.attention"]) for row in rows}) == 24
    attentions = {row.name: row.overrides["model.attention"] for row in rows}
    for row in rows:
        resolve(apply_overrides(load_recipe(recipe).values, row.overrides))
        if not row.name.endswith(", conv"):
            assert attentions[f"{row.name}, conv"] == attentions[row.name] | {"short_conv": 4}


def test_unknown_packaged_rows_are_one_sentence() -> None:
    with pytest.raises(UserError, match=r"unknown variants .* 'language_qualty'.* did you mean 'language_quality'"):
        variants_file("language_qualty")
    assert "variants/language_quality" not in recipe_names()


def test_a_missing_variants_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read .*nowhere.yaml: No such file"):
        rows_from_file(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("name", ["mhla", "a, b", "../../etc", "...", "", "ä ö", "x" * 300, "-seed", "a/b", "1..2"])
def test_slugs_are_run_ids(name: str) -> None:
    assert len(check_run_id(Row(name, slug(name), {}).run_id(0))) < 80


@pytest.mark.parametrize("text", ["", "0,", "a", "-1", "1.5", "0,0", "1,01"])
def test_seeds_refuse(text: str) -> None:
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text)


def test_seeds() -> None:
    assert parse_seeds("0, 1,20") == [0, 1, 20]


def test_a_rows_value_counts_and_deeper_keys_come_later() -> None:
    values = merged({"model.attention.gate": True, "trainer.max_steps": 5, "x": 1}, {"model.attention": "mhla", "trainer.max_steps": 2})
    assert list(values.items()) == [("x", 1), ("trainer.max_steps", 2), ("model.attention", "mhla"), ("model.attention.gate", True)]


def test_overrides_survive_the_command_line() -> None:
    values = {"a.b": {"name": "mhla", "sizes": [4, 4]}, "c": None, "d": True, "e": 1e-05, "f": "1e-5", "g": "--x", "h": "null", "i": "a: b #é"}
    assert parse_overrides(arguments(values)) == values


def test_identity_knows_everything_but_paths() -> None:
    recipe = {"data": {"init_args": {"path": "/a", "batch_size": 2}}}
    rows = rows_over(["x=[1, 2]"])
    same = identity(recipe, rows, [0], {})
    moved = {"data": {"init_args": {"path": "/b", "batch_size": 2}}}
    assert identity(moved, rows, [0], {"data.path": "/c"}) == same
    assert len(same) == 8
    larger = {"data": {"init_args": {"path": "/a", "batch_size": 4}}}
    others = [
        identity(larger, rows, [0], {}),
        identity(recipe, rows[:1], [0], {}),
        identity(recipe, rows, [1], {}),
        identity(recipe, rows, [0], {"y": 1}),
    ]
    assert len({same, *others}) == 5


# table


def summary(top1: float, **more: Any) -> dict[str, Any]:
    return {"last": {"val/top1": top1, "val/loss": 2 - top1}, "best": {}, "samples_per_second": 10.0, "parameters": 5, "seconds": 1.0, **more}


def test_table_row_means_and_spreads() -> None:
    row = table_row("a", {"x": 1}, {0: summary(0.5), 3: summary(0.7, samples_per_second=None)})
    assert row["mean"]["val/top1"] == pytest.approx(0.6)
    assert row["spread"]["val/top1"] == pytest.approx(statistics.stdev([0.5, 0.7]))
    assert (row["mean"]["samples_per_second"], row["spread"]["samples_per_second"]) == (10.0, None)
    assert "peak_memory_bytes" not in row["mean"]
    assert [run["seed"] for run in row["seeds"]] == [0, 3]
    assert row["seeds"][0]["last"]["val/top1"] == 0.5


def test_spread_of_one_and_of_nan() -> None:
    assert spread([1.0]) is None
    assert spread([2.0, 2.0]) == 0
    assert math.isnan(spread([1.0, math.nan]) or 0)


def test_best_rows() -> None:
    rows = [table_row(name, {}, {0: summary(top1)}) for name, top1 in [("a", 0.5), ("b", 0.9), ("c", 0.9), ("d", math.nan)]]
    assert best_rows("val/top1", rows) == {"b", "c"}
    assert best_rows("val/loss", rows[:2]) == {"b"}
    assert best_rows("val/top1", rows[:1]) == best_rows("val/other", rows) == set()


def test_tags_and_headline() -> None:
    rows = [{"mean": {"val_ema/loss": 1, "val/top1": 1, "seconds": 1}}, {"mean": {"val/loss": 1}}]
    assert validation_tags(rows) == ["val/loss", "val/top1", "val_ema/loss"]
    assert headline(["train/loss", "val/loss", "val/top1"]) == "val/top1"
    assert headline(["val/fid", "val/loss"]) == "val/loss"
    assert headline(["val/fid"]) == "val/fid"
    assert headline(["train/loss"]) is None
    assert higher_is_better("val_ema/top5")
    assert not higher_is_better("val/loss")


def test_numbers_as_shown() -> None:
    assert score(0.93124, 0.00211) == "0.9312 ±0.0021"
    assert score(0.93124, None) == "0.9312"
    assert score(123.456, 1.5) == "123.46 ±1.50"
    assert score(None, None) == "-"
    assert cost("flops_per_sample", 68126592) == "0.06813"
    assert cost("peak_memory_bytes", 1.2459e9) == "1,246"
    assert cost("parameters", 469994) == "469,994"
    assert cost("samples_per_second", None) == "-"


# curves


def test_smoothing_keeps_the_ends_and_straight_lines() -> None:
    line = [(step, 2.0 * step) for step in range(7)]
    assert smooth(line, 5) == line
    assert smooth([(0, 0.0), (1, 3.0), (2, 0.0)], 3) == [(0, 0.0), (1, 1.0), (2, 0.0)]
    assert smooth([], 3) == []


def test_smoothing_is_light_and_odd() -> None:
    widths = [smoothing_width({"a": [{"train/loss": [(0, 0.0)] * count}]}) for count in (0, 20, 90, 1000, 100_000)]
    assert widths == [1, 1, 3, 25, 51]


def test_curves_skip_what_cannot_be_drawn() -> None:
    assert finite([(2, 1.0), (1, math.nan), (2, 3.0), (0, 5.0)]) == [(0, 5.0), (2, 3.0)]
    assert mean_curve([[(0, 1.0), (1, 2.0)], [(1, 4.0), (2, 9.0)]]) == [(1, 3.0)]
    assert mean_curve([]) == []
    assert len(set(colors(10))) == 10
    assert len(set(colors(30))) == 30


def test_figure_of_runs_without_accuracy_or_without_anything() -> None:
    figure = curves_figure("t", {"_a": [{"train/loss": [(1, 1.0)], "val/loss": [(1, 1.0)]}], "b": [{}]})
    assert figure.axes[1].get_ylabel() == "val/loss"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a"]
    assert not curves_figure("t", {"a": [{}]}).legends


# the verb


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 shapes of two classes as shards: squares left or right."""
    from mhla_lightning.data.tools.pack import pack

    root = tmp_path_factory.mktemp("digits")
    for index in range(64):
        label = index % 2
        image = Image.new("RGB", (28, 28), (index, index, index))
        image.paste((255, 255, 255), (2 + 14 * label, 6 + index % 8, 12 + 14 * label, 16 + index % 8))
        folder = root / "images" / "ab"[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.png")
    pack(str(root / "images"), str(root / "shards"), val=16, shards=2)
    return root / "shards"


@pytest.fixture
def small(digits: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that make the recipe a matter of seconds."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MHLA_RUNS", raising=False)
    lines = [line.split(": ") for line in SMALL.strip().splitlines()]
    return [f"--{key}={value}" for key, value in [*lines, ["data.path", str(digits)], ["model.num_classes", "2"]]]


def test_compare_end_to_end(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    over = "model.attention=[linear, {name: mhla, mix_init: uniform}]"
    command = ["compare", RECIPE, "--over", over, "--seeds", "0,1", "--runs", str(tmp_path), "--json", str(tmp_path / "copy.json"), *small]
    assert main(command) == 0
    shown = capsys.readouterr().out
    (folder,) = tmp_path.glob("compare-*")
    ids = [f"{row}-seed{seed}" for row in ("linear", "mhla-mix_init-uniform") for seed in (0, 1)]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(ids)

    table = json.loads((folder / "table.json").read_text())
    assert json.loads((tmp_path / "copy.json").read_text()) == table
    summaries = [json.loads((folder / run_id / "summary.json").read_text()) for run_id in ids]
    assert [seed for row in table["rows"] for seed in row["seeds"]] == [{"seed": n % 2, **found} for n, found in enumerate(summaries)]
    for row, own in zip(table["rows"], (summaries[:2], summaries[2:]), strict=True):
        losses = [found["last"]["val/loss"] for found in own]
        assert losses[0] != losses[1], "the seeds did not reach the runs"
        assert row["mean"]["val/loss"] == pytest.approx(statistics.fmean(losses))
        assert row["spread"]["val/loss"] == pytest.approx(statistics.stdev(losses))
        assert score(row["mean"]["val_ema/loss"], row["spread"]["val_ema/loss"]) in shown
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
    assert all(word in shown for word in ("parameters", "GFLOPs", "val_ema/", f"{rows[0]['mean']['val/loss']:.4f}"))


def check_picture(path: Path) -> None:
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        assert image.size[0] > 1000
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (np.ptp(pixels, axis=-1) > 60).sum() > 2000, "no curves to be seen"


def test_a_failing_run_ends_the_comparison_and_the_same_command_goes_on(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = tmp_path / "variants.yaml"
    variants.write_text("good: {model.attention: linear}\nbad: {model.backbone_options.img_size: 32}\nnever: {}\n")
    command = ["compare", RECIPE, "--variants", str(variants), "--runs", str(tmp_path), *small]
    assert main(command) == 2
    shown = capsys.readouterr()
    (folder,) = tmp_path.glob("compare-*")
    assert f"row 'bad', seed 0 stopped with exit code 2; all it said is in {folder / 'bad-seed0.log'}" in shown.err
    assert "error: " in (folder / "bad-seed0.log").read_text()
    assert (folder / "bad-seed0.log").read_text().splitlines()[-1] in shown.err
    assert "good, seed 0: val/top1 " in shown.out
    assert read_metrics(folder / "good-seed0" / "metrics.jsonl")
    assert not (folder / "never-seed0").exists()
    assert not (folder / "table.json").exists()
    assert main(command) == 2
    assert "good, seed 0: " in (again := capsys.readouterr().out)
    assert "(finished before)" in again


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--over", "model.optimizer.lr=[1e-3, fast]"], ["row 'fast': ", "model.optimizer.lr"]),
        (["--over", "model.attention=[linear, {name: mhla, mix_int: uniform}]"], ["row 'mhla mix_int=uniform': ", "did you mean 'mix_init'"]),
        (["--over", "model.attention=[linear]", "--model.optimzer.lr", "1"], ["row 'linear': ", "did you mean"]),
        (["--over", "model.attention=[linear]", "--variants", "v.yaml"], ["exactly one way"]),
        ([], ["exactly one way"]),
        (["--over", "model.attention=[linear]", "--seeds", "a"], ["--seeds 'a'"]),
        (["--over", "seed_everything=[0, 1]"], ["--seeds 0,1,2"]),
        (["--over", "model.attention=[linear]", "--seed_everything", "3"], ["--seeds 0,1,2"]),
        (["--over", "model.attention=[linear]", "--json", "nowhere/t.json"], ["there is no folder"]),
        (["--over", "model.attention=[linear]", "more"], ["unexpected argument 'more'"]),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", RECIPE, "--runs", str(tmp_path / "runs"), *arguments]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
