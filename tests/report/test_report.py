"""`mhla report`: what the page holds, what it leaves out, and what it refuses."""

from __future__ import annotations

import base64
import json
import math
import random
import re
import shutil
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.compare.significance import as_json, paired_differences
from mhla_lightning.errors import UserError
from mhla_lightning.report import data as page_data
from mhla_lightning.report.comparison import interval, read_comparison
from mhla_lightning.report.data import thin_curve, thin_places
from mhla_lightning.report.page import comparison_page, run_page
from mhla_lightning.report.run import read_run
from mhla_lightning.runs.folder import RunFolder, write_json
from mhla_lightning.runs.logger import RunLogger
from mhla_lightning.runs.tags import MIXING_VALUES, group_of, unit_of
from tests.helpers.run_folders import losses, matrix, write_comparison, write_run
from tests.helpers.written_files import DAMAGES


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return write_run(tmp_path_factory.mktemp("runs") / "digits")


def report(*runs: Path, to: Path) -> str:
    """Write the page of runs and return it."""
    assert main(["report", *map(str, runs), "--to", str(to)]) == 0
    return (to / "index.html").read_text()


def data_of(page: str) -> dict[str, Any]:
    """Return what the page's own script draws."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def weights(layer: dict[str, Any], place: int, largest: float) -> np.ndarray:
    packed = np.frombuffer(base64.b64decode(layer["values"][place]), dtype="<u2")
    return packed.reshape(layer["rows"], layer["columns"]) / 65535 * largest


def test_a_page_holds_what_the_run_folder_holds(run: RunFolder, tmp_path: Path) -> None:
    page = report(run.path, to=tmp_path / "page")
    found = data_of(page)
    charts = {chart["tag"]: chart for chart in found["charts"]}
    assert list(charts) == ["train/loss", "val/loss", "val/top1", "train/samples_per_second"]
    assert charts["train/loss"]["curves"][0]["x"] == list(range(1, 13))
    assert charts["train/loss"]["curves"][0]["y"] == pytest.approx(losses(12), rel=1e-5)
    assert [curve["averaged"] for curve in charts["val/loss"]["curves"]] == [False, True]
    (mixing,) = found["matrices"]
    assert mixing["steps"] == [4, 8, 12]
    for place, step in enumerate(mixing["steps"]):
        drawn = weights(mixing["layers"][0], place, mixing["largest"])
        np.testing.assert_allclose(drawn, matrix(step), atol=1e-5)
    (samples,) = found["pictures"]
    assert [frame["label"] for frame in samples["frames"]] == ["step 4", "step 8", "step 12"]
    assert samples["frames"][0]["source"].startswith("data:image/png;base64,")
    for text in (
        "214,410",
        "mhla, blocks 2",
        "node-7",
        "12 of 12 steps",
        "1 min 15 s",
        "500 MB",
        "seed_everything: 3",
    ):
        assert text in page, text


def test_a_page_asks_no_network_and_runs_one_script_alone(run: RunFolder, tmp_path: Path) -> None:
    page = report(run.path, to=tmp_path)
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", page)
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert "default-src 'none'" in page
    assert "unsafe" not in page.partition("<title>")[0]


def test_several_runs_share_the_plots(run: RunFolder, tmp_path: Path) -> None:
    other = write_run(tmp_path / "elsewhere" / "digits", top=3.0)
    found = data_of(report(run.path, other.path, to=tmp_path / "page"))
    assert len(found["series"]) == 2
    assert len(set(found["series"])) == 2  # both folders have one name
    loss = found["charts"][0]["curves"]
    assert [(curve["series"], curve["y"][0]) for curve in loss] == [(0, 1.6), (1, 2.4)]


def test_texts_of_a_stranger_stay_texts(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    run = write_run(tmp_path / "evil")
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 3, "tag": f"val/{evil}", "value": 1.0}) + "\n")
    run.recipe.write_text(run.recipe.read_text() + f"notes: {json.dumps(evil)}\n")
    write_json(run.environment, {"host": evil, "versions": {evil: evil}, "command": [evil]})
    write_json(run.progress, {"state": evil, "step": evil, "reason": [evil], "max_steps": 10**400})
    page = report(run.path, to=tmp_path / "page")
    assert evil in json.dumps(data_of(page))
    assert "<script>alert" not in page
    assert "<img" not in page
    assert page.count("<script") == 2


STRANGE: list[Any] = [None, True, -1, 10**400, "x", [], {}, [[]], {"a": 1}, math.nan, math.inf, 1e308]


def mutated(value: Any, rng: random.Random) -> Any:
    """Return JSON in which some values are of another kind."""
    if rng.random() < 0.25:
        return rng.choice(STRANGE)
    if isinstance(value, dict):
        return {key: mutated(item, rng) for key, item in value.items()}
    return [mutated(item, rng) for item in value] if isinstance(value, list) else value


def test_files_with_values_of_another_kind_are_a_page_or_one_sentence(run: RunFolder, tmp_path: Path) -> None:
    rng = random.Random(0)
    folder = write_comparison(tmp_path / "compare-1", {"linear": [2.0, 2.1], "mhla": [1.0, 1.1]})
    tables = [folder / "table.json", run.progress, run.summary, run.environment]
    contents = {path: json.loads(path.read_text()) for path in tables}
    strange = tmp_path / "strange"
    shutil.copytree(run.path, strange)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for _ in range(40):
        for path in tables[1:]:
            (strange / path.name).write_text(json.dumps(mutated(contents[path], rng)))
        texts = [json.dumps(mutated(line, rng)) + "\n" for line in lines]
        (strange / run.metrics.name).write_text("".join(texts))
        tables[0].write_text(json.dumps(mutated(contents[tables[0]], rng)))
        run_page([read_run(strange)], ["strange"]).html("0")
        with suppress(UserError):
            comparison_page(read_comparison(folder)).html("0")


def test_links_out_of_the_run_folder_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "linked")
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"host": "a-secret"}))
    run.environment.unlink()
    run.environment.symlink_to(secret)
    shutil.move(run.tensorboard, tmp_path / "tensorboard")
    run.tensorboard.symlink_to(tmp_path / "tensorboard")
    page = report(run.path, to=tmp_path / "page")
    assert "a-secret" not in page
    assert "environment.json is a link out of the run folder" in page
    assert data_of(page)["matrices"] == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_still_make_a_page(run: RunFolder, tmp_path: Path, damage: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run.path, broken)
    for path in broken.rglob("*"):
        if path.is_file():
            path.write_bytes(DAMAGES[damage](path.read_bytes()))
    page = report(broken, to=tmp_path / "page")
    assert damage == "garbage tail" or "damaged" in page


def test_a_record_of_a_huge_length_ends_the_event_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "huge")
    (events,) = run.tensorboard.glob("events*")
    events.write_bytes(events.read_bytes() + b"\xff" * 64)
    page = report(run.path, to=tmp_path / "page")
    assert data_of(page)["matrices"][0]["steps"] == [4, 8, 12]
    assert "is damaged or being written" in page


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "begun")
    run.create()
    run.recipe.write_text("model: {class_path: mhla_lightning.tasks.LanguageTask}\ndata: {}\n")
    page = report(run.path, to=tmp_path / "page")
    assert "no progress.json yet" in page
    assert "No curve is known yet" in page


def test_a_run_without_validation_and_without_pictures(tmp_path: Path) -> None:
    run = write_run(tmp_path / "bare", validates=False, pictures=False)
    run.summary.unlink()
    write_json(run.progress, {"state": "running", "step": 12, "max_steps": 99})
    page = report(run.path, to=tmp_path / "page")
    assert "has not validated yet" in page
    assert "12 of 99 steps" in page
    assert 'id="mixing"' not in page


def test_a_resumed_run_shows_its_last_attempt(tmp_path: Path) -> None:
    run = write_run(tmp_path / "resumed")
    again = RunLogger(run, resume_step=4)
    again.start()
    again.experiment.add_tensor(f"{MIXING_VALUES}blocks.0", matrix(77), 8)
    again.finalize("success")
    (mixing,) = data_of(report(run.path, to=tmp_path / "page"))["matrices"]
    assert mixing["steps"] == [4, 8]
    assert weights(mixing["layers"][0], 1, mixing["largest"])[0, 0] == pytest.approx(0.77, abs=1e-4)


def test_what_is_too_large_is_left_out_and_named(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = max(
        len(frame["source"]) for frame in data_of(report(run.path, to=tmp_path))["pictures"][0]["frames"]
    )
    monkeypatch.setattr(page_data, "MOST_PICTURES", picture)
    monkeypatch.setattr(page_data, "MOST_MATRICES", 8)
    capsys.readouterr()
    found = data_of(report(run.path, to=tmp_path))
    assert len(found["pictures"][0]["frames"]) < 3
    assert found["matrices"][0]["steps"] == [4, 12]
    assert "of its mixing matrices the page shows 2 of 3 steps" in capsys.readouterr().out


def test_long_curves_keep_their_extremes() -> None:
    curve = [(step, float(step % 97)) for step in range(20_000)]
    curve[7_003] = (7_003, -50.0)
    curve[9_001] = (9_001, 500.0)
    thin = thin_curve(curve)
    assert len(thin) <= page_data.MOST_POINTS
    assert {curve[0], curve[-1], curve[7_003], curve[9_001]} <= set(thin)
    assert thin == sorted(thin)
    assert thin_places(range(100), 4) == [0, 33, 66, 99]


def test_a_comparison_has_a_table_with_intervals_and_a_plot_per_metric(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "compare-1", {"linear": [2.0, 2.2, 2.1], "mhla": [1.0, 1.1, 1.3]})
    page = report(folder, to=tmp_path / "page")
    found = data_of(page)
    assert found["series"] == ["linear", "mhla"]
    assert [plot["tag"] for plot in found["intervals"]] == ["val/loss", "val/top1"]
    row = found["intervals"][0]["rows"][1]
    values = [top / 4 for top in (1.0, 1.1, 1.3)]  # the loss of step 12
    assert row["values"] == pytest.approx(values)
    assert row["half"] == pytest.approx(4.302653 * statistics.stdev(values) / 3**0.5)
    assert f"{statistics.fmean(values):.4f} <small>± {row['half']:.4f}, n = 3</small>" in page
    curves = found["charts"][0]["curves"]
    kinds = [False, True, True, True]  # the mean, and three seeds
    assert [curve["seed"] for curve in curves] == 2 * kinds
    assert [curve["series"] for curve in curves] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert curves[0]["y"][0] == pytest.approx(2.1 / 1.25)
    assert page.count('class="number best"') == 2


def test_a_comparison_shows_the_paired_test_that_compare_prints(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "compare-1", {"linear": [2.0, 2.2, 2.1], "mhla": [1.0, 1.1, 1.3]})
    table = json.loads((folder / "table.json").read_text())
    rows = [
        {**row, "seeds": [{**seed, "seed": number} for number, seed in enumerate(row["seeds"])]}
        for row in table["rows"]
    ]
    tested = list(paired_differences(rows, "linear", ["val/loss"]))
    damaged: list[Any] = [{"row": "mhla", "tag": 3}, "x", {"row": "mhla", "against": "a", "tag": "val/top1"}]
    (folder / "table.json").write_text(json.dumps(table | {"differences": [*as_json(tested), *damaged]}))
    page = report(folder, to=tmp_path / "page")
    (one,) = tested
    shown = f"{one.mean:+.4f} <small>±{one.half:.4f}, n = 3, p = {one.p:.2g}</small>"
    assert page.count(shown) == 1
    assert "Difference from linear" in page


def test_a_row_of_one_seed_beside_others_is_marked(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "compare-1", {"linear": [2.0, 2.2], "mhla": [1.0]})
    page = report(folder, to=tmp_path / "page")
    assert "n = 2</small>" in page
    assert "n = 1</small>" in page
    assert "With n = 1 there is no interval" in page


def test_without_a_folder_each_page_has_the_name_of_its_runs(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(run.path, other)
    for words in ([run.path], [other], [run.path, other]):
        assert main(["report", *map(str, words)]) == 0
    pages = [path.parent.name for path in tmp_path.glob("report-*/index.html")]
    assert len(pages) == 3
    assert {f"report-{run.run_id}", "report-other"} < set(pages)


def test_a_comparison_without_its_run_folders(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "compare-1", {"linear": [2.0], "mhla": [1.0]})
    shutil.rmtree(folder / "mhla-seed0")
    page = report(folder, to=tmp_path / "page")
    assert "Row mhla, seed 0 has no run folder here" in page
    assert "One seed for each row: there is no interval" in page
    assert interval([0.5]).half is None


def test_mistakes_are_one_sentence(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MHLA_RUNS", str(tmp_path))
    folder = write_comparison(tmp_path / "compare-1", {"linear": [2.0], "mhla": [1.0]})
    (tmp_path / "file").touch()
    (tmp_path / "compare-2").mkdir()
    (tmp_path / "compare-3").mkdir()
    (tmp_path / "compare-3" / "table.json").write_text("{")
    for words, reason in (
        (["nowhere"], "no run 'nowhere'"),
        ([str(run.path), "--to", str(tmp_path / "file")], "is no folder"),
        ([str(folder), str(run.path)], "has a page of its own"),
        (["compare-2"], "has not ended"),
        (["compare-3"], "holds no rows"),
    ):
        assert main(["report", *words]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("tag", "group", "unit"),
    [
        ("train/loss", "Loss", "loss"),
        ("val_512/top1", "Quality", "share of samples"),
        ("train/time_data", "Speed", "seconds per step"),
        ("train/consumed/books", "Health", "samples"),
        ("loss_by_time/val_ema_1of4", "Loss by noise level", "loss"),
        ("train/memory_allocated_gib", "Memory", "GiB"),
    ],
)
def test_every_tag_has_a_group_and_a_unit(tag: str, group: str, unit: str) -> None:
    assert (group_of(tag), unit_of(tag)) == (group, unit)
