"""Pictures whose halves agree, and the losses that are known for them."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from mhla_lightning.data.prepare.sources import SampleSource, open_sample_source
from mhla_lightning.data.prepare.sources.repeated_noise import MEAN, STD
from mhla_lightning.diffusion import build_process
from tests.helpers.errors import refused


def pictures(source: SampleSource, split: str, numbers: range) -> np.ndarray:
    """Return pictures, (N, side, side, 3), with pixels of mean 0 and variance 1."""
    found = []
    for sample in source.parts[split].take(numbers):
        with Image.open(io.BytesIO(sample.members["png"])) as image:
            found.append((np.asarray(image).astype(np.float64) - MEAN) / STD)
    return np.stack(found)


@pytest.mark.parametrize("side", [2, 16])
def test_halves_agree_and_nothing_else_does(side: int) -> None:
    found = pictures(open_sample_source(f"repeated_noise:{side}"), "train", range(0, 4_000, 10))
    upper, lower = found[:, : side // 2], found[:, side // 2 :]
    assert np.array_equal(upper, lower)
    assert len(np.unique(upper.reshape(len(found), -1), axis=0)) == len(found)
    values = upper.reshape(len(found), -1)
    assert abs(values.mean()) < 5 / math.sqrt(values.size)
    assert abs(values.var() - 1) < 0.02 + 5 / math.sqrt(values.size)
    between = np.corrcoef(values.T)[~np.eye(values.shape[1], dtype=bool)]
    assert abs(between).max() < 6 / math.sqrt(len(found))


def test_a_picture_depends_on_its_split_and_number_alone() -> None:
    source = open_sample_source("repeated_noise")
    assert {split: len(part) for split, part in source.parts.items()} == {"train": 10_000, "val": 500}
    chosen = [7, 300, 2]
    first = list(source.parts["train"].take(chosen))
    assert first == list(open_sample_source("repeated_noise:16").parts["train"].take(chosen[::-1]))[::-1]
    assert first != list(source.parts["val"].take(chosen))
    assert source.fingerprint != open_sample_source("repeated_noise:8").fingerprint


@pytest.mark.parametrize("given", ["repeated_noise:x", "repeated_noise:7", "repeated_noise:258"])
def test_wrong_sides_are_refused(given: str) -> None:
    with refused("source"):
        open_sample_source(given)


@pytest.mark.parametrize(("views", "loss"), [(1, math.pi / 2), (2, math.pi / (2 * math.sqrt(2)))])
def test_the_best_guess_from_one_and_from_two_views_has_the_known_loss(views: int, loss: float) -> None:
    """The guess is linear, because the pixels are normal: the mean of x given its noisy views."""
    process = build_process({"name": "flow", "times": "uniform"})
    x = pictures(open_sample_source("repeated_noise"), "val", range(500))
    rng = np.random.default_rng(0)
    t = np.array([process.draw_time(rng) for _ in range(len(x))])[:, None, None, None]
    noise = rng.standard_normal(x.shape)
    seen = (1 - t) * x + t * noise
    twin = np.roll(seen, x.shape[1] // 2, axis=1)
    total = seen if views == 1 else seen + twin
    guess = (1 - t) * total / (t**2 + views * (1 - t) ** 2)
    error = ((seen - guess) / t - (noise - x)) ** 2  # the noise is what is left of `seen`
    best = error.mean((1, 2, 3)) * (t**2 + views * (1 - t) ** 2)[:, 0, 0, 0]
    assert best.mean() == pytest.approx(1, abs=0.02), "the error at each time"
    times = (np.arange(10_000) + 0.5) / 10_000
    assert (1 / (times**2 + views * (1 - times) ** 2)).mean() == pytest.approx(loss, abs=1e-6)
