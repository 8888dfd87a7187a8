"""Turns other people's checkpoints into weights of our backbones: one .safetensors file for model.init_from.

mhla import dit DiT-XL-2-256x256.pt --out dit_xl2.safetensors                      # softmax as trained
mhla import dit DiT-XL-2-256x256.pt --out dit_xl2_mhla.safetensors --attention mhla # the paper's fine-tuning start: mixing, gate and conv are new
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhla_lightning.cli.bench.report import check_json, write_json
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.checkpoints.foreign import Imported, Target

_KINDS = {"dit": "facebookresearch's DiT, or the DiT of the MHLA authors"}
_STATES = {"copied": "copied", "created": "new in ours", "left": "left over"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla import`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, summary in _KINDS.items():
        added = kinds.add_parser(name, help=summary, description=f"Takes a checkpoint of {summary}.", allow_abbrev=False)
        added.add_argument(
            "path", metavar="PATH", help="torch or .safetensors file: bare weights, or a training checkpoint (its ema, else its model)"
        )
        added.add_argument("--out", required=True, metavar="FILE", help="the .safetensors file to write")
        added.add_argument("--backbone", help="name in the registry (default: dit_xl2)")
        added.add_argument("--attention", metavar="YAML", help="attention entry (default: as the checkpoint was trained)")
        added.add_argument("--backbone-options", metavar="YAML", default="{}", help="such as '{input_size: 64}' (default: %(default)s)")
        added.add_argument("--seed", type=int, default=0, help="of the weights that are new (default: %(default)s)")
        added.add_argument("--json", metavar="FILE", help="write what became of every tensor")


def run(args: argparse.Namespace) -> int:
    """Carries out the verb."""
    source, out = Path(args.path), Path(args.out)
    attention = None if args.attention is None else _yaml("--attention", args.attention)
    options = _yaml("--backbone-options", args.backbone_options)
    if not isinstance(options, dict):
        raise UserError(f"--backbone-options {args.backbone_options}: a mapping is wanted, such as '{{input_size: 64}}'")
    _check_files(source, out)
    check_json(args.json)

    from mhla_lightning.backbones.weights import read_tensors
    from mhla_lightning.checkpoints.foreign import FAMILIES, convert, save_weights

    state = read_tensors(source, "PATH")
    target = FAMILIES[args.kind].target(state, args.backbone, attention, options)
    imported = convert(state, target, args.seed)
    save_weights(out, imported, target, source.name)
    _show(imported, target, out)
    write_json(args.json, imported.as_dict())
    return 0


def _yaml(argument: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{argument} {text}: this is no YAML ({str(error).splitlines()[0]})") from error


def _check_files(source: Path, out: Path) -> None:
    if not source.is_file():
        raise UserError(f"PATH {source} is no file")
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: weights are written as .safetensors, so the name ends like that")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}")
    if out.exists() and out.samefile(source):
        raise UserError(f"--out {out} is the file that is read; give another name")


def _show(imported: Imported, target: Target, out: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{target.backbone}, attention {target.attention}"))
    for heading in ("", "name", "tensors", "shape", "parameters"):
        table.add_column(heading, justify="right" if heading in ("tensors", "parameters") else "left")
    for row in imported.rows():
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(_STATES[row["state"]], escape(row["name"]), str(row["tensors"]), shape, f"{row['parameters']:,}")
    console = Console()
    console.print(table)
    counts = f"{len(imported.copied)} tensors copied, {len(imported.created)} new in ours, {len(imported.left)} left over"
    console.print(f"{out}: {counts}; start from it with --model.init_from {out}", soft_wrap=True, markup=False, highlight=False)
