"""Weights of a model of another grid: positions, mixing matrices and everything else that has a place."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mhla_lightning.attention import BlockGrid, CausalSelfAttention
from mhla_lightning.attention.mhla.relative import average_by_offset, offset_deviation
from mhla_lightning.backbones import build_backbone
from mhla_lightning.backbones.layers import grid_sinusoid
from mhla_lightning.backbones.resampling import resampled_mixing
from mhla_lightning.weights.adapted import DoubtfulWeights
from tests.helpers.errors import refused

NAME = "blocks.0.attn.attention.mixing.weight"
LM = {"vocab_size": 11, "embed_dim": 32, "depth": 1, "context": 64}
VIDEO = {"embed_dim": 24, "ffn_dim": 16, "depth": 1, "text_dim": 8, "freq_dim": 8}


def vit(grid: Sequence[int], blocks: Any = 2, **options: Any) -> Any:
    attention = {"name": "mhla", "blocks": blocks, **options}
    sizes = {"img_size": [4 * grid[0], 4 * grid[1]], "patch_size": 4, "token_multiple": 1}
    small: dict[str, Any] = {"embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    return build_backbone("deit_tiny", attention=attention, **sizes, **small)


def dit(size: Sequence[int], blocks: Any = 2, **options: Any) -> Any:
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "input_size": size} | options
    return build_backbone("dit_s2", attention={"name": "mhla", "blocks": blocks}, **sizes)


def video(size: Sequence[int], blocks: Sequence[int], **options: Any) -> Any:
    sizes = {**VIDEO, "input_size": size, "blocks": blocks, **options}
    return build_backbone("wan_tiny", attention="mhla", **sizes)


def lm(**options: Any) -> Any:
    return build_backbone("lm_tiny", attention={"name": "mhla", "max_chunks": 4, **options}, **LM)


def smooth(grid: Sequence[int], channels: int) -> Tensor:
    """Positions that differ along both axes, (1, tokens, channels)."""
    row, column = (torch.arange(float(n)) / n for n in grid)
    phase = torch.arange(float(channels))
    return torch.sin(3 * row[:, None, None] + phase) * torch.cos(4 * column[:, None] - phase / 2)


def by_pillow(table: Tensor, grid: Sequence[int]) -> Tensor:
    """Bicubic resampling by another library, channel by channel."""
    planes = [
        np.asarray(Image.fromarray(plane.numpy()).resize((grid[1], grid[0]), Image.Resampling.BICUBIC))
        for plane in table.permute(2, 0, 1).contiguous()
    ]
    return torch.from_numpy(np.stack(planes, -1)).flatten(0, 1)[None]


GRIDS = [((8, 16), (16, 16)), ((8, 16), (4, 32)), ((16, 16), (8, 32)), ((3, 10), (6, 4))]


@pytest.mark.parametrize(("before", "after"), GRIDS, ids=str)
@pytest.mark.parametrize("door", ["state dict", "file", "told"])
def test_positions_are_resampled_from_their_own_grid(
    before: tuple[int, int], after: tuple[int, int], door: str
) -> None:
    """Equal counts of another shape, too; a state dict keeps its grid, also through a file of torch."""
    source, model = vit(before, [1, 1]), vit(after, [1, 1])
    table = smooth(before, 16)
    with torch.no_grad():
        source.pos_embed.copy_(table.flatten(0, 1)[None])
    state, grid = source.state_dict(), None
    if door == "file":
        file = io.BytesIO()
        torch.save(state, file)
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    if door == "told":
        state, grid = dict(state), before
    adapted = model.adapt_state_dict(state, grid)
    torch.testing.assert_close(adapted["pos_embed"], by_pillow(table, after), rtol=0, atol=1e-4)
    assert adapted.resampled.keys() == {"pos_embed"}
    model.load_state_dict(adapted)


def test_class_and_register_tokens_come_before_the_grid() -> None:
    model = vit((4, 8), [1, 1])
    for names, rows in (((), 0), (("cls_token",), 1), (("cls_token", "dist_token"), 2)):
        table = smooth((8, 4), 16).flatten(0, 1)[None]
        state = {"pos_embed": torch.cat([torch.full((1, rows, 16), 9.0), table], 1)}
        state |= {name: torch.zeros(1, 1, 16) for name in names}
        found = model.adapt_state_dict(state, grid=(8, 4))["pos_embed"]
        torch.testing.assert_close(found, by_pillow(smooth((8, 4), 16), (4, 8)), rtol=0, atol=1e-4)
    with refused("grid"):
        model.adapt_state_dict(state, grid=(5, 5))
    with refused("grid"):
        model.adapt_state_dict(state, grid=(0, 4))


@pytest.mark.parametrize(("before", "after"), [((8, 16), (16, 16)), ((8, 16), (4, 32)), ((8, 8), (4, 16))])
def test_positions_of_an_unknown_grid_are_left_out_and_said(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    model = vit(after, [1, 1])
    with pytest.warns(DoubtfulWeights, match="pos_embed: nothing tells the token grid"):
        adapted = model.adapt_state_dict(dict(vit(before, [1, 1]).state_dict()))
    assert "pos_embed" not in adapted
    assert adapted.omitted.keys() == {"pos_embed"}


def test_positions_that_fit_a_square_are_taken_and_said() -> None:
    source = vit((4, 4), [1, 1])
    with pytest.warns(DoubtfulWeights, match="taken as the 4 x 4"):
        adapted = vit((4, 4), [1, 1]).adapt_state_dict(dict(source.state_dict()))
    assert torch.equal(adapted["pos_embed"], source.pos_embed)


def test_weights_of_the_same_grid_are_taken_as_they_are() -> None:
    for model in (vit((2, 6), [1, 3]), dit([4, 8], [1, 2]), video((2, 8, 8), (1, 2, 2)), lm()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            state = model.state_dict()
            adapted = model.adapt_state_dict(state)
        assert adapted.keys() == state.keys()
        assert all(adapted[name] is value for name, value in state.items())
        assert not adapted.resampled


LAYOUTS = [
    ((8, 8), (2, 8), (8, 8), (4, 4)),
    ((8, 8), (2, 2), (16, 16), (4, 4)),
    ((8, 16), (4, 4), (16, 4), (2, 2)),
    ((7, 9), (3, 2), (10, 10), (4, 3)),  # short last blocks
    ((4, 8, 8), (1, 2, 4), (2, 4, 4), (2, 2, 2)),
]


@pytest.mark.parametrize(("grid", "blocks", "other_grid", "other"), LAYOUTS, ids=str)
def test_a_mixing_matrix_is_resampled_by_block_centres(
    grid: Sequence[int], blocks: Sequence[int], other_grid: Sequence[int], other: Sequence[int]
) -> None:
    source, target = BlockGrid(grid, list(blocks)), BlockGrid(other_grid, list(other))

    def centres(of: BlockGrid) -> list[np.ndarray]:
        """Mean place of the tokens of each block, along each axis."""
        found = []
        for axis, tokens in enumerate(of.grid):
            block = np.arange(tokens) // of.block_size[axis]
            places = (np.arange(tokens) + 0.5) / tokens
            found.append(np.array([places[block == b].mean() for b in range(of.blocks[axis])]))
        return found

    rng = np.random.default_rng(0)
    known, wanted = centres(source), centres(target)
    rows, columns = ([rng.random(count) for count in source.blocks] for _ in range(2))

    def line(parts: Sequence[np.ndarray]) -> np.ndarray:
        out = np.ones(1)
        for part in parts:
            out = np.kron(out, part)
        return out

    between = [
        line([np.interp(w, k, values) for w, k, values in zip(wanted, known, half, strict=True)])
        for half in (rows, columns)
    ]
    given = torch.from_numpy(np.outer(line(rows), line(columns)))
    right = torch.from_numpy(np.outer(*between))
    for mixing in (given, torch.stack([given, 2 * given])):
        scale = torch.ones(1) if mixing.dim() == 2 else torch.tensor([[[1.0]], [[2.0]]])
        torch.testing.assert_close(resampled_mixing(mixing, source, target), right * scale)


@pytest.mark.parametrize("family", ["vit", "vit per head", "dit", "video"])
def test_models_of_other_blocks_take_resampled_matrices(family: str) -> None:
    """Equal counts, too: 2 x 8 blocks are as many as 4 x 4."""
    heads = {"mix_per_head": True} if family == "vit per head" else {}
    source, model = {
        "vit": lambda: (vit((8, 8), [2, 8]), vit((8, 8), [4, 4])),
        "vit per head": lambda: (vit((8, 8), [2, 2], **heads), vit((8, 8), [4, 4], **heads)),
        "dit": lambda: (dit([16, 16], [2, 8]), dit([16, 16], [4, 4])),
        "video": lambda: (video((4, 16, 16), (1, 4, 2)), video((8, 16, 16), (2, 2, 2))),
    }[family]()
    name = "blocks.0.attn.attention.mixing.weight"
    adapted = model.adapt_state_dict(source.state_dict())
    assert name in adapted.resampled
    layers = (m.blocks[0].attn.attention for m in (source, model))
    right = resampled_mixing(source.state_dict()[name], *(layer.grid for layer in layers))
    torch.testing.assert_close(adapted[name], right)
    model.load_state_dict(adapted)
    plain = {name: torch.zeros_like(model.state_dict()[name])}
    with pytest.warns(DoubtfulWeights, match="nothing tells the layout of its"):
        assert name in model.adapt_state_dict(plain)


RELATIVE: dict[str, Any] = {"blocks": None, "block_size": 2, "mix_form": "relative"}


def test_weights_by_offset_serve_a_larger_grid_as_they_are() -> None:
    """Four times the tokens in blocks of the same size: the same weights, and the outermost beyond them."""
    source, model = vit((6, 4), **RELATIVE), vit((12, 8), **RELATIVE)
    weight = source.blocks[0].attn.attention.mixing.weight
    torch.nn.init.uniform_(weight)
    adapted = model.adapt_state_dict(source.state_dict())
    model.load_state_dict(adapted)
    mixing = model.blocks[0].attn.attention.mixing
    assert torch.equal(mixing.matrix(), source.blocks[0].attn.attention.mixing.matrix((6, 4)))
    assert adapted.resampled[NAME] == "3 x 2 to 6 x 4 blocks"
    source.set_input_size((48, 32))  # timm's way to the same
    torch.testing.assert_close(source.blocks[0].attn.attention.mixing.weight, mixing.weight)


def test_an_absolute_matrix_becomes_weights_by_offset_and_the_change_is_told() -> None:
    source, model = vit((6, 4), None, block_size=2), vit((6, 4), **RELATIVE)
    matrix = source.blocks[0].attn.attention.mixing.matrix()
    weights = average_by_offset(matrix, (3, 2))
    deviation = offset_deviation(matrix, weights, (3, 2))
    adapted = model.adapt_state_dict(source.state_dict())
    torch.testing.assert_close(adapted[NAME], weights.expand(2, -1))
    assert adapted.resampled[NAME].endswith(f"which changes weights by up to {deviation:.2g}")
    assert 0.05 < deviation < 1
    model.load_state_dict(adapted)
    back = vit((6, 4), None, block_size=2, mix_per_head=True).adapt_state_dict(model.state_dict())
    torch.testing.assert_close(back[NAME], model.blocks[0].attn.attention.mixing.matrix())
    other = vit((12, 8), 4, mix_form="relative").adapt_state_dict(source.state_dict())
    layers = [each.blocks[0].attn.attention.grid for each in (source, vit((12, 8), 4))]
    expected = average_by_offset(resampled_mixing(matrix, *layers), (4, 4))
    torch.testing.assert_close(other[NAME], expected.expand(2, -1))


def test_plain_loading_of_the_other_form_names_both_and_the_way() -> None:
    relative, absolute = vit((6, 4), **RELATIVE), vit((6, 4), None, block_size=2)
    for model, source, words in (
        (relative, absolute, "the absolute form of mixing, (6, 6), and this model the relative one, (2, 15)"),
        (absolute, relative, "the relative form of mixing, (2, 15), and this model the absolute one, (6, 6)"),
    ):
        for strict in (True, False):
            with refused(NAME) as error:
                model.load_state_dict(source.state_dict(), strict=strict)
            assert words in str(error.value)
            assert "model.load_state_dict(model.adapt_state_dict(state))" in str(error.value)
        model.load_state_dict(model.state_dict())
    assert "with `mix_per_head` true and convert" in str(error.value)  # relative has one for each head
    relative.load_state_dict(relative.adapt_state_dict(absolute.state_dict()))
    each = vit((6, 4), None, block_size=2, mix_per_head=True)
    each.load_state_dict(each.adapt_state_dict(relative.state_dict()))
    layers = [
        CausalSelfAttention(16, attention={"name": "mhla", "heads": 2, "max_chunks": 5, "mix_form": form})
        for form in ("absolute", "relative")
    ]
    for model, source in (layers, reversed(layers)):
        with refused("attention.mixing.weight") as error:
            model.load_state_dict(source.state_dict())
        assert "takes all others" in str(error.value)


def test_positions_of_a_formula_stay_its_own() -> None:
    """32 tokens of 4 x 8 are as many as those of 2 x 16."""
    source, model = dit([8, 16], 1), dit([4, 32], 1)
    adapted = model.adapt_state_dict(source.state_dict())
    assert adapted.omitted.keys() == {"pos_embed"}
    assert not adapted.doubts
    model.load_state_dict(adapted, strict=False)
    assert torch.equal(model.pos_embed[0], grid_sinusoid((2, 16), 16))
    half = {name: value.half() for name, value in source.state_dict().items()}
    assert "pos_embed" in source.adapt_state_dict(half)


def test_the_output_of_other_patches_is_left_out() -> None:
    """4 x 4 latents of 1 channel are as many numbers as 2 x 2 of 4."""
    source = dit([16, 16], patch_size=4, in_channels=1)
    model = dit([16, 16], patch_size=2, in_channels=4)
    with pytest.warns(
        DoubtfulWeights, match="final_layer.linear.weight and 1 more: its patches are 1 x 4 x 4"
    ):
        adapted = model.adapt_state_dict(source.state_dict())
    assert {"final_layer.linear.weight", "final_layer.linear.bias"} <= adapted.omitted.keys()
    source = video((2, 16, 16), (1, 2, 2), patch_size=(1, 4, 4), in_channels=1)
    other = video((2, 16, 16), (1, 2, 2), patch_size=(1, 2, 2), in_channels=4)
    with pytest.warns(DoubtfulWeights, match="head.head.weight and 1 more"):
        adapted = other.adapt_state_dict(source.state_dict())
    assert "head.head.weight" in adapted.omitted


def test_chunks_of_another_size_are_left_out() -> None:
    source = lm(chunk_size=16)
    with pytest.warns(DoubtfulWeights, match="chunks are 16 tokens, and here 8"):
        adapted = lm(chunk_size=8).adapt_state_dict(source.state_dict())
    name = "layers.0.attn.attention.mixing.weight"
    assert adapted.omitted.keys() == {name}
    assert name in lm(chunk_size=16).adapt_state_dict(source.state_dict())


def test_an_output_that_is_not_the_embedding_is_said() -> None:
    state = dict(lm().state_dict())
    same = lm().adapt_state_dict({**state, "lm_head.weight": state["embeddings.weight"].clone()})
    assert same.omitted
    assert not same.doubts
    with pytest.warns(DoubtfulWeights, match="lm_head.weight"):
        lm().adapt_state_dict({**state, "lm_head.weight": torch.ones(11, 32)})


MODELS = {
    "vit": lambda: vit((4, 4)),
    "dit": lambda: dit([8, 8]),
    "video": lambda: video((2, 16, 16), (1, 2, 2)),
    "lm": lm,
    "convnet": lambda: build_backbone("convnet_tiny", attention="none", num_classes=3, widths=[4, 4, 4]),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(family: str, value: float) -> None:
    model = MODELS[family]()
    state = model.state_dict()
    name = [key for key, tensor in state.items() if tensor.is_floating_point() and tensor.dim()][-1]
    state[name] = state[name].clone()
    state[name].view(-1)[0] = value
    with refused("state") as error:
        model.adapt_state_dict(state)
    assert name in str(error.value)
    state = model.state_dict()
    state["of_another.mask"] = torch.full((2,), value)
    assert model.adapt_state_dict(state).keys() == state.keys()


def test_quantised_weights_are_left_out() -> None:
    model = lm()
    name = "layers.0.mlp.up_proj.weight"
    state = model.state_dict()
    state[name] = torch.ones_like(state[name], dtype=torch.int8)
    with pytest.warns(DoubtfulWeights, match="int8"):
        assert name in model.adapt_state_dict(state).omitted
