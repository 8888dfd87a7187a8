"""Writes the weights of a run, of any strategy and number of ranks, as one file or as a folder that other
code opens.

mhla export RUN --to weights.safetensors  # one file under our own names, for plain torch and model.init_from
mhla export RUN --to lm --format hf       # language models: AutoModelForCausalLM.from_pretrained, after
import mhla_lightning.hf mhla export RUN --to vit --format timm    # image classifiers: timm.create_model,
after import mhla_lightning.backbones mhla export RUN --to wan                  # videos: key names of
diffusers' WanTransformer3DModel; what MHLA adds stands beside them mhla export RUN --to wan --format wan
# Wan2.1's own names and those that the MHLA authors add mhla export wan_mhla.safetensors --to wan # what mhla
import wrote mhla export RUN --to dit                  # all other backbones: our own names and a config.json,
for model.init_from
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhla_lightning.cli.import_ import weights_table
from mhla_lightning.cli.output import check_json, write_json
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.conversion.export import Export, Trained
    from mhla_lightning.runs.folder import RunFolder
    from mhla_lightning.tasks import Task

_STATES = {"shared": "written", "added": "added"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla export`."""
    parser.add_argument(
        "trained", metavar="RUN", help="run id, run or checkpoint folder, or a file that mhla import wrote"
    )
    parser.add_argument(
        "--to",
        required=True,
        metavar="PATH",
        help="a new file that ends in .safetensors, or a folder, new or empty",
    )
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="plain, hf, timm, diffusers or wan (default: plain; for a folder of video diffusers)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the tensors (default: %(default)s)",
    )
    parser.add_argument(
        "--runs", metavar="DIR", help="where run folders live (default: $MHLA_RUNS, else ./runs)"
    )
    parser.add_argument("--ckpt", metavar="STEP", help="step, or checkpoint folder (default: the newest)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--ema", action="store_true", help="the average of the weights, and nothing where the run has none"
    )
    which.add_argument(
        "--no-ema",
        action="store_true",
        help="the weights as trained (default: their average, where the run has one)",
    )
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="unpickle a checkpoint of DeepSpeed's own, which can run any code",
    )
    parser.add_argument("--json", metavar="FILE", help="write what became of every tensor")


def run(args: argparse.Namespace) -> int:
    """Carries out the verb."""
    target = Path(args.to)
    check_json(args.json)
    import torch
    from rich.console import Console

    from mhla_lightning.conversion.export import check_target, is_file, write

    check_target(target)
    title, export = _export(args, target)
    write(export, target, getattr(torch, args.dtype))
    console = Console()
    console.print(weights_table(title, export.rows(), _STATES))
    counts = (
        f"{len(export.shared) + len(export.added)} tensors, {len(export.added)} of them under names that "
        "only ours have"
    )
    loading = [] if export.opened_by is None else [f"load it: {export.opened_by.replace('DIR', str(target))}"]
    file = target if is_file(target) else target / export.file
    for line in (f"{file}: {counts}", *loading, *_foreign_layers(export.config)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    names = {state: [name for name, _ in getattr(export, state)] for state in _STATES}
    place = {"file" if is_file(target) else "folder": str(target)}
    write_json(args.json, {"format": 1, **place, **names, "rows": export.rows()})
    return 0


def _export(args: argparse.Namespace, target: Path) -> tuple[str, Export]:
    """What is written, and what it is of."""
    from mhla_lightning.conversion.export import bare, is_file, plan
    from mhla_lightning.weights.deepspeed_folder import read_deepspeed
    from mhla_lightning.weights.files import is_deepspeed

    path = Path(args.trained)
    if not is_deepspeed(path):
        trained = _find(args)
        return f"{trained.source}: {trained.backbone}", plan(trained, args.format, is_file(target))
    _refuse_choices(args)
    if not is_file(target) or args.format not in (None, "plain"):
        raise UserError(
            f"RUN {path} does not say what model it is of: --to a file that ends in .safetensors, "
            "without --format"
        )
    return str(path), bare(read_deepspeed(path, args.trust_checkpoint, "RUN"), path.name)


def _refuse_choices(args: argparse.Namespace) -> None:
    if args.ckpt is not None or args.ema or args.no_ema:
        raise UserError(
            f"RUN {args.trained} is no run, and --ckpt, --ema and --no-ema choose between the "
            "weights of a run"
        )


def _find(args: argparse.Namespace) -> Trained:
    from mhla_lightning.conversion.export import Trained, read_imported
    from mhla_lightning.inference.weights import find_weights
    from mhla_lightning.runs.folder import find_run, runs_root

    path, root = Path(args.trained), runs_root(args.runs)
    if path.exists() and not any(
        (folder / "recipe.yaml").is_file() for folder in (root / args.trained, path)
    ):
        _refuse_choices(args)
        return read_imported(path)
    folder = find_run(args.trained, root)
    task, beside = _rebuilt(folder, args.format)
    weights = find_weights(folder, args.ckpt, ema=not args.no_ema)
    if args.ema and not weights.averaged:
        raise UserError(
            f"{weights.checkpoint} holds no average (callbacks.EMA); leave out --ema to take the "
            "weights as trained"
        )
    source = (
        f"run {folder.run_id} {weights.checkpoint.name} ({'averaged' if weights.averaged else 'raw'} weights)"
    )
    return Trained(
        weights.open(), task.backbone_name, task.attention, task.backbone_options, source, **beside
    )


def _rebuilt(folder: RunFolder, format: str | None) -> tuple[Task, dict[str, Any]]:
    """The task without weights, and what formats say besides: the tokenizer of a language model, the
    preparation of a classifier's images.
    """
    from mhla_lightning.data import ImageDataModule
    from mhla_lightning.inference.loading import find_task, keeps_tokenizer, kept_tokenizer
    from mhla_lightning.inference.rebuilding import rebuild, trains
    from mhla_lightning.tasks import LanguageTask, Task

    if trains(folder, LanguageTask):
        tokenizer = kept_tokenizer(folder) if format == "hf" and keeps_tokenizer(folder) else None
        return find_task(folder), {"end": tokenizer.end, "files": tokenizer.files} if tokenizer else {}
    # # any kind will do
    built = rebuild(folder, Task, "only what trains a backbone can be exported")  # type: ignore[type-abstract]
    return built.task, {"pixels": built.data.augmentation.for_timm()} if isinstance(
        built.data, ImageDataModule
    ) else {}


def _foreign_layers(config: Mapping[str, object]) -> list[str]:
    """One line where code that knows only softmax would compute something else."""
    from mhla_lightning.conversion.wan import CONFIG

    facts = config.get(CONFIG)
    layers = facts["layers"] if isinstance(facts, dict) else []
    others = [str(number) for number, name in enumerate(layers) if name != "softmax"]
    if not others:
        return []
    return [
        (
            f"layers {', '.join(others)} are no softmax attention: diffusers and Wan2.1 load the shared "
            "tensors and compute softmax there"
        )
    ]
