"""ZeRO stages on real ranks (CPU, gloo): the numbers of one process, resumed bit for bit, and on other
numbers of ranks and other strategies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mhla_lightning.runs.folder import complete_checkpoints, read_metrics
from mhla_lightning.weights.rank_files import WEIGHT, RankFileReader
from tests.helpers.images import TINY_RECIPE
from tests.helpers.ranks import Nursery
from tests.helpers.zero_runs import CURVES, STRATEGIES, ZERO3, Runs, assert_close_curves, curves, end_of

SPLIT = [name for name in STRATEGIES if name != "ddp"]
RARE = ("zero1", "zero2", "zero3_small_whole", "zero2_offload")


def often_first(names: Sequence[str]) -> list[Any]:
    """Names as parameters; the rare ones are run by make slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in RARE else name for name in names]


@pytest.fixture(scope="module")
def runs(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Runs:
    folder = tmp_path_factory.mktemp("zero")
    recipe = folder / "tiny.yaml"
    clipped = TINY_RECIPE.replace("log_every_n_steps: 1", "log_every_n_steps: 1, gradient_clip_val: 0.5")
    # Adam divides by the gradient's size: where that is near 0, its usual eps makes whole steps of rounding
    # errors.
    steady = clipped.replace("optimizer: {lr: 2.0e-3}", "optimizer: {lr: 2.0e-2, eps: 1.0e-2}")
    # what goes up is projected in every step
    at_the_border = "{name: mhla, blocks: 2, mix_init: const, mix_init_options: {value: 1.0}}"
    steady = steady.replace("{name: mhla, blocks: 2}", at_the_border)
    recipe.write_text(steady.replace("PATH", str(shards)).replace("keep_last: 2", "keep_last: 9"))
    return Runs(nursery, folder, recipe)


@pytest.mark.parametrize("name", often_first(list(STRATEGIES)))
def test_two_ranks_learn_what_one_process_learns(runs: Runs, name: str) -> None:
    one, run = runs.of("one"), runs.of(name)
    assert_close_curves(run, one, tolerance=1e-5)
    expected, got = end_of(one), end_of(run)
    assert got.names() == sorted(expected.names()) if name in SPLIT else got.names() == expected.names()
    for tensor in expected.names():
        difference = (got.whole(tensor) - expected.whole(tensor)).abs().max()
        assert difference <= 2e-6, f"{tensor} differs by {difference}"
        assert got.kinds(tensor) == expected.kinds(tensor) == ["exp_avg", "exp_avg_sq"]
        assert got.scalars(tensor) == expected.scalars(tensor) == {"step": 12.0}
    decays = [
        {name: group["weight_decay"] for group in source.groups for name in group["names"]}
        for source in (expected, got)
    ]
    assert decays[0] == decays[1]


@pytest.mark.slow
def test_stages_1_and_2_are_ddp_bit_for_bit(runs: Runs) -> None:
    """Their clipped steps too: nobody rounds the norm before it is whole."""
    ddp = curves(runs.of("ddp"))
    assert max(norm for _, norm in ddp["train/grad_norm"]) > 0.5, (
        "nothing was clipped: the test shows nothing"
    )
    assert curves(runs.of("zero1")) == curves(runs.of("zero2")) == ddp


@pytest.mark.slow
def test_split_weights_start_as_those_of_one_process(runs: Runs) -> None:
    """DeepSpeed would round what is computed on the way to them: the locality of a mixing matrix is
    float64.
    """
    still = [
        "--model.optimizer.lr",
        "1e-60",
        "--model.schedule.warmup_steps",
        "0",
        "--trainer.max_steps",
        "1",
    ]
    still += ["--model.attention", "{name: mhla, blocks: 2, mix_init: local_row}"]
    expected = end_of(runs.train("still-one", "auto", 1, *still))
    got = end_of(runs.train("still-zero3", ZERO3, 2, *still))
    for tensor in expected.names():
        assert torch.equal(got.whole(tensor), expected.whole(tensor)), tensor


@pytest.mark.parametrize("name", often_first(SPLIT))
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
    average = RankFileReader(complete_checkpoints(runs.of(name))[-1] / "ema")
    for tensor, values in load_file(whole).items():
        torch.testing.assert_close(average.whole(tensor), values, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_stages_split_what_they_should(runs: Runs) -> None:
    """Every rank writes about half of the weights, none of them twice."""
    for name in ("zero1", "zero2", "zero3"):
        files = sorted((complete_checkpoints(runs.of(name))[-1] / "shards").glob("*.safetensors"))
        sizes = [file.stat().st_size for file in files]
        assert len(files) == 2
        assert min(sizes) > 0.4 * sum(sizes)
        reader = RankFileReader(files[0].parent)  # refuses gaps and overlaps
        assert reader.read(reader.names()[0], WEIGHT).dtype == torch.float32


@pytest.mark.parametrize(
    "name",
    [
        "zero3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3_small_whole")),
    ],
)
def test_a_run_broken_off_goes_on_bit_for_bit(runs: Runs, name: str) -> None:
    runs.broken_off(runs.of(name), f"{name}-again")
    again = runs.train(f"{name}-again", STRATEGIES[name], 2)
    assert curves(again) == curves(runs.of(name))
    first, second = end_of(runs.of(name)), end_of(again)
    assert all(
        torch.equal(first.whole(t, kind), second.whole(t, kind))
        for t in first.names()
        for kind in (WEIGHT, *first.kinds(t))
    )


@pytest.mark.parametrize(
    "name",
    ["zero2", "ddp", "zero1", "zero3", "zero2_offload"],
)
@pytest.mark.slow
def test_a_changed_resume_is_that_of_one_process(runs: Runs, name: str) -> None:
    """Rates by a formula written down here, decay by group, and moments: the curves are the same."""
    changes = ["--model.optimizer.lr", "1e-2", "--model.optimizer.weight_decay", "0.5", "--accept-changes"]
    changes += ["--model.optimizer.betas", "[0.8, 0.9]", "--model.schedule.warmup_steps", "6"]
    changes += ["--model.schedule.min_lr", "1e-3", "--trainer.max_steps", "10"]
    one, run = runs.root / "one-changed", runs.root / f"{name}-changed"
    if not one.exists():
        runs.broken_off(runs.of("one"), one.name)
        runs.train(one.name, "auto", 1, *changes)
    runs.broken_off(runs.of(name), run.name)
    runs.train(run.name, STRATEGIES[name], 2, *changes)
    rising = [(5, 1e-6 + (1e-2 - 1e-6) * 5 / 6)]
    cosine = [(step, 1e-3 + 9e-3 * (1 + math.cos(math.pi * (step - 6) / 4)) / 2) for step in range(6, 11)]
    got = [point for point in read_metrics(run / "metrics.jsonl")["train/lr"] if point[0] > 4]
    assert got == [(step, pytest.approx(value)) for step, value in rising + cosine]
    assert_close_curves(run, one, tolerance=1e-5)
    groups = end_of(run).groups
    assert [group["weight_decay"] for group in groups] == [0.0, 0.5]
    assert [(*group["betas"], group["initial_lr"]) for group in groups] == [(0.8, 0.9, 1e-2)] * 2
    assert [group["names"] for group in groups] == [group["names"] for group in end_of(one).groups]


CHANGES: list[Any] = [("ddp", "zero3", 2)]
MORE = [
    ("zero2", "ddp", 2),
    ("zero3", "zero3", 4),
    ("zero1", "zero1", 1),
    ("zero1", "zero1", 4),
    ("zero2", "zero2", 1),
    ("zero2", "zero2", 4),
    ("zero3_small_whole", "zero2", 2),
    ("zero2", "one", 1),
]
CHANGES += [pytest.param(*change, marks=pytest.mark.slow) for change in MORE]


@pytest.mark.parametrize(("before", "after", "ranks"), CHANGES, ids=lambda value: str(value))
def test_a_run_goes_on_with_other_ranks_and_strategies(
    runs: Runs, before: str, after: str, ranks: int
) -> None:
    name = f"{before}-{after}-{ranks}"
    runs.broken_off(runs.of(before), name)
    run = runs.train(name, "auto" if after == "one" else STRATEGIES[after], ranks)
    assert_close_curves(run, runs.of(before), tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_twenty_more_steps_with_one_rank_and_with_four(runs: Runs, name: str) -> None:
    long = ["--trainer.max_steps", "24"]
    unbroken = runs.train(f"long-{name}", STRATEGIES[name], 2, *long)
    assert len(curves(unbroken)["train/loss"]) == 24
    for ranks in (1, 4):
        again = f"long-{name}-{ranks}"
        runs.broken_off(unbroken, again)
        assert_close_curves(runs.train(again, STRATEGIES[name], ranks, *long), unbroken, tolerance=1e-5)


@pytest.mark.parametrize("name", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_a_warm_start_with_frozen_weights_is_that_of_one_process(runs: Runs, name: str) -> None:
    """At stage 3 a file is copied into weights that are split while they are built, and frozen ones have
    no master.
    """
    start = str(complete_checkpoints(runs.of("one"))[-1] / "ema" / "weights.safetensors")
    warm = [
        "--model.init_from",
        start,
        "--model.train_only",
        '["mixing", "norm", "head"]',
        "--trainer.max_steps",
        "4",
    ]
    one = runs.root / "warm-one"
    expected = end_of(one if one.exists() else runs.train("warm-one", "auto", 1, *warm))
    got = end_of(runs.train(f"warm-{name}", STRATEGIES[name], 2, *warm))
    for tensor in expected.names():
        torch.testing.assert_close(got.whole(tensor), expected.whole(tensor), rtol=0, atol=2e-6)
    assert not got.kinds("backbone.blocks.0.attn.qkv.weight")
    assert got.kinds("backbone.head.weight")


BF16 = [
    ("zero3", "bf16-mixed"),
    ("zero3", "bf16-true"),
    ("zero2", "bf16-true"),
    ("zero1", "bf16-true"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "precision"), BF16)
def test_bf16_follows_ddp(runs: Runs, strategy: str, precision: str) -> None:
    shared = ["--trainer.precision", precision]
    ddp = runs.root / f"ddp-{precision}"
    if not ddp.exists():
        runs.train(ddp.name, "ddp", 2, *shared)
    run = runs.train(f"{strategy}-{precision}", STRATEGIES[strategy], 2, *shared)
    for tag in CURVES:
        expected = [value for _, value in curves(ddp)[tag]]
        assert [value for _, value in curves(run)[tag]] == pytest.approx(expected, rel=0.02), tag
    got = end_of(run)
    assert all(got.whole(name).dtype == torch.float32 for name in got.names()), (
        "masters are saved, not bf16 weights"
    )
    mixing = [got.whole(name) for name in got.names() if name.endswith("mixing.weight")]
    assert all(0 <= values.min() <= values.max() <= 1 for values in mixing)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
@pytest.mark.slow
def test_accumulation_and_recomputation_change_nothing(runs: Runs, name: str) -> None:
    """Four micro batches of 2 a rank and step, and every block computed again in the backward."""
    split = ["--data.micro_batch_size", "2", "--model.checkpoint_activations", "blocks"]
    run = runs.train(f"micro-{name}", STRATEGIES[name], 2, *split)
    assert_close_curves(run, runs.of("one"), tolerance=1e-5)
    norms = [dict(curves(folder)["train/grad_norm"]) for folder in (run, runs.of("one"))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4), (
        "Lightning and DeepSpeed must not both divide by the micro batches"
    )


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
@pytest.mark.slow
def test_compiled_blocks_train_save_and_resume_alike(runs: Runs, name: str) -> None:
    """Compiled from the first step, and again after a kill, where nothing is compiled any more."""
    compiled = ["--model.compile.what", "blocks", "--model.compile.backend", "aot_eager"]
    run = runs.train(f"compiled-{name}", STRATEGIES[name], 2, *compiled)
    assert_close_curves(run, runs.of("one"), tolerance=1e-5)
    runs.broken_off(run, f"compiled-{name}-again")
    again = runs.train(f"compiled-{name}-again", STRATEGIES[name], 2, *compiled)
    assert curves(again) == curves(run)
    first, second = end_of(run), end_of(again)
    assert all(torch.equal(first.whole(tensor), second.whole(tensor)) for tensor in first.names())


def test_a_checkpoint_of_split_weights_is_validated_anywhere(runs: Runs) -> None:
    run, told = runs.of("zero3"), {}
    for strategy, ranks in (("auto", 1), (ZERO3, 2), ("zero2", 2)):
        place = [
            "--mode",
            "validate",
            "--ckpt",
            str(run),
            "--trainer.devices",
            str(ranks),
            "--trainer.strategy",
            strategy,
        ]
        output = runs.nursery.run(ranks, ["run", str(runs.recipe), *place], runs.root)
        told[strategy] = [
            line for line in output.splitlines() if line.startswith(("│ val/loss", "│ val_ema/loss"))
        ]
    assert len(told["auto"]) == 2
    assert told["auto"] == told[ZERO3] == told["zero2"]
    assert f"{dict(curves(run)['val/loss'])[12]:.4f}" in told["auto"][0]
