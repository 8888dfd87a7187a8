"""The order of samples as properties over random shapes: nothing here opens a file."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import numpy as np
import pytest

from mhla_lightning.data.batching import RankPart
from mhla_lightning.data.mixture import BLOCK, Ingredient, Mixture, WhenExhausted
from mhla_lightning.data.order import Order, permutation

SHAPES = range(60)


def random_order(number: int, seed: int = 0) -> Order:
    """Shards of 0 to 12 samples, 1 to 24 lanes, windows of 1 to 16."""
    rng = np.random.default_rng(number)
    sizes = [*rng.integers(0, 13, rng.integers(0, 14)).tolist(), int(rng.integers(1, 30))]
    return Order(sizes, seed, lanes=int(rng.integers(1, 25)), window=int(rng.integers(1, 17)))


@pytest.mark.parametrize("number", SHAPES)
def test_every_epoch_is_a_permutation(number: int) -> None:
    order = random_order(number)
    epochs, indices = order.locate(np.arange(3 * order.samples))
    for epoch in range(3):
        part = slice(epoch * order.samples, (epoch + 1) * order.samples)
        assert (epochs[part] == epoch).all()
        assert sorted(indices[part].tolist()) == list(range(order.samples))


@pytest.mark.parametrize("number", SHAPES)
def test_a_position_needs_no_history(number: int) -> None:
    """Asked in any order, alone or together, by a fresh object: the same sample. So position k resumes at
    k + 1.
    """
    order = random_order(number)
    positions = np.arange(2 * order.samples)
    whole = order.locate(positions)[1]
    mixed = np.random.default_rng(1).permutation(positions)
    assert (random_order(number).locate(mixed)[1] == whole[mixed]).all()
    fresh = random_order(number)
    assert [int(fresh.locate(np.array([p]))[1][0]) for p in positions[::-1]] == whole[::-1].tolist()
    start = order.samples // 2 + 1
    assert (random_order(number).locate(positions[start:])[1] == whole[start:]).all()


def test_epochs_and_seeds_differ() -> None:
    orders = [
        Order([50] * 20, seed, lanes=12, window=16).locate(np.arange(2000))[1].reshape(2, 1000)
        for seed in (0, 1)
    ]
    lines = [epoch.tolist() for order in orders for epoch in order]
    for number, line in enumerate(lines):
        for other in lines[number + 1 :]:
            same = np.mean(np.array(line) == np.array(other))
            assert same < 0.02, "two orders share more places than chance"


def test_one_shard_is_mixed_anew_in_every_epoch() -> None:
    indices = Order([400], lanes=8, window=16).locate(np.arange(800))[1].reshape(2, 400)
    lanes = [[frozenset(epoch[lane::8].tolist()) for lane in range(8)] for epoch in indices]
    assert not set(lanes[0]) & set(lanes[1]), "the same samples meet in the same lanes"


def test_samples_are_mixed_across_shards_and_inside_windows() -> None:
    order = Order([1000] * 100, seed=3, lanes=20, window=100)
    _, indices = order.locate(np.arange(100_000))
    assert len({int(i) // 1000 for i in indices[:20]}) >= 15, "neighbours come from many shards"
    lane = indices[7::20]
    for start in range(0, 5000, 100):  # windows of exactly 100 here
        window = np.sort(lane[start : start + 100])
        assert window[-1] - window[0] < 200 or len(set(window // 1000)) == 2, (
            "a window stays in one place, or spans the end of a shard"
        )
        assert (lane[start : start + 100] != window).any()


def test_a_lane_opens_few_shards() -> None:
    """Reading 480 samples a step for 10 steps from 1,000 shards touches one or two a lane."""
    order = Order([1000] * 1000, lanes=48, window=256)
    _, indices = order.locate(900_000 + np.arange(4800))
    assert len(set(indices // 1000)) <= 2 * 48


def test_memory_is_shards_and_windows() -> None:
    order = Order([10**6] * 10_000, lanes=48, window=2048)  # ten thousand million samples
    epochs, indices = order.locate(np.array([0, 10**10 - 1, 10**10, 123_456_789_012]))
    assert epochs.tolist() == [0, 0, 1, 12]
    assert ((indices >= 0) & (indices < 10**10)).all()
    assert order._table.nbytes == 48 * 2048 * 4


@pytest.mark.parametrize(("sizes", "lanes", "window"), [([], 1, 1), ([0], 1, 1), ([3], 0, 1), ([3], 1, 0)])
def test_an_order_needs_something_to_order(sizes: list[int], lanes: int, window: int) -> None:
    with pytest.raises(ValueError, match="an order needs"):
        Order(sizes, 0, lanes, window)


def test_the_order_never_changes() -> None:
    """A change of these numbers breaks every run that is to be resumed: it needs a new format number."""
    assert permutation(8, 0, "window", 1).tolist() == GOLDEN_PERMUTATION
    epochs, indices = Order([5, 1, 7, 3], seed=1, lanes=3, window=4).locate(np.arange(20))
    assert (epochs.tolist(), indices.tolist()) == ([0] * 16 + [1] * 4, GOLDEN_ORDER)


GOLDEN_PERMUTATION = [2, 0, 4, 1, 3, 6, 5, 7]
GOLDEN_ORDER = [10, 4, 6, 12, 3, 15, 11, 13, 8, 1, 5, 7, 2, 14, 9, 0, 9, 14, 4, 10]


def test_the_order_is_numpy_alone() -> None:
    code = (
        "import sys, mhla_lightning.data.order, mhla_lightning.data.mixture; sys.exit(any(m in "
        "sys.modules for m in ('torch', 'webdataset')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Ranks and workers


def batches(
    order: Order, world: int, workers: int, batch: int, micro: int, steps: int, first: int = 0
) -> list[set[tuple[int, int]]]:
    """The samples (epoch, index) of every global batch, put together from what each worker of each rank
    reads.
    """
    parts = [RankPart(rank, world, batch, micro, first) for rank in range(world)]
    accumulation = batch // world // micro
    found: list[list[tuple[int, int]]] = [[] for _ in range(steps)]
    for part, worker in product(parts, range(max(workers, 1))):
        for step in range(worker, steps * accumulation, max(workers, 1)):
            epochs, indices = order.locate(part.positions(step))
            found[step // accumulation] += zip(epochs.tolist(), indices.tolist(), strict=True)
    assert all(len(samples) == batch == len(set(samples)) for samples in found)
    return [set(samples) for samples in found]


@pytest.mark.parametrize("number", range(20))
def test_global_batches_are_the_same_for_every_world(number: int) -> None:
    order = random_order(number)
    batch = 8
    if order.samples < batch:
        order = Order([order.samples, 9], 0, order.lanes, order.window)
    first = number * 3
    expected = batches(order, 1, 0, batch, batch, 10, first)
    for world, workers in product((1, 2, 4), (0, 2, 3)):
        for micro in {batch // world, batch // world // 2}:
            assert batches(order, world, workers, batch, micro, 10, first) == expected


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_pairs_stay_together(world: int, micro: int) -> None:
    batch = 4 * world
    pairs = set()
    for rank, step in product(range(world), range(6)):
        positions = RankPart(rank, world, batch, micro, first=5).positions(step).tolist()
        assert len(positions) == micro
        pairs |= set(zip(positions[::2], positions[1::2], strict=False))
    if micro > 1:
        assert all(b == a + 1 and (a - 5) % 2 == 0 for a, b in pairs)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_have_lanes_of_their_own(world: int) -> None:
    """So that a node fetches its part of the shards, not all of them."""
    order = Order([100] * 240, lanes=48, window=32)
    shards = []
    for rank in range(world):
        part = RankPart(rank, world, 64, 64 // world)
        positions = np.concatenate([part.positions(step) for step in range(40)])
        shards.append(set((order.locate(positions)[1] // 100).tolist()))
    cut = sum(len(s) for s in shards) - len(set.union(*shards))
    assert cut <= 48, "a shard is shared only where a lane's end cuts it"
    assert len(shards[0]) <= 2 * 48 / world + 2


# Mixtures


def mixture(
    sizes: list[int],
    weights: list[float],
    when: list[WhenExhausted] | None = None,
    replacement: list[bool] | None = None,
    seed: int = 0,
) -> Mixture:
    when, replacement = when or ["repeat"] * len(sizes), replacement or [False] * len(sizes)
    orders = [Order([size], f"{seed}/{number}", 4, 8) for number, size in enumerate(sizes)]
    return Mixture(
        [Ingredient(*items) for items in zip(orders, weights, replacement, when, strict=True)], seed
    )


@pytest.mark.parametrize("weights", [[1.0, 1.0, 2.0], [0.7, 0.2, 0.1], [1, 998, 1], [1 / 3, 1 / 3, 1 / 3]])
def test_weights_hold_in_every_block(weights: list[float]) -> None:
    mixed = mixture([70, 500, 33], weights)
    sources = mixed.locate(np.arange(5 * BLOCK)).sources.reshape(5, BLOCK)
    shares = np.array(weights) / sum(weights)
    for block in sources:
        assert np.abs(np.bincount(block, minlength=3) - shares * BLOCK).max() <= 1
    assert (sources[0] != sources[1]).any()


@pytest.mark.parametrize("replacement", [False, True])
def test_a_mixture_needs_no_history_either(replacement: bool) -> None:
    arguments = ([70, 500, 33], [3.0, 1.0, 1.0], None, [replacement, False, False])
    positions = np.arange(4000)
    whole = mixture(*arguments).locate(positions)
    fresh, mixed = mixture(*arguments), np.random.default_rng(0).permutation(positions)
    for chunk in np.split(mixed, 100):
        assert all((a == b[chunk]).all() for a, b in zip(fresh.locate(chunk), whole, strict=True))
    for count in (0, 1, 999, 1000, 1001, 3999, 4000):
        assert fresh.counts(count) == np.bincount(whole.sources[:count], minlength=3).tolist()
    assert (mixture(*arguments, seed=1).locate(positions).sources != whole.sources).any()


def test_without_replacement_every_source_goes_epoch_by_epoch() -> None:
    found = mixture([70, 500], [1, 1]).locate(np.arange(4000))
    for source, size in ((0, 70), (1, 500)):
        here = found.sources == source
        for epoch in range(2000 // size):
            assert sorted(found.indices[here & (found.epochs == epoch)].tolist()) == list(range(size))


def test_with_replacement_draws_are_independent() -> None:
    indices = mixture([1000], [1], replacement=[True]).locate(np.arange(20_000)).indices
    share_seen = len(set(indices[:1000].tolist())) / 1000
    assert 0.58 < share_seen < 0.68, "1 - 1/e of the samples are seen in one epoch's worth of draws"
    counts = np.bincount(indices, minlength=1000)
    assert 0.8 * 20 < counts.var() < 1.2 * 20, "a Poisson count"


def test_a_dropped_source_is_seen_once_and_leaves_its_share_to_the_others() -> None:
    mixed = mixture([700, 5000, 300], [0.5, 0.3, 0.2], ["drop", "repeat", "drop"])
    assert mixed.length == float("inf")
    found = mixed.locate(np.arange(9000))
    for source, size in ((0, 700), (2, 300)):
        assert sorted(found.indices[found.sources == source].tolist()) == list(range(size))
    assert (found.sources[-5000:] == 1).all()
    assert np.bincount(found.sources[:1400]).tolist() == [700, 420, 280], (
        "the weights hold until the first source runs out"
    )


def test_a_source_smaller_than_a_block_keeps_its_share() -> None:
    sources = mixture([20, 15], [3, 1], ["repeat", "drop"]).locate(np.arange(100)).sources
    assert (np.bincount(sources[:60]).tolist(), sources[60:].sum()) == ([45, 15], 0)


@pytest.mark.parametrize(
    ("when", "length", "counts"),
    [
        (["stop", "repeat"], 1400, [700, 700]),
        (["drop", "drop"], 5700, [700, 5000]),
        (["stop", "stop"], 1400, [700, 700]),
    ],
    ids=["stop", "drop all", "stop both"],
)
def test_a_mixture_may_end(when: list[WhenExhausted], length: int, counts: list[int]) -> None:
    mixed = mixture([700, 5000], [1, 1], when)
    assert (mixed.length, mixed.counts(length)) == (length, counts)
    assert len(mixed.locate(np.arange(length)).sources) == length
    with pytest.raises(IndexError, match=f"position {length} lies outside a mixture of {length}"):
        mixed.locate(np.array([length]))


def test_one_source_is_its_order() -> None:
    order = Order([30, 12], 7, 4, 8)
    found = Mixture([Ingredient(Order([30, 12], 7, 4, 8))], 7).locate(np.arange(300))
    epochs, indices = order.locate(np.arange(300))
    assert (found.epochs == epochs).all()
    assert (found.indices == indices).all()


@pytest.mark.parametrize(
    "weights", [[], [0.0, 1.0], [-1.0, 2.0], [1.0, 100_000.0]], ids=["none", "zero", "negative", "too small"]
)
def test_impossible_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        mixture([10] * len(weights), weights)
