"""Converts checkpoints of other projects to weights of our backbones, for model.init_from.

It writes one .safetensors file:
  mhla import dit DiT-XL-2-256x256.pt --out dit_xl2.safetensors
                                             softmax as trained
  mhla import dit DiT-XL-2-256x256.pt --out dit_xl2_mhla.safetensors --attention mhla
                                             start of the paper's fine-tuning: mixing, gate and
                                             convolution are new
  mhla import sana Sana_600M_1024px_diffusers --out sana.safetensors
                                             diffusers' folder; linear attention as trained
  mhla import sana Sana_600M_1024px_diffusers --out sana_mhla.safetensors \\
    --attention '{name: mhla, mix_init: uniform}'
                                             MHLA that begins as that linear attention
  mhla import wan Wan2.1-T2V-1.3B --out wan.safetensors
                                             a file or a folder; softmax as trained
  mhla import wan Wan2.1-T2V-1.3B --out wan_hybrid.safetensors --attention '[softmax, mhla, mhla]'
  mhla import wan model.safetensors --out wan_mhla.safetensors
                                             the MHLA authors' model: gate, blocks and hybrid
                                             pattern are found
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhla_lightning.cli.output import check_json, write_json
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.conversion.foreign import Imported
    from mhla_lightning.weights.target import ImportTarget

_KINDS = {
    "dit": "facebookresearch's DiT, or the DiT of the MHLA authors",
    "sana": "SANA, by the names of diffusers",
    "wan": "Wan2.1 (its own names or diffusers'), or the Wan of the MHLA authors",
}
_DEFAULT = {
    "dit": "dit_xl2",
    "sana": "sana_600m or sana_1600m, with the sizes of the checkpoint",
    "wan": "wan_1_3b or wan_14b, with the sizes of the checkpoint",
}
_OPTIONS = {"dit": "{input_size: 64}", "sana": "{input_size: 16}", "wan": "{input_size: [21, 60, 100]}"}
_EXAMPLES = {
    "dit": "DiT-XL-2-256x256.pt --out dit_xl2_mhla.safetensors --attention mhla",
    "sana": "Sana_600M_1024px_diffusers --out sana.safetensors",
    "wan": "Wan2.1-T2V-1.3B --out wan.safetensors",
}
_STATES = {"copied": "copied", "resampled": "resampled", "created": "new", "left": "left over"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla import`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, summary in _KINDS.items():
        added = kinds.add_parser(
            name,
            help=summary,
            description=f"Convert a checkpoint of {summary}.",
            epilog=f"Example: mhla import {name} {_EXAMPLES[name]}",
            allow_abbrev=False,
        )
        added.add_argument(
            "path",
            metavar="PATH",
            help=(
                "torch or .safetensors file, or a folder of .safetensors: bare weights, or a training "
                "checkpoint"
            ),
        )
        added.add_argument("--out", required=True, metavar="FILE", help="the .safetensors file to write")
        added.add_argument("--backbone", help=f"name in the registry (default: {_DEFAULT[name]})")
        added.add_argument(
            "--attention", metavar="YAML", help="attention entry (default: as the checkpoint was trained)"
        )
        added.add_argument(
            "--backbone-options",
            metavar="YAML",
            default="{}",
            help=f"such as '{_OPTIONS[name]}' (default: %(default)s)",
        )
        added.add_argument(
            "--weights",
            metavar="KEY",
            help=(
                "key of a training checkpoint that holds the weights, such as model or model_ema "
                "(default: an average where there is one)"
            ),
        )
        added.add_argument("--seed", type=int, default=0, help="of new weights (default: %(default)s)")
        added.add_argument(
            "--trust-checkpoint",
            action="store_true",
            help="unpickle a checkpoint of DeepSpeed's own format, which can run any code",
        )
        added.add_argument(
            "--json", metavar="FILE", help="write which tensors were copied, are new or were left over"
        )
        added.set_defaults(heads=None, layout=None)
        if name != "dit":
            added.add_argument(
                "--heads",
                type=int,
                metavar="N",
                help="attention heads, where the checkpoint does not show them",
            )
        if name == "wan":
            added.add_argument(
                "--layout",
                type=int,
                nargs=3,
                metavar=("T", "H", "W"),
                help="blocks per axis of the MHLA layers (150 blocks: 3 5 10)",
            )


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    source, out = Path(args.path), Path(args.out)
    attention = None if args.attention is None else _yaml("attention", args.attention)
    options = _yaml("backbone_options", args.backbone_options)
    if not isinstance(options, dict):
        raise UserError(
            "backbone_options", f"{args.backbone_options} is no mapping, such as '{_OPTIONS[args.kind]}'"
        )
    heads, layout = args.heads, args.layout
    for name, number in (("heads", heads), *(("layout", count) for count in layout or ())):
        if number is not None and number < 1:
            raise UserError(name, f"{number} is too small; it must be at least 1")
    _check_files(source, out)
    check_json(args.json)

    from mhla_lightning.conversion.config_files import read_config
    from mhla_lightning.conversion.foreign import FAMILIES, save_weights
    from mhla_lightning.weights.adapted import WeightState
    from mhla_lightning.weights.deepspeed_folder import read_deepspeed
    from mhla_lightning.weights.files import is_deepspeed, read_tensors
    from mhla_lightning.weights.target import Wish

    state = (
        WeightState(read_deepspeed(source, args.trust_checkpoint, "path"))
        if is_deepspeed(source)
        else read_tensors(source, "path", args.weights)
    )
    config = read_config(source, FAMILIES[args.kind].classes)
    wish = Wish(
        str(source),
        args.backbone,
        attention,
        options,
        heads,
        None if layout is None else tuple(layout),
        config,
    )
    imported, target = FAMILIES[args.kind].convert(state, wish, args.seed)
    save_weights(out, imported, target, source.name)
    if state.taken:
        imported.notes.insert(0, f"these are {state.taken}")
    _show(imported, target, out)
    write_json(args.json, {**imported.as_dict(), "model": _model(target, out)})
    return 0


def _model(target: ImportTarget, out: Path) -> dict[str, Any]:
    """Return the recipe keys that train on from the written weights."""
    options = {"backbone_options": dict(target.options)} if target.options else {}
    return {"backbone": target.backbone, "attention": target.attention, **options, "init_from": str(out)}


def _yaml(key: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(key, f"{text} is no YAML ({str(error).splitlines()[0]})") from error


def _check_files(source: Path, out: Path) -> None:
    if not (source.is_file() or source.is_dir()):
        raise UserError("path", f"{source} is no file and no folder")
    if out.suffix != ".safetensors":
        raise UserError("out", f"{out} must end in .safetensors, the format that is written")
    if not out.absolute().parent.is_dir():
        raise UserError("out", f"{out} is in a folder that does not exist, {out.absolute().parent}")
    if out.exists() and source.is_dir() and out.absolute().parent.samefile(source):
        raise UserError("out", f"{out} is a file of the folder that is read; give another name")
    if out.exists() and out.samefile(source):
        raise UserError("out", f"{out} is the file that is read; give another name")


def weights_table(title: str, rows: Sequence[Mapping[str, Any]], states: Mapping[str, str]) -> Any:
    """Build a rich table of tensors, with the weight and bias of a module in one row.

    Args:
        title: above the table.
        rows: of conversion.foreign.table_rows.
        states: words for the states of the rows.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    modules: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        modules.setdefault((row["state"], re.sub(r"\.(weight|bias)$", "", row["name"])), []).append(row)
    table = Table(title=escape(title), box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "name", "tensors", "shape", "parameters"):
        number, whole = heading in ("tensors", "parameters"), heading not in ("name", "shape")
        table.add_column(heading, justify="right" if number else "left", no_wrap=whole, overflow="fold")
    for (state, name), group in modules.items():
        shape = " ".join(dict.fromkeys("x".join(map(str, row["shape"])) for row in group))
        counts = [sum(row[key] for row in group) for key in ("tensors", "parameters")]
        table.add_row(states[state], escape(name), str(counts[0]), shape, f"{counts[1]:,}")
    return table


def _show(imported: Imported, target: ImportTarget, out: Path) -> None:
    import yaml
    from rich.console import Console

    console = Console()
    console.print(weights_table(f"{target.backbone}, attention {target.attention}", imported.rows(), _STATES))
    counts = (
        f"{len(imported.copied)} tensors copied, {len(imported.created)} new in ours, "
        f"{len(imported.left)} left over"
        + (f", {len(imported.resampled)} resampled to other blocks" if imported.resampled else "")
    )
    recipe = yaml.safe_dump(
        json.loads(json.dumps({"model": {"init_args": _model(target, out)}})),
        sort_keys=False,
        default_flow_style=None,
    )
    for text in (
        *imported.notes,
        f"{out}: {counts}; start from it with",
        recipe.rstrip(),
        *_mixing_range(imported),
    ):
        console.print(text, soft_wrap=True, markup=False, highlight=False)


def _mixing_range(imported: Imported) -> list[str]:
    """Return a line about copied mixing values, which some recipes would clamp to [0, 1]."""
    copied = [imported.weights[name] for name, _ in imported.copied if name.endswith(".mixing.weight")]
    if not copied:
        return []
    low, high = min(float(value.min()) for value in copied), max(float(value.max()) for value in copied)
    beyond = "; training leaves them so only where mix_clamp is null" if low < 0 or high > 1 else ""
    return [f"mixing values copied as they are: {low:.4g} to {high:.4g}{beyond}"]
