"""What torch offers any module: second derivatives, torch.func, pickles, empty batches."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from mhla_lightning.attention import CausalSelfAttention, SelfAttention
from mhla_lightning.attention.base import FEATURE_MAPS, feature_map
from mhla_lightning.attention.baselines import causal_fla
from mhla_lightning.attention.mhla import MHLA, fused_causal
from tests.helpers.errors import refused

BLOCKS = {"name": "mhla", "blocks": 2}
ENTRIES: list[dict[str, Any]] = [
    BLOCKS,
    {**BLOCKS, "qk_norm": True},
    {"name": "mhla", "blocks": [1, 4], "mix_per_head": True, "normalizer": "none"},
    {**BLOCKS, "normalizer": "slot"},
    {"name": "linear", "qk_norm": True},
]
CAUSAL: list[dict[str, Any]] = [
    {"name": "mhla"},
    {"name": "mhla", "gate": True, "out_norm": True, "short_conv": 4},
    {"name": "mhla", "mix_form": "relative", "mix_per_head": True},
    {"name": "mhla", "decay": "token"},
    {"name": "linear"},
    {"name": "deltanet"},
]


def label(entry: dict[str, Any]) -> str:
    return "-".join(str(value) for value in entry.values())


def bidirectional(entry: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return SelfAttention(8, 2, attention=entry, grid=(4, 4)).double()


def causal(entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(fused_causal, "WORTHWHILE", 1)  # the hand-written form, also for short rows
    torch.manual_seed(0)
    given = {**entry, "heads": 2, "chunk_size": 4}
    return CausalSelfAttention(8, attention=given, context=64).double()


@pytest.fixture(params=[*ENTRIES, *CAUSAL], ids=label)
def layer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    entry = request.param
    return causal(entry, monkeypatch) if entry in CAUSAL else bidirectional(entry)


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_second_derivatives_with_frozen_weights_equal_finite_differences(layer: nn.Module) -> None:
    layer.requires_grad_(False)
    x, w, u, direction = tokens(), *torch.randn(3, 2, 16, 8, dtype=torch.float64)

    def slope(x: Tensor) -> Tensor:
        return torch.autograd.grad((layer(x) * w).sum(), x, create_graph=True)[0]

    leaf = x.clone().requires_grad_()
    second = torch.autograd.grad((slope(leaf) * u).sum(), leaf)[0]
    step = 1e-5 * direction
    ends = [(slope((x + sign * step).requires_grad_()) * u).sum() for sign in (1, -1)]
    numeric = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close((second * direction).sum(), numeric, rtol=1e-4, atol=1e-6)


def test_a_penalty_on_gradients_reaches_the_weights(layer: nn.Module) -> None:
    """The second derivative with respect to weights, which torch.func computes by its own ways."""
    x = tokens().requires_grad_()
    slope = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    slope.square().sum().backward()
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def penalty(weights: dict[str, Tensor]) -> Tensor:
        return grad(lambda x: functional_call(layer, weights, (x,)).square().sum())(x.detach()).square().sum()

    for name, expected in grad(penalty)(weights).items():
        found = layer.get_parameter(name).grad
        torch.testing.assert_close(torch.zeros_like(expected) if found is None else found, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own, in jvp
def test_torch_func_computes_what_autograd_does(layer: nn.Module) -> None:
    x, tangent = tokens(), torch.randn(2, 16, 8, dtype=torch.float64)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, weights, (x,)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(weights, x[:, None])
    for sample in range(2):
        layer.zero_grad()
        layer(x[sample, None]).square().sum().backward()
        for name, p in layer.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(per_sample[name][sample], expected)
    with torch.no_grad():
        torch.testing.assert_close(vmap(layer)(x[:, None])[:, 0], layer(x))
    jacobian = jacrev(layer)(x[:1])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(layer, x[:1]))
    pushed = jvp(layer, (x[:1],), (tangent[:1],))[1]
    torch.testing.assert_close(pushed, torch.einsum("abcdef,def->abc", jacobian, tangent[:1]))


def test_a_layer_is_pickled_and_copied(layer: nn.Module) -> None:
    x, file = tokens(), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), torch.load(file, weights_only=False)]
    for other in copies:
        assert torch.equal(other(x), layer(x))
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in layer.parameters()}


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_every_feature_map_is_pickled(name: str) -> None:
    phi, x = feature_map(name, 0.5), tokens()
    assert torch.equal(pickle.loads(pickle.dumps(phi))(x), phi(x))


def test_an_empty_batch_has_an_empty_output_and_gradients_of_zero(layer: nn.Module) -> None:
    empty = tokens()[:0].requires_grad_()
    with torch.no_grad():
        assert layer(empty).shape == empty.shape
    layer(empty).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == empty.shape
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("grid", [(7,), (100,), (3, 14), (2, 5, 9)], ids=str)
def test_a_layer_works_with_its_defaults(grid: tuple[int, ...]) -> None:
    layer = SelfAttention(8, heads=2, grid=grid)
    x = torch.randn(2, math.prod(grid), 8)
    assert layer(x).shape == x.shape
    most = 16 if len(grid) == 1 else 4
    assert isinstance(layer.attention, MHLA)
    assert all(1 < blocks <= most for blocks in layer.attention.grid.blocks)


def test_kernels_refuse_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of flash-linear-attention write gradients that torch takes for constants."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **_: Any) -> tuple[Tensor, None]:
        return q * k * v * g, None

    q, k, v, gate = torch.randn(4, 1, 3, 2, 4).unbind(0)
    given = {"q": q.requires_grad_(), "k": k, "v": v, "gate": gate}
    out, _ = causal_fla._call(kernel, given)
    (first,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    assert first.shape == q.shape
    with refused("create_graph"):
        torch.autograd.grad(out.sum(), q, create_graph=True)
