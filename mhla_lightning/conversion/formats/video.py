"""Export video models with the names and the config.json of diffusers or of Wan2.1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from mhla_lightning.backbones import VideoDiT
from mhla_lightning.backbones.video_dit import VideoBlock
from mhla_lightning.conversion.config_files import CONFIG
from mhla_lightning.conversion.formats.base import (
    FOR_TORCH,
    Export,
    TrainedModel,
    check_text_attention,
    shapes,
)
from mhla_lightning.errors import UserError
from mhla_lightning.weights.streaming import Rename, parts_of
from mhla_lightning.weights.wan_names import added, needed, to_diffusers, to_wan


def diffusers(trained: TrainedModel, model: nn.Module) -> Export:
    """Plan a folder with the names and config of diffusers' WanTransformer3DModel.

    The tensors that MHLA adds are in the same file.

    Raises:
        UserError: see :func:`_export`.
    """
    return _export(trained, cast(VideoDiT, model), to_diffusers, _diffusers_config)


def wan(trained: TrainedModel, model: nn.Module) -> Export:
    """Plan a folder with the names of Wan2.1, and those that the MHLA authors add.

    Raises:
        UserError: see :func:`_export`.
    """
    return _export(trained, cast(VideoDiT, model), to_wan, _wan_config)


def _export(
    trained: TrainedModel, model: VideoDiT, rename: Rename, config: Callable[[VideoDiT], dict[str, Any]]
) -> Export:
    """Rename the tensors and build the config.

    Raises:
        UserError: the model reads its text by another attention than Wan2.1, or lacks tensors of it.
    """
    check_text_attention(model, "Wan2.1")
    missing = [name for name in needed(len(model.blocks)) if name not in trained.weights]
    if missing:
        raise UserError(
            trained.source,
            f"this model has no {missing[0]}, which Wan2.1 needs (qk_norm, qkv_bias of its attention); "
            "take the format plain",
        )
    weights = trained.stored()
    shared, extra = (
        parts_of(weights.renamed({name: name for name in weights if added(name) == new}), rename)
        for new in (False, True)
    )
    layers = [cast(VideoBlock, block).spec.name for block in model.blocks]
    facts = {
        **trained.facts(),
        "computed_as": "softmax",
        "layers": layers,
        "added": [name for name, _ in shapes(extra)],
    }
    whole = {**config(model), CONFIG: facts}
    return Export(
        "diffusion_pytorch_model.safetensors", shared + extra, FOR_TORCH, whole, shapes(shared), shapes(extra)
    )


def _diffusers_config(model: VideoDiT) -> dict[str, Any]:
    """Return the arguments of diffusers' WanTransformer3DModel."""
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
    """Return a config.json like that of Wan2.1's repository."""
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
