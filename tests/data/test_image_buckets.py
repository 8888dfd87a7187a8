"""Images of several sizes: every optimizer step has one, on every rank the same."""

from __future__ import annotations

import io
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mhla_lightning.data import (
    Augmentation,
    BucketConfig,
    ImageDataModule,
    OrderConfig,
    ReadingConfig,
    TokenDataModule,
)
from mhla_lightning.data.batching import RankPart
from mhla_lightning.data.buckets import image_sizes, nearest_by_aspect
from mhla_lightning.data.kinds import Images
from mhla_lightning.data.pixels import size_of
from mhla_lightning.data.prepare.pack import PackOptions, pack
from mhla_lightning.data.stream import EvalPasses, EvalStream, TrainStream
from tests.helpers.errors import refused

SHAPES = [(8, 8)] * 14 + [(8, 16)] * 10 + [(20, 10)] * 6  # height, width; square, wide, high
PLAIN = Augmentation(auto_augment=None, color_jitter=None, re_prob=0.0, crop_pct=1.0, hflip=0.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 training and 30 validation images of two classes and three ratios of sides."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for number, (height, width) in enumerate(SHAPES):
            folder = root / "source" / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.full((height, width, 3), 8 * number, np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    pack(str(root / "source"), root / "shards", PackOptions(shards=3))
    return root / "shards"


def module(root: Path, buckets: BucketConfig | None, **options: Any) -> ImageDataModule:
    given: dict[str, Any] = {"batch_size": 4, "image_size": 8, "reading": ReadingConfig(num_workers=0)}
    order = OrderConfig(buckets=buckets)
    return ImageDataModule(str(root), augmentation=PLAIN, order=order, **{**given, **options})


ALL = BucketConfig([4, [8, 12], 8])
ASPECT = BucketConfig([8, [6, 12], [12, 6]], assign="aspect")


def batches(data: ImageDataModule, part: RankPart, count: int) -> list[dict[str, Any]]:
    stream = TrainStream(data.corpus, data.kind(data.index()), part, kinds=data._kinds("train"))
    return list(islice(iter(stream), count))


@pytest.mark.parametrize("buckets", [ALL, ASPECT], ids=["all", "aspect"])
def test_ranks_have_the_same_size_and_together_the_same_samples(root: Path, buckets: BucketConfig) -> None:
    data = module(root, buckets)
    whole = batches(data, RankPart(0, 1, 4, 4), 12)
    ranks = [batches(data, RankPart(rank, 2, 4, 1), 24) for rank in range(2)]
    for step, batch in enumerate(whole):
        parts = [rank[2 * step + micro] for rank in ranks for micro in range(2)]
        assert {tuple(part["image"].shape[1:]) for part in parts} == {tuple(batch["image"].shape[1:])}
        assert sorted(key for part in parts for key in part["key"]) == sorted(batch["key"])
    assert len({tuple(batch["image"].shape) for batch in whole}) == 3


def test_every_size_comes_as_often_and_with_every_image(root: Path) -> None:
    data = module(root, ALL)
    found = batches(data, RankPart(0, 1, 4, 4), 90)
    sizes = Counter(tuple(batch["image"].shape[2:]) for batch in found)
    assert set(sizes) == {(4, 4), (8, 12), (8, 8)}
    assert min(sizes.values()) > 20
    for size in sizes:
        seen = [key for batch in found if tuple(batch["image"].shape[2:]) == size for key in batch["key"]]
        assert len(set(seen[: len(SHAPES)])) == len(SHAPES)  # an epoch of its own
    assert data.samples == len(SHAPES)
    assert data.facts()["sizes"] == pytest.approx(dict.fromkeys(sizes, 1 / 3))
    assert data.consumed_by_source().keys() == {"4x4", "8x12", "8x8"}


def test_an_image_comes_in_the_size_of_its_ratio_only(root: Path) -> None:
    data = module(root, ASPECT)
    sizes = image_sizes(data.splits("train")[0])
    keys = [sample["__key__"] for sample in data.splits("train")[0].read(range(len(SHAPES)))]
    assert sorted(map(tuple, sizes.tolist())) == sorted(SHAPES)
    bucket = {(8, 8): (8, 8), (8, 16): (6, 12), (20, 10): (12, 6)}
    own = {key: bucket[int(size[0]), int(size[1])] for key, size in zip(keys, sizes, strict=True)}
    found = batches(data, RankPart(0, 1, 4, 4), 40)
    for batch in found:
        assert {own[key] for key in batch["key"]} == {tuple(batch["image"].shape[2:])}
    assert data.facts()["sizes"] == pytest.approx({(8, 8): 14 / 30, (6, 12): 10 / 30, (12, 6): 6 / 30})
    first: dict[tuple[int, ...], list[str]] = {}
    for batch in found:
        first.setdefault(tuple(batch["image"].shape[2:]), []).extend(batch["key"])
    for size, seen in first.items():  # one epoch of a bucket has each of its images once
        members = {key for key in own if own[key] == size}
        assert set(seen[: len(members)]) == members
    assert {int(label) for batch in found for label in batch["label"]} == {0, 1}


def test_validation_by_ratio_has_every_image_once_on_any_number_of_ranks(root: Path) -> None:
    data = module(root, ASPECT)
    streams = [
        EvalStream(data._eval_corpus("val"), data.kind(data.index()), 4, rank, 2, kinds=data._kinds("val"))
        for rank in range(2)
    ]
    ranks = [list(stream) for stream in streams]
    for one, other in zip(*ranks, strict=True):
        assert one["image"].shape == other["image"].shape
    seen = [key for rank in ranks for batch in rank for key in batch["key"] if key]
    assert len(seen) == len(set(seen)) == len(SHAPES)


@pytest.mark.parametrize("buckets", [ALL, ASPECT], ids=["all", "aspect"])
def test_a_resumed_sequence_goes_on_with_the_same_bits(root: Path, buckets: BucketConfig) -> None:
    whole = batches(module(root, buckets), RankPart(0, 1, 4, 4), 9)
    later = batches(module(root, buckets), RankPart(0, 1, 4, 4, first=5 * 4), 4)
    for before, after in zip(whole[5:], later, strict=True):
        assert before["key"] == after["key"]
        torch.testing.assert_close(after["image"], before["image"], rtol=0, atol=0)


def test_a_position_among_other_buckets_is_refused(root: Path) -> None:
    state = module(root, ALL).state_dict()
    module(root, ALL).check_state(state)
    for other in (None, BucketConfig([4, 8]), BucketConfig(ALL.sizes, assign="aspect")):
        with refused("order.buckets"):
            module(root, other).check_state(state)
    with refused("order.buckets"):
        module(root, ALL).check_state(module(root, None).state_dict())


def test_passes_at_several_sizes_keep_the_order_of_batches_with_workers(root: Path) -> None:
    data = module(root, None)
    corpus = data._eval_corpus("val")
    passes = EvalPasses([EvalStream(corpus, Images(2, (side, side), PLAIN), 10) for side in (8, 4, 12)])
    assert passes.batches == 9
    alone = [(batch["key"], batch["image"].shape) for batch in passes]
    loader = torch.utils.data.DataLoader(passes, batch_size=None, num_workers=2)
    assert [(batch["key"], batch["image"].shape) for batch in loader] == alone
    assert [shape[-1] for _, shape in alone] == [8] * 3 + [4] * 3 + [12] * 3


def test_the_nearest_ratio_and_of_several_sizes_the_largest_that_is_filled() -> None:
    buckets = [(8, 8), (16, 16), (8, 16), (32, 32)]
    sizes = np.array([[9, 10], [20, 20], [4, 4], [10, 30], [40, 41], [30, 10]])
    assert nearest_by_aspect(sizes, buckets).tolist() == [0, 1, 0, 2, 3, 0]


def test_measured_sizes_are_kept_beside_the_shards(root: Path) -> None:
    data = module(root, ASPECT)
    data.prepare_data()
    (file,) = (root / "train").glob("image_sizes-*.npy")
    split = data.splits("train")[0]
    kept = image_sizes(split)
    assert np.array_equal(kept, np.load(file, allow_pickle=False))
    np.save(file, kept[:3])  # of another number of images: measured anew
    assert np.array_equal(image_sizes(split), kept)


def test_the_size_of_a_turned_image_is_that_of_its_upright_form() -> None:
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (10, 4)).save(out, "JPEG", exif=exif)
    assert size_of(out.getvalue()) == (10, 4)


def test_buckets_that_cannot_be(root: Path) -> None:
    with refused("order.buckets.sizes"):
        BucketConfig([])
    with refused("order.buckets.sizes"):
        BucketConfig([8, [8, 8]])
    with refused("order.buckets.sizes"):
        module(root, BucketConfig([0]))
    with refused("order.buckets.assign"):
        BucketConfig([8], assign="ratio")  # type: ignore[arg-type]
    with refused("order.mix_by"):
        OrderConfig(mix_by="batch", buckets=ALL)
    with refused("order.buckets"):
        TokenDataModule(str(root), order=OrderConfig(buckets=ALL))
    with refused("order.buckets.assign"):
        ImageDataModule("https://example.org/shards", order=OrderConfig(buckets=ASPECT))
