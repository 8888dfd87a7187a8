"""Classifiers, image DiTs, SANA and Wan models on the Hugging Face Hub.

The mixin is huggingface_hub's ModelHubMixin. Its PyTorchModelHubMixin would write a second format: the
arguments of a constructor, without the checks of an export. Here a folder is that of `mhla export --format
plain` with a model card, so that `mhla import` and `model.init_from` read it too. Language models have
`mhla_lightning.hf`, which transformers opens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import nn

from mhla_lightning.backbones import (
    IMAGE_CLASSIFIERS,
    IMAGE_DIFFUSION,
    TEXT_TO_IMAGE,
    VIDEO_DIFFUSION,
    CausalLM,
    build_backbone,
)
from mhla_lightning.config.classes import check_packages
from mhla_lightning.conversion.export import fitting, plan_export, write
from mhla_lightning.conversion.formats.base import TrainedModel
from mhla_lightning.conversion.formats.card import Record, model_card
from mhla_lightning.conversion.from_run import trained_model
from mhla_lightning.errors import UserError
from mhla_lightning.finite import check_finite
from mhla_lightning.runs.folder import find_run, read_object, runs_root
from mhla_lightning.weights.stored import open_safetensors
from mhla_lightning.weights.target import Entry, file_header

__all__ = ["HubModel", "Record"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_TAGS: dict[str, Mapping[str, Any]] = {
    "image-classification": IMAGE_CLASSIFIERS,
    "unconditional-image-generation": IMAGE_DIFFUSION,
    "text-to-image": TEXT_TO_IMAGE,
    "text-to-video": VIDEO_DIFFUSION,
}
_FILES = (WEIGHTS, CONFIG, "README.md")


class HubModel(nn.Module, ModelHubMixin):
    """A backbone that can be pushed to the Hugging Face Hub and opened from there.

    Args:
        model: a backbone of the registry, as built.
        backbone: its name in the registry.
        attention: the entry it was built from.
        options: that it was built with; None means none.
        record: of its training, for the model card; None leaves the card's rows open.

    Attributes:
        model: the backbone; the forward is its own.

    Raises:
        UserError: the model is not what `backbone`, `attention` and `options` build.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: str,
        attention: Entry = "mhla",
        options: Mapping[str, Any] | None = None,
        record: Record | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, CausalLM):
            raise UserError("model", "found a language model; wrap it with `mhla_lightning.hf.wrap`")
        self.model = model
        self.described = TrainedModel(
            {}, backbone, attention, dict(options or {}), "a built model", record=record or Record()
        )
        fitting(self._trained(), _outline(self.described))

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Call the backbone."""
        return self.model(*arguments, **options)

    @classmethod
    def from_run(
        cls, run: str | Path, runs: str | None = None, ckpt: str | None = None, ema: bool = True
    ) -> HubModel:
        """Open the model of a run, in eval mode.

        Args:
            run, runs, ckpt, ema: see :func:`mhla_lightning.inference.rebuilding.open_run`.

        Raises:
            UserError: no such run or checkpoint, or a recipe that may not be rebuilt.
        """
        return cls._opened(trained_model(find_run(str(run), runs_root(runs)), ckpt, ema))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **download: Any) -> HubModel:
        """Open a folder of `save_pretrained`, or a model of the Hub, in eval mode.

        Only config.json and the .safetensors file are read. No code runs and no pickle is opened.

        Args:
            pretrained_model_name_or_path: folder, or name on the Hub.
            download: of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

        Raises:
            UserError: the folder holds no such model, its weights do not fit or are not finite.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            name = str(pretrained_model_name_or_path)
            folder = Path(snapshot_download(name, allow_patterns=list(_FILES), **download))
        return cls._opened(_read(folder))

    def save_pretrained(  # type: ignore[override]  # the config is the model's own
        self,
        save_directory: str | Path,
        *,
        config: None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: None = None,
        **push_options: Any,
    ) -> str | None:
        """Write weights, config.json and the model card into a new or empty folder.

        Args:
            save_directory: the folder.
            config, model_card_kwargs: of the mixin; the model knows its own, and others are refused.
            repo_id: name on the Hub; None takes the folder's.
            push_to_hub: upload it as well.
            push_options: of `push_to_hub`.

        Returns:
            The address of the commit if it was uploaded.

        Raises:
            UserError: the folder has content or cannot be written.
        """
        for key, value in (("config", config), ("model_card_kwargs", model_card_kwargs)):
            if value is not None:
                raise UserError(key, "is the model's own; leave it out, and give a `record` to HubModel")
        folder, trained = Path(save_directory), self._trained()
        folder.parent.mkdir(parents=True, exist_ok=True)
        export = plan_export(trained, "plain")
        header = file_header(trained.backbone, trained.attention, trained.options, trained.source)
        write(replace(export, metadata=header, files={"README.md": self._card()}), folder)
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.name, **push_options)
        return None

    @classmethod
    def _opened(cls, trained: TrainedModel) -> HubModel:
        """Return a model with these weights.

        Raises:
            UserError: they do not fit the backbone, or are not finite.
        """
        if isinstance(_outline(trained), CausalLM):
            raise UserError(
                trained.source,
                "holds a language model; open it with transformers, or `mhla_lightning.hf.to_hf`",
            )
        model = build_backbone(trained.backbone, attention=trained.attention, **trained.options)
        weights = dict(fitting(trained, model))
        check_finite(weights, trained.source)
        model.load_state_dict(weights, strict=False)  # an average lacks integer buffers; `fitting` checked
        opened = cls(model, trained.backbone, trained.attention, trained.options, trained.record).eval()
        opened.described = replace(trained, weights={})
        return opened

    def _trained(self) -> TrainedModel:
        return replace(self.described, weights=self.model.state_dict())

    def _card(self) -> bytes:
        trained = self.described
        parameters = sum(weight.numel() for weight in self.model.parameters())
        facts = {
            "Source": trained.source,
            "Backbone": f"`{trained.backbone}`, {parameters:,} parameters",
            "Attention": f"`{json.dumps(trained.attention)}`",
            "Options": f"`{json.dumps(dict(trained.options))}`",
        }
        header: dict[str, Any] = {"library_name": "mhla-lightning", "tags": ["mhla", "linear-attention"]}
        for tag, names in _TAGS.items():
            if trained.backbone in names:
                header["pipeline_tag"] = tag
        usage = """from mhla_lightning.conversion.hub import HubModel

model = HubModel.from_pretrained("DIR")"""
        return model_card(trained.backbone, trained.record, facts, header, usage)


def _outline(trained: TrainedModel) -> nn.Module:
    """Return the model without weights."""
    with torch.device("meta"):
        return build_backbone(trained.backbone, attention=trained.attention, **trained.options)


def _read(folder: Path) -> TrainedModel:
    """Read a folder that may come from a stranger.

    Raises:
        UserError: no such files, or a config that names no backbone or anything but plain values.
    """
    config, weights = read_object(folder / CONFIG), folder / WEIGHTS
    backbone, attention, options = (config.get(key) for key in ("backbone", "attention", "backbone_options"))
    if not (
        isinstance(backbone, str) and isinstance(attention, str | dict | list) and isinstance(options, dict)
    ):
        raise UserError(
            str(folder),
            f"its {CONFIG} names no backbone; it is no folder of `save_pretrained` or `mhla export`",
        )
    for key in ("attention", "backbone_options"):
        check_packages(config[key], key, ())
    if not weights.is_file():
        raise UserError(str(folder), f"holds no {WEIGHTS}; other kinds of weights are not read")
    stored = open_safetensors(weights, str(weights))
    return TrainedModel(stored, backbone, attention, options, str(config.get("source", folder.name)))
