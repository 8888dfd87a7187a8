"""Study files: the packaged ones, and mistakes that are refused by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mhla_lightning.cli.reproduce import minutes_left, within
from mhla_lightning.compare.plan import check_rows
from mhla_lightning.config.recipes import recipe_names
from mhla_lightning.evidence.study import read_studies, read_study, study_names
from mhla_lightning.evidence.work import StudyWork, work_for
from tests.helpers.errors import refused

RECIPE = "classification/deit_tiny_mhla_mnist_cpu"
GOOD: dict[str, Any] = {
    "title": "A study",
    "about": "Two rows.",
    "value": 1,
    "minutes": 10,
    "seeds": [0, 1, 2],
    "recipe": RECIPE,
    "rows": {"linear": {"model.attention": "linear"}, "mhla": None},
    "metrics": {"val/top1": "top-1"},
    "claims": [{"says": "s", "paper": "p", "metric": "val/top1", "higher": "mhla", "than": "linear"}],
}
CLAIM = GOOD["claims"][0]


def write(folder: Path, **changes: Any) -> Path:
    content = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    return folder / "study.yaml"


def test_a_study_is_read(tmp_path: Path) -> None:
    found = read_study(write(tmp_path))
    assert (found.name, found.row_names(), found.minutes) == ("study", ["linear", "mhla"], 10.0)
    assert found.trained is not None
    assert found.trained.rows[1].overrides == {}


def test_the_attention_of_some_rows_is_analyzed(tmp_path: Path) -> None:
    for given, wanted in ((4, (4, ["linear", "mhla"])), ({"samples": 2, "rows": ["mhla"]}, (2, ["mhla"]))):
        trained = read_study(write(tmp_path, analyze=given)).trained
        assert trained is not None
        assert (trained.samples, trained.analyzed) == wanted


def test_rows_can_be_chosen_from_a_variants_file(tmp_path: Path) -> None:
    claims = [{**CLAIM, "higher": "softmax"}]
    path = write(tmp_path, variants="video_quality", rows=["linear", "softmax"], claims=claims)
    assert read_study(path).row_names() == ["linear", "softmax"]
    with refused("rows"):
        read_study(write(tmp_path, variants="video_quality", rows=["linear", "softmix"], claims=claims))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"titel": "x"}, "titel"),
        ({"title": ...}, "title"),
        ({"about": 3}, "about"),
        ({"minutes": 0}, "minutes"),
        ({"minutes": "long"}, "minutes"),
        ({"value": True}, "value"),
        ({"seeds": [0, 1]}, "seeds"),
        ({"seeds": [0, 1, 1]}, "seeds"),
        ({"seeds": "0,1,2"}, "seeds"),
        ({"recipe": "classification/deit_tny"}, "recipe"),
        ({"recipe": ...}, "recipe"),
        ({"overrides": ["a"]}, "overrides"),
        ({"rows": {}}, "rows"),
        ({"rows": {"linear": "model.attention"}}, "rows"),
        ({"variants": "no_quality"}, "variants"),
        ({"sources": [{"data.source": "mnist"}]}, "sources.0"),
        ({"needs": {"../judge": {"recipe": RECIPE}}}, "run_id"),
        ({"needs": {"judge": {"recipes": RECIPE}}}, "needs.judge"),
        ({"needs": {"judge": {"recipe": "x"}}}, "needs.judge.recipe"),
        ({"evaluations": {"samples": 3}}, "evaluations.samples"),
        ({"analyze": -1}, "analyze"),
        ({"analyze": {"samples": 1}}, "analyze"),
        ({"analyze": {"samples": -1, "rows": ["linear"]}}, "analyze"),
        ({"analyze": {"samples": 1, "rows": []}}, "analyze.rows"),
        ({"analyze": {"samples": 1, "rows": ["liner"]}}, "analyze.rows"),
        ({"metrics": ["val/top1"]}, "metrics"),
        ({"paper": {"mlha": "75.8 %"}}, "paper"),
        ({"paper": {"mhla": 75.8}}, "paper.mhla"),
        ({"plots": [{"metrics": []}]}, "plots.0.metrics"),
        ({"plots": [{"metrics": ["a"], "x": [1, 2]}]}, "plots.0.x"),
        ({"plots": [{"metrics": ["a"], "color": "red"}]}, "plots.0.color"),
        ({"claims": []}, "claims"),
        ({"claims": [{**CLAIM, "metric": "val/topp1"}]}, "claims.0.metric"),
        ({"claims": [{**CLAIM, "grows_from": {"metric": "val/topp1"}}]}, "claims.0.metric"),
        ({"claims": [CLAIM, {**CLAIM, "higher": "mlha"}]}, "claims.1.higher"),
        ({"claims": ["mhla wins"]}, "claims.0"),
        ({"bench": {"tokens": [256]}}, "recipe"),  # runs and speed do not go together
        ({"bench": [1], "recipe": ..., "rows": ...}, "bench"),
    ],
)
def test_mistakes_are_refused_by_key(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    with refused(key):
        read_study(write(tmp_path, **changes))


def test_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with refused(str(tmp_path / "list.yaml")):
        read_study(tmp_path / "list.yaml")
    with refused("table"):
        read_studies(["clasification"])
    with refused("table"):
        read_studies(["speed", "speed"])


def test_a_file_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(f"title: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'made'}]\n")
    with refused(str(path)):
        read_study(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", study_names())
def test_packaged_studies_are_whole(name: str) -> None:
    (study,) = read_studies([name])
    assert len(study.seeds) >= 3
    assert all(
        tag in study.metrics or tag.startswith("attention/") for tag in (c.metric for c in study.claims)
    )
    assert f"studies/{name}" not in recipe_names()


@pytest.mark.slow  # builds every row of every study: half a minute
@pytest.mark.parametrize("name", study_names())
def test_the_rows_of_packaged_studies_are_valid(name: str, tmp_path: Path) -> None:
    work = work_for(read_studies([name])[0], None, str(tmp_path))
    if work.plan is not None:
        check_rows(work.plan)


def test_all_studies_fit_the_time() -> None:
    assert sum(study.minutes for study in read_studies([])) <= 150


def works(folder: Path, *minutes: float) -> list[StudyWork]:
    made = []
    for number, one in enumerate(minutes):
        write(folder, minutes=one, value=number + 1).rename(folder / f"s{number}.yaml")
        made.append(work_for(read_study(folder / f"s{number}.yaml"), None, str(folder)))
    return made


def test_a_budget_takes_whole_studies_by_value(tmp_path: Path) -> None:
    every = works(tmp_path, 30, 50, 20)
    assert within(every, None) == every
    assert within(every, 60) == [every[0], every[2]]
    assert within(every, 80) == every[:2]
    assert within(every, 5) == []


def test_fewer_seeds_take_fewer_minutes_and_the_same_folder(tmp_path: Path) -> None:
    study = read_study(write(tmp_path))
    first, second = (work_for(study, seeds, str(tmp_path)) for seeds in (None, [0]))
    assert second.study.minutes == pytest.approx(10 / 3)
    assert first.folder == second.folder


def test_another_content_has_another_folder(tmp_path: Path) -> None:
    changed: list[dict[str, Any]] = [
        {},
        {"overrides": {"trainer.max_steps": 5}},
        {"rows": {"linear": {}, "mhla": {}}},
    ]
    made = [work_for(read_study(write(tmp_path, **one)), None, str(tmp_path)).folder for one in changed]
    assert len(set(made)) == 3


def test_the_first_data_of_this_machine_is_taken(tmp_path: Path) -> None:
    sources = [
        {"data.source": f"fashion_mnist:{tmp_path}", "data.path": str(tmp_path / "no")},
        {"data.source": "mnist", "data.path": str(tmp_path / "digits")},
    ]
    work = work_for(read_study(write(tmp_path, sources=sources)), None, str(tmp_path))
    assert work.source is not None
    assert work.source.name == "mnist"
    assert "apt-get install dataset-fashion-mnist" in work.missing[0]
    alone = work_for(read_study(write(tmp_path, sources=sources[1:])), None, str(tmp_path))
    assert alone.missing == []
    none = work_for(read_study(write(tmp_path, sources=sources[:1])), None, str(tmp_path))
    with refused("sources"):
        none.check_data()


def test_the_remaining_time_follows_the_measured_pace() -> None:
    assert minutes_left(30, 0.5, 0.5, 1) == 15
    assert minutes_left(30, 0.5, 0.6, 600) == pytest.approx(40)
