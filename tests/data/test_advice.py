"""Sentences about sizes of data that mislead, and about pixels that are normalised for others."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhla_lightning.data import ImageDataModule
from mhla_lightning.data.modules.advice import Pixels, advice, advice_on_pixels, advice_on_start
from mhla_lightning.data.transforms import Augmentation
from tests.helpers.images import write_images


def test_large_sets_need_no_sentence() -> None:
    assert list(advice(samples=1000, batch_size=1000, val_samples=100)) == []
    assert list(advice(samples=1000, batch_size=10, val_samples=0)) == []


def test_fewer_samples_than_a_batch_are_named() -> None:
    (sentence,) = advice(samples=99, batch_size=100, val_samples=100)
    assert "99 samples and data.batch_size is 100" in sentence


def test_a_small_validation_is_named() -> None:
    (sentence,) = advice(samples=200, batch_size=100, val_samples=40)
    assert "40 samples: one of them is 2.5% of an accuracy" in sentence


DARK = Pixels((0.13, 0.13, 0.13), (0.31, 0.31, 0.31))
IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = Pixels((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
UNIT = Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("measured", "used"), [(IMAGENET, DARK), (DARK, IMAGENET), (IMAGENET, Pixels((0.5,) * 3, (0.05,) * 3))]
)
def test_the_normalisation_of_other_images_is_named(measured: Pixels, used: Pixels) -> None:
    (sentence,) = advice_on_pixels(measured, used)
    assert f"set data.augmentation.mean to [{measured.mean[0]:.3g}" in sentence


@pytest.mark.parametrize(
    ("measured", "used"), [(CIFAR, IMAGENET), (IMAGENET, CIFAR), (DARK, DARK), (DARK, UNIT)]
)
def test_a_normalisation_that_suits_needs_no_sentence(measured: Pixels, used: Pixels) -> None:
    assert list(advice_on_pixels(measured, used)) == []


def test_weights_to_start_from_have_their_own_normalisation() -> None:
    (sentence,) = advice_on_start(UNIT, IMAGENET)
    assert "[0.5, 0.5, 0.5]" in sentence
    assert list(advice_on_start(IMAGENET, IMAGENET)) == []
    assert list(advice_on_start(Pixels((), ()), IMAGENET)) == []  # nothing tells it


def test_images_are_measured_before_training(tmp_path: Path) -> None:
    shards = str(write_images(tmp_path))  # of mean 0.46, and of four levels of brightness

    def said(mean: float, std: float) -> list[str]:
        augmentation = Augmentation(mean=(mean,) * 3, std=(std,) * 3)
        return list(ImageDataModule(shards, 16, image_size=8, augmentation=augmentation).further_advice())

    (sentence,) = said(0.1, 0.3)
    assert "these have mean [0.4" in sentence
    assert said(0.46, 0.27) == []
