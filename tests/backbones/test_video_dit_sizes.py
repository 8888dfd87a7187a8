"""The video DiT: clips of any size that fits its blocks, texts of any length, and sentences about all
others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.helpers.errors import refused
from tests.helpers.video_models import ENTRIES, HYBRID, awake, build, inputs


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_a_short_text_is_one_filled_up_with_zeros(rows: int) -> None:
    model = awake(build(attention=HYBRID))
    x, t, text = inputs(model)
    filled = text.clone()
    filled[:, rows:] = 0
    assert torch.equal(model(x, t, text[:, :rows]), model(x, t, filled))
    assert (model(x, t, text) - model(x, t, filled)).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ENTRIES, ids=str)
def test_clips_of_any_size_that_makes_as_many_blocks(attention: Any) -> None:
    """One model for images and clips of several sizes; the same weights laid out for that size give the
    same numbers.
    """
    model = awake(build(attention=attention, blocks=(1, 2, 3)))
    for size in [(1, 4, 6), (1, 8, 12), (6, 8, 12), (5, 10, 18), (3, 6, 22)]:
        own = build(attention=attention, blocks=(1, 2, 3), input_size=size).eval()
        own.load_state_dict(model.state_dict())
        out = model(*inputs(model, size))
        assert out.shape[2:] == size
        assert torch.equal(out, own(*inputs(own, size)))


@pytest.mark.parametrize(
    "attention",
    ["mhla", HYBRID, {"name": "mhla", "blocks": 2}, {"name": "mhla", "mix_per_head": True}],
    ids=str,
)
def test_an_image_is_mixed_like_the_first_blocks_of_a_video(attention: Any) -> None:
    """One frame, whatever the blocks of time: the mixing of the blocks that a video begins with."""
    model = awake(build(attention=attention))
    size = (1, 8, 12)
    width = 2 if isinstance(attention, dict) and "blocks" in attention else 3
    first = {"name": "mhla", **(attention if isinstance(attention, dict) else {}), "blocks": (1, 2, width)}
    own = awake(build(attention=["softmax", first, first] if attention is HYBRID else first, input_size=size))
    state = model.state_dict()
    for name, value in own.state_dict().items():
        if name.endswith("mixing.weight"):
            state[name] = state[name][..., : value.shape[-2], : value.shape[-1]]
    own.load_state_dict(state)
    assert torch.equal(model(*inputs(model, size)), own(*inputs(own, size)))


def test_short_last_blocks_count_as_the_tokens_they_hold() -> None:
    """11 columns in blocks of 4 are 4, 4 and 3: with equal weights for all blocks nothing depends on the
    borders.
    """
    uniform = {"name": "mhla", "mix_init": "uniform", "normalizer": "block"}
    split = awake(build(attention={**uniform, "blocks": (2, 2, 3)}, depth=1, input_size=(3, 6, 22)))
    whole = awake(build(attention={**uniform, "blocks": 1}, depth=1, input_size=(3, 6, 22)))
    state = {name: value for name, value in split.state_dict().items() if "mixing" not in name}
    whole.load_state_dict(state, strict=False)
    for model in (split, whole):
        mixing = model.blocks[0].attn.attention.mixing.weight
        mixing.data.fill_(1.0)
    torch.testing.assert_close(split(*inputs(split)), whole(*inputs(whole)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("attention", "size", "words"),
    [
        (
            "softmax",
            (4, 7, 12),
            ["(4, 7, 12) (frames, height, width)", "patches of (1, 2, 2): height 7; use 6 or 8"],
        ),
        ("softmax", (4, 8, 1), ["width 1; use 2"]),
        ("mhla", (4, 8, 8), ["blocks (2, 2, 3): width 8; use 6 or 10"]),
        ({"name": "mhla", "block_size": (2, 2, 2)}, (5, 8, 12), ["blocks (2, 2, 3): frames 5; use 4"]),
        ({"name": "mhla", "block_size": 2}, (4, 8, 6), ["blocks (2, 2, 3): width 6; use 10"]),
        ({"name": "mhla", "normalizer": "slot"}, (4, 8, 14), ["width 14; use 12 or 18"]),
        ("linear", (4, 8), ["three whole numbers", "[frames, height, width]", "(4, 8)"]),
    ],
    ids=str,
)
def test_a_size_that_does_not_fit_names_the_nearest(
    attention: Any, size: tuple[int, ...], words: list[str]
) -> None:
    model = build(attention=attention)
    with refused("shape") as error:
        model.check_size(size)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    if len(size) == 3:
        with refused("x"):
            model(*inputs(model, size))


def test_a_size_has_to_suit_the_blocks_of_every_layer() -> None:
    model = build(attention=["mhla", {"name": "mhla", "blocks": (2, 2, 4)}], input_size=(4, 8, 14))
    assert model.check_size((4, 8, 20)) == (4, 4, 10)  # 4 + 4 + 2 and 3 + 3 + 3 + 1
    with refused("shape"):
        model.check_size((4, 8, 12))
    assert model.nearest(2, 12) == (14,)


@pytest.mark.parametrize(
    "attention",
    [*ENTRIES, {"name": "mhla", "block_size": (2, 3, 2)}, {"name": "mhla", "normalizer": "slot"}],
    ids=str,
)
def test_what_check_size_says_is_what_the_model_takes(attention: Any) -> None:
    """Every size it allows runs, and every nearest size it names is allowed."""
    model = awake(build(attention=attention, depth=1))
    allowed = 0
    for axis in range(3):
        for n in range(1, 30):
            size = [4, 8, 12]
            size[axis] = n
            near = model.nearest(axis, n)
            assert near
            assert all(model.nearest(axis, other) == (other,) for other in near)
            if n in near:
                allowed += 1
                assert model.check_size(size) == (size[0], size[1] // 2, size[2] // 2)
                assert model(*inputs(model, tuple(size), batch=1)).isfinite().all()
            else:
                with refused("shape"):
                    model.check_size(size)
                assert not [
                    other
                    for other in range(min(near[0], n) + 1, max(near[-1], n))
                    if model.nearest(axis, other) == (other,)
                ]
    assert allowed >= 3


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"input_size": (4, 9, 12)}, "input_size"),
        ({"input_size": 16}, "input_size"),
        ({"patch_size": (1, 2)}, "patch_size"),
        ({"num_heads": 5}, "num_heads"),
        ({"num_heads": 8}, "num_heads"),
        ({"freq_dim": 15}, "freq_dim"),
        ({"depth": 0}, "depth"),
        ({"text_length": 0}, "text_length"),
        ({"attention": {"name": "mhla", "blocks": (2, 3, 3)}}, "attention.blocks"),
        ({"attention": {"name": "mhla", "is_gated": True}}, "attention.is_gated"),
        ({"dim": 24}, "dim"),
    ],
    ids=str,
)
def test_wrong_options_are_one_clear_sentence(options: dict[str, Any], key: str) -> None:
    with refused(key) as error:
        build(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"x": torch.zeros(2, 4, 4, 8, 12)}, "x"),
        ({"x": torch.zeros(2, 3, 8, 12)}, "x"),
        ({"t": torch.tensor(7)}, "t"),
        ({"text": torch.zeros(2, 7, 10)}, "text"),
        ({"text": torch.zeros(1, 6, 10)}, "text"),
        ({"text": torch.zeros(2, 6, 9)}, "text"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, Mapping) else "",
)
def test_wrong_inputs_are_one_clear_sentence(change: dict[str, torch.Tensor], key: str) -> None:
    model = build()
    x, t, text = inputs(model)
    with refused(key) as error:
        model(**{"x": x, "t": t, "text": text, **change})
    assert "\n" not in str(error.value)
