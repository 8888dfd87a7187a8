"""Videos: the names and config.json of diffusers and of Wan2.1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from mhla_lightning.backbones import VideoDiT
from mhla_lightning.backbones.video_dit import VideoBlock
from mhla_lightning.conversion.formats.base import FOR_TORCH, Export, Trained, shapes
from mhla_lightning.conversion.wan import CONFIG
from mhla_lightning.errors import UserError
from mhla_lightning.weights.streaming import Rename, parts_of
from mhla_lightning.weights.wan_names import added, needed, to_diffusers, to_wan


def diffusers(trained: Trained, model: nn.Module) -> Export:
    """Key names and config of diffusers' WanTransformer3DModel; what MHLA adds stands beside them. Raises
    UserError, see :func:`_export`.
    """
    return _export(trained, cast(VideoDiT, model), to_diffusers, _diffusers_config)


def wan(trained: Trained, model: nn.Module) -> Export:
    """Wan2.1's own names and those that the MHLA authors add. Raises UserError, see :func:`_export`."""
    return _export(trained, cast(VideoDiT, model), to_wan, _wan_config)


def _export(
    trained: Trained, model: VideoDiT, rename: Rename, config: Callable[[VideoDiT], dict[str, Any]]
) -> Export:
    """Raises UserError for a model without tensors that Wan2.1 has."""
    missing = [name for name in needed(len(model.blocks)) if name not in trained.weights]
    if missing:
        raise UserError(
            f"Wan2.1 has {missing[0]}, and {trained.source} has none (qk_norm, qkv_bias of its "
            "attention); take --format plain"
        )
    weights = trained.stored()
    shared, extra = (
        parts_of(weights.renamed({name: name for name in weights if added(name) == new}), rename)
        for new in (False, True)
    )
    layers = [cast(VideoBlock, block).spec.name for block in model.blocks]
    facts = {**trained.facts(), "layers": layers, "added": [name for name, _ in shapes(extra)]}
    whole = {**config(model), CONFIG: facts}
    return Export(
        "diffusion_pytorch_model.safetensors", shared + extra, FOR_TORCH, whole, shapes(shared), shapes(extra)
    )


def _diffusers_config(model: VideoDiT) -> dict[str, Any]:
    """Arguments of diffusers' WanTransformer3DModel."""
    block = cast(VideoBlock, model.blocks[0])
    heads = block.attn.heads
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(model.patch_size),
        "num_attention_heads": heads,
        "attention_head_dim": model.embed_dim // heads,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "text_dim": model.text_dim,
        "freq_dim": model.freq_dim,
        "ffn_dim": cast(nn.Linear, block.ffn[0]).out_features,
        "num_layers": len(model.blocks),
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
    }


def _wan_config(model: VideoDiT) -> dict[str, Any]:
    """The config.json of Wan2.1's own repository."""
    block = cast(VideoBlock, model.blocks[0])
    return {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "patch_size": list(model.patch_size),
        "dim": model.embed_dim,
        "ffn_dim": cast(nn.Linear, block.ffn[0]).out_features,
        "freq_dim": model.freq_dim,
        "text_dim": model.text_dim,
        "text_len": model.text_length,
        "in_dim": model.in_channels,
        "out_dim": model.out_channels,
        "num_heads": block.attn.heads,
        "num_layers": len(model.blocks),
        "eps": 1e-6,
    }
