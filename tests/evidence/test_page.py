"""The page, from folders that hold finished and missing runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mhla_lightning.cli.main import main
from mhla_lightning.evidence.page import write_page
from mhla_lightning.evidence.results import read_result
from mhla_lightning.evidence.study import read_study
from mhla_lightning.evidence.work import StudyWork, work_for
from mhla_lightning.runs.folder import write_json

STUDY: dict[str, Any] = {
    "title": "A study | of <two> rows",
    "about": "Nothing was trained.",
    "value": 1,
    "minutes": 10,
    "seeds": [0, 1, 2],
    "recipe": "classification/deit_tiny_mhla_mnist_cpu",
    "rows": {"linear": {"model.attention": "linear"}, "mhla": {}},
    "analyze": 4,
    "metrics": {"val/top1": "top-1", "attention/effective_rank": "effective rank"},
    "paper": {"mhla": "75.8 % | Table 2"},
    "plots": [
        {"metrics": ["val/top1"]},
        {"metrics": ["val/top1", "val_512/top1"], "x": [64, 128], "x_title": "tokens", "y_title": "top-1"},
    ],
    "claims": [
        {
            "says": "MHLA is above.",
            "paper": "Table 2",
            "metric": "val/top1",
            "higher": "mhla",
            "than": "linear",
        },
        {"says": "MHLA is below.", "paper": "none", "metric": "val/top1", "lower": "mhla", "than": "linear"},
        {
            "says": "The rank is high.",
            "paper": "Figure 3",
            "metric": "attention/effective_rank",
            "row": "mhla",
            "at_least": 2,
        },
        {
            "says": "The bound holds.",
            "paper": "Sec. 4",
            "metric": "attention/rank_over_bound",
            "row": "mhla",
            "never_above": 1,
        },
    ],
}
SESSION = {
    "started": "2026-11-29T20:00:00+00:00",
    "ended": "2026-11-29T20:10:00+00:00",
    "seconds": 600.0,
    "jobs": 2,
    "load": 0.3,
    "cpu": "A <script>alert(1)</script> [x](javascript:1) | processor",
    "cores": 2,
    "torch": "2.14.1",
    "python": "3.11.7",
    "version": "0.2.0",
    "commit": "0123456789abcdef",
    "changed": False,
}


@pytest.fixture
def work(tmp_path: Path) -> StudyWork:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return work_for(read_study(tmp_path / "study.yaml"), None, str(tmp_path / "runs"))


def finish(work: StudyWork, name: str, seed: int, top1: float) -> None:
    """Write what a finished run leaves behind."""
    assert work.plan is not None
    row = next(row for row in work.plan.rows if row.name == name)
    run = work.plan.run(row, seed)
    run.path.mkdir(parents=True)
    write_json(run.progress, {"state": "finished"})
    write_json(run.summary, {"last": {"val/top1": top1, "val_512/top1": top1 / 2}, "seconds": 1.0})


def finish_all(work: StudyWork) -> None:
    for seed in range(3):
        finish(work, "linear", seed, 0.5 + 0.01 * seed)
        finish(work, "mhla", seed, 0.7 + 0.011 * seed)
    write_json(work.folder / "study.json", {"format": 1, "sessions": [SESSION]})


def look_into(work: StudyWork, ranks: list[float], rows: Sequence[str] = ("linear", "mhla")) -> None:
    """Write what an analysis of every seed leaves behind; ranks: of the heads of mhla."""
    for seed in range(3):
        heads = {name: ranks if name == "mhla" else [3.0, 3.0] for name in rows}
        runs = [
            {
                "run": f"{name}-seed{seed}",
                "layers": [
                    {"mean": {"effective_rank": 2.5 + seed / 10}, "heads": {"rank": rank}, "rank_bound": 4}
                ],
            }
            for name, rank in heads.items()
        ]
        file = work.analysis(seed)[0]
        file.parent.mkdir()
        write_json(file, {"samples": 4, "runs": runs})


def test_rows_that_are_not_analyzed_have_no_number(tmp_path: Path) -> None:
    content = {**STUDY, "analyze": {"samples": 4, "rows": ["mhla"]}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    work = work_for(read_study(tmp_path / "study.yaml"), None, str(tmp_path / "runs"))
    finish_all(work)
    look_into(work, [3.0, 3.0])  # of an earlier study, of all rows
    assert not work.complete()
    for seed in range(3):
        shutil.rmtree(work.analysis(seed)[0].parent)
    look_into(work, [3.0, 3.0], ["mhla"])
    assert work.complete()
    words = list(work.analysis(1)[1].words())
    assert words[1 : words.index("--samples")] == [str(work.folder / "mhla-seed1")]
    text = page(work, tmp_path / "docs")
    assert "| linear | 3 | 0.5100 ± 0.0248 | - | - |" in text
    assert "| mhla | 3 | 0.7110 ± 0.0273 | 2.6000 ± 0.2484 |" in text


def page(work: StudyWork, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    write_page(folder / "evidence.md", [read_result(work)])
    return (folder / "evidence.md").read_text()


def test_nothing_has_run(work: StudyWork, tmp_path: Path) -> None:
    text = page(work, tmp_path / "docs")
    assert "0 of 1 studies are" in text
    assert text.count("**not run**") == 4 + 1  # the claims, and the rule
    assert "Nothing has run yet." in text
    assert list((tmp_path / "docs" / "evidence").iterdir()) == []


def test_a_part_has_run(work: StudyWork, tmp_path: Path) -> None:
    for seed in range(2):
        finish(work, "linear", seed, 0.5 + 0.01 * seed)
    finish(work, "mhla", 0, 0.7)
    text = page(work, tmp_path / "docs")
    assert "3 of 6 runs are finished" in text
    assert "| linear | 2 | 0.5050 ± 0.0635 | - | - |" in text
    assert "top-1: mhla minus linear = +0.2000, no interval (n = 1) | **not shown** |" in text


def test_everything_has_run(work: StudyWork, tmp_path: Path) -> None:
    finish_all(work)
    look_into(work, [4.0, 3.0])
    assert work.complete()
    text = page(work, tmp_path / "docs")
    assert "is not complete" not in text
    assert "| linear | 3 | 0.5100 ± 0.0248 | 2.6000 ± 0.2484 | - |" in text
    assert "| mhla | 3 | 0.7110 ± 0.0273 | 2.6000 ± 0.2484 | 75.8 % &#124; Table 2 |" in text
    assert "3 shown, 1 contradicted." in text
    assert "+0.2010 ± 0.0025 (n = 3) | **shown** |" in text
    assert "+0.2010 ± 0.0025 (n = 3) | **contradicted** |" in text
    assert "effective rank: mhla = 2.6000 ± 0.2484 (n = 3) | **shown** |" in text
    assert "mhla is at most 1.0000 (n = 3) | **shown** |" in text
    assert "Total: 10.0 minutes, 2 processes at once." in text
    assert "Largest load of the machine at a start: 0.3 processes." in text
    assert "`mhla reproduce study --seeds 0,1,2`, 6 of 6 runs" in text
    for number in (1, 2):
        assert f"(evidence/study-{number}.png)" in text
        assert (tmp_path / "docs" / "evidence" / f"study-{number}.png").read_bytes()[1:4] == b"PNG"


def test_a_broken_bound_is_a_contradiction(work: StudyWork, tmp_path: Path) -> None:
    finish_all(work)
    look_into(work, [4.0, 4.5])
    assert "at most 1.1250 (n = 3) | **contradicted** |" in page(work, tmp_path / "docs")


def test_equal_folders_give_equal_bytes(work: StudyWork, tmp_path: Path) -> None:
    finish_all(work)
    look_into(work, [4.0, 3.0])
    first, second = page(work, tmp_path / "one"), page(work, tmp_path / "two")
    assert first == second
    for name in ("study-1.png", "study-2.png"):
        one, two = (tmp_path / place / "evidence" / name for place in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_texts_of_a_folder_and_a_study_are_no_markup(work: StudyWork, tmp_path: Path) -> None:
    finish_all(work)
    text = page(work, tmp_path / "docs")
    assert "<script>" not in text
    assert "](javascript" not in text
    assert "A study &#124; of &lt;two&gt; rows" in text


@pytest.mark.parametrize("damage", ["[1]", "{", '{"samples": 4, "runs": [{"run": "linear-seed0"}]}'])
def test_a_damaged_analysis_counts_as_missing(damage: str, work: StudyWork, tmp_path: Path) -> None:
    finish_all(work)
    look_into(work, [4.0, 3.0])
    work.analysis(0)[0].write_text(damage)
    assert not work.complete()
    assert "(n = 2)" in page(work, tmp_path / "docs")


@pytest.mark.parametrize(
    "layers", [3, [3], [{"mean": 3}], [{"mean": {"effective_rank": "x"}}], [{"mean": {}, "rank_bound": 4}]]
)
def test_an_analysis_with_other_content_gives_no_number(layers: Any, work: StudyWork, tmp_path: Path) -> None:
    finish_all(work)
    for seed in range(3):
        runs = [{"run": f"{name}-seed{seed}", "layers": layers} for name in ("linear", "mhla")]
        work.analysis(seed)[0].parent.mkdir()
        write_json(work.analysis(seed)[0], {"samples": 4, "runs": runs})
    assert "effective rank: mhla | **not run** |" in page(work, tmp_path / "docs")


def test_the_page_alone_trains_nothing(
    work: StudyWork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish_all(work)
    before = sorted(work.folder.rglob("*"))
    words = ["reproduce", str(tmp_path / "study.yaml"), "--runs", str(tmp_path / "runs")]
    assert main([*words, "--page-only", "--page", str(tmp_path / "page.md")]) == 0
    assert sorted(work.folder.rglob("*")) == before
    assert "+0.2010 ± 0.0025" in (tmp_path / "page.md").read_text()
    assert f"page: {tmp_path / 'page.md'}" in capsys.readouterr().out
    assert main([*words, "--list"]) == 0
    assert "6 of 6 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--page", "/proc/version/page.md"], "--page: "),
        (["--page", "page.txt"], "--page: "),
        (["--jobs", "0"], "--jobs: "),
        (["--budget", "-1"], "--budget: "),
        (["--seeds", "a"], "--seeds: "),
        (["clasification"], "did you mean 'classification'"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *words]) == 2
    assert said in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_measurement_of_speed(tmp_path: Path) -> None:
    given = {
        "title": "Speed",
        "about": "Times.",
        "value": 1,
        "minutes": 1,
        "seeds": [0, 1, 2],
        "bench": {"tokens": [256], "turns": 5},
        "metrics": {"speed/step_256": "ms", "speed/slope": "slope"},
        "claims": [
            {"says": "s", "paper": "p", "metric": "speed/step_256", "lower": "mhla", "than": "softmax"},
            {"says": "s", "paper": "p", "metric": "speed/slope", "row": "mhla", "at_most": 1.1},
        ],
    }
    (tmp_path / "speed.yaml").write_text(yaml.safe_dump(given))
    work = work_for(read_study(tmp_path / "speed.yaml"), None, str(tmp_path))
    assert work.speeds(0)[1].words()[:5] == ["bench", "attention", "--tokens", "256", "--turns"]
    assert work.units() == (0, 3)
    work.folder.mkdir(parents=True)
    for repetition in range(3):
        rows = [
            {
                "operator": name,
                "tokens": 256,
                "forward_seconds": 0.001,
                "step_seconds": seconds + repetition / 1e4,
            }
            for name, seconds in (("softmax", 0.02), ("linear", 0.01), ("mhla", 0.012))
        ]
        write_json(work.speeds(repetition)[0], {"rows": rows, "summary": {"slope": 0.9, "slope_memory": 1.0}})
    assert work.complete()
    verdicts = [verdict for _, verdict in read_result(work).verdicts]
    assert verdicts[0].mean == pytest.approx(-8.0)
    assert [one.answer for one in verdicts] == ["shown", "shown"]
    work.speeds(0)[0].write_text(json.dumps({"rows": [{"operator": "mhla"}], "summary": {}}))
    assert read_result(work).verdicts[0][1].seeds == 2
