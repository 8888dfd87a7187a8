"""LongBench: the cut of long prompts, the average, the harness's own tasks, and what is refused."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is the extra 'lm_eval'")
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from mhla_lightning.data.tokenizers import open_tokenizer
from mhla_lightning.evaluation import lm_harness
from mhla_lightning.evaluation.lm_harness import HarnessLM, load_tasks, run_harness
from mhla_lightning.evaluation.longbench import AVERAGE, LONGBENCH_TASKS, average_row
from mhla_lightning.inference.text import Sampling
from mhla_lightning.inference.text.continuation import continue_prompts
from tests.helpers.errors import refused
from tests.helpers.language_models import tiny_model
from tests.helpers.longbench import SOURCE, write_longbench

BYTES = open_tokenizer("bytes")
FOLDER = Path(lm_eval.__file__).parent / "tasks" / "longbench"
TOPICS = ("single", "multi", "summarization", "fewshot", "code")


def harness(length: int) -> HarnessLM:
    return HarnessLM(tiny_model("linear", vocab_size=BYTES.vocabulary), BYTES, length, batch_size=3)


@pytest.fixture
def own_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The harness reads LongBench's task files alone; data sets are taken from the current folder."""
    monkeypatch.setattr(
        lm_harness,
        "TaskManager",
        lambda include_path: TaskManager(include_path=FOLDER, include_defaults=False),
    )
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def test_a_long_prompt_of_longbench_loses_its_middle() -> None:
    model, text, new = harness(32), "instruction " + "x" * 90 + " question?", 8
    settings = {"until": [], "max_gen_toks": new, "temperature": 1, "do_sample": False}
    tokens, room = BYTES.encode(text), 32 - new
    kept = {
        "longbench_qasper": tokens[: room // 2] + tokens[-room // 2 :],
        "gsm8k": tokens[-room:],
    }
    for task, expected in kept.items():
        requests = [
            Instance("generate_until", {}, (prompt, settings), number, metadata=(task, number, 1))
            for number, prompt in enumerate((text, "short"))
        ]
        wanted = [
            "".join(
                step.text
                for step in continue_prompts(model.backbone, BYTES, [prompt], Sampling(greedy=True), new)
            )
            for prompt in (expected, BYTES.encode("short"))
        ]
        assert model.generate_until(requests) == wanted
        assert model.shortened[task] == 1


def test_the_average_is_over_all_tasks_or_absent() -> None:
    table: dict[str, dict[str, Any]] = {
        name: {"score": number / 100, "samples": 2} for number, name in enumerate(LONGBENCH_TASKS)
    }
    assert average_row(table) == {"longbench": {AVERAGE: pytest.approx(6.5), "samples": 28}}
    table.pop("longbench_lcc")
    assert average_row(table) == {}


@pytest.mark.filterwarnings("ignore:Using slow pure-python SequenceMatcher")
@pytest.mark.usefixtures("own_tasks")
def test_missing_packages_of_the_scorers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge", None)
    with refused("tasks") as error:
        load_tasks(["longbench"])
    assert "mhla-lightning[longbench]" in error.value.reason


def test_data_out_of_reach_are_named_with_the_way_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "{task: far, dataset_path: nobody/nothing, output_type: generate_until, test_split: test, "
    (tmp_path / "far.yaml").write_text(text + "doc_to_text: a, doc_to_target: b, metric_list: []}")
    monkeypatch.setattr(lm_harness, "TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refused("tasks") as error:
        load_tasks(["far"], str(tmp_path))
    assert "hf download nobody/nothing --repo-type dataset" in error.value.reason


def test_the_tasks_are_the_harnesss_english_ones_but_for_the_synthetic() -> None:
    manager = TaskManager(include_path=FOLDER, include_defaults=False)
    members = [
        name for topic in TOPICS for name in (manager.task_index[f"longbench_{topic}"].cfg or {})["task"]
    ]
    chinese = {f"longbench_{name}" for name in ("multifieldqa_zh", "dureader", "vcsum", "lsht")}
    assert set(LONGBENCH_TASKS) == set(members) - chinese
    assert len(LONGBENCH_TASKS) == 14
    sources = {(manager.task_index[name].cfg or {})["dataset_path"] for name in LONGBENCH_TASKS}
    assert sources == {SOURCE}


def f1(prediction: str, answer: str) -> float:
    """F1 of words, for answers without articles and punctuation."""
    said, meant = prediction.lower().split(), answer.lower().split()
    common = sum(min(said.count(word), meant.count(word)) for word in set(meant))
    return 2 * common / (len(said) + len(meant)) if common else 0.0


class Answering(HarnessLM):
    """Its continuation of each prompt is computed by the model and then replaced by a known answer."""

    seen: list[tuple[str, str]]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        texts = super().generate_until(requests)
        self.seen = [(request.task_name, text) for request, text in zip(requests, texts, strict=True)]
        return ["bird nest" for _ in requests]


@pytest.mark.slow  # 14 data sets are read and 28 texts continued
@pytest.mark.filterwarnings("ignore:Using slow pure-python SequenceMatcher")
@pytest.mark.usefixtures("own_tasks")
def test_the_harness_runs_all_tasks_on_data_of_this_folder(tmp_path: Path) -> None:
    pytest.importorskip("rouge", reason="LongBench's scorers are the extra 'longbench'")
    with refused("tasks") as error:
        load_tasks(["longbench"])
    assert f"hf download {SOURCE} --repo-type dataset --local-dir {SOURCE}" in error.value.reason
    write_longbench(tmp_path)
    manager, tasks = load_tasks(["longbench"])
    model = Answering(tiny_model("linear", vocab_size=BYTES.vocabulary), BYTES, max_length=700, batch_size=14)
    table = run_harness(model, tasks, manager)
    assert list(table)[-1] == "longbench"
    assert sorted(table)[:-1] == sorted([*LONGBENCH_TASKS, "longbench"])[:-1]
    question = [f1("bird nest", answer) for answer in ("mat", "bird")]  # articles do not count
    for name in ("hotpotqa", "qasper", "triviaqa"):
        assert table[f"longbench_{name}"]["score"] == pytest.approx(sum(question) / 2)
    assert table["longbench_trec"]["score"] == 0
    assert 0 < table["longbench_lcc"]["score"] < 1
    scores = [table[name]["score"] for name in LONGBENCH_TASKS]
    assert table["longbench"] == {AVERAGE: pytest.approx(100 * sum(scores) / 14), "samples": 28}
    assert {name for name, _ in model.seen} == set(LONGBENCH_TASKS)
    assert all(model.shortened[name] >= 1 for name in LONGBENCH_TASKS)
    assert all("\n" not in text for name, text in model.seen if name == "longbench_trec")
