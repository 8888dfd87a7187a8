"""Export SANA models with the names and the config.json of diffusers."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from mhla_lightning.attention import LayerAttention
from mhla_lightning.backbones import SanaDiT
from mhla_lightning.backbones.sana import SanaBlock
from mhla_lightning.backbones.text_attention import CrossAttention
from mhla_lightning.conversion.config_files import CONFIG
from mhla_lightning.conversion.formats.base import (
    FOR_TORCH,
    Export,
    TrainedModel,
    check_text_attention,
    shapes,
)
from mhla_lightning.conversion.sana import ratio_of
from mhla_lightning.errors import UserError
from mhla_lightning.weights.sana_names import added_to_sana, needed_by_sana, to_diffusers_sana
from mhla_lightning.weights.streaming import parts_of


def sana_diffusers(trained: TrainedModel, model: nn.Module) -> Export:
    """Plan a folder with the names and config of diffusers' SanaTransformer2DModel.

    The tensors that MHLA adds are in the same file.

    Raises:
        UserError: another attention to the text than SANA's; tensors of SANA that the model lacks; a bias in
            some layers only; patches that are no squares.
    """
    sana = cast(SanaDiT, model)
    check_text_attention(sana, "SANA")
    biased = {f"blocks.{i}.attn.qkv.bias" in trained.weights for i in range(len(sana.blocks))}
    if len(biased) > 1:
        raise UserError(
            trained.source,
            "some layers have a bias of q, k and v (qkv_bias) and some not; take plain",
        )
    needed = needed_by_sana(len(sana.blocks), qkv_bias=True in biased)
    missing = [name for name in needed if name not in trained.weights]
    if missing:
        raise UserError(
            trained.source,
            f"this model has no {missing[0]}, which SANA needs (ffn_conv of the backbone); take plain",
        )
    if len(set(sana.patch_size)) > 1:
        raise UserError(
            trained.source,
            f"SANA has square patches, and this model {sana.patch_size}; take plain",
        )
    weights = trained.stored()
    shared, extra = (
        parts_of(
            weights.renamed({name: name for name in weights if added_to_sana(name) == new}), to_diffusers_sana
        )
        for new in (False, True)
    )
    layers = [_computes(cast(SanaBlock, block).spec) for block in sana.blocks]
    facts = {
        **trained.facts(),
        "computed_as": "linear",
        "layers": layers,
        "added": [name for name, _ in shapes(extra)],
    }
    return Export(
        "diffusion_pytorch_model.safetensors",
        shared + extra,
        FOR_TORCH,
        {**_config(sana, bias=True in biased), CONFIG: facts},
        shapes(shared),
        shapes(extra),
        opened_by='diffusers.SanaTransformer2DModel.from_pretrained("DIR")',
    )


def _computes(spec: LayerAttention) -> str:
    """Return the operator of a layer; SANA's own is `linear`."""
    features = spec.operator.get("feature_map")
    if spec.name == "linear" and features != "relu":
        return f"linear with {features}"
    return spec.name


def _config(model: SanaDiT, bias: bool) -> dict[str, Any]:
    """Return the arguments of diffusers' SanaTransformer2DModel."""
    block, dim = cast(SanaBlock, model.blocks[0]), model.embed_dim
    heads, cross = block.attn.heads, cast(CrossAttention, block.cross_attn).heads
    return {
        "_class_name": "SanaTransformer2DModel",
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "num_layers": len(model.blocks),
        "num_cross_attention_heads": cross,
        "cross_attention_head_dim": dim // cross,
        "cross_attention_dim": dim,
        "caption_channels": model.text_dim,
        "mlp_ratio": ratio_of(block.ffn.point.in_features, dim),
        "dropout": 0.0,
        "attention_bias": bias,
        "sample_size": model.input_size[0],
        "patch_size": model.patch_size[0],
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": None,
    }
