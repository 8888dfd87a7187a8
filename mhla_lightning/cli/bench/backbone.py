"""Measure a backbone's training step over image or clip sizes.

Several operators have the same positional convolution.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mhla_lightning.cli.bench.on_gpu import (
    add_gpu_arguments,
    gpu_cells,
    gpu_headings,
    gpu_notes,
    machine_name,
    plot_rows,
)
from mhla_lightning.cli.output import (
    check_writable,
    demand_at_least,
    measuring_bar,
    summary_table,
    write_json,
)
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.bench.backbone_speed import BackboneFamily, Size
    from mhla_lightning.bench.timing import Case

Entry = dict[str, Any] | list[dict[str, Any]]

HELP = "speed and peak memory of a backbone over image or clip sizes"
EXAMPLE = "dit_s2 --res 256 --layers 2 --turns 5"
RATIOS = (
    ("mhla", "linear"),
    ("softmax", "mhla"),
    ("softmax", "linear"),
    ("softmax", "hybrid"),
    ("hybrid", "mhla"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla bench backbone`."""
    parser.add_argument("backbone", metavar="BACKBONE", help="dit_s2, dit_b2, ..., sana_600m, wan_1_3b")
    parser.add_argument(
        "--res",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="image sizes, per side (default: 256 512 1024 2048; sana_600m: 1024 2048 4096)",
    )
    parser.add_argument(
        "--video",
        nargs="+",
        metavar="FxHxW",
        help=(
            "clip sizes, frames x height x width in pixels (default: 29x256x256 29x512x512 81x480x800; "
            "wan_tiny: 16x64x64)"
        ),
    )
    parser.add_argument(
        "--attention",
        metavar="YAML",
        help=(
            "list of attention entries, a hybrid being a list itself (default: [softmax, linear, mhla], "
            "for video also [softmax, mhla, mhla])"
        ),
    )
    parser.add_argument(
        "--pos-conv",
        help=(
            "of every entry that does not name one: cpe3, lepe3, lepe5, none (default: cpe3, for video "
            "the preset's none)"
        ),
    )
    parser.add_argument(
        "--gate", action="store_true", help="output gate in every entry that does not say (default: in none)"
    )
    parser.add_argument(
        "--blocks",
        type=int,
        default=None,
        metavar="K",
        help="mhla's blocks per axis (default: what M^2 <= tokens allows)",
    )
    parser.add_argument("--layers", type=int, default=None, metavar="N", help="default: the backbone's")
    parser.add_argument("--batch", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="recompute every block in the backward: less memory, a longer step",
    )
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast instead of float32")
    parser.add_argument(
        "--turns",
        type=int,
        default=5,
        help="measured turns after a warm-up, at least 5 (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add_gpu_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Carries out the verb."""
    demand_at_least(args, turns=5, batch=1, **({} if args.layers is None else {"layers": 1}))
    check_writable("plot", args.plot)
    from mhla_lightning.bench.backbone_speed import family_of
    from mhla_lightning.bench.timing import gemm_name

    family = family_of(args.backbone)
    entries = _entries(args, family)
    sizes = _sizes(args, family)
    import torch
    from rich.console import Console

    from mhla_lightning.inference.weights import choose_device

    device = choose_device(args.device)
    torch.manual_seed(0)
    plan = _plan(args, family, sizes, entries)
    console = Console()
    console.print(_what(args, family))
    result: dict[str, Any] = {
        "rows": [],
        "summary": {},
        "precision": _precision(args),
        "checkpointing": args.checkpointing,
    }
    with measuring_bar(console, len(plan) * len(entries) * (args.turns + 1)) as on_case:
        for size, planned in plan.items():  # one size at a time: the memory of one is enough
            group, rate = _measure(args, family, size, planned, device, on_case)
            rows = [_row(args, family, size, case, planned[case.operator]) for case in group]
            machine, product = machine_name(device), gemm_name(device, group[0].dtype)
            console.print(
                f"{machine}; a {product} runs at {rate / 1e9:.0f} GFLOP/s; torch {torch.__version__}"
            )
            console.print(_table(family, rows))
            for note in gpu_notes(rows):
                console.print(note)
            result["rows"] += [{**row, "gemm_flops_per_second": rate, "machine": machine} for row in rows]
            result["summary"] |= _ratios(family, size, group)
            write_json(
                args.json, result
            )  # the next size may take an hour: a run that is stopped keeps what it measured
    plot_rows(args.plot, f"{args.backbone}, forward and backward", "tokens", result["rows"])
    if result["summary"]:
        by = "pixels" if family.key == "res" else "clip"
        console.print(summary_table(f"summary: time of A over time of B, by {by}", result["summary"]))
    return 0


def _what(args: argparse.Namespace, family: BackboneFamily) -> str:
    """What is measured, in a line."""
    layers = "" if args.layers is None else f" with {args.layers} layers"
    steps = "forward and backward" + (" with recomputation of every block" if args.checkpointing else "")
    return (
        f"{args.backbone}{layers}, {_precision(args)}, batch {args.batch}, pos_conv "
        f"{_pos_conv(args, family) or 'none'}; steps are {steps}"
    )


def _precision(args: argparse.Namespace) -> str:
    return "bf16 autocast" if args.bf16 else "float32"


def _sizes(args: argparse.Namespace, family: BackboneFamily) -> list[Size]:
    """What is measured, in growing order."""
    given = {"res": args.res, "video": args.video}
    other = "res" if family.key == "video" else "video"
    if given[other] is not None:
        raise UserError(other, f"it does not go with {args.backbone}, which takes `{family.key}`")
    asked = given[family.key]
    sizes = (
        list(family.sizes)
        if asked is None
        else [_clip(text) if family.key == "video" else text for text in asked]
    )
    return sorted(set(sizes))


def _clip(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UserError("video", f"'{text}' is no clip: FRAMESxHEIGHTxWIDTH in pixels, such as 29x256x256")
    frames, height, width = map(int, parts)
    return frames, height, width


def _pos_conv(args: argparse.Namespace, family: BackboneFamily) -> str | None:
    return family.pos_conv if args.pos_conv is None else args.pos_conv


def _entries(args: argparse.Namespace, family: BackboneFamily) -> dict[str, Entry]:
    """Return label -> entry, with the options that all entries share.

    Options tell apart an operator that is given twice.
    """
    import yaml

    text = family.attention if args.attention is None else args.attention
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError("attention", f"'{text}' is no YAML ({str(error).splitlines()[0]})") from error
    pos_conv = _pos_conv(args, family)
    shared = {"gate": args.gate} if pos_conv is None else {"pos_conv": pos_conv, "gate": args.gate}
    entries: dict[str, Entry] = {}
    for entry in given if isinstance(given, list) else [given]:
        parts = [_mapping(part) for part in (entry if isinstance(entry, list) else [entry])]
        label = _label(parts, isinstance(entry, list), entries)
        if label in entries:
            raise UserError("attention", f"{label} is given twice")
        full = [{**shared, **part} for part in parts]
        entries[label] = full if isinstance(entry, list) else full[0]
    if not entries:
        raise UserError("attention", "the list is empty; give at least one entry")
    return entries


def _mapping(entry: Any) -> dict[str, Any]:
    mapping = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(mapping, Mapping) or not isinstance(mapping.get("name"), str):
        raise UserError(
            "attention",
            f"{entry} is neither a name nor a mapping with a name; write for example "
            "'[softmax, {name: mhla, gate: true}]'",
        )
    return dict(mapping)


def _label(parts: list[dict[str, Any]], hybrid: bool, taken: dict[str, Entry]) -> str:
    if not parts:
        raise UserError("attention", "an entry is an empty list; a hybrid names at least one operator")
    name = "hybrid" if hybrid else parts[0]["name"]
    if name not in taken:
        return name
    named = [
        " ".join([part["name"], *(f"{key}={value}" for key, value in part.items() if key != "name")])
        for part in parts
    ]
    return f"hybrid {', '.join(named)}" if hybrid else named[0]


def _plan(
    args: argparse.Namespace, family: BackboneFamily, sizes: list[Size], entries: dict[str, Entry]
) -> dict[Size, dict[str, Entry]]:
    """Return size -> label -> entry, with mhla's blocks for that many tokens.

    Every model is built once without weights, so that mistakes come first.
    """
    import torch

    from mhla_lightning.attention.entry import lookup_attention
    from mhla_lightning.backbones import build_backbone
    from mhla_lightning.bench.backbone_speed import token_grid

    plan: dict[Size, dict[str, Entry]] = {}
    for size in sizes:
        options = _options(args, family.options(size))
        blocks = args.blocks or family.blocks(token_grid(args.backbone, options))

        def laid_out(entry: dict[str, Any], blocks: Any = blocks) -> dict[str, Any]:
            partitioned = (
                "blocks" in lookup_attention(entry["name"]).options()
                and not {"blocks", "block_size"} & entry.keys()
            )
            return {**entry, "blocks": blocks} if partitioned else entry

        plan[size] = {
            label: [laid_out(part) for part in entry] if isinstance(entry, list) else laid_out(entry)
            for label, entry in entries.items()
        }
        for entry in plan[size].values():
            with torch.device("meta"):
                build_backbone(args.backbone, attention=entry, **options)
    return plan


def _options(args: argparse.Namespace, size: dict[str, Any]) -> dict[str, Any]:
    return size if args.layers is None else {**size, "depth": args.layers}


def _measure(
    args: argparse.Namespace,
    family: BackboneFamily,
    size: Size,
    entries: dict[str, Entry],
    device: Any,
    on_case: Callable[[str], None],
) -> tuple[list[Case], float]:
    """The cases of one size with their times, and the GEMM rate in FLOP/s."""
    from mhla_lightning.bench.backbone_speed import make_case
    from mhla_lightning.bench.timing import take_turns

    options = _options(args, family.options(size))
    how = {"bf16": args.bf16, "checkpointing": args.checkpointing}
    group = [
        make_case(label, args.backbone, entry, options, args.batch, device, **how)
        for label, entry in entries.items()
    ]
    rates = take_turns(
        group,
        args.turns,
        device,
        lambda case: on_case(f"{case.operator} at {_name(size)}"),
        graphs=not args.no_graphs,
    )
    for case in group:
        case.release()
    return group, sorted(rates)[len(rates) // 2]


def _row(
    args: argparse.Namespace, family: BackboneFamily, size: Size, case: Case, entry: Entry
) -> dict[str, Any]:
    from mhla_lightning.bench.backbone_speed import layers_of
    from mhla_lightning.bench.timing import SLOW

    row = case.row()
    named = {"resolution": size} if isinstance(size, int) else {"video": _name(size)}
    if family.by_layer:
        layers = layers_of(args.backbone) if args.layers is None else args.layers
        row |= {f"{kind}_seconds_per_layer": row[f"{kind}_seconds"] / layers for kind in ("forward", "step")}
    rate = {f"{family.unit}_per_second": args.batch / row["step_seconds"]}
    return {**named, **row, "attention": entry, **rate, "measured_once": row["step_seconds"] > SLOW}


def _name(size: Size) -> str:
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def _ratios(family: BackboneFamily, size: Size, group: list[Case]) -> dict[str, float]:
    from mhla_lightning.bench.timing import ratio

    at = {case.operator: case for case in group}
    pairs = [(a, b) for a, b in RATIOS if a in at and b in at]
    if not family.by_layer:
        return {f"{a}_over_{b}_{size}": ratio(at[a].step, at[b].step) for a, b in pairs}
    kinds: list[tuple[str, Any]] = [("forward", lambda case: case.forward), ("step", lambda case: case.step)]
    return {
        f"{a}_over_{b}_{kind}_{_name(size)}": ratio(times(at[a]), times(at[b]))
        for kind, times in kinds
        for a, b in pairs
    }


def _table(family: BackboneFamily, rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    times = ("forward", "step") if family.by_layer else (f"{family.unit}/s", "ms")
    what = "milliseconds a layer" if family.by_layer else "a training step"
    table = Table(title=f"{what}; peak: activations and gradients held at once")
    first = "clip" if family.key == "video" else "pixels"
    for heading in (first, "tokens", "operator", *times, "x GEMM", "peak MiB", "turns"):
        table.add_column(heading, justify="left" if heading == "operator" else "right")
    for heading in gpu_headings(rows):
        table.add_column(heading, justify="right")
    for row in rows:
        turns = "1 (slow)" if row["measured_once"] else str(row["turns"])
        size = row["video"] if "video" in row else f"{row['resolution']:,}"
        table.add_row(
            size,
            f"{row['tokens']:,}",
            _operator(row),
            *_numbers(family, row),
            f"{row['peak_bytes'] / 2**20:,.1f}",
            turns,
            *gpu_cells(row),
        )
    return table


def _numbers(family: BackboneFamily, row: dict[str, Any]) -> Iterator[str]:
    if family.by_layer:
        yield from (f"{row[f'{kind}_seconds_per_layer'] * 1e3:,.1f}" for kind in ("forward", "step"))
    else:
        yield f"{row[f'{family.unit}_per_second']:.3g}"
        yield f"{row['step_seconds'] * 1e3:.1f}"
    yield f"{row['step_over_gemm']:.2f}"


def _operator(row: dict[str, Any]) -> str:
    from rich.markup import escape

    entries = row["attention"] if isinstance(row["attention"], list) else [row["attention"]]
    layouts = {str(entry["blocks"]).replace(" ", "") for entry in entries if "blocks" in entry}
    return escape(
        row["operator"]
        if not layouts or "blocks=" in row["operator"]
        else f"{row['operator']} blocks={' '.join(sorted(layouts))}"
    )
