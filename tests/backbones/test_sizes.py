"""One model on samples of several sizes: the same numbers as a model that is built for each size."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mhla_lightning.backbones import build_backbone
from mhla_lightning.backbones.compiling import Compilation
from mhla_lightning.backbones.dit import DiT
from mhla_lightning.backbones.vit import VisionTransformer
from tests.helpers.compiled import compiled_counts
from tests.helpers.errors import refused
from tests.helpers.sana_models import build as sana

RELATIVE = {"name": "mhla", "block_size": 2, "mix_form": "relative"}
GROWING = {"name": "mhla", "blocks": 2}
OPERATORS: dict[str, Any] = {
    "linear": "linear",
    "absolute": {**GROWING, "pos_conv": "lepe3"},
    "hybrid": ["softmax", {**RELATIVE, "pos_conv": "cpe3"}],
}
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 2}
OWN, OTHERS = (8, 8), ((4, 4), (8, 16), (16, 16))


def dit(attention: Any, size: tuple[int, int] = OWN, **options: Any) -> DiT:
    given = {"num_classes": 3, "in_channels": 2, **SMALL, **options}
    return cast(DiT, build_backbone("dit_s2", attention=attention, input_size=size, **given))


def deit(attention: Any, size: tuple[int, int] = OWN, **options: Any) -> VisionTransformer:
    given = {"num_classes": 3, "token_multiple": 1, **SMALL, **options}
    return cast(VisionTransformer, build_backbone("deit_tiny", attention=attention, img_size=size, **given))


def awake(model: nn.Module) -> Any:
    """Give every parameter values, also those that start at zero."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("mixing.weight"):
            parameter.data.uniform_(0, 1)
        else:
            parameter.data.normal_(0, 0.2)
    return model.eval()


def run(model: nn.Module, size: tuple[int, int], seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    if isinstance(model, DiT):
        return model(torch.randn(2, 2, *size), torch.tensor([3.0, 500.0]), torch.tensor([0, 3]))
    return model(torch.randn(2, 3, *size))


@pytest.mark.parametrize("attention", OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.parametrize("build", [dit, deit], ids=["dit", "deit"])
def test_other_sizes_give_the_numbers_of_models_built_for_them(build: Any, attention: Any) -> None:
    model = awake(build(attention))
    before = run(model, OWN)
    model.take_sizes(OTHERS)
    torch.testing.assert_close(run(model, OWN), before, rtol=0, atol=0)
    for size in OTHERS:
        alone = build(attention, size)
        state = alone.adapt_state_dict(model.state_dict(), model.geometry)
        if attention is OPERATORS["absolute"]:  # as many blocks: the matrix serves as it is
            state |= {name: value for name, value in model.state_dict().items() if "mixing" in name}
        left = alone.load_state_dict(state, strict=False)
        assert {*left.missing_keys, *left.unexpected_keys} <= {"pos_embed"}  # of DiT, which follow a formula
        torch.testing.assert_close(run(model, size), run(alone.eval(), size))
        assert model.tokens_of(size) == alone.grid
        assert model.flops(alone.grid) == alone.flops(alone.grid)


def test_learned_positions_learn_from_every_size() -> None:
    model = awake(deit(RELATIVE))
    model.take_sizes([(16, 16)])
    run(model, (16, 16)).square().sum().backward()
    found = cast(Tensor, model.pos_embed).grad
    assert found is not None
    assert (found.abs().sum(-1) > 0).all()


def test_images_are_padded_to_full_blocks_at_every_size() -> None:
    model, alone = (awake(deit(RELATIVE, size, token_multiple=2)) for size in (OWN, (8, 10)))
    model.take_sizes([(8, 10)])
    state = alone.adapt_state_dict(model.state_dict(), model.geometry)
    alone.load_state_dict(state)
    assert model.tokens_of((8, 10)) == (4, 6)
    torch.testing.assert_close(run(model, (8, 10)), run(alone, (8, 10)))


def test_a_class_token_keeps_its_place() -> None:
    model, alone = (awake(deit("softmax", size, class_token=True)) for size in (OWN, (8, 16)))
    model.take_sizes([(8, 16)])
    alone.load_state_dict(alone.adapt_state_dict(model.state_dict(), model.geometry))
    torch.testing.assert_close(run(model, (8, 16)), run(alone, (8, 16)))


ABSOLUTE = {"name": "mhla", "block_size": 2}


@pytest.mark.parametrize(
    ("model", "sizes", "key"),
    [
        (lambda: dit(ABSOLUTE), [(16, 16)], "sizes"),
        (lambda: dit("softmax"), [(9, 8)], "sizes"),
        (lambda: dit("softmax", dwconv=True), [(16, 16)], "dwconv"),
        (lambda: dit({**RELATIVE, "normalizer": "slot"}), [(8, 16), (6, 8)], "sizes"),
        (lambda: deit(ABSOLUTE), [(16, 16)], "img_size"),
        (lambda: deit("softmax"), [(9, 8)], "img_size"),
        (lambda: deit("softmax", mask_padding=True), [(16, 16)], "mask_padding"),
    ],
    ids=["blocks", "patch", "dwconv", "slot", "deit-blocks", "deit-patch", "mask"],
)
def test_a_size_that_does_not_fit_changes_nothing(model: Any, sizes: Any, key: str) -> None:
    built = model()
    with refused(key):
        built.take_sizes(sizes)
    with refused("x"):
        run(built, sizes[0])


def test_absolute_mixing_names_the_form_that_takes_any_size() -> None:
    with refused("sizes") as error:
        dit(ABSOLUTE).take_sizes([(16, 16)])
    assert "mix_form: relative" in str(error.value)


def test_sana_with_weights_by_offset_takes_sizes_of_other_blocks() -> None:
    fixed, free = (sana(attention={**entry, "block_size": 4}) for entry in (ABSOLUTE, RELATIVE))
    with refused("shape"):
        fixed.check_size((16, 12))
    assert free.check_size((16, 12)) == (16, 12)
    out = free(torch.randn(1, 3, 16, 12), torch.tensor([3.0]), torch.randn(1, 2, 10))
    assert out.shape == (1, 3, 16, 12)


@pytest.mark.slow(reason="Dynamo traces four grids: 10 s")
def test_a_compiled_model_has_at_most_one_graph_a_grid() -> None:
    model = dit(RELATIVE, depth=3)
    model.take_sizes(OTHERS)
    awake(model).requires_grad_(False)
    plain = {size: run(model, size) for size in (OWN, *OTHERS)}
    Compilation("blocks", backend="eager").apply(model)
    with compiled_counts() as counts:
        for _ in range(2):
            for size in (OWN, *OTHERS):
                torch.testing.assert_close(run(model, size), plain[size])
    assert 1 <= counts.graphs <= 1 + len(OTHERS)
    assert not counts.breaks
