"""`attention_outputs`, the hook that distillation takes: what every self-attention layer gave, in every
family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mhla_lightning.attention import SelfAttention, attention_outputs
from mhla_lightning.backbones import build_backbone
from tests.helpers.errors import refused

Inputs = tuple[torch.Tensor, ...]
WAN = {
    "input_size": (2, 8, 16),
    "embed_dim": 24,
    "ffn_dim": 40,
    "freq_dim": 16,
    "text_dim": 10,
    "depth": 3,
    "blocks": (1, 2, 2),
}


def vit() -> tuple[Any, Inputs]:
    return build_backbone("deit_tiny", img_size=32, patch_size=4, embed_dim=24, depth=3, num_classes=5), (
        torch.randn(2, 3, 32, 32),
    )


def dit() -> tuple[Any, Inputs]:
    model = build_backbone("dit_s2", input_size=16, embed_dim=24, depth=3, num_heads=3, num_classes=5)
    return model, (torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), torch.tensor([0, 5]))


def video() -> tuple[Any, Inputs]:
    model = build_backbone("wan_tiny", attention=["softmax", "mhla", "mhla"], **WAN)
    return model, (torch.randn(2, 3, 2, 8, 16), torch.tensor([3.0, 900.0]), torch.randn(2, 4, 10))


def language() -> tuple[Any, Inputs]:
    return build_backbone("lm_tiny", depth=3, context=128), (torch.randint(257, (2, 40)),)


FAMILIES: dict[str, Callable[[], tuple[Any, Inputs]]] = {
    "vit": vit,
    "dit": dit,
    "video": video,
    "language": language,
}


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> tuple[Any, Inputs]:
    """Every weight random: fresh gates of zero would hide what reaches what."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter).abs() * 0.05)
    return model.train(), inputs


def layers(model: Any) -> list[torch.nn.Module]:
    blocks = getattr(model, "blocks", None) or model.layers
    return [block.attn for block in blocks]


def test_one_output_a_layer_in_order(case: tuple[Any, Inputs]) -> None:
    model, inputs = case
    expected: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, out: expected.append(out)) for layer in layers(model)
    ]
    with attention_outputs(model) as outputs:
        model(*inputs)
        assert len(outputs) == 3
        model(*inputs)
    for handle in handles:
        handle.remove()
    assert len(outputs) == 6
    assert all(a is b for a, b in zip(outputs, expected, strict=True))
    assert [out.shape for out in outputs[:3]] == [
        (2, outputs[0].shape[1], 24 if hasattr(model, "blocks") else 128)
    ] * 3
    model(*inputs)
    assert len(outputs) == 6  # nothing outside


def test_a_recomputed_layer_appends_nothing_and_gets_the_same_gradients(case: tuple[Any, Inputs]) -> None:
    """The loss of a distillation: on the output and on every layer's, with the backward inside the context
    or behind it.
    """
    model, inputs = case
    grads: list[list[torch.Tensor]] = []
    for checkpointing, inside in ((False, False), (True, False), (True, True)):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        with attention_outputs(model) as outputs:
            loss = model(*inputs).square().mean() + sum((out - 1).square().mean() for out in outputs)
            if inside:
                loss.backward()
                assert len(outputs) == 3
        if not inside:
            loss.backward()
        assert len(outputs) == 3
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))
    assert all(grad.any() for grad in grads[0])


def test_only_layer_losses_reach_the_layers_before_them(case: tuple[Any, Inputs]) -> None:
    model, inputs = case
    with attention_outputs(model) as outputs:
        model(*inputs)
    outputs[1].square().mean().backward()
    reached = [
        any(p.grad is not None and bool(p.grad.any()) for p in layer.parameters()) for layer in layers(model)
    ]
    assert reached == [True, True, False]


def test_a_failed_forward_leaves_no_hook(case: tuple[Any, Inputs]) -> None:
    model, inputs = case
    with pytest.raises(ValueError, match="stop"), attention_outputs(model) as outputs:
        raise ValueError("stop")
    model(*inputs)
    assert outputs == []
    assert not any(layer._forward_hooks for layer in layers(model))


def test_only_forwards_of_the_model_record_even_after_one_that_failed(case: tuple[Any, Inputs]) -> None:
    model, inputs = case
    first, *_, last = layers(model)
    calls: list[tuple[Any, Any]] = []

    def fail(module: torch.nn.Module, args: Any) -> None:
        raise ValueError("stop")

    seen = first.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    failing = last.register_forward_pre_hook(fail)
    with attention_outputs(model) as outputs:
        with pytest.raises(ValueError, match="stop"):
            model(*inputs)
        seen.remove()
        failing.remove()
        assert len(outputs) == 2
        args, kwargs = calls[0]
        first(*args, **kwargs)  # as activation checkpointing calls it in a backward
        assert len(outputs) == 2
        model(*inputs)
        assert len(outputs) == 5


def test_teacher_and_student_at_once() -> None:
    """Two models, one list each; without gradients as well."""
    (student, inputs), (teacher, _) = video(), video()
    with attention_outputs(student) as ours, attention_outputs(teacher) as theirs:
        with torch.no_grad():
            teacher(*inputs)
        student(*inputs)
    assert (len(ours), len(theirs)) == (3, 3)
    assert all(out.requires_grad for out in ours)
    assert not any(out.requires_grad for out in theirs)


def test_a_layer_alone_is_a_model() -> None:
    layer = SelfAttention(8, 2, grid=(4,), attention="softmax")
    x = torch.randn(1, 4, 8)
    with attention_outputs(layer) as outputs:
        y = layer(x)
    (output,) = outputs
    assert output is y


def test_a_model_without_self_attention_is_a_mistake() -> None:
    with refused("model"), attention_outputs(torch.nn.Linear(2, 2)):
        pass
