"""A trained language model out of its run folder, without the data it was trained on."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from mhla_lightning.attention import CAUSAL_ATTENTION
from mhla_lightning.attention.entry import Entry
from mhla_lightning.backbones import CausalLM, build_backbone
from mhla_lightning.config.recipes import read_yaml
from mhla_lightning.config.resolve import resolve
from mhla_lightning.data.modules.tokens import TokenDataModule
from mhla_lightning.data.tokenizers import Tokenizer, open_tokenizer, same_tokenizer
from mhla_lightning.errors import UserError
from mhla_lightning.runs.folder import FORMAT, RunFolder, complete_checkpoints, find_run, read_json, runs_root, step_folder, write_json
from mhla_lightning.tasks.language import LanguageTask

_AVERAGE, _RAW, _NAME = "ema/weights.safetensors", "trainer.ckpt", "tokenizer_name.json"


@dataclass(frozen=True)
class LanguageRun:
    """What a run holds, found and checked; no weights are loaded yet.

    Attributes:
        run: the folder.
        checkpoint: of `run`, or the folder that was asked for.
        averaged: whether the weights are the average (callbacks.EMA).
        task: built from recipe.yaml.
        tokenizer: the one the run was trained with.
    """

    run: RunFolder
    checkpoint: Path
    averaged: bool
    task: LanguageTask
    tokenizer: Tokenizer

    @property
    def attention(self) -> str | Mapping[str, Any] | Sequence[Any]:
        """The attention entry."""
        return self.task.attention

    @property
    def weights(self) -> Path:
        """The file that is loaded."""
        return self.checkpoint / (_AVERAGE if self.averaged else _RAW)


def find_language_run(
    run: str,
    *,
    runs: str | None = None,
    ckpt: str | None = None,
    ema: bool = True,
    tokenizer: str | None = None,
    extrapolation: str | None = None,
) -> LanguageRun:
    """Finds a run, its checkpoint and its tokenizer, and builds the task without weights.

    Args:
        run: id or folder.
        runs: where run folders live; None is $MHLA_RUNS, else ./runs.
        ckpt: a step, or a checkpoint folder; None is the newest.
        ema: take the average where the checkpoint has one.
        tokenizer: instead of the run's own, as `open_tokenizer` takes it.
        extrapolation: instead of the recipe's, in every layer that can.

    Raises:
        UserError: no such run or checkpoint, no language model, no tokenizer.
    """
    folder = find_run(run, runs_root(runs))
    checkpoint = _checkpoint(folder, ckpt)
    task = _task(folder, extrapolation)
    found = _tokenizer(folder, tokenizer)
    if found.vocabulary > task.vocab_size:
        raise UserError(f"the tokenizer {found.name} has {found.vocabulary} ids, and the model of run {folder.run_id} has {task.vocab_size}")
    averaged = ema and (checkpoint / _AVERAGE).is_file()
    if not averaged and not (checkpoint / _RAW).is_file():
        raise UserError(f"{checkpoint} holds no {_RAW} that can be read here" + ("" if ema else "; leave out --no-ema to take the average"))
    return LanguageRun(folder, checkpoint, averaged, task, found)


def load_model(found: LanguageRun, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> CausalLM:
    """The model in eval mode, on `device`.

    Raises:
        UserError: weights of another model.
    """
    found.task.configure_model()
    backbone = cast(CausalLM, found.task.backbone)
    state = _read(found)
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    own = backbone.state_dict()
    missing = [name for name in missing if own[name].is_floating_point()]  # an average holds nothing else
    if missing or unexpected:
        names = ", ".join([*missing, *unexpected][:4])
        raise UserError(f"{found.weights} does not fit the recipe beside it: {len(missing)} weights missing, {len(unexpected)} left over ({names})")
    return backbone.to(device=device, dtype=dtype).eval().requires_grad_(False)


def check_length(found: LanguageRun, tokens: int) -> None:
    """Tries so many tokens on the model without weights. Raises UserError where an operator cannot take them."""
    task = found.task
    with torch.device("meta"), torch.no_grad():
        plan = build_backbone(task.backbone_name, attention=task.attention, **task.backbone_options)
        cast(CausalLM, plan).features(torch.empty(1, tokens, dtype=torch.int64))


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; else any name of torch's.

    Raises:
        UserError: a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}); auto takes the GPU where there is one") from error
    return device


def keep_tokenizer(data: TokenDataModule, folder: Path) -> None:
    """Puts into a run folder what is needed to read and write its text once the data are elsewhere: the tokenizer's files and its name."""
    data.save_tokenizer(folder)
    write_json(folder / _NAME, {"format": FORMAT, "name": data.index().tokenizer})


def kept_tokenizer(run: RunFolder) -> Tokenizer:
    """The tokenizer that `keep_tokenizer` put into a run folder.

    Raises:
        UserError: there is none.
    """
    name = (read_json(run.path / _NAME) or {}).get("name")
    if name == "bytes":
        return open_tokenizer(name)
    if (run.path / "tokenizer.json").is_file():
        return open_tokenizer(str(run.path))
    made = f"its data were made with '{name}'" if name else "its data named none"
    raise UserError(f"run {run.run_id} keeps no tokenizer ({made}); name one with --tokenizer: bytes, a tokenizer.json, or a Hugging Face name")


def _tokenizer(folder: RunFolder, named: str | None) -> Tokenizer:
    """The run's own; another one is taken only where the run does not say what its own was."""
    if named is None:
        return kept_tokenizer(folder)
    found, own = open_tokenizer(named), (read_json(folder.path / _NAME) or {}).get("name")
    if own is not None and not same_tokenizer(found.name, own):
        raise UserError(f"--tokenizer {named}: run {folder.run_id} was trained with {own}, whose ids mean other text; leave it out")
    return found


def _checkpoint(folder: RunFolder, ckpt: str | None) -> Path:
    found = complete_checkpoints(folder.path)
    if ckpt is None:
        if not found:
            raise UserError(f"run {folder.run_id} has no checkpoint yet")
        return found[-1]
    path = folder.checkpoints / step_folder(int(ckpt)) if ckpt.isdecimal() else Path(ckpt)
    if not (path / "COMPLETE").is_file():
        steps = ", ".join(str(int(checkpoint.name.removeprefix("step-"))) for checkpoint in found) or "none"
        raise UserError(f"--ckpt {ckpt} is no complete checkpoint; steps of run {folder.run_id}: {steps}")
    return path


def extrapolated(attention: Entry | Sequence[Entry], how: str) -> list[dict[str, Any]]:
    """An attention entry whose layers take longer text than they were made for, where they have a choice.

    Raises:
        UserError: no layer has.
    """
    entries = [attention] if isinstance(attention, (str, Mapping)) else attention
    layers = [{"name": entry} if isinstance(entry, str) else dict(entry) for entry in entries]
    bounded = [layer for layer in layers if "extrapolation" in CAUSAL_ATTENTION[layer["name"]].options() and layer.get("mix_form") != "relative"]
    if not bounded:
        raise UserError(f"--extrapolation {how}: the layers of this run take text of any length as they are; leave it out")
    for layer in bounded:
        layer["extrapolation"] = how
    return layers


def _task(folder: RunFolder, extrapolation: str | None) -> LanguageTask:
    model = read_yaml(folder.recipe)["model"]
    module, _, name = model["class_path"].rpartition(".")
    task = getattr(importlib.import_module(module), name, None) if module.startswith("mhla_lightning.") else None
    if not (isinstance(task, type) and issubclass(task, LanguageTask)):
        raise UserError(f"run {folder.run_id} trains {name}; generate and eval need a language model (LanguageTask)")
    arguments = {**model["init_args"], "init_from": None}  # the run's own weights follow, and what it started from may be gone
    if (arguments.get("backbone_options") or {}).get("compile"):
        arguments["backbone_options"] = {**arguments["backbone_options"], "compile": False}  # every new length would compile anew
    if extrapolation is not None:
        arguments["attention"] = extrapolated(arguments.get("attention", "mhla"), extrapolation)
    data = {"class_path": "mhla_lightning.data.TokenDataModule", "init_args": {"path": "."}}  # a recipe needs one; nothing is read
    resolved = resolve({"trainer": {}, "model": {**model, "init_args": arguments}, "data": data})
    return cast(LanguageTask, resolved.task)


def _read(found: LanguageRun) -> dict[str, Tensor]:
    if found.averaged:
        return load_file(found.weights)
    state = torch.load(found.weights, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    return {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
