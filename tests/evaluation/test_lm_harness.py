"""lm-evaluation-harness on tiny models, against full recomputation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm_eval is the extra 'lm_eval'")
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from mhla_lightning.conversion.export import TrainedModel, plan_export, write
from mhla_lightning.data.tokenizers import open_tokenizer
from mhla_lightning.errors import UserError
from mhla_lightning.evaluation import lm_harness
from mhla_lightning.evaluation.lm_harness import (
    PAPER_TASKS,
    HarnessLM,
    load_tasks,
    run_harness,
    similar_names,
)
from mhla_lightning.inference.text import Sampling
from mhla_lightning.inference.text.continuation import continue_prompts
from tests.helpers.errors import refused
from tests.helpers.language_models import ENTRIES, entry_id, tiny_model
from tests.helpers.lm_tasks import ROWS, local_tasks

BYTES = open_tokenizer("bytes")
LENGTH = 32
every_operator = pytest.mark.parametrize("entry", ENTRIES, ids=entry_id)


def harness(entry: Any, dtype: torch.dtype = torch.float32) -> HarnessLM:
    return HarnessLM(tiny_model(entry, dtype, vocab_size=BYTES.vocabulary), BYTES, LENGTH, batch_size=3)


def requests(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def plain(entry: Any, tokens: list[int], start: int) -> tuple[float, bool]:
    """Return log p of tokens[start:] in float64, and whether each was the likeliest.

    Every prefix is computed anew.
    """
    model = tiny_model(entry, torch.float64, vocab_size=BYTES.vocabulary)
    total, greedy = 0.0, True
    with torch.no_grad():
        for place in range(start, len(tokens)):
            logits = model(torch.tensor([tokens[:place]]))[0, -1]
            total += logits.log_softmax(-1)[tokens[place]].item()
            greedy &= int(logits.argmax()) == tokens[place]
    return total, greedy


PAIRS = [
    ("the cat", " sat"),
    ("", "alone"),
    ("a longer context here", "x"),
    ("a longer context here", "y"),
    ("abc ", "trailing"),
    ("z" * 90, "cut off"),
]


@every_operator
def test_loglikelihood_is_that_of_full_recomputation(entry: Any) -> None:
    model = harness(entry)
    found = model.loglikelihood(requests("loglikelihood", PAIRS))
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        moved = len(context) - len(
            context.rstrip()
        )  # the harness scores spaces at the end of a context with what follows
        tokens = [*(BYTES.encode(context) or [BYTES.end or 0]), *BYTES.encode(continuation)][-(LENGTH + 1) :]
        expected, would = plain(entry, tokens, len(tokens) - len(continuation) - moved)
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert greedy == would


def test_the_greedy_continuation_is_said_to_be_greedy() -> None:
    model = harness("linear")
    context = "go on"
    new = [
        c.token
        for c in continue_prompts(model.backbone, BYTES, [BYTES.encode(context)], Sampling(greedy=True), 6)
    ]
    ((_, greedy),) = model.score([(BYTES.encode(context), new)])
    ((_, other),) = model.score([(BYTES.encode(context), [*new[:-1], (new[-1] + 1) % 256])])
    assert (greedy, other) == (True, False)


@every_operator
@pytest.mark.parametrize("length", [1, LENGTH, LENGTH + 1, 3 * LENGTH + 5])
def test_rolling_predicts_every_token_once_with_its_window(entry: Any, length: int) -> None:
    model = harness(entry)
    text = "".join(chr(97 + n * n % 26) for n in range(length))
    (value,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    tokens = BYTES.encode(text)
    expected = plain(entry, [BYTES.end or 0, *tokens[:LENGTH]], 1)[0]
    for first in range(LENGTH, length, LENGTH):
        last = min(first + LENGTH, length)
        expected += plain(entry, tokens[max(0, last - LENGTH - 1) : last], LENGTH + 1 - (last - first))[0]
    assert value == pytest.approx(expected, rel=1e-5)


def test_an_empty_text_has_likelihood_one() -> None:
    assert (
        harness("linear").loglikelihood_rolling(requests("loglikelihood_rolling", [("",), ("a",)]))[0] == 0.0
    )


def test_generate_until_is_our_generation_cut_at_the_first_stop() -> None:
    model = harness("linear", torch.float64)
    contexts = ["short", "a much longer context", "mid one"]

    def alone(context: str, new: int) -> str:
        steps = continue_prompts(
            model.backbone, BYTES, [BYTES.encode(context)[-(LENGTH - new) :]], Sampling(greedy=True), new
        )
        return "".join(step.text for step in steps)

    free = model.generate_until(
        requests("generate_until", [(c, {"until": [], "max_gen_toks": 12}) for c in contexts])
    )
    assert free == [alone(context, 12) for context in contexts]
    stop = free[1][4:6]
    cut = model.generate_until(
        requests(
            "generate_until",
            [(c, {"until": [stop], "max_gen_toks": 12, "do_sample": False}) for c in contexts],
        )
    )
    assert cut == [text.split(stop)[0] for text in free]
    assert cut[1] != free[1]
    sampled = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 0.9, "top_k": 40}
    first, second = (
        model.generate_until(requests("generate_until", [(c, sampled) for c in contexts])) for _ in range(2)
    )
    assert first == second != free
    with refused("generation_kwargs"):
        model.generate_until(requests("generate_until", [("a", {"until": [], "num_beams": 4})]))


def test_a_continuation_longer_than_the_model_and_a_tokenizer_without_end_are_refused() -> None:
    model = harness("linear")
    with refused("pairs"):
        model.score([([1], [2] * (LENGTH + 1))])
    tokenizer = open_tokenizer("bytes")
    tokenizer.end = None
    with refused("tokenizer"):
        HarnessLM(model.backbone, tokenizer, LENGTH)


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture
def folder(
    tasks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> str:
    """The folder of local_tasks, with a cache of its own.

    The harness reads its thousands of task files once for all tests.
    """
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    # the harness's own task files take 30 s to read: those tests are slow
    manager = read_once if request.node.get_closest_marker("slow") else local_only
    monkeypatch.setattr(lm_harness, "TaskManager", manager)
    return str(local_tasks(tasks_folder))


read_once = lru_cache(TaskManager)
local_only = partial(TaskManager, include_defaults=False)


def test_local_tasks_of_the_harness(folder: str) -> None:
    entry = "mhla"
    model = harness(entry)
    manager, tasks = load_tasks(["local_choice", "local_rolling"], folder)
    table = run_harness(model, tasks, manager)
    right = 0
    for row in ROWS:
        context = BYTES.encode(row["question"])
        values = [plain(entry, context + BYTES.encode(choice), len(context))[0] for choice in row["choices"]]
        right += max(range(len(values)), key=values.__getitem__) == row["answer"]
    assert table["local_choice"]["acc"] == pytest.approx(right / len(ROWS))
    assert table["local_choice"]["samples"] == 3
    nats = sum(plain(entry, [BYTES.end or 0, *BYTES.encode(row["question"])], 1)[0] for row in ROWS)
    size = sum(len(row["question"].encode()) for row in ROWS)
    assert table["local_rolling"]["bits_per_byte"] == pytest.approx(
        -nats / size / 0.6931471805599453, rel=1e-5
    )
    assert run_harness(model, tasks, manager, limit=2)["local_choice"]["samples"] == 2


HARNESS_ALONE = """
import sys
sys.modules["mhla_lightning"] = None  # an import of ours fails
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.mark.slow
def test_the_harness_alone_opens_an_export_and_measures_the_same(folder: str, tmp_path: Path) -> None:
    """`lm_eval --model hf` on an exported folder, in a process that cannot import this package."""
    entry = {"name": "mhla", "chunk_size": 8, "max_chunks": 200}
    model = tiny_model(entry, torch.float32, vocab_size=BYTES.vocabulary)
    options = {
        "vocab_size": BYTES.vocabulary,
        "context": 64,
        "embed_dim": 32,
        "depth": 2,
        "intermediate": 64,
        "tie_embeddings": False,
    }
    trained = TrainedModel(
        model.state_dict(), "lm_tiny", entry, options, "a test", end=BYTES.end, tokenizer=BYTES
    )
    write(plan_export(trained, "hf"), tmp_path / "lm")
    names = ["local_choice", "local_rolling"]
    arguments = {
        "--model": "hf",
        "--model_args": f"pretrained={tmp_path / 'lm'},trust_remote_code=True,dtype=float32",
        "--tasks": ",".join(names),
        "--include_path": folder,
        "--device": "cpu",
        "--batch_size": "2",
        "--output_path": str(tmp_path / "out"),
    }
    command = [sys.executable, "-c", HARNESS_ALONE, *(word for pair in arguments.items() for word in pair)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(written.read_text())["results"]
    manager, tasks = load_tasks(names, folder)
    ours = run_harness(HarnessLM(model, BYTES, 64, batch_size=2), tasks, manager)
    assert found["local_choice"]["acc,none"] == ours["local_choice"]["acc"]
    assert found["local_rolling"]["bits_per_byte,none"] == pytest.approx(
        ours["local_rolling"]["bits_per_byte"], rel=1e-5
    )


@pytest.mark.slow
def test_unknown_tasks_and_data_out_of_reach_give_one_line(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="did you mean 'wikitext'"):  # the nearest name is the point
        load_tasks(["wikitex"], folder)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (Path(folder) / "rows.jsonl").unlink()
    with refused("tasks") as error:
        load_tasks(["local_choice"], folder)
    assert "local_choice" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_paper_means_nine_tasks_of_the_harness(folder: str) -> None:
    assert len(PAPER_TASKS) == 9
    assert set(PAPER_TASKS) <= set(read_once(include_path=folder).all_tasks)


def test_similar_names_begin_alike() -> None:
    assert similar_names("arc_hard", ["wikitext", "arc_easy", "arc_challenge"]) == [
        "arc_easy",
        "arc_challenge",
    ]
