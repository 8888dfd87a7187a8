"""Compare generated images with real ones by the features of a network.

Frechet distance, inception score, precision and recall, as in ADM's evaluator (Dhariwal & Nichol 2021, arXiv
2105.05233), in float64. Imports numpy and torch.
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
class ImageFeatures:
    """The features of N images.

    Attributes:
        pooled: (N, D), for Frechet distance, precision and recall.
        spatial: (N, S), a few channels of a feature map at all positions, for sFID.
        probabilities: (N, K) of the network's classes.
    """

    pooled: np.ndarray
    spatial: np.ndarray
    probabilities: np.ndarray


class FeatureNetwork(Protocol):
    """A network that turns images into features.

    Attributes:
        name: shown above the table.
        published: whether its numbers compare with published ones; they are called FID then, else FD.
    """

    name: str
    published: bool

    def __call__(self, images: np.ndarray) -> ImageFeatures:
        """Return the features of images, uint8 (N, H, W, 3)."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """A mean (D,) and a covariance (D, D) in float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Gaussian:
        """Fit features (N, D), with N - 1 in the covariance.

        Raises:
            UserError: fewer than two images.
        """
        if len(features) < 2:
            raise UserError("features", f"{len(features)} image is not enough; a covariance needs at least 2")
        values = np.asarray(features, dtype=np.float64)
        mean = values.mean(0)
        centred = values - mean
        return cls(mean, centred.T @ centred / (len(values) - 1))


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Return the Frechet distance of two Gaussians (Heusel et al. 2017, Eq. 6).

        |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))

    With sigma = F F^T, the trace of the root is the sum of the singular values of F1^T F2. These keep their
    digits where a covariance is singular (fewer images than features). The eigenvalues of sigma1 sigma2 would
    lose them in the square root.

    Args:
        mu1: (D,); so is `mu2`.
        sigma1: (D, D), symmetric and positive semi-definite; so is `sigma2`.

    Raises:
        UserError: shapes that do not fit, or numbers that are not finite.
    """
    means = [np.atleast_1d(np.asarray(mu, dtype=np.float64)) for mu in (mu1, mu2)]
    sigmas = [np.atleast_2d(np.asarray(sigma, dtype=np.float64)) for sigma in (sigma1, sigma2)]
    for number, (mu, sigma) in enumerate(zip(means, sigmas, strict=True), 1):
        if mu.shape != means[0].shape or sigma.shape != (len(means[0]), len(means[0])):
            raise UserError(
                f"mu{number}",
                f"statistics of {mu.shape} and {sigma.shape} cannot be compared with {means[0].shape} and "
                f"{sigmas[0].shape}",
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise UserError(f"mu{number}", "these statistics hold numbers that are not finite")
    one, other = (_factor(sigma) for sigma in sigmas)
    root = np.linalg.svd(one.T @ other, compute_uv=False).sum() if min(one.shape[1], other.shape[1]) else 0.0
    distance = np.square(means[0] - means[1]).sum() + np.trace(sigmas[0]) + np.trace(sigmas[1]) - 2 * root
    return max(0.0, float(distance))  # rounding may leave -1e-12 of equal ones


def _factor(sigma: np.ndarray) -> np.ndarray:
    """Return F (D, rank) with F F^T = sigma.

    Eigenvalues that are rounding noise are dropped: there are many, with roots of 1e-8 of the largest.
    """
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def inception_score(probabilities: np.ndarray, split: int = SPLIT) -> float:
    """Return exp of the mean KL(p(y|x) || p(y)), averaged over splits (Salimans et al. 2016).

    Args:
        probabilities: (N, K), rows that sum to 1.
        split: images in a split, taken in their order, as in ADM.
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
    """Return precision and recall of generated images (Kynkaanniemi et al. 2019).

    Precision is the share of fake images inside the manifold of the real ones. Recall is the share of real
    images inside the manifold of the fake ones. A manifold is the union of balls around its features that
    reach to their k-th neighbour. Distances are exact: equal images have distance 0.

    Args:
        features_real: (N, D).
        features_fake: (M, D).
        k: neighbours.
        device: where distances are computed; the CPU for a device without float64.

    Raises:
        UserError: no more than k images on one side.
    """
    fewest = min(len(features_real), len(features_fake))
    if fewest <= k:
        few = "features_real" if len(features_real) == fewest else "features_fake"
        raise UserError(
            few, f"{fewest} images are too few; precision and recall with {k} neighbours need more than {k}"
        )
    place = torch.device(device) if torch.device(device).type != "mps" else torch.device("cpu")
    real, fake = (
        torch.as_tensor(np.asarray(found, dtype=np.float64), device=place)
        for found in (features_real, features_fake)
    )
    return _inside(fake, real, _radii(real, k)), _inside(real, fake, _radii(fake, k))


def _radii(points: Tensor, k: int) -> Tensor:
    """Return the distances (N,) to the k-th neighbour; the nearest of all is the point itself."""
    return torch.cat([_distances(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(_ROWS)])


def _inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Return the share of `points` that are inside at least one ball."""
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
    """The statistics of real images.

    Attributes:
        name: shown above the table.
        pooled: of the pooled features.
        spatial: of the spatial features; None where a reference file has none.
        features: (N, D) pooled features; None where only statistics are known, and then without precision and
            recall.
    """

    name: str
    pooled: Gaussian
    spatial: Gaussian | None
    features: np.ndarray | None

    @classmethod
    def of(cls, name: str, features: ImageFeatures) -> Reference:
        """Compute the statistics from the features of real images."""
        return cls(name, Gaussian.of(features.pooled), Gaussian.of(features.spatial), features.pooled)


def image_metrics(
    fake: ImageFeatures, reference: Reference, published: bool, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Compute all numbers of generated images.

    Args:
        fake: features of the generated images.
        reference: of the real images.
        published: whether the network is the one of published numbers.
        device: where distances for precision and recall are computed.

    Returns:
        fid, sfid and inception_score, or fd, sfd and class_score if the network is not the published one;
        precision and recall. Numbers that the reference does not support are left out.
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
