"""The vision linear transformer: its numbers, its stages, and what timm's users do with it."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.attention import ATTENTION, MHLA, Linear, Softmax
from mhla_lightning.backbones import IMAGE_CLASSIFIERS, VLT, build_backbone
from mhla_lightning.backbones.layers import ImageRotation
from mhla_lightning.backbones.vlt_layers import VLTBlock
from mhla_lightning.backbones.vlt_options import VLTOptions, resolve_stages
from tests.helpers.classifiers import TINY_VLT
from tests.helpers.dense_vlt import dense_block
from tests.helpers.errors import refused

SIZES = [name for name in IMAGE_CLASSIFIERS if name.startswith("vlt_")]
DEEP = pytest.mark.slow  # 28 and 38 layers take 4 s each to build and count
RALA = {"name": "linear", "preset": "ravlt"}
ENTRIES: list[Any] = [*ATTENTION, RALA, ["mhla", ["linear", "mhla"], "softmax", "mhla"]]


def tiny(attention: Any = "mhla", **options: Any) -> Any:
    """Untyped on purpose: the tests look inside."""
    torch.manual_seed(0)
    return build_backbone("vlt_tiny", attention=attention, **{**TINY_VLT, **options})


def images(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "parameters", "millions", "billions"),
    [
        ("vlt_tiny", 14_903_082, 15, 2.4),
        ("vlt_small", 25_599_691, 26, 4.6),
        pytest.param("vlt_base", 48_252_428, 48, 9.9, marks=DEEP),
        pytest.param("vlt_large", 95_253_836, 95, 16.0, marks=DEEP),
    ],
)
def test_sizes_are_those_that_ravlt_publishes(
    name: str, parameters: int, millions: float, billions: float
) -> None:
    """RAVLT's published multiply-adds are those of its convolutions and linear layers: our products of
    attention come on top, and mixing matrices are all that MHLA adds to its parameters.
    """
    with torch.device("meta"):
        model: Any = build_backbone(name).eval()
        image = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        assert model(image).shape == (1, 1000)
    counted = counter.get_flop_counts()["Global"]
    layers = counted[torch.ops.aten.convolution] + counted[torch.ops.aten.addmm]
    assert counter.get_total_flops() == model.flops(model.grid)
    assert layers / 2e9 == pytest.approx(billions, rel=0.03)
    count = sum(parameter.numel() for parameter in model.parameters())
    mixing = sum(2401 if number < 1 else 256 for number in range(2) for _ in model.stages[number].blocks)
    assert count == parameters == pytest.approx(millions * 1e6, rel=0.03)
    with torch.device("meta"):
        plain = build_backbone(name, attention="linear")
    assert count - sum(parameter.numel() for parameter in plain.parameters()) == mixing


@pytest.mark.parametrize("attention", ENTRIES, ids=str)
@pytest.mark.parametrize("size", [(28, 28), (50, 77)], ids=str)
def test_flops_are_those_that_torch_counts(attention: Any, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = tiny(attention, img_size=size).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *size, device="meta"))
    assert counter.get_total_flops() == model.flops(model.grid)


@pytest.mark.parametrize(
    ("entry", "features", "reweighted", "blocks"),
    [
        ("softmax", "softmax", False, None),
        ("linear", "relu_eps", False, None),
        (RALA, "elu", True, None),
        ({"name": "mhla", "blocks": [2, 4]}, "relu_eps", False, (2, 4)),
        ({"name": "mhla", "preset": "ravlt", "blocks": [3, 2]}, "elu", True, (3, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("grid", "dim", "heads"), [((5, 7), 12, 3), ((6, 4), 24, 2)], ids=str)
def test_a_block_equals_its_dense_restatement(
    entry: Any, features: str, reweighted: bool, blocks: Any, grid: tuple[int, int], dim: int, heads: int
) -> None:
    spec = resolve_stages([entry, entry, entry, entry], sized(grid))[0][0]
    block = VLTBlock(dim, heads, spec, grid, mlp_ratio=1.5, layer_scale=1.0, drop_path=0.0).double()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in block.named_parameters():
        low, high = (0.1, 1.0) if "mixing" in name else (-0.7, 0.7)
        torch.nn.init.uniform_(parameter, low, high, generator=generator)
    x = torch.randn(2, grid[0] * grid[1], dim, dtype=torch.float64, generator=generator).requires_grad_()
    weights = dict(block.named_parameters())
    out = block(x, ImageRotation(grid, dim // heads, x.device))
    dense = dense_block(x, weights, grid, heads, features=features, reweighted=reweighted, blocks=blocks)
    torch.testing.assert_close(out, dense, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn(out.shape, dtype=out.dtype, generator=generator)
    wanted = [x, *weights.values()]
    pairs = zip(
        torch.autograd.grad(out, wanted, cotangent),
        torch.autograd.grad(dense, wanted, cotangent),
        strict=True,
    )
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def sized(grid: tuple[int, int]) -> VLTOptions:
    """Options whose first stage has this grid."""
    options = VLTOptions(img_size=(4 * grid[0], 4 * grid[1]))
    assert options.grids[0] == grid
    return options


def operators(model: Any) -> list[list[type]]:
    return [[type(block.attn.attention) for block in stage.blocks] for stage in model.stages]


def test_a_name_is_the_papers_and_a_list_has_an_entry_a_stage() -> None:
    depths = {"depths": [2, 3, 2, 1]}
    assert operators(tiny("mhla", **depths)) == [[MHLA] * 2, [MHLA] * 3, [Softmax] * 2, [Softmax]]
    mixed = ["softmax", ["mhla", {"name": "mhla", "block_size": 3}, "linear"], ["linear"], "mhla"]
    model = tiny(mixed, **depths)
    assert operators(model) == [[Softmax] * 2, [MHLA, MHLA, Linear], [Linear] * 2, [MHLA]]
    assert [block.attn.attention.grid.blocks for block in model.stages[1].blocks[:2]] == [(2, 2), (2, 2)]
    assert model(images(28, 28)).shape == (2, 5)


def test_blocks_are_the_papers_at_224_and_few_enough_elsewhere() -> None:
    """SPEC 3.2: 49 and 16 blocks; M^2 <= N on every axis."""
    for size, expected in (
        ((224, 224), [(7, 7), (4, 4), (3, 3), (2, 2)]),
        ((384, 512), [(7, 7), (4, 4), (3, 3), (2, 2)]),
        ((28, 28), [(2, 2), (2, 2), (1, 1), (1, 1)]),
    ):
        with torch.device("meta"):
            model: Any = build_backbone("vlt_tiny", attention=["mhla"] * 4, img_size=size)
        found = [stage.blocks[0].attn.attention.grid for stage in model.stages]
        assert [made.blocks for made in found] == expected
        assert all(made.num_blocks**2 <= made.tokens for made in found)


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, "mhla") for name in SIZES), ("vlt_tiny", "linear"), ("vlt_tiny", "softmax")],
)
def test_features_only_gives_four_maps(name: str, attention: str) -> None:
    size = (64, 96)
    options: dict[str, Any] = {**TINY_VLT, "img_size": size}
    torch.manual_seed(0)
    model: Any = timm.create_model(f"{name}_{attention}", features_only=True, **options).eval()
    maps = model(images(*size))
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.channels() == list(TINY_VLT["embed_dims"])
    for found, stride, channels in zip(maps, (4, 8, 16, 32), TINY_VLT["embed_dims"], strict=True):
        assert found.shape == (2, channels, size[0] // stride, size[1] // stride)
    torch.manual_seed(0)
    whole: Any = timm.create_model(f"{name}_{attention}", **options).eval()
    last, all_maps = whole.forward_intermediates(images(*size))
    torch.testing.assert_close(whole.forward_head(last), whole(images(*size)))
    for found, expected in zip(maps, all_maps, strict=True):
        torch.testing.assert_close(found, expected)


def test_features_of_some_stages_leave_the_others_out() -> None:
    model: Any = timm.create_model("vlt_tiny_mhla", features_only=True, out_indices=(0, -3), **TINY_VLT)
    assert model.feature_info.reduction() == [4, 8]
    assert len(model.model.stages) == 2
    assert [found.shape[1] for found in model(images(28, 28))] == list(TINY_VLT["embed_dims"][:2])
    with refused("indices"):
        timm.create_model("vlt_tiny_mhla", features_only=True, out_indices=(4,), **TINY_VLT)
    with refused("output_fmt"):
        tiny().forward_intermediates(images(28, 28), output_fmt="NLC")


def blocks_of(model: Any) -> list[tuple[int, ...]]:
    return [stage.blocks[0].attn.attention.grid.blocks for stage in model.stages[:2]]


def test_another_input_size_resamples_the_mixing() -> None:
    model = tiny(img_size=(64, 64)).double().eval()
    x = images(64, 64).double()
    before = model(x)
    assert blocks_of(model) == [(4, 4), (2, 2)]
    model.set_input_size(64)
    assert torch.equal(model(x), before)  # the same size changes nothing
    model.set_input_size((100, 144))
    assert model.grid == (25, 36)
    assert blocks_of(model) == [(5, 6), (3, 4)]
    other = images(100, 144, seed=2).double()
    fresh = tiny(img_size=(100, 144)).double().eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(other), model(other))
    adapted = tiny(img_size=(100, 144)).double().eval()
    source = tiny(img_size=(64, 64)).double().eval()
    found = adapted.adapt_state_dict(source.state_dict())
    assert set(found.resampled) == {name for name in found if name.endswith("mixing.weight")}
    adapted.load_state_dict(found)
    torch.testing.assert_close(adapted(other), model(other))
    with refused("x"):
        model(x)


def test_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for how in ("none", "blocks", "attention", "offload"):
        model = tiny()
        model.keep_activations(how)
        model(images(28, 28)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, gradients[0], strict=True))


def test_blocks_compile_without_graph_breaks() -> None:
    model, x = tiny().eval(), images(28, 28)
    expected = model(x)
    model.compile_parts("blocks", lambda block: block.compile(backend="eager", fullgraph=True))
    torch.testing.assert_close(model(x), expected)


def test_only_mixing_matrices_are_named_as_not_decayed() -> None:
    model = tiny()
    assert model.no_weight_decay() == {
        f"stages.{number}.blocks.0.attn.attention.mixing.weight" for number in range(2)
    }


def test_the_head_is_replaced() -> None:
    model, x = tiny().eval(), images(28, 28)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert model.get_classifier() is model.head.fc
    torch.testing.assert_close(model.head.fc(features), model(x))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features)
    model.reset_classifier(7, "max")
    assert model(x).shape == (2, 7)
    with refused("global_pool"):
        model.reset_classifier(3, "token")
    with refused("global_pool"):
        model.reset_classifier(3, "")
    assert model(x).shape == (2, 7)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"attention": ["mhla", "mhla"]}, "attention"),
        ({"attention": []}, "attention"),
        ({"attention": ["mhla", "mhla", [], "softmax"]}, "attention.2.name"),
        ({"attention": ["mhla", "mlha", "softmax", "softmax"]}, "attention.1.name"),
        ({"attention": [{"name": "mhla", "blocks": 5}, "mhla", "mhla", "mhla"]}, "attention.0.blocks"),
        ({"attention": {"name": "mhla", "blocks": 5}}, "attention.blocks"),
        ({"attention": {"name": "mhla", "preset": "release"}}, "attention.preset"),
        ({"attention": {"name": "mhla", "gate": "silu"}}, "attention.gate"),
        ({"img_size": 3}, "img_size"),
        ({"embed_dims": [8, 8, 8]}, "embed_dims"),
        ({"embed_dims": 8}, "embed_dims"),
        ({"depths": [1, 0, 1, 1]}, "depths"),
        ({"num_heads": [1, 1, 1, 5]}, "num_heads"),
        ({"num_heads": [1, 1, 1, 4], "embed_dims": [8, 8, 8, 8]}, "num_heads"),
        ({"global_pool": "token"}, "global_pool"),
        ({"patch_size": 4}, "patch_size"),
    ],
    ids=str,
)
def test_wrong_options_are_one_clear_sentence(options: dict[str, Any], key: str) -> None:
    with refused(key) as error:
        tiny(**options)
    assert "\n" not in str(error.value)


def test_one_image_of_one_token_cannot_be_normalised() -> None:
    model = tiny()
    with refused("x"):
        model(images(28, 28)[:1])
    assert model.eval()(images(28, 28)[:1]).shape == (1, 5)


def test_synchronised_normalisation_keeps_the_activations() -> None:
    """torch's converter replaces timm's layers, which may hold an activation of their own."""
    model, x = tiny().eval(), images(28, 28)
    expected = model(x)
    converted: Any = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    torch.testing.assert_close(converted(x), expected)
    assert isinstance(converted, VLT)
