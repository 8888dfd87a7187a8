"""Converts checkpoints of other projects to weights of our backbones, for model.init_from.

It writes one .safetensors file:
  mhla import dit DiT-XL-2-256x256.pt --out dit_xl2.safetensors
                                             softmax as trained
  mhla import dit DiT-XL-2-256x256.pt --out dit_xl2_mhla.safetensors --attention mhla
                                             start of the paper's fine-tuning: mixing, gate and
                                             convolution are new
  mhla import sana Sana_600M_1024px_diffusers --out sana.safetensors
                                             diffusers' folder; linear attention as trained
  mhla import sana Sana_600M --out sana_mhla.safetensors --attention '{name: mhla, mix_init: uniform}'
                                             MHLA that begins as that linear attention
  mhla import wan Wan2.1-T2V-1.3B --out wan.safetensors
                                             a file or a folder; softmax as trained
  mhla import wan Wan2.1-T2V-1.3B --out wan_hybrid.safetensors --attention '[softmax, mhla, mhla]'
  mhla import wan model.safetensors --out wan_mhla.safetensors
                                             the MHLA authors' model: gate, blocks and hybrid
                                             pattern are found
  mhla import timm deit_tiny_patch16_224 --out deit.safetensors
                                             a name that timm downloads, a file or a folder; softmax
                                             as trained
  mhla import timm deit.pth --out deit_mhla.safetensors --attention mhla
                                             the same weights as the start of MHLA
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhla_lightning.cli.output import check_json, write_json
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.conversion.foreign import Imported
    from mhla_lightning.weights.target import ImportTarget, Wish

Pixels = Mapping[str, Sequence[float]]  # mean and std; empty where there are none
_IMAGES = "classification/deit_tiny_mhla_images_cpu"
_KINDS = {
    "dit": "facebookresearch's DiT, or the DiT of the MHLA authors",
    "sana": "SANA, by the names of diffusers",
    "wan": "Wan2.1 (its own names or diffusers'), or the Wan of the MHLA authors",
    "timm": "a ViT or DeiT of timm",
}
_DEFAULT = {
    "dit": "dit_xl2",
    "sana": "sana_600m or sana_1600m, with the sizes of the checkpoint",
    "wan": "wan_1_3b or wan_14b, with the sizes of the checkpoint",
    "timm": "deit_tiny, deit_small or deit_base, with the sizes of the checkpoint",
}
_OPTIONS = {
    "dit": "{input_size: 64}",
    "sana": "{input_size: 16}",
    "wan": "{input_size: [21, 60, 100]}",
    "timm": "{img_size: 128}",
}
_EXAMPLES = {
    "dit": "DiT-XL-2-256x256.pt --out dit_xl2_mhla.safetensors --attention mhla",
    "sana": "Sana_600M_1024px_diffusers --out sana.safetensors",
    "wan": "Wan2.1-T2V-1.3B --out wan.safetensors",
    "timm": "deit_tiny_patch16_224 --out deit_mhla.safetensors --attention mhla",
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
        by_name = "timm's name of a model, which timm downloads; " if name == "timm" else ""
        added.add_argument(
            "path",
            metavar="NAME|PATH" if by_name else "PATH",
            help=(
                f"{by_name}torch or .safetensors file, or a folder of .safetensors: bare weights, or a "
                "training checkpoint"
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
        added.set_defaults(heads=None, layout=None, model=None)
        if name != "dit":
            added.add_argument(
                "--heads",
                type=int,
                metavar="N",
                help="attention heads, where the checkpoint does not show them",
            )
        if name == "timm":
            added.add_argument(
                "--model",
                metavar="NAME",
                help="timm's name of the model behind a file (default: by config.json, file name or shapes)",
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
    _check_files(source, out, may_be_name=args.kind == "timm")
    check_json(args.json)

    from mhla_lightning.conversion.foreign import save_weights
    from mhla_lightning.weights.target import Wish

    wish = Wish(
        str(source),
        args.backbone,
        attention,
        options,
        heads,
        None if layout is None else tuple(layout),
    )
    imported, target, pixels = _converted(args, wish)
    save_weights(out, imported, target, source.name, pixels)
    _show(imported, target, out, pixels)
    write_json(args.json, {**imported.as_dict(), "model": _model(target, out)})
    return 0


def _converted(args: argparse.Namespace, wish: Wish) -> tuple[Imported, ImportTarget, Pixels]:
    """Return the weights, their backbone, and the normalisation of a classifier's images."""
    from mhla_lightning.conversion.config_files import read_config
    from mhla_lightning.conversion.foreign import FAMILIES
    from mhla_lightning.conversion.timm_models import open_timm
    from mhla_lightning.conversion.timm_vit import convert_timm
    from mhla_lightning.weights.adapted import WeightState
    from mhla_lightning.weights.deepspeed_folder import read_deepspeed
    from mhla_lightning.weights.files import is_deepspeed, read_tensors

    source = Path(wish.source)
    if args.kind == "timm":
        opened = open_timm(args.path, args.model, args.heads, args.weights)
        state, pixels = opened.state, opened.pixels
        imported, target = convert_timm(opened, wish, args.seed)
    else:
        state = (
            WeightState(read_deepspeed(source, args.trust_checkpoint, "path"))
            if is_deepspeed(source)
            else read_tensors(source, "path", args.weights)
        )
        family, pixels = FAMILIES[args.kind], {}
        wish = replace(wish, config=read_config(source, family.classes))
        imported, target = family.convert(state, wish, args.seed)
    if state.taken:
        imported.notes.insert(0, f"these are {state.taken}")
    return imported, target, pixels


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


def _check_files(source: Path, out: Path, may_be_name: bool) -> None:
    if not (source.is_file() or source.is_dir() or may_be_name):
        raise UserError("path", f"{source} is no file and no folder")
    if out.suffix != ".safetensors":
        raise UserError("out", f"{out} must end in .safetensors, the format that is written")
    if not out.absolute().parent.is_dir():
        raise UserError("out", f"{out} is in a folder that does not exist, {out.absolute().parent}")
    if out.exists() and source.is_dir() and out.absolute().parent.samefile(source):
        raise UserError("out", f"{out} is a file of the folder that is read; give another name")
    if out.exists() and source.exists() and out.samefile(source):
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


def _show(imported: Imported, target: ImportTarget, out: Path, pixels: Pixels) -> None:
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
        *_on_images(target, out, pixels),
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


def _on_images(target: ImportTarget, out: Path, pixels: Pixels) -> list[str]:
    """Return the command that trains a classifier on from these weights; none for other models."""
    from mhla_lightning.backbones import IMAGE_CLASSIFIERS, default_options

    if target.backbone not in IMAGE_CLASSIFIERS:
        return []
    keys = {
        "model.backbone": target.backbone,
        "model.attention": target.attention,
        "model.backbone_options": {
            key: value for key, value in target.options.items() if key not in ("num_classes", "in_chans")
        },
        "model.init_from": str(out),
        "data.image_size": (default_options(target.backbone) | dict(target.options))["img_size"],
        **{f"data.augmentation.{name}": list(values) for name, values in pixels.items()},
    }
    words = [f"--{key} {shlex.quote(_flow(value))}" for key, value in keys.items()]
    command = " \\\n  ".join([f"lightning run {_IMAGES} --data.source FOLDER --data.path SHARDS", *words])
    return [f"or on your own images with\n{command}"]


def _flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    import yaml

    plain = json.loads(json.dumps(value))
    text: str = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("...\n").strip()
