"""Writes the weights of a run as one file, or as a folder that other libraries open.

Any strategy and any number of ranks will do:
  mhla export RUN --to weights.safetensors   our own names, for plain torch and model.init_from
  mhla export RUN --to DIR                   a folder of the library of the model's family:
    language models    --format hf           AutoModelForCausalLM.from_pretrained, with the model's code and
                                             its tokenizer
    image classifiers  --format timm         timm.create_model, after import mhla_lightning.backbones
    videos             --format diffusers    names of WanTransformer3DModel, and MHLA's own tensors
    image diffusion    --format plain        our own names and a config.json, for HubModel.from_pretrained
  mhla export RUN --to DIR --format plain    any model under our own names
  mhla export RUN --to wan --format wan      videos: names of Wan2.1 and those that the MHLA authors add
  mhla export wan_mhla.safetensors --to wan   a file of mhla import
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mhla_lightning.cli.import_ import weights_table
from mhla_lightning.cli.output import check_json, write_json
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.conversion.export import Export, TrainedModel

_STATES = {"shared": "written", "added": "added"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla export`."""
    parser.add_argument(
        "run", metavar="RUN", help="run id, run or checkpoint folder, or a file of mhla import"
    )
    parser.add_argument(
        "--to",
        required=True,
        metavar="PATH",
        help="a new file that ends in .safetensors, or a new or empty folder",
    )
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="plain, hf, timm, diffusers or wan (default: plain for one file; for a folder the one of the "
        "model's family)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the tensors (default: %(default)s)",
    )
    parser.add_argument(
        "--runs", metavar="DIR", help="folder of all run folders (default: $MHLA_RUNS, else ./runs)"
    )
    parser.add_argument("--ckpt", metavar="STEP", help="step, or checkpoint folder (default: the newest)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--ema", action="store_true", help="take the average of the weights; refuse a run that has none"
    )
    which.add_argument(
        "--no-ema",
        action="store_true",
        help="take the weights as trained (default: their average, where the run has one)",
    )
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="unpickle a checkpoint of DeepSpeed's own format, which can run any code",
    )
    parser.add_argument("--json", metavar="FILE", help="write the names and shapes of all tensors")


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    to = Path(args.to)
    title, export = perform(args)
    from rich.console import Console

    from mhla_lightning.conversion.export import is_file

    console = Console()
    console.print(weights_table(title, export.rows(), _STATES))
    total, added = len(export.shared) + len(export.added), len(export.added)
    counts = f"{total} tensors, {added} of them under names of MHLA only"
    loading = [] if export.opened_by is None else [f"load it: {export.opened_by.replace('DIR', str(to))}"]
    file = to if is_file(to) else to / export.file
    for line in (f"{file}: {counts}", *loading, *_foreign_layers(export.config)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    names = {state: [name for name, _ in getattr(export, state)] for state in _STATES}
    place = {"file" if is_file(to) else "folder": str(to)}
    write_json(args.json, {"format": 1, **place, **names, "rows": export.rows()})
    return 0


def perform(args: argparse.Namespace) -> tuple[str, Export]:
    """Write the export; return the title of its table and its content.

    Raises:
        UserError: an argument, the run or its weights are wrong.
    """
    to = Path(args.to)
    check_json(args.json)
    import torch

    from mhla_lightning.conversion.export import check_target, write

    check_target(to)
    title, export = _export(args, to)
    write(export, to, getattr(torch, args.dtype))
    return title, export


def _export(args: argparse.Namespace, to: Path) -> tuple[str, Export]:
    """Return the title of the table and the content of the export."""
    from mhla_lightning.conversion.export import bare, is_file, plan_export
    from mhla_lightning.weights.deepspeed_folder import read_deepspeed
    from mhla_lightning.weights.files import is_deepspeed

    path = Path(args.run)
    if not is_deepspeed(path):
        trained = _find(args)
        return f"{trained.source}: {trained.backbone}", plan_export(trained, args.format, is_file(to))
    _refuse_choices(args)
    if not is_file(to) or args.format not in (None, "plain"):
        raise UserError(
            "run",
            f"{path} does not name its model: `to` must end in .safetensors, and `format` must be left out",
        )
    return str(path), bare(read_deepspeed(path, args.trust_checkpoint, "run"), path.name)


def _refuse_choices(args: argparse.Namespace) -> None:
    if args.ckpt is not None or args.ema or args.no_ema:
        raise UserError(
            "run", f"{args.run} is no run, and `ckpt`, `ema` and `no_ema` choose between the weights of a run"
        )


def _find(args: argparse.Namespace) -> TrainedModel:
    from mhla_lightning.conversion.export import read_imported
    from mhla_lightning.conversion.from_run import trained_model
    from mhla_lightning.runs.folder import find_run, runs_root

    path, root = Path(args.run), runs_root(args.runs)
    if path.exists() and not any((folder / "recipe.yaml").is_file() for folder in (root / args.run, path)):
        _refuse_choices(args)
        return read_imported(path)
    folder = find_run(args.run, root)
    trained = trained_model(folder, args.ckpt, ema=not args.no_ema, tokenizer=args.format == "hf")
    if args.ema and not trained.averaged:
        raise UserError(
            trained.source,
            "this checkpoint holds no average (callbacks.EMA); leave out `ema` to take the weights as "
            "trained",
        )
    return trained


def _foreign_layers(config: Mapping[str, object]) -> list[str]:
    """Return a warning about layers that other code would compute as softmax."""
    from mhla_lightning.conversion.wan import CONFIG

    facts = config.get(CONFIG)
    layers = facts["layers"] if isinstance(facts, dict) else []
    others = [str(number) for number, name in enumerate(layers) if name != "softmax"]
    if not others:
        return []
    return [
        (
            f"layers {', '.join(others)} are no softmax attention, but diffusers and Wan2.1 load the "
            "shared tensors and compute softmax there"
        )
    ]
