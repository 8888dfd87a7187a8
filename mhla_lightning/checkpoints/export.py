"""Our weights as a folder that other people's code opens: config.json and one .safetensors file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mhla_lightning.backbones import VideoDiT, build_backbone
from mhla_lightning.backbones.video_dit import VideoBlock
from mhla_lightning.backbones.wan_names import added, needed, to_diffusers, to_wan
from mhla_lightning.backbones.weights import weight_files
from mhla_lightning.checkpoints.foreign import Shapes, table_rows
from mhla_lightning.checkpoints.target import Entry
from mhla_lightning.checkpoints.wan import CONFIG
from mhla_lightning.errors import UserError, unknown_name
from mhla_lightning.runs.folder import FORMAT

FORMATS = ("diffusers", "wan", "plain")
_RENAMED = {"diffusers": to_diffusers, "wan": to_wan}


@dataclass(frozen=True)
class Trained:
    """What is exported.

    Attributes:
        weights: by the backbone's own names.
        backbone, attention, options: see backbones.build_backbone.
        source: where the weights come from, in words.
    """

    weights: Mapping[str, Tensor]
    backbone: str
    attention: Entry
    options: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class Export:
    """What a folder is to hold.

    Attributes:
        file: name of the file of tensors.
        tensors: by the names of the format.
        config: of config.json.
        shared: (name, shape) of what Wan2.1 itself has; of the plain format everything.
        added: of what only MHLA has.
    """

    file: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    shared: Shapes
    added: Shapes

    def rows(self) -> list[dict[str, Any]]:
        """See :func:`table_rows`."""
        return table_rows({"shared": self.shared, "added": self.added})


def read_imported(path: Path) -> Trained:
    """A file that `mhla import` wrote, or a folder that holds one.

    Raises:
        UserError: no such file, or one whose header does not say what it is for.
    """
    file = path
    if path.is_dir():
        files = weight_files(path, "RUN")
        if len(files) != 1:
            raise UserError(f"RUN {path} holds weights in {len(files)} parts, which mhla import never writes")
        file = files[0]
    if file.suffix != ".safetensors":
        raise UserError(f"RUN {file} is no run and no .safetensors file of mhla import")
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
        backbone, attention, options = header["backbone"], json.loads(header["attention"]), json.loads(header["backbone_options"])
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        raise UserError(f"RUN {file} was not written by mhla import: its header does not name a backbone; import it first") from error
    return Trained(load_file(file), backbone, attention, options, f"{file.name}, imported from {header.get('source', 'elsewhere')}")


def plan(trained: Trained, format: str | None = None) -> Export:
    """What is written for `diffusers` (default for video), `wan` or `plain` (default for all others, our own names).

    Raises:
        UserError: an unknown format, one that the backbone has not, weights that do not fit the backbone.
    """
    if format is not None and format not in FORMATS:
        raise UserError(unknown_name("--format", format, FORMATS))
    with torch.device("meta"):
        model = build_backbone(trained.backbone, attention=trained.attention, **trained.options)
    trained = replace(trained, weights=_checked(trained, model))
    if not isinstance(model, VideoDiT):
        if format not in (None, "plain"):
            raise UserError(f"--format {format} is for video models, and {trained.source} holds a {trained.backbone}; leave it out or take plain")
        return _plain(trained)
    if format == "plain":
        return _plain(trained)
    return _video(trained, model, format or "diffusers")


def write(export: Export, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Makes the folder at once, whole or not at all.

    Args:
        dtype: of the tensors; None leaves them.

    Raises:
        UserError: a folder with something in it, or one that cannot be made.
    """
    check_folder(folder)
    config = json.dumps(export.config, indent=2) + "\n"
    temporary = folder.absolute().parent / f".{folder.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        save_file({name: _own(value, dtype) for name, value in export.tensors.items()}, temporary / export.file, metadata={"format": "pt"})
        (temporary / "config.json").write_text(config, encoding="utf-8")
        shutil.copymode(temporary / "config.json", temporary / export.file)  # safetensors lets the owner alone read
        os.replace(temporary, folder)  # an empty folder of that name gives way
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Raises UserError for a folder that cannot be written, or that holds something already."""
    if not folder.absolute().parent.is_dir():
        raise UserError(f"--to {folder}: there is no folder {folder.absolute().parent}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {folder} holds something already; name a new folder")


def _checked(trained: Trained, model: nn.Module) -> dict[str, Tensor]:
    """The weights in the model's order. Raises UserError where they are not all of the model's, and no others."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items() if value.is_floating_point()}  # an average holds nothing else
    given = {name: tuple(value.shape) for name, value in trained.weights.items() if value.is_floating_point()}
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if wrong:
        raise UserError(f"{trained.source} does not fit {trained.backbone}: {len(wrong)} tensors differ ({', '.join(wrong[:4])})")
    return {name: trained.weights[name] for name in model.state_dict() if name in trained.weights}


def _facts(trained: Trained) -> dict[str, Any]:
    """What rebuilds the model: `mhla import` reads it, and so can mhla_lightning.backbones.build_backbone."""
    model = {"backbone": trained.backbone, "attention": trained.attention, "backbone_options": dict(trained.options)}
    return {"format": FORMAT, "source": trained.source, **model}


def _plain(trained: Trained) -> Export:
    tensors = dict(trained.weights)
    return Export("model.safetensors", tensors, _facts(trained), [(name, tuple(value.shape)) for name, value in tensors.items()], [])


def _video(trained: Trained, model: VideoDiT, format: str) -> Export:
    rename = _RENAMED[format]
    missing = [name for name in needed(len(model.blocks)) if name not in trained.weights]
    if missing:
        raise UserError(f"Wan2.1 has {missing[0]}, and {trained.source} has none (qk_norm, qkv_bias of its attention); take --format plain")
    parts = [rename({name: value for name, value in trained.weights.items() if added(name) == new}) for new in (False, True)]
    shared, extra = ([(name, tuple(value.shape)) for name, value in part.items()] for part in parts)
    layers = [cast(VideoBlock, block).spec.name for block in model.blocks]
    facts = {**_facts(trained), "layers": layers, "added": [name for name, _ in extra]}
    config = (_wan_config if format == "wan" else _diffusers_config)(model)
    return Export("diffusion_pytorch_model.safetensors", parts[0] | parts[1], {**config, CONFIG: facts}, shared, extra)


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


def _own(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Contiguous, in memory of its own: q, k and v are parts of one tensor, which safetensors does not write."""
    value = value.detach().to(dtype if value.is_floating_point() else None).contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
