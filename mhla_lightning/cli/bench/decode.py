"""Measure the cost of one more token at different positions, and the bytes of the state.

Rows are mhla and softmax with a key-value cache.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mhla_lightning.cli.bench.on_gpu import add_gpu_arguments, machine_name, plot_rows
from mhla_lightning.cli.output import check_writable, demand_at_least, summary_table, write_json
from mhla_lightning.errors import UserError

if TYPE_CHECKING:
    from mhla_lightning.bench.decode_speed import DecodePoint

HELP = "time and state of one more token, by position"
EXAMPLE = "--positions 256 1024 --turns 5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla bench decode`."""
    parser.add_argument(
        "--positions",
        type=int,
        nargs="+",
        default=[1024, 16384],
        metavar="N",
        help="tokens before (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=256,
        help=(
            "consecutive tokens whose mean is a measurement; of tokens that do the same work some are timed "
            "(default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--max-chunks",
        type=int,
        default=32,
        help="of the capped mhla, with extrapolation: shift (default: %(default)s)",
    )
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--embed-dim", type=int, default=1024, help="default: %(default)s")
    parser.add_argument(
        "--batch", type=int, default=1, help="sequences decoded at once (default: %(default)s)"
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=5,
        help="measurements at every position, at least 5 (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add_gpu_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Carries out the verb."""
    demand_at_least(args, tokens=1, max_chunks=1, layers=1, embed_dim=64, batch=1, turns=5)
    if len(set(args.positions)) < 2 or min(args.positions) < 1:
        raise UserError(
            "positions",
            f"{' '.join(map(str, args.positions))} cannot be compared; give at least two different "
            "positions from 1 on",
        )
    check_writable("plot", args.plot)
    import torch
    from rich.console import Console

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device", "there is no CUDA device here; use cpu")
    device = torch.device(
        "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu")
    )
    torch.manual_seed(0)
    places = _measure(args, device)
    rows = [place.row() for place in places]
    summary = _summary(places, min(args.positions), max(args.positions))
    machine = machine_name(device)
    console = Console()
    console.print(
        f"{machine}; lm_340m with {args.layers} layers of {args.embed_dim} channels, float32, batch "
        f"{args.batch}; torch {torch.__version__}"
    )
    console.print(_table(rows, args.tokens))
    for place in places:
        if place.graph is not None and place.graph[1] is None:
            console.print(f"{place.operator} {place.position:,}: {place.graph[0]}")
    plot_rows(
        args.plot, f"one more token, {machine}", "position", rows, size="position", key="seconds_per_token"
    )
    console.print(summary_table("summary: times or bytes of A / of B", summary))
    write_json(args.json, {"rows": rows, "summary": summary, "machine": machine})
    return 0


def _measure(args: argparse.Namespace, device: Any) -> list[DecodePoint]:
    from rich.progress import Progress

    from mhla_lightning.bench.decode_speed import build_model, decode_at

    farthest = max(args.positions) + args.turns * args.tokens
    entries: dict[str, dict[str, Any]] = {
        "mhla": {"name": "mhla", "max_chunks": args.max_chunks, "extrapolation": "shift"},
        "mhla_uncapped": {"name": "mhla", "max_chunks": -(-farthest // 64)},
        "softmax": {"name": "softmax"},
    }
    shape = {"depth": args.layers, "embed_dim": args.embed_dim}
    places = []
    with Progress(transient=True) as progress:
        bar = progress.add_task("measuring", total=len(entries) * (len(args.positions) + args.turns))
        for name, entry in entries.items():
            model = build_model(entry, shape, device)
            sizes = {"batch": args.batch, "tokens": args.tokens, "turns": args.turns}
            places += decode_at(
                name,
                model,
                sorted(set(args.positions)),
                **sizes,
                on_progress=lambda: progress.advance(bar),
                graphs=not args.no_graphs,
            )
    return places


def _summary(places: list[DecodePoint], near: int, far: int) -> dict[str, float]:
    from mhla_lightning.bench.timing import ratio

    at = {(place.operator, place.position): place for place in places}
    names = dict.fromkeys(place.operator for place in places)
    summary = {
        f"{name}_{far}_over_{near}": ratio(at[name, far].seconds, at[name, near].seconds) for name in names
    }
    summary["softmax_over_mhla"] = ratio(at["softmax", far].seconds, at["mhla", far].seconds)
    summary["softmax_over_mhla_state_bytes"] = at["softmax", far].state_bytes / at["mhla", far].state_bytes
    summary["mhla_uncapped_over_mhla_state_bytes"] = (
        at["mhla_uncapped", far].state_bytes / at["mhla", far].state_bytes
    )
    return summary


def _table(rows: list[dict[str, Any]], tokens: int) -> Any:
    from rich.table import Table

    table = Table(title=f"one more token: mean over {tokens} consecutive ones, median of the turns")
    for heading in ("operator", "position", "ms a token", "state KiB"):
        table.add_column(heading, justify="left" if heading == "operator" else "right")
    on_gpu = any("graph" in row for row in rows)
    for heading in ("quartiles apart", "ms as a CUDA graph") if on_gpu else ():
        table.add_column(heading, justify="right")
    for row in rows:
        graph = row.get("graph_seconds_per_token")
        cells = (
            (f"{row['spread_seconds'] * 1e3:.3f}", "-" if graph is None else f"{graph * 1e3:.3f}")
            if on_gpu
            else ()
        )
        table.add_row(
            row["operator"],
            f"{row['position']:,}",
            f"{row['seconds_per_token'] * 1e3:.2f}",
            f"{row['state_bytes'] / 2**10:,.0f}",
            *cells,
        )
    return table
