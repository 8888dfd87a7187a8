"""`cross_attention: mhla` in SANA and Wan: against dense matrices, padded texts, sizes, weights, mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.attention import BlockGrid, MHLACrossAttention, dense_cross_mhla
from mhla_lightning.backbones.text_attention import CROSS_ATTENTION
from mhla_lightning.tasks.projection import mixing_matrices
from mhla_lightning.weights.warm_start import load_matching
from tests.helpers import sana_models, video_models
from tests.helpers.errors import refused
from tests.helpers.video_models import awake, inputs

BUILD: dict[str, Callable[..., Any]] = {"sana": sana_models.build, "wan": video_models.build}
LARGER: dict[str, tuple[int, ...]] = {"sana": (12, 8), "wan": (7, 12, 18)}
SHORT = {"name": "mhla", "block_size": 3, "context_block_size": 4, "mix_per_head": True, "qk_norm": True}
families = pytest.mark.parametrize("family", BUILD)


def made(family: str, cross: Any = "mhla", **options: Any) -> Any:
    return awake(BUILD[family](attention="linear", cross_attention=cross, depth=2, **options))


class Dense(nn.Module):
    """The same layer by its full matrix of tokens x text rows, from the same parameters."""

    def __init__(self, layer: MHLACrossAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, context: Tensor, *, mask: Tensor | None = None, grid: Any = None) -> Tensor:
        layer, options = self.layer, self.layer.options
        q, k, v = (
            part.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for part in (layer.norm_q(layer.q(x)), layer.norm_k(layer.k(context)), layer.v(context))
        )
        blocks = BlockGrid(grid, options.blocks, block_size=options.block_size).block_of_token
        out = dense_cross_mhla(
            torch.relu(q) + options.eps,
            torch.relu(k) + options.eps,
            v,
            layer.mixing.weight,
            blocks,
            layer.keys.block_of_token,
            normalizer=options.normalizer,
            eps=options.eps,
            mask=mask,
        )
        return layer.o(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("cross", ["mhla", SHORT], ids=["defaults", "short blocks"])
@families
def test_the_model_equals_dense_matrices_in_float64(family: str, cross: Any) -> None:
    """Outputs and every gradient, with texts of unlike lengths, one of them empty."""
    model = made(family, cross).double()
    x, t, text = (value.double() for value in inputs(model))
    mask = torch.arange(6) < torch.tensor([[4], [0]])
    runs = []
    for dense in (False, True):
        if dense:
            for block in model.blocks:
                block.cross_attn = Dense(block.cross_attn)
        out = model(x, t, text, mask)
        cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
        runs.append((out, torch.autograd.grad((out * cotangent).sum(), list(model.parameters()))))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-7, atol=1e-9)
    names = [name for name, _ in model.named_parameters()]
    moved = {name for name, gradient in zip(names, runs[0][1], strict=True) if gradient.any()}
    assert {name for name in names if "cross_attn" in name} <= moved


@families
def test_a_padded_text_never_changes_results(family: str) -> None:
    """Rows of zeros, loud rows under a mask, and no rows at all behind the text are the same."""
    model = made(family)
    x, t, text = inputs(model)
    short = text[:, :3]
    wanted = model(x, t, short)
    mask = torch.arange(6).expand(2, 6) < 3
    loud = torch.where(mask[..., None], text, 1e3)
    for padded, given in ((loud, mask), (text * mask[..., None], mask)):
        torch.testing.assert_close(model(x, t, padded, given), wanted, rtol=1e-5, atol=1e-6)
    if family == "wan":  # it takes rows of zeros as padding by itself
        torch.testing.assert_close(model(x, t, text * mask[..., None]), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(x, t, text), wanted, rtol=1e-3)  # the rows do count where they are real


@families
def test_each_sample_reads_its_own_text(family: str) -> None:
    model = made(family)
    x, t, text = inputs(model)
    mask = torch.arange(6) < torch.tensor([[2], [5]])
    both = model(x, t, text, mask)
    alone = torch.cat([model(*(part[i : i + 1] for part in (x, t, text, mask))) for i in range(2)])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cross", ["softmax", {"name": "softmax"}], ids=str)
@families
def test_softmax_is_what_the_families_have(family: str, cross: Any) -> None:
    usual = awake(BUILD[family](attention="linear", depth=2))
    model = made(family, cross)
    assert list(model.state_dict()) == list(usual.state_dict())
    assert torch.equal(model(*inputs(model)), usual(*inputs(usual)))


@pytest.mark.parametrize("size", ["own", "larger", "an image"])
@families
def test_flops_are_those_that_torch_counts_at_every_size(family: str, size: str) -> None:
    if size == "an image" and family == "sana":
        return
    with torch.device("meta"):
        model = BUILD[family](attention="linear", cross_attention="mhla")
        shape = {"own": model.input_size, "larger": LARGER[family], "an image": (1, 8, 12)}[size]
        grid = tuple(n // patch for n, patch in zip(shape, model.patch_size, strict=True))
        with FlopCounterMode(display=False) as counter:
            out = model(torch.empty(1, 3, *shape), torch.empty(1), torch.empty(1, 6, 10))
    assert out.shape[2:] == shape
    assert counter.get_total_flops() == model.flops(grid)


def test_a_frame_has_the_blocks_of_the_first_frames() -> None:
    model = made("wan")
    (layer,) = {block.cross_attn for block in model.blocks[:1]}
    x, text = torch.randn(1, 24, 24), torch.randn(1, 6, 24)
    alone = layer(x, text, grid=(1, 4, 6))
    video = layer(x.repeat(1, 4, 1), text)
    torch.testing.assert_close(alone, video[:, :24])
    assert not torch.allclose(video[:, :24], video[:, -24:])  # the later half mixes otherwise


@families
def test_a_size_of_other_blocks_is_refused(family: str) -> None:
    model = made(family, {"name": "mhla", "block_size": 2})
    model.check_size(model.input_size)
    with refused("shape"):
        model.check_size(LARGER[family])


@families
def test_it_trains_and_its_matrices_are_projected(family: str) -> None:
    """Recomputed activations give the same losses; every parameter moves by the third step."""
    runs = []
    for how in ("none", "blocks", "attention"):
        torch.manual_seed(0)
        model = BUILD[family](attention="mhla", cross_attention="mhla", depth=1)
        model.keep_activations(how)
        before = {name: value.clone() for name, value in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
        x, t, text = inputs(model)
        losses = []
        for _ in range(3):
            loss = (model(x, t, text) - x.roll(1, 0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert [name for name, value in model.named_parameters() if torch.equal(value, before[name])] == []
        runs.append(losses)
    assert runs[0][0] > runs[0][2]
    assert runs[0] == runs[1] == runs[2]
    assert len(mixing_matrices(model)) == 2
    name = "blocks.0.cross_attn.mixing.weight"
    assert name in model.no_weight_decay()
    model.get_parameter(name).data.fill_(2.0)
    for matrix in mixing_matrices(model):
        matrix.project_()
    assert (model.get_parameter(name) == 1).all()


@families
def test_softmax_weights_start_everything_but_the_mixing(family: str, tmp_path: Any) -> None:
    softmax, model = (
        made(family, "softmax"),
        BUILD[family](attention="linear", cross_attention="mhla", depth=2),
    )
    report = load_matching(model, model.adapt_state_dict(softmax.state_dict()), tmp_path)
    assert report.fresh == [f"blocks.{i}.cross_attn.mixing.weight" for i in range(2)]
    assert not report.left
    assert "2 new here (blocks.0.cross_attn.mixing.weight, " in str(report)


@families
def test_a_mixing_matrix_of_other_blocks_is_resampled(family: str) -> None:
    """Rows by the place in the image, columns by the number of the text's row."""
    axes = 2 if family == "sana" else 3
    source = made(family, {"name": "mhla", "blocks": [2] * axes, "context_block_size": 1})
    target = BUILD[family](
        attention="linear",
        cross_attention={"name": "mhla", "blocks": [1] * (axes - 1) + [2], "context_block_size": 3},
        depth=2,
    )
    adapted = target.adapt_state_dict(source.state_dict())
    name = "blocks.1.cross_attn.mixing.weight"
    assert set(adapted.resampled) == {f"blocks.{i}.cross_attn.mixing.weight" for i in range(2)}
    weight = source.state_dict()[name].unflatten(0, [2] * axes)
    rows = weight.flatten(0, axes - 2).mean(0)  # the middle between the blocks of an axis
    columns = torch.stack([rows[:, 1], rows[:, 4]], 1)  # the middle of rows 0 to 2, and 3 to 5
    torch.testing.assert_close(adapted[name], columns)
    longer = BUILD[family](
        attention="linear",
        cross_attention={"name": "mhla", "blocks": [2] * axes, "context_block_size": 1},
        depth=2,
        text_length=8,
    )
    placed = longer.adapt_state_dict(source.state_dict())[name]
    torch.testing.assert_close(placed[:, :6], source.state_dict()[name])
    torch.testing.assert_close(placed[:, 6:], placed[:, 5:6].expand(-1, 2))  # beyond the end the last row


@pytest.mark.parametrize(
    ("cross", "key"),
    [
        ("mlha", "cross_attention.name"),
        ({"blocks": 2}, "cross_attention.name"),
        (["mhla"], "cross_attention"),
        (None, "cross_attention"),
        ({"name": "softmax", "blocks": 2}, "cross_attention.blocks"),
        ({"name": "mhla", "grid": 2}, "cross_attention.grid"),
        ({"name": "mhla", "blocks": 2, "block_size": 2}, "cross_attention.blocks"),
        ({"name": "mhla", "blocks": 7}, "cross_attention.blocks"),
        ({"name": "mhla", "context_blocks": 4}, "cross_attention.context_blocks"),
        ({"name": "mhla", "mix_init": "local_row"}, "cross_attention.mix_init"),
    ],
    ids=str,
)
@families
def test_mistakes_are_refused_by_their_key(family: str, cross: Any, key: str) -> None:
    with refused(key):
        BUILD[family](cross_attention=cross)


@pytest.mark.parametrize("cross", CROSS_ATTENTION)
@families
def test_a_mask_that_is_not_bool_or_of_another_shape_is_refused(family: str, cross: str) -> None:
    """A float mask would be added to scores here and multiply keys there."""
    model = made(family, cross)
    for mask in (torch.ones(2, 6), torch.ones(2, 6, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool)):
        with refused("text_mask"):
            model(*inputs(model), mask)
