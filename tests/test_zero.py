"""ZeRO stages on real ranks (CPU, gloo): the numbers of one process, resumed bit for bit, and on other numbers of ranks and other strategies."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mhla_lightning.backbones.shards import WEIGHT, ShardReader
from mhla_lightning.checkpoints.source import Source, open_source
from mhla_lightning.runs.folder import complete_checkpoints, read_metrics
from tests.conftest import TINY_RECIPE
from tests.ranks import Nursery

# With the usual threshold tensors of a tiny model stay whole on every rank, and stage 3 would split nothing.
ZERO3 = "{name: zero3, zero_optimization: {stage3_param_persistence_threshold: 0}}"
STRATEGIES = {"ddp": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": ZERO3, "zero3_small_whole": "zero3", "zero2_offload": "zero2_offload"}
SPLIT = [name for name in STRATEGIES if name != "ddp"]
CURVES = ("train/loss", "val/loss", "val_ema/loss")


class Runs:
    """Trains the tiny recipe under a strategy, once for the whole module."""

    def __init__(self, nursery: Nursery, folder: Path, recipe: Path) -> None:
        self.nursery, self.root, self.recipe = nursery, folder, recipe

    def train(self, name: str, strategy: str, ranks: int, *overrides: str) -> Path:
        """The run folder, trained to its end."""
        place = ["--runs", str(self.root), "--run-id", name, "--trainer.devices", str(ranks), "--trainer.strategy", strategy]
        self.nursery.run(ranks, ["run", str(self.recipe), *place, *overrides], self.root)
        return self.root / name

    def of(self, name: str) -> Path:
        """The run of two ranks under a strategy, or `one` of one process."""
        folder = self.root / name
        if (folder / "summary.json").is_file():
            return folder
        return self.train(name, "auto", 1) if name == "one" else self.train(name, STRATEGIES[name], 2)

    def broken_off(self, name: str, copy: str) -> Path:
        """A copy of a run as a kill after step 4 leaves it."""
        folder = self.root / copy
        shutil.copytree(self.of(name), folder)
        for later in complete_checkpoints(folder)[1:]:
            shutil.rmtree(later)
        (folder / "summary.json").unlink()
        return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("zero")
    recipe = folder / "tiny.yaml"
    clipped = TINY_RECIPE.replace("log_every_n_steps: 1", "log_every_n_steps: 1, gradient_clip_val: 0.5")
    recipe.write_text(clipped.replace("PATH", str(shards)).replace("keep_last: 2", "keep_last: 9"))
    nursery = Nursery(folder)
    yield Runs(nursery, folder, recipe)
    nursery.close()


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    series = read_metrics(run / "metrics.jsonl")
    return {tag: series[tag] for tag in (*CURVES, "train/grad_norm")}


def assert_close_curves(got: Path, expected: Path, tolerance: float) -> None:
    ours, theirs = curves(got), curves(expected)
    for tag in CURVES:
        assert [step for step, _ in ours[tag]] == [step for step, _ in theirs[tag]]
        assert [value for _, value in ours[tag]] == pytest.approx([value for _, value in theirs[tag]], abs=tolerance), tag


def end_of(run: Path) -> Source:
    return open_source(complete_checkpoints(run)[-1] / "trainer.ckpt")


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_learn_what_one_process_learns(runs: Runs, name: str) -> None:
    one, run = runs.of("one"), runs.of(name)
    assert_close_curves(run, one, tolerance=1e-5)
    expected, got = end_of(one), end_of(run)
    assert got.names() == sorted(expected.names()) if name in SPLIT else got.names() == expected.names()
    for tensor in expected.names():
        difference = (got.whole(tensor) - expected.whole(tensor)).abs().max()
        assert difference <= 2e-5, f"{tensor} differs by {difference}"
        assert got.kinds(tensor) == expected.kinds(tensor) == ["exp_avg", "exp_avg_sq"]
        assert got.scalars(tensor) == expected.scalars(tensor) == {"step": 12.0}
    decays = [{name: group["weight_decay"] for group in source.groups for name in group["names"]} for source in (expected, got)]
    assert decays[0] == decays[1]


@pytest.mark.parametrize("name", SPLIT)
def test_mixing_stays_in_its_range_and_the_average_is_that_of_one_process(runs: Runs, name: str) -> None:
    expected, got = end_of(runs.of("one")), end_of(runs.of(name))
    mixing = [tensor for tensor in got.names() if tensor.endswith("mixing.weight")]
    assert len(mixing) == 2
    for tensor in mixing:
        values = got.whole(tensor)
        assert values.min() >= 0
        assert values.max() <= 1
        assert (expected.whole(tensor) == 1).any(), "nothing was projected: the test shows nothing"
        torch.testing.assert_close(values, expected.whole(tensor), rtol=0, atol=1e-6)
    whole = complete_checkpoints(runs.of("one"))[-1] / "ema" / "weights.safetensors"
    from safetensors.torch import load_file

    average = ShardReader(complete_checkpoints(runs.of(name))[-1] / "ema")
    for tensor, values in load_file(whole).items():
        torch.testing.assert_close(average.whole(tensor), values, rtol=0, atol=1e-6)


def test_stages_split_what_they_should(runs: Runs) -> None:
    """Every rank writes about half of the weights, none of them twice."""
    for name in SPLIT:
        files = sorted((complete_checkpoints(runs.of(name))[-1] / "shards").glob("*.safetensors"))
        sizes = [file.stat().st_size for file in files]
        assert len(files) == 2
        assert min(sizes) > 0.4 * sum(sizes)
        reader = ShardReader(files[0].parent)  # refuses gaps and overlaps
        assert reader.read(reader.names()[0], WEIGHT).dtype == torch.float32


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_small_whole"])
def test_a_run_broken_off_goes_on_bit_for_bit(runs: Runs, name: str) -> None:
    runs.broken_off(name, f"{name}-again")
    again = runs.train(f"{name}-again", STRATEGIES[name], 2)
    assert curves(again) == curves(runs.of(name))
    first, second = end_of(runs.of(name)), end_of(again)
    assert all(torch.equal(first.whole(t, kind), second.whole(t, kind)) for t in first.names() for kind in (WEIGHT, *first.kinds(t)))


CHANGES = [("zero1", "zero1", 1), ("zero2", "zero2", 4), ("zero3", "zero3", 1), ("zero3", "zero3", 4), ("zero3_small_whole", "zero2", 2)]
CHANGES += [("ddp", "zero3", 2), ("zero3", "ddp", 2), ("zero2", "one", 1)]


@pytest.mark.parametrize(("before", "after", "ranks"), CHANGES, ids=lambda value: str(value))
def test_a_run_goes_on_with_other_ranks_and_strategies(runs: Runs, before: str, after: str, ranks: int) -> None:
    name = f"{before}-{after}-{ranks}"
    runs.broken_off(before, name)
    run = runs.train(name, "auto" if after == "one" else STRATEGIES[after], ranks)
    assert_close_curves(run, runs.of(before), tolerance=1e-5)
