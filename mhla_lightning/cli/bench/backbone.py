"""Measures a backbone's training step (forward and backward) over image sizes, with several operators and the same positional convolution."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mhla_lightning.cli.bench.report import demand_at_least, load, summary_table, write_json
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.analysis.timing import Case

HELP = "images a second and peak memory of a backbone over image sizes"
RATIOS = (("mhla", "linear"), ("softmax", "mhla"), ("softmax", "linear"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla bench backbone`."""
    parser.add_argument("backbone", metavar="BACKBONE", help="dit_s2, dit_b2, ...")
    parser.add_argument("--res", type=int, nargs="+", default=[256, 512, 1024, 2048], metavar="PIXELS", help="per side (default: %(default)s)")
    parser.add_argument("--attention", default="[softmax, linear, mhla]", metavar="YAML", help="list of attention entries (default: %(default)s)")
    parser.add_argument("--pos-conv", default="cpe3", help="of every entry that does not name one: cpe3, lepe3, lepe5, none (default: %(default)s)")
    parser.add_argument("--gate", action="store_true", help="output gate in every entry that does not say (default: in none)")
    parser.add_argument("--blocks", type=int, default=None, metavar="K", help="mhla's blocks per axis (default: the most with M^2 <= tokens)")
    parser.add_argument("--layers", type=int, default=None, metavar="N", help="default: the backbone's")
    parser.add_argument("--batch", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast instead of float32")
    parser.add_argument("--turns", type=int, default=5, help="measured turns after a warm-up, at least 5 (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Carries out the verb."""
    demand_at_least(args, turns=5, batch=1, **({} if args.layers is None else {"layers": 1}))
    entries = _entries(args)
    import torch
    from rich.console import Console

    from mhla_lightning.generation.weights import choose_device

    device = choose_device(args.device)
    torch.manual_seed(0)
    plan = _plan(args, entries)
    cases, rates = _measure(args, plan, device)
    rows = [_row(args, pixels, case, plan[pixels][case.operator]) for pixels, group in cases.items() for case in group]
    summary = {key: value for pixels, group in cases.items() for key, value in _ratios(pixels, group).items()}
    rate = sorted(rates)[len(rates) // 2]
    machine = f"{torch.get_num_threads()} threads, {load()}" if device.type == "cpu" else torch.cuda.get_device_name(device)
    precision = "bf16 autocast" if args.bf16 else "float32"
    layers = "" if args.layers is None else f" with {args.layers} layers"
    console = Console()
    console.print(f"{machine}; a 2048-cubed float32 matrix product runs at {rate / 1e9:.0f} GFLOP/s; torch {torch.__version__}")
    console.print(f"{args.backbone}{layers}, {precision}, batch {args.batch}, pos_conv {args.pos_conv}; steps are forward and backward")
    console.print(_table(rows))
    if summary:
        console.print(summary_table("summary: time of A over time of B, by pixels", summary))
    write_json(args.json, {"rows": rows, "summary": summary, "gemm_flops_per_second": rate, "machine": machine, "precision": precision})
    return 0


def _entries(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Label -> entry, with what all entries share; an operator that stands there twice is told apart by its options."""
    import yaml

    try:
        given = yaml.safe_load(args.attention)
    except yaml.YAMLError as error:
        raise UserError(f"--attention {args.attention}: this is no YAML ({str(error).splitlines()[0]})") from error
    entries: dict[str, dict[str, Any]] = {}
    for entry in given if isinstance(given, list) else [given]:
        mapping = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(mapping, Mapping) or not isinstance(mapping.get("name"), str):
            raise UserError(
                f"--attention takes a list of names or mappings with a name, such as '[softmax, {{name: mhla, gate: true}}]', got {entry}"
            )
        name = mapping["name"]
        label = name if name not in entries else " ".join([name, *(f"{key}={value}" for key, value in mapping.items() if key != "name")])
        if label in entries:
            raise UserError(f"--attention has {label} twice")
        entries[label] = {"pos_conv": args.pos_conv, "gate": args.gate, **mapping}
    if not entries:
        raise UserError("--attention is an empty list; give at least one entry")
    return entries


def _plan(args: argparse.Namespace, entries: dict[str, dict[str, Any]]) -> dict[int, dict[str, dict[str, Any]]]:
    """Pixels -> label -> entry, with mhla's blocks for that many tokens; every model is built once without weights, so that mistakes come first."""
    import torch

    from mhla_lightning.analysis.backbone_speed import blocks_for, family_of, token_grid
    from mhla_lightning.attention.entry import lookup_attention
    from mhla_lightning.backbones import build_backbone

    family = family_of(args.backbone)
    plan: dict[int, dict[str, dict[str, Any]]] = {}
    for pixels in sorted(set(args.res)):
        options = _options(args, family.options(pixels))
        blocks = args.blocks or blocks_for(token_grid(args.backbone, options))
        plan[pixels] = {}
        for label, entry in entries.items():
            partitioned = "blocks" in lookup_attention(entry["name"]).options() and not {"blocks", "block_size"} & entry.keys()
            plan[pixels][label] = {**entry, "blocks": blocks} if partitioned else entry
            with torch.device("meta"):
                build_backbone(args.backbone, attention=plan[pixels][label], **options)
    return plan


def _options(args: argparse.Namespace, size: dict[str, Any]) -> dict[str, Any]:
    return size if args.layers is None else {**size, "depth": args.layers}


def _measure(args: argparse.Namespace, plan: dict[int, dict[str, dict[str, Any]]], device: Any) -> tuple[dict[int, list[Case]], list[float]]:
    from rich.progress import Progress

    from mhla_lightning.analysis.backbone_speed import family_of, make_case
    from mhla_lightning.analysis.timing import take_turns

    cases: dict[int, list[Case]] = {}
    rates: list[float] = []
    with Progress(transient=True) as progress:
        bar = progress.add_task("measuring", total=len(plan) * (args.turns + 1))
        for pixels, entries in plan.items():  # one size at a time: the memory of one is enough
            options = _options(args, family_of(args.backbone).options(pixels))
            group = [make_case(label, args.backbone, entry, options, args.batch, device, bf16=args.bf16) for label, entry in entries.items()]
            rates += take_turns(group, args.turns, device, lambda: progress.advance(bar))
            for case in group:
                case.release()
            cases[pixels] = group
    return cases, rates


def _row(args: argparse.Namespace, pixels: int, case: Case, entry: dict[str, Any]) -> dict[str, Any]:
    from mhla_lightning.analysis.timing import SLOW

    row = case.row()
    once = row["step_seconds"] > SLOW
    return {"resolution": pixels, **row, "attention": entry, "images_per_second": args.batch / row["step_seconds"], "measured_once": once}


def _ratios(pixels: int, group: list[Case]) -> dict[str, float]:
    from mhla_lightning.analysis.timing import ratio

    at = {case.operator: case for case in group}
    return {f"{a}_over_{b}_{pixels}": ratio(at[a].step, at[b].step) for a, b in RATIOS if a in at and b in at}


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="a training step; peak: activations and gradients held at once")
    for heading in ("pixels", "tokens", "operator", "images/s", "ms", "x GEMM", "peak MiB", "turns"):
        table.add_column(heading, justify="left" if heading == "operator" else "right")
    for row in rows:
        turns = "1 (slow)" if row["measured_once"] else str(row["turns"])
        speed = (f"{row['images_per_second']:.3g}", f"{row['step_seconds'] * 1e3:.1f}", f"{row['step_over_gemm']:.2f}")
        table.add_row(f"{row['resolution']:,}", f"{row['tokens']:,}", _operator(row), *speed, f"{row['peak_bytes'] / 2**20:.1f}", turns)
    return table


def _operator(row: dict[str, Any]) -> str:
    from rich.markup import escape

    blocks = row["attention"].get("blocks")
    return escape(row["operator"] if blocks is None or "blocks=" in row["operator"] else f"{row['operator']} blocks={blocks}")
