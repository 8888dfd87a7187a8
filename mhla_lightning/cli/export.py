"""Writes the weights of a run as a folder that other code opens: config.json and a .safetensors file.

mhla export RUN --to wan                  # video: key names of diffusers' WanTransformer3DModel; what MHLA adds stands beside them
mhla export RUN --to wan --format wan     # Wan2.1's own names and those that the MHLA authors add
mhla export wan_mhla.safetensors --to wan # what mhla import wrote
mhla export RUN --to vit                  # all other backbones: our own names, for model.init_from (a language model: see mhla_lightning.hf)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mhla_lightning.cli.bench.report import check_json, write_json
from mhla_lightning.cli.import_ import weights_table
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.checkpoints.export import Trained

_STATES = {"shared": "written", "added": "added"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla export`."""
    parser.add_argument("trained", metavar="RUN", help="run id, run folder, or a file that mhla import wrote")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--format", metavar="NAME", help="diffusers, wan or plain (default: diffusers for video, plain for all others)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the tensors (default: %(default)s)")
    parser.add_argument("--runs", metavar="DIR", help="where run folders live (default: $MHLA_RUNS, else ./runs)")
    parser.add_argument("--ckpt", metavar="STEP", help="step, or checkpoint folder (default: the newest)")
    parser.add_argument("--no-ema", action="store_true", help="the weights as trained (default: their average, where the run has one)")
    parser.add_argument("--json", metavar="FILE", help="write what became of every tensor")


def run(args: argparse.Namespace) -> int:
    """Carries out the verb."""
    folder = Path(args.to)
    check_json(args.json)
    import torch
    from rich.console import Console

    from mhla_lightning.checkpoints.export import check_folder, plan, write

    check_folder(folder)
    trained = _find(args)
    export = plan(trained, args.format)
    write(export, folder, getattr(torch, args.dtype))
    console = Console()
    console.print(weights_table(f"{trained.source}: {trained.backbone}", export.rows(), _STATES))
    counts = f"{len(export.shared) + len(export.added)} tensors, {len(export.added)} of them under names that only ours have"
    console.print(f"{folder / export.file}: {counts}", soft_wrap=True, markup=False, highlight=False)
    for line in _foreign_layers(export.config):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    names = {state: [name for name, _ in getattr(export, state)] for state in _STATES}
    write_json(args.json, {"format": 1, "folder": str(folder), **names, "rows": export.rows()})
    return 0


def _find(args: argparse.Namespace) -> Trained:
    from mhla_lightning.checkpoints.export import Trained, read_imported
    from mhla_lightning.generation.rebuilding import rebuild
    from mhla_lightning.generation.weights import find_weights
    from mhla_lightning.runs.folder import find_run, runs_root
    from mhla_lightning.tasks import Task

    path, root = Path(args.trained), runs_root(args.runs)
    if path.exists() and not any((folder / "recipe.yaml").is_file() for folder in (root / args.trained, path)):
        if args.ckpt is not None or args.no_ema:
            raise UserError(f"RUN {path} is no run, and --ckpt and --no-ema choose between the weights of a run")
        return read_imported(path)
    folder = find_run(args.trained, root)
    task = rebuild(folder, Task, "only what trains a backbone can be exported").task  # type: ignore[type-abstract]  # any kind will do
    weights = find_weights(folder, args.ckpt, ema=not args.no_ema)
    source = f"run {folder.run_id} {weights.checkpoint.name} ({'averaged' if weights.averaged else 'raw'} weights)"
    return Trained(weights.read(), task.backbone_name, task.attention, task.backbone_options, source)


def _foreign_layers(config: dict[str, object]) -> list[str]:
    """One line where code that knows only softmax would compute something else."""
    from mhla_lightning.checkpoints.wan import CONFIG

    facts = config.get(CONFIG)
    layers = facts["layers"] if isinstance(facts, dict) else []
    others = [str(number) for number, name in enumerate(layers) if name != "softmax"]
    if not others:
        return []
    return [f"layers {', '.join(others)} are no softmax attention: diffusers and Wan2.1 load the shared tensors and compute softmax there"]
