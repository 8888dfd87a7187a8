"""Metrics of generated images against scipy, torchmetrics and closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mhla_lightning.evaluation.image_metrics import (
    Gaussian,
    ImageFeatures,
    Reference,
    frechet_distance,
    image_metrics,
    inception_score,
    precision_recall,
)
from tests.helpers.errors import refused

GOLDEN = Path(__file__).parents[1] / "golden" / "frechet.npz"
RANKS = pytest.mark.parametrize(
    ("count", "size"), [(500, 24), (25, 24), (12, 24), (2, 24), (40, 200)], ids=lambda value: str(value)
)


def two_sets(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (count, size) of two Gaussians with other means and other correlations."""
    rng = np.random.default_rng(count + size)
    mix = rng.standard_normal((2, size, size))
    return rng.standard_normal((count, size)) @ mix[0], rng.standard_normal((count, size)) @ mix[1] + 0.5


def distance(one: Gaussian, other: Gaussian) -> float:
    return frechet_distance(one.mean, one.covariance, other.mean, other.covariance)


@RANKS
def test_frechet_distance_is_that_of_scipys_matrix_root(count: int, size: int) -> None:
    """scipy's root of a singular product has half of the digits; a small shift has fewer."""
    scipy = pytest.importorskip("scipy.linalg", reason="scipy is in the extra 'eval'")
    one, other = (Gaussian.of(features) for features in two_sets(count, size))
    root = np.real(scipy.sqrtm(one.covariance @ other.covariance))
    expected = np.square(one.mean - other.mean).sum() + np.trace(one.covariance + other.covariance - 2 * root)
    assert distance(one, other) == pytest.approx(expected, rel=1e-6)


@RANKS
def test_frechet_distance_is_torchmetrics(count: int, size: int) -> None:
    """Uses its public class: images are reshaped features, and its network returns them."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pass(nn.Module):
        num_features = size

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    metric = FrechetInceptionDistance(feature=Pass(), normalize=True, input_img_size=(1, 1, size)).set_dtype(
        torch.float64
    )
    sets = two_sets(count, size)
    for features, real in zip(sets, (True, False), strict=True):
        metric.update(torch.from_numpy(features), real=real)
    assert distance(*(Gaussian.of(features) for features in sets)) == pytest.approx(
        metric.compute().item(), rel=1e-6
    )


@pytest.mark.parametrize("count", [12, 5])
def test_a_singular_covariance_costs_no_digits(count: int) -> None:
    """The expected value has no root of rounding noise.

    tr (S1 S2)^(1/2) of S = A^T A is the sum of the singular values of A1 A2^T, (count, count).
    """
    sets = two_sets(count, 24)
    one, other = (Gaussian.of(features) for features in sets)
    roots = [(features - features.mean(0)) / math.sqrt(count - 1) for features in sets]
    trace = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    expected = (
        np.square(one.mean - other.mean).sum()
        + np.square(roots[0]).sum()
        + np.square(roots[1]).sum()
        - 2 * trace
    )
    assert distance(one, other) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["full", "deficient"])
def test_frechet_distance_of_a_stored_pair(name: str) -> None:
    """Values of scipy 1.17 for 400 and for 10 samples of 16 features.

    |mu0 - mu1|^2 + tr(S0 + S1 - 2 real(sqrtm(S0 @ S1)))
    """
    with np.load(GOLDEN, allow_pickle=False) as stored:
        mu, sigma, expected = stored[f"{name}_mu"], stored[f"{name}_sigma"], float(stored[f"{name}_distance"])
    assert frechet_distance(mu[0], sigma[0], mu[1], sigma[1]) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(mu[1], sigma[1], mu[0], sigma[0]) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("count", [300, 10])
def test_closed_forms(count: int) -> None:
    features, _ = two_sets(count, 24)
    one = Gaussian.of(features)
    scale = np.trace(one.covariance)
    assert distance(one, one) == pytest.approx(0, abs=1e-12 * scale)
    assert distance(one, Gaussian.of(features + 3.0)) == pytest.approx(24 * 9, rel=1e-9)
    assert distance(one, Gaussian.of(features * 3 - 2 * one.mean)) == pytest.approx(
        4 * scale, rel=1e-9
    )  # (3 - 1)^2 tr S
    diagonal = np.diag(np.arange(4.0))
    expected = sum((math.sqrt(n) - math.sqrt(2)) ** 2 for n in range(4)) + 4
    assert frechet_distance(np.zeros(4), diagonal, np.ones(4), 2 * np.eye(4)) == pytest.approx(
        expected, rel=1e-12
    )
    zero = np.zeros((4, 4))
    assert frechet_distance(np.zeros(4), zero, np.ones(4), zero) == 4


def test_statistics_that_cannot_be_compared_are_refused() -> None:
    eye = np.eye(3)
    with refused("mu2"):
        frechet_distance(np.zeros(3), eye, np.zeros(2), np.eye(2))
    with refused("mu2"):
        frechet_distance(np.zeros(3), eye, np.full(3, np.nan), eye)
    with refused("features"):
        Gaussian.of(np.zeros((1, 3)))


def test_inception_score_closed_forms_and_torchmetrics() -> None:
    assert inception_score(np.full((50, 10), 0.1)) == pytest.approx(1)
    assert inception_score(np.tile(np.eye(10), (5, 1))) == pytest.approx(
        10
    )  # certain of its class, and every class as often: with 0 log 0 in it
    from torchmetrics.image.inception import InceptionScore

    logits = torch.randn(90, 7, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="will save all extracted features"):
        metric = InceptionScore(feature=nn.Identity(), splits=1)
    metric.update(logits)
    probabilities = logits.double().softmax(1).numpy()
    with pytest.warns(UserWarning, match="degrees of freedom"):  # of its spread over one split
        expected = metric.compute()[0].item()
    assert inception_score(probabilities) == pytest.approx(expected, rel=1e-5)
    parts = [inception_score(probabilities[first : first + 40]) for first in (0, 40, 80)]
    assert inception_score(probabilities, split=40) == pytest.approx(np.mean(parts))


def plain_precision_recall(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    """Compute both by their definition, one pair at a time."""

    def inside(points: np.ndarray, centres: np.ndarray) -> float:
        radii = [sorted(math.dist(a, b) for b in centres)[k] for a in centres]
        return float(
            np.mean(
                [
                    any(math.dist(point, c) <= radius for c, radius in zip(centres, radii, strict=True))
                    for point in points
                ]
            )
        )

    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize(("reals", "fakes"), [(40, 70), (600, 5)])
def test_precision_and_recall_by_their_definition(reals: int, fakes: int) -> None:
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((reals, 3)), rng.standard_normal((fakes, 3)) * 1.4 + 0.3
    found = precision_recall(real, fake)
    assert found == pytest.approx(plain_precision_recall(real, fake, 3))
    assert found != precision_recall(real, fake, k=1)
    assert 0 < found[0] < 1


def test_precision_and_recall_of_extremes() -> None:
    rng = np.random.default_rng(0)
    real = rng.standard_normal((50, 4))
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 1000) == (0, 0)
    assert (
        precision_recall(real, np.repeat(real[:1], 20, axis=0))[0] == 1
    )  # one good image again and again: precise,
    assert (
        precision_recall(real, np.repeat(real[:1], 20, axis=0))[1] == 1 / 50
    )  # and covers itself only: radius 0, distances exact
    with refused("features_fake"):
        precision_recall(real, real[:3])


def features_of(images: int, seed: int) -> ImageFeatures:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(5), images)
    return ImageFeatures(rng.standard_normal((images, 6)), rng.standard_normal((images, 8)), probabilities)


def test_only_published_features_make_a_fid() -> None:
    real, fake = features_of(30, 0), features_of(20, 1)
    whole = Reference.of("real", real)
    assert list(image_metrics(fake, whole, published=True)) == [
        "fid",
        "sfid",
        "inception_score",
        "precision",
        "recall",
    ]
    own = image_metrics(fake, whole, published=False)
    assert list(own) == ["fd", "sfd", "class_score", "precision", "recall"]
    assert own["fd"] == pytest.approx(distance(Gaussian.of(real.pooled), Gaussian.of(fake.pooled)))
    assert own["sfd"] == pytest.approx(distance(Gaussian.of(real.spatial), Gaussian.of(fake.spatial)))
    statistics = Reference("real", whole.pooled, None, None)
    assert image_metrics(fake, statistics, published=True) == pytest.approx(
        {"fid": own["fd"], "inception_score": own["class_score"]}
    )
