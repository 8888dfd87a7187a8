"""`mhla analyze` and the curves of training, on tiny runs of all four families."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mhla_lightning
from mhla_lightning.analysis.drawing import DrawnRun, page_figure
from mhla_lightning.analysis.held_out import open_run, single_samples
from mhla_lightning.analysis.measures import TITLES
from mhla_lightning.analysis.study import StudyOptions, chosen_queries, kept_tokens, study
from mhla_lightning.analysis.watching import AttentionCall
from mhla_lightning.attention import ATTENTION, CAUSAL_ATTENTION, Attention, Context, Softmax
from mhla_lightning.callbacks import AttentionCurves
from mhla_lightning.cli.main import main
from mhla_lightning.tasks import ClassificationTask
from tests.helpers import tiny_tasks
from tests.helpers.errors import refused

STEPS = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.callbacks"]
CURVES = "[{class_path: mhla_lightning.callbacks.AttentionCurves, init_args: {every_n_steps: 1, samples: 1}}]"


def train(root: Path, task: str, run_id: str, attention: str, callbacks: str = "[]") -> None:
    recipe = tiny_tasks.write_recipes(root, [task])[task] if not (root / f"{task}.yaml").exists() else None
    recipe = recipe or root / f"{task}.yaml"
    place = ["--runs", str(root / "runs"), "--run-id", run_id]
    assert main(["run", str(recipe), *place, *STEPS, callbacks, "--model.attention", attention]) == 0


def analyze(root: Path, *words: str) -> dict[str, Any]:
    assert main(["analyze", *words, "--runs", str(root / "runs"), "--to", str(root / "out")]) == 0
    assert (root / "out" / "analysis.png").stat().st_size > 10_000
    found: dict[str, Any] = json.loads((root / "out" / "analysis.json").read_text())
    return found


class Squares(Softmax):
    """An operator without an attention matrix."""

    def attend(self, q: Any, k: Any, v: Any, context: Context) -> Any:
        return super().attend(q, k, v * v, context)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("classifier")
    ATTENTION["squares"] = Squares
    try:
        train(root, "classification", "hybrid", "[softmax, {name: mhla, blocks: 2}]", CURVES)
        train(root, "classification", "odd", "[linear, squares]", CURVES)
        yield root
    finally:
        del ATTENTION["squares"]


def test_a_hybrid_and_an_odd_run_share_a_table(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = analyze(classifier, "hybrid", "odd", "--samples", "3", "--heads", "--queries", "5", "0")
    hybrid, odd = found["runs"]
    assert [run["samples"] for run in found["runs"]] == [3, 3]
    sizes = [layer["block_size"] for layer in (*hybrid["layers"], odd["layers"][0])]
    assert sizes == [[2, 2]] * 3  # the one of mhla, in both
    assert hybrid["queries"] == [5, 0]
    softmax, mhla = hybrid["layers"]
    assert (softmax["rank_bound"], mhla["rank_bound"]) == (16, 16)
    for layer in (softmax, mhla, odd["layers"][0]):
        assert list(layer["heads"]) == list(TITLES)
        assert all(len(values) == 2 for values in layer["heads"].values())
        assert layer["mean"]["rank"] <= layer["rank_bound"]
        assert layer["skipped"] is None
    assert odd["layers"][0]["rank_bound"] == 6
    assert "not linear in v" in odd["layers"][1]["skipped"]
    assert odd["layers"][1]["heads"] == {}
    printed = capsys.readouterr().out
    assert "skipped: odd, layer 1: Squares has no attention matrix" in printed
    assert sum(line.startswith("│ hybrid") for line in printed.splitlines()) == 4  # a line a head


def test_curves_of_training_are_the_numbers_of_the_command(classifier: Path) -> None:
    lines = [json.loads(line) for line in (classifier / "runs/hybrid/metrics.jsonl").read_text().splitlines()]
    curves = {(line["tag"], line["step"]): line["value"] for line in lines if "attention/" in line["tag"]}
    assert {step for _, step in curves} == {1, 2}
    found = analyze(classifier, "hybrid", "--samples", "1", "--no-ema")["runs"][0]
    for number, layer in enumerate(found["layers"]):
        for measure in ("effective_rank", "rank", "entropy", "locality", "own_block"):
            assert curves[f"val_attention/{measure}/layer_{number}", 2] == pytest.approx(
                layer["mean"][measure]
            )
    odd = (classifier / "runs/odd/metrics.jsonl").read_text()
    assert "val_attention/rank/layer_0" in odd
    assert "layer_1" not in odd


def test_curves_change_nothing_of_training(classifier: Path) -> None:
    train(classifier, "classification", "bare", "[softmax, {name: mhla, blocks: 2}]")
    bare, watched = ((classifier / "runs" / run / "metrics.jsonl").read_text() for run in ("bare", "hybrid"))
    losses = [
        [
            line["value"]
            for line in map(json.loads, text.splitlines())
            if line["tag"] in ("train/loss", "val/loss")
        ]
        for text in (bare, watched)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["hybrid", "hybrid"], "run"),
        (["hybrid", "--max-tokens", "15"], "max_tokens"),
        (["hybrid", "--block-size", "2"], "block_size"),
        (["hybrid", "--queries", "16"], "queries"),
        (["hybrid", "--samples", "0"], "samples"),
        (["hybrid", "--device", "meta"], "device"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_mistakes_are_refused(
    classifier: Path, words: list[str], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", *words, "--runs", str(classifier / "runs"), "--to", str(classifier / "no")]) == 2
    assert key.replace("_", "-") in capsys.readouterr().err
    assert not (classifier / "no").exists()


def test_the_call_from_python(classifier: Path, tmp_path: Path) -> None:
    found = mhla_lightning.analyze("hybrid", runs=classifier / "runs", to=tmp_path, samples=1, queries=[3, 7])
    assert found.picture == tmp_path / "analysis.png"
    assert found.runs[0]["queries"] == [3, 7]


@pytest.mark.parametrize("key", ["every_n_steps", "samples", "max_tokens"])
def test_curves_refuse_numbers_below_one(key: str) -> None:
    with refused(key):
        AttentionCurves(**{key: 0})


def causal_call(context: Context, tokens: int) -> AttentionCall:
    operator: Attention = CAUSAL_ATTENTION["softmax"](heads=1, dim_k=2, dim_v=2)
    x = torch.zeros(1, tokens, 1, 2)
    return AttentionCall(0, operator, x, x, x, context)


def test_a_packed_row_counts_with_its_longest_document() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, -1]])
    packed = causal_call(Context(documents=documents, mask=documents >= 0), 7)
    assert kept_tokens(packed).tolist() == [2, 3, 4]
    padded = causal_call(Context(mask=torch.tensor([[False, True, True]])), 3)
    assert kept_tokens(padded).tolist() == [1, 2]
    assert kept_tokens(causal_call(Context(), 3)).tolist() == [0, 1, 2]


def test_queries_are_spread_over_the_tokens() -> None:
    assert chosen_queries(None, range(64), (8, 8), False) == [18, 36, 54]
    assert chosen_queries(None, range(10, 21), (30,), True) == [15, 18, 20]
    assert chosen_queries(None, [3], (30,), True) == [3]


def test_stages_of_several_grids() -> None:
    """A VLT has fewer tokens from stage to stage: each layer counts with its own blocks."""
    options = {"img_size": 28, "embed_dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
    task = ClassificationTask("vlt_tiny", "mhla", {**options, "head_dim": 8}, num_classes=4)
    task.configure_model()
    sample = {"image": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))}
    found = study(task.eval(), [sample, sample], StudyOptions())
    assert [layer.tokens for layer in found.layers] == [49, 16, 4, 1]
    assert [layer.maps is not None for layer in found.layers] == [True, False, False, False]
    assert all(len(layer.block_size) == 2 for layer in found.layers)
    assert [float(layer.heads["rank"]) for layer in found.layers[2:]] == [pytest.approx(4, abs=3), 1]
    assert page_figure([DrawnRun("stages", found, None, None)]) is not None


@pytest.mark.slow  # trains a tiny model of each family and kind: a minute and a half
@pytest.mark.parametrize("task", tiny_tasks.TASKS)
def test_all_families_and_kinds(tmp_path: Path, task: str) -> None:
    mhla = {"language": "{name: mhla, chunk_size: 8, max_chunks: 8, heads: 2}"}.get(
        task, "{name: mhla, blocks: 2}"
    )
    heads = ", heads: 2" if task == "language" else ""
    kinds = {"linear": f"{{name: linear{heads}}}", "softmax": f"{{name: softmax{heads}}}", "mhla": mhla}
    for name, entry in kinds.items():
        train(tmp_path, task, name, entry, CURVES)
    found = analyze(tmp_path, *kinds, "--samples", "2")
    for run in found["runs"]:
        assert all(layer["skipped"] is None and layer["mean"]["rank"] >= 1 for layer in run["layers"])
        assert run["samples"] == 2
    one = open_run("mhla", 1, runs=str(tmp_path / "runs"))
    loaded = one.load(torch.device("cpu"))
    samples = list(single_samples(loaded.completed(one.batch(), 0, "evaluate"), torch.device("cpu")))
    again = study(loaded, samples, StudyOptions())
    assert again.samples == 1
    assert again.layers[0].heads["own_block"].shape == (2,)
