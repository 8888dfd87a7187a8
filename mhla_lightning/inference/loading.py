"""Load a trained language model from its run folder, without its training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mhla_lightning.attention import CAUSAL_ATTENTION
from mhla_lightning.attention.entry import Entry
from mhla_lightning.backbones import CausalLM, build_backbone
from mhla_lightning.data.modules.tokens import TokenDataModule
from mhla_lightning.data.tokenizers import Tokenizer, open_tokenizer, same_tokenizer
from mhla_lightning.errors import UserError
from mhla_lightning.inference.rebuilding import rebuild
from mhla_lightning.inference.weights import FoundRun, find_weights
from mhla_lightning.runs.folder import FORMAT, RunFolder, find_run, read_object, runs_root, write_json
from mhla_lightning.tasks.language import LanguageTask

_NAME = "tokenizer_name.json"


@dataclass(frozen=True)
class LanguageRun(FoundRun):
    """A run of a language model.

    Attributes:
        task: built from recipe.yaml, without weights.
        tokenizer: the tokenizer of the training data.
    """

    task: LanguageTask
    tokenizer: Tokenizer

    @property
    def attention(self) -> str | Mapping[str, Any] | Sequence[Any]:
        """Return the attention entry of the recipe."""
        return self.task.attention


def find_language_run(
    run: str,
    *,
    runs: str | None = None,
    ckpt: str | None = None,
    ema: bool = True,
    tokenizer: str | None = None,
    extrapolation: str | None = None,
) -> LanguageRun:
    """Find a run, its checkpoint and its tokenizer, and build the task without weights.

    Args:
        run: id or folder.
        runs: folder of all run folders; None means $MHLA_RUNS, else ./runs.
        ckpt: a step or a checkpoint folder; None means the newest.
        ema: take the averaged weights where the checkpoint has them.
        tokenizer: replaces the run's own, in any form that `open_tokenizer` accepts; None keeps it.
        extrapolation: replaces the recipe's value in every layer that has this option; None keeps it.

    Raises:
        UserError: no such run or checkpoint, no language model, no tokenizer, or one with too many ids.
    """
    folder = find_run(run, runs_root(runs))
    weights = find_weights(folder, ckpt, ema)
    task = find_task(folder, extrapolation)
    found = _tokenizer(folder, tokenizer)
    if found.vocabulary > task.vocab_size:
        raise UserError(
            "tokenizer",
            f"{found.name} has {found.vocabulary} ids, and the model of run {folder.run_id} has "
            f"{task.vocab_size}",
        )
    return LanguageRun(folder, weights, task, found)


def load_model(
    found: LanguageRun, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CausalLM:
    """Build the model and load its weights, in eval mode, on `device`.

    Raises:
        UserError: the weights belong to another model.
    """
    found.task.configure_model()
    backbone = cast(CausalLM, found.task.backbone)
    found.weights.load(backbone)
    return backbone.to(device=device, dtype=dtype).eval().requires_grad_(False)


def check_length(found: LanguageRun, tokens: int) -> None:
    """Run `tokens` tokens through the model on the meta device, without weights.

    Raises:
        UserError: an operator cannot take that many tokens.
    """
    task = found.task
    with torch.device("meta"), torch.no_grad():
        plan = build_backbone(task.backbone_name, attention=task.attention, **task.backbone_options)
        cast(CausalLM, plan).features(torch.empty(1, tokens, dtype=torch.int64))


def keep_tokenizer(data: TokenDataModule, folder: Path) -> None:
    """Save the tokenizer's files and its name in a run folder.

    Text can then be encoded and decoded after the training data have moved.
    """
    data.save_tokenizer(folder)
    write_json(folder / _NAME, {"format": FORMAT, "name": data.index().tokenizer})


def keeps_tokenizer(run: RunFolder) -> bool:
    """Return whether :func:`kept_tokenizer` finds a tokenizer in this run folder."""
    return read_object(run.path / _NAME).get("name") == "bytes" or (run.path / "tokenizer.json").is_file()


def kept_tokenizer(run: RunFolder) -> Tokenizer:
    """Open the tokenizer that :func:`keep_tokenizer` saved in a run folder.

    Raises:
        UserError: there is none.
    """
    name = read_object(run.path / _NAME).get("name")
    if name == "bytes":
        return open_tokenizer(name)
    if (run.path / "tokenizer.json").is_file():
        return open_tokenizer(str(run.path))
    made = f"its data were made with '{name}'" if name else "its data name none"
    raise UserError(
        "tokenizer",
        f"run {run.run_id} keeps none ({made}); give bytes, a tokenizer.json, or a Hugging Face name",
    )


def _tokenizer(folder: RunFolder, named: str | None) -> Tokenizer:
    """Return the run's own tokenizer, or the named one.

    Raises:
        UserError: no tokenizer, or the named one differs from the run's own.
    """
    if named is None:
        return kept_tokenizer(folder)
    found, own = open_tokenizer(named), read_object(folder.path / _NAME).get("name")
    if own is not None and not same_tokenizer(found.name, own):
        raise UserError(
            "tokenizer",
            f"{named} is not {own}, with which run {folder.run_id} was trained: its ids mean other text; "
            "leave it out",
        )
    return found


def extrapolated(attention: Entry | Sequence[Entry], how: str) -> list[dict[str, Any]]:
    """Set the option `extrapolation` in all layers of an attention entry that have it.

    Args:
        attention: entry of one layer, or a list of them.
        how: value of the option.

    Returns:
        one mapping for each layer of the entry.

    Raises:
        UserError: no layer has the option.
    """
    entries = [attention] if isinstance(attention, (str, Mapping)) else attention
    layers = [{"name": entry} if isinstance(entry, str) else dict(entry) for entry in entries]
    bounded = [
        layer
        for layer in layers
        if "extrapolation" in CAUSAL_ATTENTION[layer["name"]].options()
        and layer.get("mix_form") != "relative"
    ]
    if not bounded:
        raise UserError(
            "extrapolation",
            f"'{how}' changes nothing: all layers of this run take text of any length; leave it out",
        )
    for layer in bounded:
        layer["extrapolation"] = how
    return layers


def find_task(folder: RunFolder, extrapolation: str | None = None) -> LanguageTask:
    """Build the task of a language run without weights; its training data may be gone.

    Args:
        folder: the run.
        extrapolation: see :func:`find_language_run`.

    Raises:
        UserError: the run trains no language model.
    """

    def change(arguments: dict[str, Any]) -> dict[str, Any]:
        if extrapolation is not None:
            arguments["attention"] = extrapolated(arguments.get("attention", "mhla"), extrapolation)
        return arguments

    # The run's own data section may name a tokenizer that no longer exists.
    data = {"class_path": "mhla_lightning.data.TokenDataModule", "init_args": {"path": "."}}
    return cast(
        LanguageTask,
        rebuild(folder, LanguageTask, "generate and eval lm need a language model", change, data).task,
    )
