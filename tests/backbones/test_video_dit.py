"""The video DiT: that it is Wan2.1, sizes, positions, variable clips, initialisation, and every operator
inside it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from einops import rearrange
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning import backbones
from mhla_lightning.attention import ATTENTION
from mhla_lightning.backbones import VIDEO_DIFFUSION
from mhla_lightning.backbones.layers import GridRotation, time_sinusoid
from mhla_lightning.weights.wan_names import to_diffusers, to_wan
from tests.helpers.errors import refused
from tests.helpers.marks import every_nth
from tests.helpers.video_models import ENTRIES, FULL, HYBRID, awake, build, inputs


def diffusers_model(model: Any, heads: int = 2) -> Any:
    """diffusers' own class with the same sizes."""
    wan: Any = WanTransformer3DModel(
        patch_size=model.patch_size,
        num_attention_heads=heads,
        attention_head_dim=model.embed_dim // heads,
        in_channels=model.in_channels,
        out_channels=model.in_channels,
        text_dim=model.text_dim,
        freq_dim=model.freq_dim,
        ffn_dim=model.blocks[0].ffn[0].out_features,
        num_layers=len(model.blocks),
    )
    return wan.eval()


@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 4, 2)], ids=str)
def test_it_is_wan_as_diffusers_has_it(patch_size: tuple[int, int, int]) -> None:
    """Softmax layers, every parameter random: outputs and all gradients."""
    model = awake(build(attention="softmax", patch_size=patch_size, embed_dim=48))
    theirs = diffusers_model(model)
    theirs.load_state_dict(to_diffusers(model.state_dict()))
    x, t, text = inputs(model)
    ours, wanted = model(x, t, text), theirs(x, t, text, return_dict=False)[0]
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max()))

    cotangent = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * cotangent).sum().backward()
    (wanted * cotangent).sum().backward()
    gradients = to_diffusers({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, parameter in theirs.named_parameters():
        assert gradients[name].any(), name
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=1e-4, atol=1e-4 * float(parameter.grad.abs().max())
        )


@pytest.mark.parametrize("names", [to_wan, to_diffusers], ids=["wan", "diffusers"])
def test_weights_by_other_peoples_names_are_taken(names: Any) -> None:
    model = awake(build(attention=[FULL, "softmax"]))
    adapted = model.adapt_state_dict(names(model.state_dict()), model.geometry)
    assert adapted.keys() == model.state_dict().keys()
    assert all(torch.equal(adapted[name], value) for name, value in model.state_dict().items())


def test_weights_of_another_width_are_refused() -> None:
    with refused("state"):
        build(embed_dim=48).adapt_state_dict(build().state_dict())


def count(**options: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in backbones.build_backbone("wan_1_3b", **options).parameters())


def test_parameter_counts_are_the_papers() -> None:
    """SPEC 6.1."""
    softmax = count(attention="softmax")
    assert softmax == 1_418_996_800
    assert count(attention="linear") == softmax
    assert count(attention="mhla") == softmax + 30 * 22_628
    assert count(attention=HYBRID) == softmax + 20 * 22_628
    assert count(attention={"name": "mhla", "gate": True}) == softmax + 30 * (22_628 + 2_360_832)
    assert count(attention={"name": "mhla", "blocks": (7, 3, 5)}) == softmax + 30 * (105**2 + 128)


def test_the_14b_size_has_its_name() -> None:
    with torch.device("meta"):
        model: Any = backbones.build_backbone("wan_14b", attention="softmax")
    assert sum(p.numel() for p in model.parameters()) == 14_288_491_584  # of Wan-AI/Wan2.1-T2V-14B
    assert (model.grid, model.embed_dim // model.blocks[0].attn.heads) == ((21, 30, 50), 128)


@pytest.mark.parametrize("name", VIDEO_DIFFUSION)
@pytest.mark.parametrize("attention", ENTRIES, ids=str)
def test_shapes_and_flops_of_every_size(name: str, attention: Any) -> None:
    with torch.device("meta"):
        model: Any = backbones.build_backbone(name, attention=attention, depth=3)
        x, t = torch.empty(1, model.in_channels, *model.input_size), torch.empty(1)
        text = torch.empty(1, 3, model.text_dim)
        with FlopCounterMode(display=False) as counter:
            assert model(x, t, text).shape == x.shape
    assert counter.get_total_flops() == model.flops(model.grid)


@pytest.mark.parametrize("size", every_nth([(4, 8, 12), (3, 12, 18), (7, 6, 22)], 3), ids=str)
@pytest.mark.parametrize("attention", ENTRIES, ids=str)
def test_flops_of_clips_of_another_size(attention: Any, size: tuple[int, int, int]) -> None:
    """How much short blocks are filled up depends on the size."""
    with torch.device("meta"):
        model = build(attention=attention)
        x = torch.empty(1, 3, *size)
        with FlopCounterMode(display=False) as counter:
            assert model(x, torch.empty(1), torch.empty(1, 6, 10)).shape == x.shape
    assert counter.get_total_flops() == model.flops((size[0], size[1] // 2, size[2] // 2))


def test_output_is_zero_at_the_start_whatever_goes_in() -> None:
    model = build()
    out = model(*inputs(model))
    assert torch.equal(out, torch.zeros_like(out))
    model.head.head.weight.data.normal_()
    assert model(*inputs(model)).abs().max() > 0.1  # the output layer was what held it back


def test_initial_weights_are_wans() -> None:
    model = backbones.build_backbone(
        "wan_tiny", attention={"name": "mhla", "gate": True, "pos_conv": "lepe3"}, depth=1, embed_dim=256
    )
    weights = model.state_dict()
    for name in (
        "text_embedding.0.weight",
        "text_embedding.2.weight",
        "time_embedding.0.weight",
        "time_embedding.2.weight",
    ):
        assert weights[name].std() == pytest.approx(0.02, rel=0.02)
    for name in ("attn.qkv", "attn.proj", "attn.gate", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"):
        weight = weights[f"blocks.0.{name}.weight"]
        bound = (6 / sum(weight.shape)) ** 0.5
        assert weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert not weights[f"blocks.0.{name}.bias"].any()
    patch = weights["patch_embedding.weight"]
    assert patch.std() == pytest.approx((2 / (256 + 3 * 2 * 4 * 4)) ** 0.5, rel=0.03)
    for name in ("head.modulation", "blocks.0.modulation"):
        assert weights[name].std() == pytest.approx(256**-0.5, rel=0.15)
    for name in ("q_norm", "k_norm", "out_norm"):
        assert torch.equal(
            weights[f"blocks.0.attn.{name}.weight"], torch.ones_like(weights[f"blocks.0.attn.{name}.weight"])
        )
    assert weights["blocks.0.attn.attention.mixing.weight"].sum(1) == pytest.approx(torch.ones(32))


@pytest.mark.parametrize("pos_conv", ["lepe3", "cpe3"])
def test_a_fresh_convolution_changes_nothing_and_then_acts_on_three_axes(pos_conv: str) -> None:
    plain = awake(build(attention={"name": "mhla", "pos_conv": "none"}, depth=1))
    model = build(attention={"name": "mhla", "pos_conv": pos_conv}, depth=1).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(model(*inputs(model)), plain(*inputs(plain)))

    block, before = model.blocks[0], plain.blocks[0]
    conv = block.cpe.depthwise.conv if pos_conv == "cpe3" else block.attn.lepe.conv
    torch.nn.init.normal_(conv.weight)
    grid = (4, 4, 6)
    rotary = GridRotation(grid, 12, torch.device("cpu"))
    x, modulation, text = torch.randn(2, 96, 24), torch.randn(2, 6, 24), torch.randn(2, 6, 24)

    def convolved(tokens: torch.Tensor) -> torch.Tensor:
        image = rearrange(tokens, "b (f h w) c -> b c f h w", f=4, h=4, w=6)
        return rearrange(
            F.conv3d(image, conv.weight, conv.bias, padding=1, groups=24), "b c f h w -> b (f h w) c"
        )

    if pos_conv == "cpe3":  # behind the block, with a residual
        out = before(x, modulation, text, rotary, grid)
        torch.testing.assert_close(
            block(x, modulation, text, rotary, grid), out + convolved(out), rtol=1e-4, atol=1e-5
        )
    else:  # on v, before the output projection
        proj = block.attn.proj
        added = convolved(block.attn.qkv(x).chunk(3, dim=-1)[2]) @ proj.weight.T
        torch.testing.assert_close(
            block.attn(x, rotary=rotary), before.attn(x, rotary=rotary) + added, rtol=1e-4, atol=1e-4
        )


def test_the_linear_baseline_is_the_authors() -> None:
    """SPEC 6.9, written out: relu without eps, rotary in the numerator only, means over tokens."""
    layer = awake(build(attention="linear")).blocks[0].attn
    rotary = GridRotation((4, 4, 6), 12, torch.device("cpu"))
    x = torch.randn(2, 96, 24)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    q, k, v = (
        t.unflatten(-1, (2, 12)) for t in (torch.relu(layer.q_norm(q)), torch.relu(layer.k_norm(k)), v)
    )
    summary = torch.einsum("bnhd,bnhe->bhde", rotary(k), v) / 96
    out = torch.einsum("bnhd,bhde->bnhe", rotary(q), summary) / (
        torch.einsum("bnhd,bhd->bnh", q, k.mean(1)) + 1e-6
    ).unsqueeze(-1)
    torch.testing.assert_close(layer(x, rotary=rotary), layer.proj(out.flatten(2)), rtol=1e-4, atol=1e-5)


def test_rotation_depends_on_differences_of_positions_only() -> None:
    """What rotary positions are for: along every axis the product of a turned q and a turned k sees how
    far apart they are.
    """
    q, k = torch.randn(2, 1, 1, 1, 24, dtype=torch.float64)
    grid = (5, 6, 7)
    rotary = GridRotation(grid, 24, torch.device("cpu"))
    turned_q, turned_k = (rotary(x.expand(1, 210, 1, 24)).view(*grid, 24) for x in (q, k))
    for a, b, c, d in [
        ((0, 0, 0), (1, 2, 3), (2, 3, 1), (3, 5, 4)),
        ((4, 0, 6), (0, 5, 1), (4, 0, 5), (0, 5, 0)),
    ]:
        torch.testing.assert_close(turned_q[a] @ turned_k[b], turned_q[c] @ turned_k[d])
    for axis in range(3):
        step = [0, 0, 0]
        step[axis] = 1
        assert (
            turned_q[0, 0, 0] @ turned_k[tuple(step)] - turned_q[0, 0, 0] @ turned_k[0, 0, 0]
        ).abs() > 1e-3


def test_rotation_in_float32_is_that_in_float64_but_for_the_last_bit() -> None:
    rotary = GridRotation((21, 30, 50), 128, torch.device("cpu"))
    x = torch.randn(1, 31_500, 1, 128)
    turned, exact = rotary(x), rotary(x.double())
    assert (turned.dtype, exact.dtype) == (torch.float32, torch.float64)
    assert (turned - exact).abs().max() < 2 * torch.finfo(torch.float32).eps * x.abs().max()
    assert rotary(x.bfloat16()).dtype == torch.bfloat16


def test_times_are_exact_where_float32_angles_are_not() -> None:
    t = torch.tensor([0.0, 3.0, 999.75])
    frequency = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    angle = t.double()[:, None] * frequency
    torch.testing.assert_close(
        time_sinusoid(t, 16, torch.float64), torch.cat([angle.cos(), angle.sin()], dim=1), rtol=0, atol=1e-11
    )
    model = awake(build())
    x, _, text = inputs(model)
    whole, fraction = (model(x, torch.full((2,), value), text) for value in (999.0, 999.5))
    assert (whole - fraction).abs().max() > 1e-3  # times are not floored (V12)
    torch.testing.assert_close(model(x, torch.full((2,), 999), text), whole)


def test_a_list_of_operators_is_cycled_over_the_layers() -> None:
    """The paper's hybrid keeps softmax at 0, 3, 6, ... (SPEC 6.5)."""
    with torch.device("meta"):
        model: Any = backbones.build_backbone("wan_1_3b", attention=HYBRID)
    softmax = [
        i for i, block in enumerate(model.blocks) if isinstance(block.attn.attention, ATTENTION["softmax"])
    ]
    assert softmax == list(range(0, 30, 3))
    assert {block.attn.attention.mixing.blocks for i, block in enumerate(model.blocks) if i % 3} == {150}


@pytest.mark.parametrize("attention", ENTRIES, ids=str)
def test_activation_checkpointing_gives_the_same_gradients(attention: Any) -> None:
    grads = []
    for checkpointing in (False, True):
        model = awake(build(attention=attention)).train()
        model.set_grad_checkpointing(checkpointing)
        model(*inputs(model)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(grad.any() for grad in grads[0])


class _Types(torch.utils._python_dispatch.TorchDispatchMode):
    """The dtypes that additions and products of token-sized tensors give back."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.setdefault(func.overloadpacket._qualified_op_name, set()).add(out.dtype)
        return out


@pytest.mark.parametrize("attention", ENTRIES, ids=str)
def test_under_bf16_autocast_products_are_bf16_and_modulation_is_float32(attention: Any) -> None:
    model = awake(build(attention=attention))
    wanted = model(*inputs(model))
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.extend((args[0], args[1], out)))
    with torch.autocast("cpu", torch.bfloat16), _Types() as types:
        out = model(*inputs(model))
    assert {x.dtype for x in seen} == {out.dtype} == {torch.float32}
    assert torch.bfloat16 in types.seen["aten::addmm"]  # the Linears
    assert (out - wanted).abs().max() < 0.05 * wanted.abs().max()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("attention", ENTRIES, ids=str)
def test_parameters_of_any_dtype(attention: Any, dtype: torch.dtype) -> None:
    model = awake(build(attention=attention))
    wanted = model(*inputs(model))
    out = model.to(dtype)(*inputs(model))
    assert out.dtype == dtype
    assert (out.float() - wanted).abs().max() < (
        0.05 if dtype == torch.bfloat16 else 1e-4
    ) * wanted.abs().max()


@pytest.mark.slow  # test_compiling.py: compiled tasks train alike
@pytest.mark.parametrize("attention", ENTRIES, ids=str)
def test_compiled_as_one_graph_it_gives_the_same(attention: Any) -> None:
    model = awake(build(attention=attention, depth=1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs(model)), model(*inputs(model)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", [*ATTENTION, HYBRID], ids=str)
def test_every_operator_trains_on_the_tiny_size(attention: Any) -> None:
    """Two steps on one batch; the output starts at zero, so only the head moves in the first, and every
    parameter by the second.
    """
    torch.manual_seed(0)
    model: Any = backbones.build_backbone("wan_tiny", attention=attention, input_size=(4, 16, 16))
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    x, t, text = inputs(model)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(3):
        loss = (model(x, t, text) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert still == []


def test_no_weight_decay_names_are_mixing_matrices_and_modulations() -> None:
    model = build(attention=["softmax", "mhla"], depth=2)
    names = {
        "blocks.0.modulation",
        "blocks.1.modulation",
        "head.modulation",
        "blocks.1.attn.attention.mixing.weight",
    }
    assert model.no_weight_decay() == names
    assert names <= dict(model.named_parameters()).keys()
