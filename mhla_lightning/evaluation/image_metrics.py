"""How far generated images are from real ones, from features of a network: Frechet distance, inception score,
precision and recall.

As in ADM's evaluator (Dhariwal & Nichol 2021, arXiv 2105.05233), in float64. Imports numpy and torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mhla_lightning.errors import UserError

SPLIT = 5000  # images of one split of the inception score, as in ADM
_ROWS = 512  # features compared with all others at once


@dataclass(frozen=True)
class Features:
    """What a network sees in N images.

    Attributes:
        pooled: (N, D), behind Frechet distance, precision and recall.
        spatial: (N, S), a few channels of a feature map with their places, behind sFID.
        probabilities: (N, K) of its classes.
    """

    pooled: np.ndarray
    spatial: np.ndarray
    probabilities: np.ndarray


class FeatureNetwork(Protocol):
    """What turns images into features.

    Attributes:
        name: shown above the table.
        published: whether its numbers may be compared with other people's: they are called FID then, else FD.
    """

    name: str
    published: bool

    def __call__(self, images: np.ndarray) -> Features:
        """images: uint8 (N, H, W, 3)."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) in float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Gaussian:
        """Of features (N, D), with N - 1 in the covariance.

        Raises:
            UserError: fewer than two of them.
        """
        if len(features) < 2:
            raise UserError(f"a covariance needs at least 2 images, and there is {len(features)}")
        values = np.asarray(features, dtype=np.float64)
        mean = values.mean(0)
        centred = values - mean
        return cls(mean, centred.T @ centred / (len(values) - 1))


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al. 2017, Eq. 6).

    With sigma = F F^T the trace of the root is the sum of the singular values of F1^T F2. Unlike the
    eigenvalues of sigma1 sigma2, these lose no digits where a covariance is singular (fewer images than
    features): nothing is drawn the root of after the product.

    Args:
        mu1, mu2: (D,).
        sigma1, sigma2: (D, D), symmetric and positive semi-definite.

    Raises:
        UserError: shapes that do not fit, or numbers that are not finite.
    """
    means = [np.atleast_1d(np.asarray(mu, dtype=np.float64)) for mu in (mu1, mu2)]
    sigmas = [np.atleast_2d(np.asarray(sigma, dtype=np.float64)) for sigma in (sigma1, sigma2)]
    for mu, sigma in zip(means, sigmas, strict=True):
        if mu.shape != means[0].shape or sigma.shape != (len(means[0]), len(means[0])):
            raise UserError(
                f"statistics of {means[0].shape} and {sigmas[0].shape} cannot be compared with "
                f"{mu.shape} and {sigma.shape}"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise UserError("the features hold numbers that are not finite, and no distance can be computed")
    one, other = (_factor(sigma) for sigma in sigmas)
    root = np.linalg.svd(one.T @ other, compute_uv=False).sum() if min(one.shape[1], other.shape[1]) else 0.0
    distance = np.square(means[0] - means[1]).sum() + np.trace(sigmas[0]) + np.trace(sigmas[1]) - 2 * root
    return max(0.0, float(distance))  # rounding may leave -1e-12 of equal ones


def _factor(sigma: np.ndarray) -> np.ndarray:
    """F (D, rank) with F F^T = sigma. Eigenvalues that are rounding noise are left out: their roots would
    be 1e-8 of the largest, and many.
    """
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def inception_score(probabilities: np.ndarray, split: int = SPLIT) -> float:
    """exp of the mean KL(p(y|x) || p(y)), mean over splits of `split` images in their order (Salimans et al.
    2016; splits as in ADM).

    probabilities: (N, K), rows that sum to 1.
    """
    scores = []
    for first in range(0, len(probabilities), split):
        part = torch.from_numpy(np.asarray(probabilities[first : first + split], dtype=np.float64))
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0))  # 0 log 0 is 0
        scores.append(divergence.sum(1).mean().exp().item())
    return float(np.mean(scores))


def precision_recall(
    features_real: np.ndarray, features_fake: np.ndarray, k: int = 3, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """(share of fake images inside the real manifold, share of real images inside the fake one) (Kynkaanniemi
    et al. 2019).

    A manifold is the union of balls around its features that reach to their k-th neighbour. Distances are
    exact: equal images have distance 0.

    Args:
        features_real, features_fake: (N, D) and (M, D).
        k: neighbours.
        device: where distances are computed, a block of rows at a time; without float64 there, on the CPU.

    Raises:
        UserError: too few images to have a k-th neighbour.
    """
    fewest = min(len(features_real), len(features_fake))
    if fewest <= k:
        raise UserError(
            f"precision and recall look at {k} neighbours and need more than {k} images on either "
            f"side; here are {fewest}"
        )
    place = torch.device(device) if torch.device(device).type != "mps" else torch.device("cpu")
    real, fake = (
        torch.as_tensor(np.asarray(found, dtype=np.float64), device=place)
        for found in (features_real, features_fake)
    )
    return _inside(fake, real, _radii(real, k)), _inside(real, fake, _radii(fake, k))


def _radii(points: Tensor, k: int) -> Tensor:
    """(N,) distance to the k-th neighbour; the nearest of all is the point itself."""
    return torch.cat([_distances(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(_ROWS)])


def _inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of `points` that lie in at least one ball."""
    return (
        torch.cat([(_distances(rows, centres) <= radii).any(1) for rows in points.split(_ROWS)])
        .double()
        .mean()
        .item()
    )


def _distances(rows: Tensor, points: Tensor) -> Tensor:
    return torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True)
class Reference:
    """The real images.

    Attributes:
        name: shown above the table.
        pooled, spatial: their statistics; spatial may be missing in a reference file.
        features: (N, D) pooled features, None where only statistics are known: no precision and recall then.
    """

    name: str
    pooled: Gaussian
    spatial: Gaussian | None
    features: np.ndarray | None

    @classmethod
    def of(cls, name: str, features: Features) -> Reference:
        """Of the features of real images."""
        return cls(name, Gaussian.of(features.pooled), Gaussian.of(features.spatial), features.pooled)


def image_metrics(
    fake: Features, reference: Reference, published: bool, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """All numbers of generated images.

    Returns:
        fid, sfid and inception_score, or fd, sfd and class_score where the network is not the one that papers
        use; precision and recall. What the reference cannot give is left out.
    """
    distance, spatial, score = (
        ("fid", "sfid", "inception_score") if published else ("fd", "sfd", "class_score")
    )
    found = {distance: _distance(Gaussian.of(fake.pooled), reference.pooled)}
    if reference.spatial is not None:
        found[spatial] = _distance(Gaussian.of(fake.spatial), reference.spatial)
    found[score] = inception_score(fake.probabilities)
    if reference.features is not None:
        found["precision"], found["recall"] = precision_recall(reference.features, fake.pooled, device=device)
    return found


def _distance(one: Gaussian, other: Gaussian) -> float:
    return frechet_distance(one.mean, one.covariance, other.mean, other.covariance)
