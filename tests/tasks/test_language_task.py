"""The language and the recall task: what counts, what is measured, which data they refuse; whole runs on
real token shards.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.cli.main import main
from mhla_lightning.data.prepare.pack import pack
from mhla_lightning.data.prepare.sources.mqar import open_mqar
from mhla_lightning.runs.folder import read_metrics
from mhla_lightning.tasks import ClassificationTask, LanguageLossConfig, LanguageTask, RecallTask
from mhla_lightning.tasks.base import Task
from mhla_lightning.tasks.language import seen_before
from mhla_lightning.tasks.token_loss import IGNORE
from mhla_lightning.training.session import best
from tests.helpers.errors import refused
from tests.helpers.language_models import OPERATORS_ON_CPU
from tests.helpers.language_runs import RECIPE, write_text

MHLA: dict[str, Any] = {
    "name": "mhla",
    "chunk_size": 4,
    "max_chunks": 4,
    "heads": 2,
    "extrapolation": "shift",
}
OPTIONS: dict[str, Any] = {"vocab_size": 12, "context": 16, "embed_dim": 8, "depth": 2, "intermediate": 16}
FACTS: dict[str, Any] = {
    "kind": "tokens",
    "length": 16,
    "val_length": 32,
    "vocabulary": 12,
    "token_bytes": None,
}
GOLDEN = Path(__file__).parents[1] / "golden" / "language.json"
JOINED = LanguageLossConfig(isolate_documents=False)


def make(kind: type[LanguageTask] = LanguageTask, attention: Any = MHLA, **options: Any) -> Any:
    torch.manual_seed(0)
    task = kind("lm_tiny", attention, OPTIONS, **options)
    task.configure_model()
    assert task.backbone is not None
    for parameter in task.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    task.logged = []  # type: ignore[assignment]
    task.log = lambda tag, *args, **kwargs: task.logged.append(tag)  # type: ignore[method-assign, operator, union-attr]
    return task


def batch(rows: int = 4, length: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "tokens": torch.randint(0, 12, (rows, length), generator=generator),
        "documents": torch.zeros(rows, length, dtype=torch.int64),
        "weight": torch.ones(rows),
    }


def measured(task: Any, tag: str) -> dict[str, float]:
    return {
        name: float(metric.compute()) for name, metric in task.metrics[tag].items() if metric.update_count
    }


def plain_loss(task: Any, data: dict[str, Tensor], targets: Tensor) -> Tensor:
    """From whole logits, each row's documents isolated as the task's backbone would."""
    logits = task(data["tokens"], documents=data["documents"])
    return F.cross_entropy(logits[targets != IGNORE], targets[targets != IGNORE])


def test_targets_are_the_next_tokens_of_the_same_document() -> None:
    tokens, documents = torch.arange(10)[None], torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, -1, -1]])
    isolated, joined = make(), make(loss=JOINED)
    assert isolated.targets(tokens, documents).tolist() == [
        [1, 2, IGNORE, 4, IGNORE, 6, 7, IGNORE, IGNORE, IGNORE]
    ]
    assert joined.targets(tokens, documents).tolist() == [[1, 2, 3, 4, 5, 6, 7, IGNORE, IGNORE, IGNORE]]


@pytest.mark.parametrize(
    "documents",
    [[0] * 16, [0] * 5 + [1] * 11, [0] * 12 + [-1] * 4, [0] * 5 + [1] * 7 + [-1] * 4, [-1] * 3 + [0] * 13],
    ids=str,
)
def test_the_loss_of_a_row_is_that_of_its_documents_alone(documents: list[int]) -> None:
    """Whatever shortcut a batch takes."""
    task, data = make(), batch(1)
    data["documents"] = torch.tensor([documents])
    losses, counts = [], []
    for number in set(documents) - {-1}:
        own = data["tokens"][:, torch.tensor(documents) == number]
        losses.append(F.cross_entropy(task(own)[0, :-1], own[0, 1:], reduction="sum"))
        counts.append(own.shape[1] - 1)
    torch.testing.assert_close(task.training_step(data, 0), torch.stack(losses).sum() / sum(counts))


def test_without_isolation_a_row_is_one_text_and_padding_counts_nowhere() -> None:
    task, data = make(loss=JOINED), batch(2)
    data["documents"] = torch.tensor([[0] * 5 + [1] * 11, [0] * 9 + [1] * 3 + [-1] * 4])
    logits = task(data["tokens"])
    expected = (
        torch.cat([logits[0, :15], logits[1, :11]]),
        torch.cat([data["tokens"][0, 1:], data["tokens"][1, 1:12]]),
    )
    loss = task.training_step(data, 0)
    torch.testing.assert_close(loss, F.cross_entropy(*expected))
    data["tokens"][1, 12:] = (data["tokens"][1, 12:] + 1) % 12
    assert torch.equal(task.training_step(data, 0), loss)


def test_z_loss_is_added_in_training_alone() -> None:
    data = batch()
    with_z, without = make(loss=LanguageLossConfig(z_loss=0.1)), make()
    logits = without(data["tokens"])[:, :-1]
    difference = with_z.training_step(data, 0) - without.training_step(data, 0)
    torch.testing.assert_close(difference, 0.1 * logits.logsumexp(-1).square().mean(), rtol=1e-4, atol=1e-5)
    for task in (with_z, without):
        task.evaluate(data, "val")
    assert measured(with_z, "val") == pytest.approx(measured(without, "val"))


def test_metrics_are_means_over_all_counted_targets() -> None:
    """Over batches of unequal counts, with rows of weight 0, with a token's bytes."""
    task, data = make(), batch(6)
    data["documents"][0, 6:] = -1
    data["documents"][1, 9:] = 1
    data["weight"][5] = 0
    token_bytes = np.arange(12)
    task.token_bytes = torch.as_tensor(token_bytes)
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        task.evaluate({name: value[start:stop] for name, value in data.items()}, "val")
    real = {name: value[:5] for name, value in data.items()}
    targets = task.targets(real["tokens"], real["documents"])
    loss = float(plain_loss(task, real, targets).detach())
    counted = targets[targets != IGNORE]
    bits = loss * len(counted) / math.log(2) / token_bytes[counted.numpy()].sum()
    assert measured(task, "val") == pytest.approx(
        {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits}, rel=1e-5
    )
    assert set(task.logged) == {"val/loss", "val/perplexity", "val/bits_per_byte"}


def test_bits_per_byte_need_a_tokens_bytes() -> None:
    task = make()
    task.check_data(FACTS, 4)
    task.evaluate(batch(), "val")
    assert set(task.logged) == {"val/loss", "val/perplexity"}


def test_a_row_is_evaluated_at_every_context_length() -> None:
    task, data = make(eval_lengths=[8, 16, 32]), batch(3, 32)
    data["weight"][2] = 0
    data["documents"][0, 20:] = 7
    data["documents"][1, 20:] = -1  # its last window of 8 is all padding
    task.check_data(FACTS, 3)
    task.evaluate(data, "val_ema")
    assert set(task.logged) == {
        f"{tag}/{name}" for tag in ("val_ema", "val_ema_8", "val_ema_32") for name in ("loss", "perplexity")
    }
    for length, tag in ((8, "val_ema_8"), (16, "val_ema"), (32, "val_ema_32")):
        windows = {name: data[name][:2].reshape(-1, length) for name in ("tokens", "documents")}
        expected = plain_loss(task, windows, task.targets(windows["tokens"], windows["documents"]))
        assert measured(task, tag)["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert measured(task, "val_ema_8")["loss"] != measured(task, "val_ema_32")["loss"]


def test_recall_counts_answers_to_repeated_keys() -> None:
    task = make(RecallTask)
    tokens = torch.tensor([[1, 8, 2, 9, 8, 8, 2, 9, 7, 1, 8, 11, 3, 6, 3, 10]])
    documents = torch.zeros_like(tokens)
    assert seen_before(tokens)[0].int().tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 1, 0]
    targets = task.targets(tokens, documents)
    assert {place: int(targets[0, place]) for place in range(16) if targets[0, place] != IGNORE} == {
        6: 9,
        9: 8,
        14: 10,
    }
    data = {"tokens": tokens, "documents": documents, "weight": torch.ones(1)}
    task.evaluate(data, "val")
    guesses = task(tokens)[0].argmax(-1)
    hits = sum(int(guesses[place]) == answer for place, answer in ((6, 9), (9, 8), (14, 10)))
    assert measured(task, "val")["accuracy"] == pytest.approx(hits / 3)
    torch.testing.assert_close(task.training_step(data, 0), plain_loss(task, data, targets))
    assert best("val/accuracy", [0.1, 0.9, 0.5]) == 0.9
    assert best("val_32/loss", [0.1, 0.9, 0.5]) == 0.1


def test_recall_of_a_model_that_knows_is_perfect() -> None:
    """Rows as the data module makes them; a model that answers by looking the key up."""
    task = make(RecallTask)
    source = open_mqar("mqar:3", length=16, val=4)
    rows = np.stack([sample.tokens for sample in _rows(source)])
    tokens = torch.from_numpy(rows.astype(np.int64))
    assert tokens.max() > 64
    task.vocab_size = 128
    targets = task.targets(tokens, torch.zeros_like(tokens))
    assert ((targets != IGNORE).sum(1) == 3).all()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        for place, answer in enumerate(wanted):
            if answer != IGNORE:
                assert answer == row[row.index(row[place]) + 1]


def _rows(source: Any) -> list[Any]:
    return [type("Row", (), {"tokens": source.parts["val"]._row(number)[0]}) for number in range(4)]


@pytest.mark.parametrize(
    ("facts", "key"),
    [
        ({"kind": "images"}, None),
        ({"vocabulary": 50}, "backbone_options.vocab_size"),
        ({"length": 32}, "backbone_options.context"),
        ({"val_length": 40}, "eval_lengths"),
        ({"val_length": 48}, "eval_lengths"),
        ({"val_length": 16}, "eval_lengths"),
    ],
    ids=str,
)
def test_data_that_does_not_fit_is_refused_in_one_sentence(facts: dict[str, Any], key: str | None) -> None:
    task = make(eval_lengths=[32])
    task.check_data(FACTS, 4)
    with refused(key) as error:
        task.check_data({**FACTS, **facts}, 4)
    assert "\n" not in str(error.value)


def test_recall_needs_the_datas_vocabulary() -> None:
    make(RecallTask).check_data(FACTS, 4)
    with refused("backbone_options.vocab_size"):
        make(RecallTask).check_data({**FACTS, "vocabulary": 8}, 4)


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: LanguageTask("deit_tiny"), "backbone"),
        (lambda: ClassificationTask("lm_tiny"), "backbone_options.num_classes"),
        (lambda: LanguageLossConfig(z_loss=-1.0), "loss.z_loss"),
        (lambda: LanguageTask("lm_tiny", eval_lengths=[1]), "eval_lengths"),
        (
            lambda: LanguageTask("lm_tiny", {"name": "mhla", "max_chunks": 4}, eval_lengths=[512]),
            "eval_lengths",
        ),
    ],
    ids=["image backbone", "language backbone", "z_loss", "length", "too long"],
)
def test_configuration_is_checked_before_weights_exist(build: Any, key: str) -> None:
    with refused(key) as error:
        build()
    assert "\n" not in str(error.value)


def test_the_340m_model_is_planned_without_weights() -> None:
    task: Task = LanguageTask("lm_340m")
    assert task.backbone is None
    assert task.parameter_count == 341_130_240
    assert task.grid == (2048,)
    assert task.flops_per_batch(1) == 3 * task.flops_per_sample > 4e12


@pytest.fixture(scope="module")
def text_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("language"))


@pytest.fixture
def language_recipe(tmp_path: Path, text_shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MHLA_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("PATH", str(text_shards)))
    return path


@pytest.mark.parametrize(
    "attention", [*OPERATORS_ON_CPU, "[softmax, {name: linear, short_conv: 4, decay: token}]"]
)
def test_every_operator_trains(language_recipe: Path, tmp_path: Path, attention: str) -> None:
    arguments = [
        "run",
        str(language_recipe),
        "--run-id",
        "a",
        "--trainer.max_steps",
        "2",
        "--model.attention",
        attention,
        "--model.loss.z_loss",
        "1e-4",
    ]
    assert (
        main(
            [
                *arguments,
                "--trainer.precision",
                "bf16-mixed",
                "--model.checkpoint_activations",
                "blocks",
                "--data.micro_batch_size",
                "4",
            ]
        )
        == 0
    )
    series = read_metrics(tmp_path / "runs" / "a" / "metrics.jsonl")
    assert [0 < value < 10 for _, value in series["train/loss"]] == [True, True]
    assert {
        f"{tag}/{name}"
        for tag in ("val", "val_16", "val_64", "val_ema", "val_ema_64")
        for name in ("loss", "bits_per_byte")
    } <= series.keys()


def test_golden_losses(language_recipe: Path, tmp_path: Path) -> None:
    """Ten steps from a fixed seed. A change that moves these numbers changes training: say so when you
    write the file anew.
    """
    assert main(["run", str(language_recipe), "--run-id", "golden"]) == 0
    series = read_metrics(tmp_path / "runs" / "golden" / "metrics.jsonl")
    found = {
        tag: [value for _, value in series[tag]] for tag in ("train/loss", "val/loss", "val_64/bits_per_byte")
    }
    golden = json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for tag, values in golden.items():
        assert found[tag] == pytest.approx(values, rel=2e-4), tag
    samples, tokens = (dict(series[f"train/{name}_per_second"]) for name in ("samples", "tokens"))
    assert all(tokens[step] == pytest.approx(32 * speed) for step, speed in samples.items())
    assert samples


@pytest.mark.slow
def test_recall_trains_on_its_own_rows(tmp_path: Path, language_recipe: Path) -> None:
    pack(open_mqar("mqar:4", length=32, val=20), tmp_path / "recall")
    arguments = [
        "run",
        str(language_recipe),
        "--run-id",
        "r",
        "--trainer.max_steps",
        "2",
        "--data.path",
        str(tmp_path / "recall"),
    ]
    arguments += [
        "--model.class_path",
        "mhla_lightning.tasks.RecallTask",
        "--model.backbone_options.vocab_size",
        "128",
        "--model.eval_lengths",
        "[16]",
    ]
    assert main(arguments) == 0
    series = read_metrics(tmp_path / "runs" / "r" / "metrics.jsonl")
    assert {"val/accuracy", "val_ema/accuracy", "val/loss"} <= series.keys()
    assert all(0 <= value <= 1 for _, value in series["val/accuracy"])
