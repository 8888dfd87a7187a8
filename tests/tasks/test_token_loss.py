"""The chunked next-token loss against the plain one, in value, gradient and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mhla_lightning.tasks import token_loss as module
from mhla_lightning.tasks.token_loss import IGNORE, chunked_loss, token_loss

BATCH, TOKENS, DIM, VOCAB = 3, 25, 6, 40


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(BATCH, TOKENS, DIM, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB, DIM, dtype=dtype, generator=generator).requires_grad_()
    targets = torch.randint(0, VOCAB, (BATCH, TOKENS), generator=generator)
    targets[0, :9] = targets[2, -1] = IGNORE
    return features, weight, targets


def plain(features: Tensor, weight: Tensor, targets: Tensor, z_loss: float, total: bool) -> Tensor:
    logits, counted = features @ weight.T, targets != IGNORE
    loss = (
        F.cross_entropy(logits[counted], targets[counted], reduction="sum")
        + z_loss * logits[counted].logsumexp(-1).square().sum()
    )
    return loss if total else loss / counted.sum()


@pytest.mark.parametrize("total", [False, True], ids=["mean", "sum"])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [1, 7, 75, 1000, None])
@pytest.mark.parametrize("own", [False, True], ids=["torch", "own"])
def test_values_and_gradients_are_those_of_plain_cross_entropy(
    total: bool, z_loss: float, chunk: int | None, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own:  # what an older torch does
        monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions")
    features, weight, targets = case()
    loss = token_loss(features, weight, targets, z_loss=z_loss, total=total, chunk=chunk)
    expected = plain(features, weight, targets, z_loss, total)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
    actual, wanted = (torch.autograd.grad(3 * x, (features, weight)) for x in (loss, expected))
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, rtol=1e-10, atol=1e-14)
    assert actual[0][0, :9].abs().sum() == 0


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_nothing_counted_is_zero_with_zero_gradients(z_loss: float) -> None:
    features, weight, targets = case()
    loss = token_loss(features, weight, torch.full_like(targets, IGNORE), z_loss=z_loss)
    assert loss == 0
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(loss, (features, weight)))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("z_loss", [0.0, 0.3], ids=["torch", "own"])
def test_no_tensor_holds_the_logits_of_the_batch(z_loss: float) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 256, 16, generator=generator).requires_grad_()
    weight, targets = (
        torch.randn(1000, 16, generator=generator).requires_grad_(),
        torch.randint(0, 1000, (4, 256), generator=generator),
    )
    with LargestTensor() as seen:
        plain(features, weight, targets, z_loss, False).backward()
    assert seen.elements >= 4 * 256 * 1000
    with LargestTensor() as seen:
        token_loss(features, weight, targets, z_loss=z_loss, chunk=64).backward()
    assert weight.numel() <= seen.elements <= 64 * 1000


def test_a_chunk_of_a_large_vocabulary_is_bounded() -> None:
    assert module._LOGITS // 32000 * 32000 * 4 <= 2**27
    with torch.device("meta"):
        features, weight = (
            torch.empty(8, 2048, 64, requires_grad=True),
            torch.empty(32000, 64, requires_grad=True),
        )
        with LargestTensor() as seen:
            token_loss(features, weight, torch.empty(8, 2048, dtype=torch.int64), z_loss=1e-4).backward()
    assert seen.elements <= module._LOGITS


def test_under_autocast_the_loss_keeps_float32() -> None:
    features, weight, targets = case(torch.float32)
    expected = token_loss(features, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = token_loss(features.bfloat16(), weight, targets)
    assert loss.dtype == torch.float32
    assert abs(float(loss.detach() - expected.detach())) < 0.02
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_whole_and_chunked_are_one_function() -> None:
    features, weight, targets = case()
    flat, goals = features.flatten(0, 1), targets.flatten()
    torch.testing.assert_close(
        chunked_loss(flat, weight, goals, 0.1, 4), chunked_loss(flat, weight, goals, 0.1, 75)
    )
