"""The convolutional classifier: the Backbone protocol, timm's methods, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning import backbones
from mhla_lightning.config.recipes import apply_overrides, load_recipe
from mhla_lightning.config.resolve import resolve
from mhla_lightning.errors import UserError
from tests.helpers.errors import refused

SIZES = pytest.mark.parametrize(
    ("img_size", "grid"), [(28, (7, 7)), (32, (8, 8)), ((30, 45), (8, 12)), (5, (2, 2))], ids=str
)


def build(**options: Any) -> Any:
    return backbones.build_backbone(
        "convnet_tiny", attention="none", **{"num_classes": 10, "widths": (4, 6, 8), **options}
    )


@SIZES
def test_shapes_grid_and_flops(img_size: int | tuple[int, int], grid: tuple[int, int]) -> None:
    model = build(img_size=img_size).eval()
    image = torch.randn(2, 3, *((img_size, img_size) if isinstance(img_size, int) else img_size))
    assert model.grid == grid
    assert model.forward_features(image).shape == (2, 8, *grid)
    with FlopCounterMode(display=False) as counter:
        assert model(image).shape == (2, 10)
    assert counter.get_total_flops() == 2 * model.flops(model.grid)


def test_the_head_is_linear_on_what_stands_before_it() -> None:
    """`pre_logits` are the features of FD: the average of the last stage, and all that the classes are
    read from.
    """
    model = build().eval()
    last = model.forward_features(torch.randn(3, 3, 28, 28))
    pooled = model.forward_head(last, pre_logits=True)
    torch.testing.assert_close(pooled, last.mean((2, 3)))
    torch.testing.assert_close(pooled @ model.head.fc.weight.T + model.head.fc.bias, model.forward_head(last))


def test_synchronised_normalisation_keeps_the_activations() -> None:
    """torch's converter puts its own norms into the places of timm's."""
    model, image = build().eval(), torch.randn(2, 3, 28, 28)
    expected = model(image)
    converted: Any = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.testing.assert_close(converted.eval()(image), expected)


def test_every_parameter_learns_and_own_weights_come_back() -> None:
    model, other = build(), build()
    model(torch.randn(4, 3, 28, 28)).square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters()
    )
    other.load_state_dict(other.adapt_state_dict(model.state_dict()))
    image = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(other.eval()(image), model.eval()(image))
    assert model.no_weight_decay() == set()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"img_size": 3}, "img_size"),
        ({"widths": [8, 16]}, "widths"),
        ({"widths": [8, 0, 16]}, "widths"),
        ({"depth": 4}, "depth"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], key: str) -> None:
    with refused(key):
        build(**options)


@pytest.mark.parametrize("attention", ["mhla", "softmax", {"name": "mhla"}, ["mhla"]], ids=str)
def test_an_attention_is_refused_and_not_ignored(attention: Any) -> None:
    with refused("attention"):
        backbones.build_backbone("convnet_tiny", attention=attention)


def test_the_recipe_refuses_attention_checkpointing_and_another_flop_grid() -> None:
    values = load_recipe("classification/convnet_mnist_cpu").values
    task = resolve(values).task
    assert task.parameter_count < 100_000
    with pytest.raises(UserError) as error:
        resolve(apply_overrides(values, {"model.attention": "mhla"}))
    assert "attention" in str(error.value)
    with refused("model.checkpoint_activations"):
        resolve(apply_overrides(values, {"model.checkpoint_activations": "blocks"}))
    with refused("shape"):
        build().flops((8, 8))
