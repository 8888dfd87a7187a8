"""`mix_by: batch`: every optimizer step trains on one source, so that clips of several sizes and images
can be mixed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mhla_lightning.data import LatentDataModule
from mhla_lightning.data.batching import RankPart, eval_ranges, grouped_eval_ranges
from mhla_lightning.data.corpus import Corpus, DataSource
from mhla_lightning.data.index import VAE, Clip, ShardIndex, TextEncoding
from mhla_lightning.data.kinds import Kind, kind_of
from mhla_lightning.data.mixture import BLOCK, Ingredient, Mixture, WhenExhausted
from mhla_lightning.data.order import Order
from mhla_lightning.data.prepare.samples import Sample, latent_sample
from mhla_lightning.data.prepare.writer import write_split
from mhla_lightning.data.stream import Batch, EvalStream, TrainStream
from mhla_lightning.errors import DataError
from tests.helpers.data_modules import build
from tests.helpers.errors import refused
from tests.helpers.marks import every_nth

SHAPES = ((4, 3, 2, 4), (4, 1, 4, 4), (4, 2, 2, 2))
TRAIN, VAL = (90, 40, 25), (7, 5, 9)
TEXT = TextEncoding("words:8", 6, 8)
ASKED = VAE("tiny", 1.0, 0.0, SHAPES[0])


def _header(shape: tuple[int, ...], **vae: Any) -> ShardIndex:
    return ShardIndex(
        "video_latents", (), vae=VAE("tiny", 1.0, 0.0, shape, **vae), clip=Clip(9, 16, 16, 8.0), text=TEXT
    )


def _samples(header: ShardIndex, source: int, count: int) -> list[Sample]:
    """Every value of sample n of source s is s + n / 1000."""
    assert header.vae is not None
    latents = [np.full(header.vae.shape, source + number / 1000, np.float32) for number in range(count)]
    rng = np.random.default_rng(source)
    texts = [rng.normal(size=(1 + number % 6, 8)).astype(np.float16) for number in range(count)]
    return [
        latent_sample(header, f"s{n}", latent, text=text)
        for n, (latent, text) in enumerate(zip(latents, texts, strict=True))
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources 0, 1, 2 of several shapes and sizes."""
    root = tmp_path_factory.mktemp("buckets")
    for source, shape in enumerate(SHAPES):
        for split, counts in (("train", TRAIN), ("val", VAL)):
            folder = root / str(source)
            folder.mkdir(exist_ok=True)
            write_split(
                folder / split, _header(shape), _samples(_header(shape), source, counts[source]), 20_000
            )
    return root


def _module(root: Path, weights: Sequence[float] = (3, 2, 1), **options: Any) -> LatentDataModule:
    mix = [DataSource(str(root / str(number)), weight) for number, weight in enumerate(weights)]
    given: dict[str, Any] = {
        "vae": ASKED,
        "mix": mix,
        "mix_by": "batch",
        "video": True,
        "text_encoder": TEXT,
        "batch_size": 4,
        "num_workers": 0,
    }
    return build(LatentDataModule, **given | {"lanes": 4, "window": 4} | options)


def _steps(module: LatentDataModule, steps: int) -> list[Batch]:
    return list(islice(module.train_dataloader(), steps))


def _identity(batch: Batch) -> list[tuple[int, int, int]]:
    return [tuple(row) for row in torch.stack([batch["source"], batch["epoch"], batch["index"]], 1).tolist()]


# The sequence


def _mixture(
    sizes: Sequence[int],
    weights: Sequence[float],
    group: int,
    when: Sequence[WhenExhausted] = (),
    replacement: Sequence[bool] = (),
) -> Mixture:
    orders = [Order([size], f"0/{number}", 4, 8) for number, size in enumerate(sizes)]
    when, replacement = when or ["repeat"] * len(sizes), replacement or [False] * len(sizes)
    return Mixture(
        [Ingredient(*items) for items in zip(orders, weights, replacement, when, strict=True)], 0, group
    )


@pytest.mark.parametrize("group", every_nth([7, 2, 64], 3))
@pytest.mark.parametrize("weights", [[1.0, 1.0, 2.0], [0.7, 0.2, 0.1]], ids=str)
def test_groups_are_of_one_source_in_the_weights_proportions(group: int, weights: list[float]) -> None:
    found = (
        _mixture([70, 500, 33], weights, group)
        .locate(np.arange(3 * BLOCK * group))
        .sources.reshape(3, BLOCK, group)
    )
    assert (found == found[..., :1]).all()
    for block in found[..., 0]:
        assert np.abs(np.bincount(block, minlength=3) - np.array(weights) / sum(weights) * BLOCK).max() <= 1
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize("replacement", [False, True])
def test_groups_need_no_history(replacement: bool) -> None:
    def fresh() -> Mixture:
        return _mixture([70, 500, 33], [3.0, 1.0, 1.0], 5, (), [replacement, False, False])

    positions = np.arange(8000)
    whole = fresh().locate(positions)
    other = fresh()
    for chunk in np.split(np.random.default_rng(0).permutation(positions), 100):
        assert all((a == b[chunk]).all() for a, b in zip(other.locate(chunk), whole, strict=True))
    for count in (0, 1, 4, 5, 4999, 5000, 5001, 7999, 8000):
        assert other.counts(count) == np.bincount(whole.sources[:count], minlength=3).tolist()


def test_grouped_sources_go_epoch_by_epoch() -> None:
    found = _mixture([70, 500], [1, 1], 8).locate(np.arange(16_000))
    for source, size in ((0, 70), (1, 500)):
        here = found.sources == source
        for epoch in range(6000 // size):
            assert sorted(found.indices[here & (found.epochs == epoch)].tolist()) == list(range(size))


def test_groups_of_one_are_the_ungrouped_sequence() -> None:
    one, plain = (
        _mixture([70, 500], [1, 2], 1),
        Mixture([Ingredient(Order([s], f"0/{n}", 4, 8), n + 1) for n, s in enumerate((70, 500))], 0),
    )
    assert all(
        (a == b).all()
        for a, b in zip(one.locate(np.arange(3000)), plain.locate(np.arange(3000)), strict=True)
    )


@pytest.mark.parametrize("when", [["drop", "repeat"], ["stop", "repeat"], ["drop", "drop"]], ids=str)
def test_a_source_that_runs_out_gives_whole_groups_once(when: list[WhenExhausted]) -> None:
    mixed = _mixture([70, 500], [1, 1], 8, when)
    groups = {"drop repeat": np.inf, "stop repeat": 16, "drop drop": 8 + 62}[" ".join(when)]
    assert mixed.length == groups * 8
    found = mixed.locate(np.arange(min(mixed.length, 4000), dtype=np.int64))
    first = found.indices[found.sources == 0]
    assert len(first) == len(set(first.tolist())) == 64, "70 samples are 8 whole groups of 8"
    by_group = found.sources.reshape(-1, 8)
    assert (by_group == by_group[:, :1]).all()


def test_a_source_that_runs_out_needs_a_group() -> None:
    with pytest.raises(ValueError, match="that is to drop has 7 samples, less than a batch of 8"):
        _mixture([7, 500], [1, 1], 8, ["drop", "repeat"])
    assert (_mixture([7, 500], [1, 1], 8).locate(np.arange(800)).sources == 0).any(), (
        "one that repeats may be smaller"
    )


# In training


def test_every_step_is_of_one_source_and_shape(root: Path) -> None:
    module = _module(root)
    module.check(2)
    for batch in _steps(module, 60):
        (source,) = set(batch["source"].tolist())
        assert batch["latent"].shape == (4, *SHAPES[source])
        assert (
            batch["latent"].mean(dim=(1, 2, 3, 4)) - source - (batch["index"] - sum(TRAIN[:source])) / 1000
        ).abs().max() < 1e-4
        assert batch["text"].shape == (4, 6, 8)
    assert module.facts() == {
        "kind": "video_latents",
        "vae": ASKED,
        "classes": 0,
        "text": (6, 8),
        "shapes": list(SHAPES),
    }


def test_proportions_are_kept(root: Path) -> None:
    module = _module(root, num_workers=2)
    sources = Counter(int(batch["source"][0]) for batch in _steps(module, 1000))
    module.teardown("fit")
    assert [sources[number] for number in range(3)] == [500, 333, 167]
    assert module.corpus.mixture.counts(4000) == [2000, 1332, 668]


@pytest.mark.parametrize(("world", "micro", "workers"), [(2, 2, 0), (1, 2, 2), (2, 1, 2), (4, 1, 0)])
def test_ranks_and_workers_do_not_matter(root: Path, world: int, micro: int, workers: int) -> None:
    one = [sorted(_identity(batch)) for batch in _steps(_module(root), 24)]
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(24)]
    accumulation = 4 // world // micro
    for rank in range(world):
        module = _module(root, num_workers=workers, micro_batch_size=micro)
        stream = _stream(module, rank, world, micro)
        batches = list(islice(stream, 24 * accumulation))
        module.teardown("fit")
        for number, batch in enumerate(batches):
            found[number // accumulation] += _identity(batch)
    assert [sorted(step) for step in found] == one


def _stream(module: LatentDataModule, rank: int, world: int, micro: int) -> Any:
    part = RankPart(rank, world, module.batch_size, micro)
    stream = TrainStream(
        module.corpus,
        module.kind(module.index()),
        part,
        kinds=[module.kind(split.index) for split in module.splits("train")],
    )
    return DataLoader(stream, batch_size=None, num_workers=module.reading.num_workers)


def test_a_resumed_run_goes_on_with_the_next_batch(root: Path) -> None:
    whole = _steps(_module(root), 30)
    begun = _module(root)
    begun.load_state_dict(_module(root).state_dict() | {"consumed": 17 * 4})
    for batch, its in zip(_steps(begun, 13), whole[17:], strict=True):
        assert _identity(batch) == _identity(its)
        assert torch.equal(batch["latent"], its["latent"])
        assert torch.equal(batch["text"], its["text"])


def test_a_position_in_another_order_is_refused(root: Path) -> None:
    common: dict[str, Any] = {
        "vae": ASKED,
        "path": str(root / "0"),
        "batch_size": 4,
        "num_workers": 0,
        "video": True,
        "text_encoder": TEXT,
        "lanes": 4,
        "window": 4,
    }
    same = build(LatentDataModule, **common)
    by_batch = build(LatentDataModule, **common, mix_by="batch")
    assert "mix_by" not in same.state_dict(), "as it was before there was a choice"
    for module, state, key in (
        (by_batch, same.state_dict(), "data.order.mix_by"),
        (same, by_batch.state_dict(), "data.order.mix_by"),
        (_module(root, batch_size=8), _module(root).state_dict(), "data.batch_size"),
    ):
        module.load_state_dict(state)
        with refused(key):
            module.train_dataloader()


def test_a_bad_sample_is_replaced_by_one_of_its_source(tmp_path: Path) -> None:
    for source, shape in enumerate(SHAPES[:2]):
        (tmp_path / str(source)).mkdir()
        for split in ("train", "val"):
            samples = _samples(_header(shape), source, 200)
            for number in range(0, 200, 25):
                samples[number] = Sample(
                    f"s{number}", {"latent.npy": b"damaged", "text.npy": samples[number].members["text.npy"]}
                )
            write_split(tmp_path / str(source) / split, _header(shape), samples, 30_000)
    module = _module(tmp_path, (1, 1), max_skipped_share=0.1)
    batches = _steps(module, 100)
    assert sum(int(batch["skipped"]) for batch in batches) > 8
    for batch in batches:
        assert len(set(batch["source"].tolist())) == 1
        assert len(batch["key"]) == 4


# In validation


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2])
def test_grouped_ranges_cover_every_sample_once(world: int, workers: int) -> None:
    groups, size = [7, 12, 1, 30], 4
    ranks = [
        [grouped_eval_ranges(groups, size, rank, world, worker, workers) for worker in range(workers)]
        for rank in range(world)
    ]
    assert len({sum(map(len, rank)) for rank in ranks}) == 1, "every rank as many"
    firsts = np.cumsum([0, *groups])
    seen: list[int] = []
    for found in (one for rank in ranks for worker in rank for one in worker):
        group, start, stop = found
        assert firsts[group] <= start <= stop <= firsts[group + 1]
        assert stop - start <= size
        seen += range(start, stop)
    assert sorted(seen) == list(range(sum(groups)))
    whole = [grouped_eval_ranges(groups, size, rank, world) for rank in range(world)]
    for together in zip(*whole, strict=True):
        assert len({group for group, _, _ in together}) == 1, "all ranks are in one group at a time"
    assert [(start, stop) for _, start, stop in grouped_eval_ranges([50], 4, 1, 3)] == eval_ranges(
        50, 4, 1, 3
    )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_validation_weighs_every_sample_once(root: Path, world: int) -> None:
    module = _module(root)
    splits = module.splits("val")
    kinds: list[Kind] = [module.kind(split.index) for split in splits]
    seen: Counter[int] = Counter()
    lengths = set()
    for rank in range(world):
        stream = EvalStream(Corpus(splits), kinds[0], 4, rank, world, kinds=kinds)
        batches = list(stream)
        lengths.add(len(batches))
        assert len(batches) == stream.batches
        for batch in batches:
            real = batch["weight"] > 0
            sources = set(batch["source"][real].tolist())
            assert len(sources) <= 1
            assert all(batch["latent"].shape == (4, *SHAPES[source]) for source in sources)
            assert not batch["latent"][~real].any()
            assert (batch["index"][~real] == -1).all()
            seen.update(batch["index"][real].tolist())
    assert seen == Counter(range(sum(VAL)))
    assert len(lengths) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_through_the_loader(root: Path, workers: int) -> None:
    module = _module(root, num_workers=workers)
    loader = module.val_dataloader()
    batches = list(loader)
    module.teardown("validate")
    assert len(batches) == 2 + 2 + 3
    assert float(sum(batch["weight"].sum() for batch in batches)) == sum(VAL)
    assert sorted(index for batch in batches for index in batch["index"].tolist() if index >= 0) == list(
        range(sum(VAL))
    )


# Mistakes


def test_shapes_may_differ_between_batches_only(root: Path, tmp_path: Path) -> None:
    with refused(str(root / "1/train/index.json"), DataError):
        _module(root, mix_by="sample").check(1)
    with refused("order.mix_by"):
        _module(root, mix_by="step")
    (tmp_path / "0").mkdir()
    for split in ("train", "val"):
        wide = _header((5, 3, 2, 4))
        write_split(tmp_path / "0" / split, wide, _samples(wide, 0, 5), 20_000)
    with refused(str(tmp_path / "0/train/index.json"), DataError):
        _module(tmp_path, (1,)).check(1)


def test_padding_of_tools_has_the_texts_shape() -> None:
    assert kind_of(_header(SHAPES[0])).padding()["text"].shape == (6, 8)
