"""Mixup and cutmix of pairs: a function of the pair alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mhla_lightning.tasks.mixup import PairMix

CLASSES = 5


def batch(pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every image is filled with its own number; labels, epochs, indices."""
    size = 2 * pairs
    images = torch.arange(size, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 16, 20).contiguous()
    return images, torch.arange(size) % CLASSES, torch.full((size,), 3), torch.arange(100, 100 + size)


def mix(
    mixup: float = 0.8, cutmix: float = 1.0, prob: float = 1.0, switch: float = 0.5, smoothing: float = 0.1
) -> PairMix:
    return PairMix(mixup, cutmix, prob, switch, smoothing, CLASSES)


def test_a_pair_is_mixed_alike_in_any_batch() -> None:
    whole = mix()(*batch(32), 0)
    for start in range(0, 64, 2):
        images, labels, epochs, indices = (tensor[start : start + 2] for tensor in batch(32))
        alone = mix()(images, labels, epochs, indices, 0)
        assert all(torch.equal(a, b[start : start + 2]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("what", ["seed", "epoch", "index"])
def test_draws_follow_the_key(what: str) -> None:
    images, labels, epochs, indices = batch(8)
    other = {
        "seed": (epochs, indices, 1),
        "epoch": (epochs + 1, indices, 0),
        "index": (epochs, indices + 2, 0),
    }[what]
    assert not torch.equal(mix()(images, labels, epochs, indices, 0)[1], mix()(images, labels, *other)[1])


def test_pixels_and_labels_are_shared_alike() -> None:
    """Of every image, the share of its own pixels is the share of its own label."""
    images, labels, epochs, indices = batch(64)
    mixed, targets = mix(smoothing=0.0)(images, labels, epochs, indices, 0)
    own, neighbour = images[:, 0, 0, 0], images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)[:, 0, 0, 0]
    share = ((mixed - neighbour[:, None, None, None]) / (own - neighbour)[:, None, None, None]).mean(
        (1, 2, 3)
    )
    assert torch.allclose(targets.gather(1, labels[:, None])[:, 0], share, atol=1e-5)
    assert torch.allclose(targets.sum(1), torch.ones(128))
    cut = torch.stack(
        [
            torch.isin(image, torch.stack([a, b])).all()
            for image, a, b in zip(mixed, own, neighbour, strict=True)
        ]
    )
    assert 30 < int(cut.sum()) < 100, "some pairs are cut, some blended"


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)], ids=["mixup alone", "cutmix alone"])
def test_one_of_the_two(mixup: float, cutmix: float) -> None:
    images, labels, epochs, indices = batch(64)
    mixed, _ = mix(mixup, cutmix)(images, labels, epochs, indices, 0)
    blended = (mixed != mixed.round()).flatten(1).any(1)
    assert bool(blended.float().mean() > 0.9) is (mixup > 0)
    if cutmix:
        box = (mixed != images).flatten(1).any(1)
        assert box.float().mean() > 0.5
        assert not blended.any()


def test_switched_off() -> None:
    images, labels, epochs, indices = batch(4)
    mixed, targets = mix(prob=0.0)(images, labels, epochs, indices, 0)
    assert torch.equal(mixed, images)
    logits = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(0))
    cross_entropy = torch.nn.functional.cross_entropy
    assert torch.allclose(cross_entropy(logits, targets), cross_entropy(logits, labels, label_smoothing=0.1))


def test_shares_are_beta_distributed() -> None:
    images, labels, epochs, indices = batch(4000)
    _, targets = mix(1.0, 0.0, smoothing=0.0)(images, labels, epochs, indices, 0)
    shares = np.sort(targets.gather(1, labels[:, None])[::2, 0].numpy())
    assert np.abs(shares - np.linspace(0, 1, 4000)).max() < 0.03, (
        "Beta(1, 1) is uniform (Kolmogorov-Smirnov, 1.95 / sqrt(4000))"
    )
    _, rare = mix(0.8, 1.0, prob=0.25, smoothing=0.0)(images, labels, epochs, indices, 0)
    assert 0.2 < float((rare.max(1).values < 1).float().mean()) < 0.3
