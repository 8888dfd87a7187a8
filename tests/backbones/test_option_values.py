"""Every option of every operator, layer and backbone refuses wrong types and ranges by its name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mhla_lightning.attention import CausalSelfAttention, SelfAttention, build_attention
from mhla_lightning.attention.entry import operators
from mhla_lightning.backbones import BACKBONES, build_backbone, default_options
from mhla_lightning.backbones.text_attention import CROSS_ATTENTION
from mhla_lightning.errors import UserError

NAN, INF = float("nan"), float("inf")
WORD: list[Any] = ["no such name", 3, True, ["mhla"], {"a": 1}]
FLAG: list[Any] = ["yes", 2, 0.5, [True]]
COUNT: list[Any] = ["four", 1.5, True, 0, -1, [], {"a": 1}, NAN]
COUNTS: list[Any] = ["four", 1.5, True, 0, -1, [], [0, 1], ["a", "b"], [1.5, 2], {"a": 1}, NAN]
NUMBER: list[Any] = ["a", True, NAN, INF, -1, [0.1], {"a": 1}]
RATIO: list[Any] = [*NUMBER, 0]
RATE: list[Any] = [*NUMBER, 1.5]
STAGES: list[Any] = [*COUNTS, 4, [1, 2], [1, 2, 4, "a"], [1, 2, 4, 0], [2.5, 2, 4, 8]]
WRONG: dict[str, list[Any]] = {
    **dict.fromkeys(("blocks", "block_size", "context_blocks", "context_block_size"), COUNTS),
    **dict.fromkeys(("normalizer", "mix_init", "mix_form", "mix_clamp_at", "feature_map", "kernel"), WORD),
    **dict.fromkeys(("extrapolation", "intra", "decay", "decay_span", "pos_conv", "global_pool"), WORD),
    **dict.fromkeys(("reweight_keys", "mix_learnable", "mix_per_head", "float32_summaries"), FLAG),
    **dict.fromkeys(("out_norm", "qk_norm", "qkv_bias", "inner_norm", "rotary", "tie_embeddings"), FLAG),
    **dict.fromkeys(("mask_padding", "fc_norm", "class_token", "learn_sigma", "dwconv", "ffn_conv"), FLAG),
    **dict.fromkeys(("eps", "qk_norm_eps", "norm_eps"), NUMBER),
    **dict.fromkeys(("dropout", "drop_rate", "drop_path_rate"), RATE),
    **dict.fromkeys(("mlp_ratio", "expand_k", "expand_v", "rope_base"), RATIO),
    **dict.fromkeys(("chunk_size", "max_chunks", "heads", "kv_heads", "vocab_size", "context"), COUNT),
    **dict.fromkeys(("embed_dim", "depth", "num_heads", "cross_heads", "ffn_dim", "freq_dim"), COUNT),
    **dict.fromkeys(("text_dim", "text_length", "in_channels", "in_chans", "intermediate"), COUNT),
    **dict.fromkeys(("token_multiple", "head_dim"), COUNT),
    **dict.fromkeys(("embed_dims", "depths", "num_heads of stages"), STAGES),
    **dict.fromkeys(("img_size", "input_size", "patch_size"), COUNTS),
    "widths": [*COUNTS, 32, [32, 64], [32, 64, 0]],
    "layer_scale": ["a", 1.0, [1.0, 1.0], [1.0, 1.0, 1.0, "a"], [1.0, 1.0, 1.0, NAN]],
    "mix_clamp": ["a", 1.0, [0], [1, 0], ["a", "b"], [NAN, 1], {"a": 1}],
    "mix_init_options": ["a", 1.0, ["exp_sigma"], {"exp_sigma": "a"}, {"sigma": 1.0}],
    "gate": ["sometimes", 1, 0.5, [True]],
    "gate of text": FLAG,
    "short_conv": ["four", 1.5, True, -1, 1, []],
    "num_classes": ["ten", 1.5, True, -1, [10]],
    "cross_attention": ["no such name", 3, True, None, ["mhla"], {"blocks": 4}],
}
"""Wrong values by the option's name."""


def cases() -> Iterator[tuple[str, str]]:
    """Yield kind and option of everything that an entry or `backbone_options` takes."""
    for causal in (False, True):
        for name, operator in operators(causal).items():
            for option in operator.options():
                yield f"{'causal ' if causal else ''}{name}", option
    for layer in (SelfAttention, CausalSelfAttention):
        for option in layer.layer_options():
            yield layer.__name__, option
    for name, form in CROSS_ATTENTION.items():
        for option in form.options:
            yield f"cross-attention {name}", option
    for backbone in ("deit_tiny", "vlt_tiny", "dit_s2", "sana_tiny", "wan_tiny", "convnet_tiny", "lm_tiny"):
        for option in default_options(backbone):
            yield backbone, option


def wrong_values(kind: str, option: str) -> list[Any]:
    if kind == "vlt_tiny" and option == "num_heads":
        return WRONG["num_heads of stages"]
    if kind == "CausalSelfAttention" and option == "gate":
        return WRONG["gate of text"]
    return WRONG[option]


def build(kind: str, option: str, value: Any) -> None:
    """Build the smallest thing that has this option."""
    if kind in BACKBONES:
        attention = "none" if kind == "convnet_tiny" else "softmax"
        build_backbone(kind, attention=attention, **{option: value})
    elif kind == "SelfAttention":
        SelfAttention(16, 2, attention={"name": "softmax", option: value}, grid=(4, 4))
    elif kind == "CausalSelfAttention":
        CausalSelfAttention(16, attention={"name": "softmax", option: value}, context=8)
    elif kind.startswith("cross-attention"):
        entry = {"name": kind.split()[1], "mix_init_options": {}, option: value}
        build_backbone("sana_tiny", attention="softmax", cross_attention=entry, depth=1)
    else:
        causal, name = kind.startswith("causal"), kind.split()[-1]
        needed = {"blocks": 2} if kind == "mhla" and option != "block_size" else {}
        grid = (8,) if causal else (4, 4)
        build_attention(
            {"name": name, **needed, option: value}, heads=2, dim_k=8, dim_v=8, grid=grid, causal=causal
        )


@pytest.mark.parametrize(("kind", "option"), list(cases()), ids=str)
def test_wrong_values_are_refused_by_the_option(kind: str, option: str) -> None:
    for value in wrong_values(kind, option):
        with torch.device("meta"), pytest.raises(UserError) as error:
            build(kind, option, value)
        key = error.value.key or ""
        assert option in key.split("."), f"{option}: {value!r} is refused as {key}: {error.value.reason}"
        assert "\n" not in str(error.value)


def test_every_registered_backbone_is_of_a_class_that_is_tested_here() -> None:
    """A new family joins `cases`."""
    tested = {kind for kind, _ in cases() if kind in BACKBONES}
    models = {getattr(BACKBONES[name], "model", BACKBONES[name]) for name in tested}
    assert {getattr(made, "model", made) for made in BACKBONES.values()} == models
