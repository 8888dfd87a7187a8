"""A trained language model out of its run folder, without the data it was trained on."""

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
from mhla_lightning.runs.folder import FORMAT, RunFolder, find_run, read_json, runs_root, write_json
from mhla_lightning.tasks.language import LanguageTask

_NAME = "tokenizer_name.json"


@dataclass(frozen=True)
class LanguageRun(FoundRun):
    """A run of a language model.

    Attributes:
        task: built from recipe.yaml, without weights.
        tokenizer: the one the run was trained with.
    """

    task: LanguageTask
    tokenizer: Tokenizer

    @property
    def attention(self) -> str | Mapping[str, Any] | Sequence[Any]:
        """The attention entry."""
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
    weights = find_weights(folder, ckpt, ema)
    task = find_task(folder, extrapolation)
    found = _tokenizer(folder, tokenizer)
    if found.vocabulary > task.vocab_size:
        raise UserError(
            f"the tokenizer {found.name} has {found.vocabulary} ids, and the model of run "
            f"{folder.run_id} has {task.vocab_size}"
        )
    return LanguageRun(folder, weights, task, found)


def load_model(
    found: LanguageRun, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CausalLM:
    """The model in eval mode, on `device`.

    Raises:
        UserError: weights of another model.
    """
    found.task.configure_model()
    backbone = cast(CausalLM, found.task.backbone)
    found.weights.load(backbone)
    return backbone.to(device=device, dtype=dtype).eval().requires_grad_(False)


def check_length(found: LanguageRun, tokens: int) -> None:
    """Tries so many tokens on the model without weights. Raises UserError where an operator cannot take
    them.
    """
    task = found.task
    with torch.device("meta"), torch.no_grad():
        plan = build_backbone(task.backbone_name, attention=task.attention, **task.backbone_options)
        cast(CausalLM, plan).features(torch.empty(1, tokens, dtype=torch.int64))


def keep_tokenizer(data: TokenDataModule, folder: Path) -> None:
    """Puts into a run folder what is needed to read and write its text once the data are elsewhere: the
    tokenizer's files and its name.
    """
    data.save_tokenizer(folder)
    write_json(folder / _NAME, {"format": FORMAT, "name": data.index().tokenizer})


def keeps_tokenizer(run: RunFolder) -> bool:
    """Whether :func:`kept_tokenizer` finds one."""
    return (read_json(run.path / _NAME) or {}).get("name") == "bytes" or (
        run.path / "tokenizer.json"
    ).is_file()


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
    raise UserError(
        f"run {run.run_id} keeps no tokenizer ({made}); name one with --tokenizer: bytes, a "
        "tokenizer.json, or a Hugging Face name"
    )


def _tokenizer(folder: RunFolder, named: str | None) -> Tokenizer:
    """The run's own; another one is taken only where the run does not say what its own was."""
    if named is None:
        return kept_tokenizer(folder)
    found, own = open_tokenizer(named), (read_json(folder.path / _NAME) or {}).get("name")
    if own is not None and not same_tokenizer(found.name, own):
        raise UserError(
            f"--tokenizer {named}: run {folder.run_id} was trained with {own}, whose ids mean other "
            "text; leave it out"
        )
    return found


def extrapolated(attention: Entry | Sequence[Entry], how: str) -> list[dict[str, Any]]:
    """An attention entry whose layers take longer text than they were made for, where they have a choice.

    Raises:
        UserError: no layer has.
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
            f"--extrapolation {how}: the layers of this run take text of any length as they are; leave it out"
        )
    for layer in bounded:
        layer["extrapolation"] = how
    return layers


def find_task(folder: RunFolder, extrapolation: str | None = None) -> LanguageTask:
    """The task of a run without weights, wherever its data are now. Raises UserError for no language
    model.
    """

    def change(arguments: dict[str, Any]) -> dict[str, Any]:
        if (arguments.get("backbone_options") or {}).get("compile"):
            arguments["backbone_options"] = {
                **arguments["backbone_options"],
                "compile": False,
            }  # every new length would compile anew
        if extrapolation is not None:
            arguments["attention"] = extrapolated(arguments.get("attention", "mhla"), extrapolation)
        return arguments

    data = {
        "class_path": "mhla_lightning.data.TokenDataModule",
        "init_args": {"path": "."},
    }  # the tokenizer that its own names may be gone
    return cast(
        LanguageTask,
        rebuild(folder, LanguageTask, "generate and eval lm need a language model", change, data).task,
    )
