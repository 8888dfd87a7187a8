"""Measure softmax (SDPA), linear and multi-head linear attention over token counts.

--causal measures the forms of language models.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mhla_lightning.cli.bench.on_gpu import (
    add_gpu_arguments,
    chosen_dtype,
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
    from rich.console import Console

    from mhla_lightning.bench.timing import Case

HELP = "softmax (SDPA), linear and mhla over token counts"
EXAMPLE = "--tokens 256 1024 --turns 5"
SLOPE_FROM = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla bench attention`."""
    parser.add_argument("--causal", action="store_true", help="tokens see earlier tokens only")
    counts = parser.add_mutually_exclusive_group()
    counts.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[256, 1024, 4096, 16384],
        metavar="N",
        help="token counts (default: %(default)s)",
    )
    counts.add_argument(
        "--grid",
        type=int,
        nargs="+",
        metavar="N",
        help=(
            "tokens per axis of one grid of 1 to 3 axes, such as 21 30 50; with 3 mhla has no "
            "normalizer, as in video"
        ),
    )
    parser.add_argument(
        "--slope-to",
        type=int,
        default=None,
        metavar="N",
        help="mhla alone goes on to N for the slope (default: 65536; with --causal or --grid none)",
    )
    parser.add_argument("--heads", type=int, default=None, help="default: 6, with --causal 4")
    parser.add_argument("--dim", type=int, default=64, help="channels a head (default: %(default)s)")
    parser.add_argument(
        "--blocks",
        type=int,
        nargs="+",
        metavar="M",
        help=(
            "of mhla, the same at every token count, with --grid per axis (default: 128; with --grid "
            "what M^2 <= tokens allows)"
        ),
    )
    parser.add_argument(
        "--chunk-size",
        type=int,
        default=128,
        help="with --causal: tokens a chunk of linear and mhla (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--turns",
        type=int,
        default=7,
        help="measured turns after a warm-up, at least 5 (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("bf16", "float32"), help="of the tokens (default: bf16 on a GPU, else float32)"
    )
    add_gpu_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Carries out the verb."""
    args.heads = (4 if args.causal else 6) if args.heads is None else args.heads
    demand_at_least(args, turns=5, heads=1, dim=1, batch=1, chunk_size=1)
    check_writable("plot", args.plot)
    if args.grid is None:
        args.slope_to = (0 if args.causal else 65536) if args.slope_to is None else args.slope_to
    else:
        _take_grid(args)
    import torch
    from rich.console import Console

    from mhla_lightning.bench.timing import gemm_name

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device", "there is no CUDA device here; use cpu")
    device = torch.device(
        "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu")
    )
    torch.manual_seed(0)
    console = Console()
    cases, rates = _measure(args, device, console)
    result: dict[str, Any] = {
        "rows": [case.row() for case in cases],
        "summary": _summary(cases, max(args.tokens)),
    }
    rate = sorted(rates)[len(rates) // 2]
    machine = machine_name(device)
    product = gemm_name(device, cases[0].dtype)
    console.print(f"{machine}; a {product} runs at {rate / 1e9:.0f} GFLOP/s; torch {torch.__version__}")
    for table in _tables(result, max(args.tokens)):
        console.print(table)
    for note in gpu_notes(result["rows"]):
        console.print(note)
    if device.type == "cuda" and args.causal and not _fla_entries(device):
        console.print("flash-linear-attention is not installed: its kernels are not measured")
    plot_rows(args.plot, f"forward and backward, {machine}", "tokens", result["rows"])
    write_json(args.json, {**result, "gemm_flops_per_second": rate, "machine": machine})
    return 0


def _take_grid(args: argparse.Namespace) -> None:
    """One token count, that of the grid. Raises UserError for a grid that cannot be measured."""
    import math

    from mhla_lightning.attention import BlockGrid
    from mhla_lightning.bench.backbone_speed import layout_for

    if args.causal or args.slope_to is not None:
        raise UserError(
            "grid",
            "a grid is one size without an order of tokens; it does not go with "
            f"`{'causal' if args.causal else 'slope_to'}`",
        )
    BlockGrid(args.grid, block_size=1)  # refuses what is no grid
    args.tokens, args.slope_to = [math.prod(args.grid)], 0
    args.blocks = args.blocks or list(layout_for(tuple(args.grid)))


def _measure(args: argparse.Namespace, device: Any, console: Console) -> tuple[list[Case], list[float]]:
    from mhla_lightning.bench.timing import make_case, take_turns

    entries = _causal_entries(args) | _fla_entries(device) if args.causal else _entries(args)
    plan = [(name, tokens) for tokens in sorted(args.tokens) for name in entries]
    larger = max(args.tokens) * 2
    while larger <= args.slope_to:
        plan.append(("mhla", larger))
        larger *= 2
    shape = {
        "heads": args.heads,
        "dim": args.dim,
        "batch": args.batch,
        "causal": args.causal,
        "grid": args.grid,
        "dtype": chosen_dtype(args.dtype, device),
    }
    cases, rates = [], []
    with measuring_bar(console, len(plan) * (args.turns + 1)) as on_case:
        for tokens in dict.fromkeys(
            tokens for _, tokens in plan
        ):  # one token count at a time: the memory of one is enough
            group = [
                make_case(name, entries[name], tokens, **shape, device=device)
                for name, n in plan
                if n == tokens
            ]
            rates += take_turns(
                group,
                args.turns,
                device,
                lambda case: on_case(f"{case.operator} at {case.tokens:,} tokens"),
                graphs=not args.no_graphs,
            )
            for case in group:
                case.modelled = _predicted(args, case, device)
                case.release()
            cases += group
    return cases, rates


def _fla_entries(device: Any) -> dict[str, Any]:
    """Return the operators of flash-linear-attention where they can run, beside ours."""
    from importlib.util import find_spec

    from mhla_lightning.attention.baselines.causal_fla import GatedDeltaNet, GatedLinearAttention, Mamba2

    if device.type != "cuda" or find_spec("fla") is None:
        return {}
    return {f"fla {kind.name}": kind.name for kind in (GatedLinearAttention, Mamba2, GatedDeltaNet)}


def _predicted(args: argparse.Namespace, case: Case, device: Any) -> tuple[float, float] | None:
    """Return the roofline's seconds of a row, where the GPU and the launches are modelled."""
    import torch

    if device.type != "cuda" or case.dtype.itemsize != 2:
        return None
    from mhla_lightning.bench.kernel_launches import modelled_gpu
    from mhla_lightning.bench.kernel_times import predicted

    gpu = modelled_gpu(torch.cuda.get_device_name(device))
    if gpu is None:
        return None
    grid, blocks = args.grid or [case.tokens], args.blocks or [128]
    layout = {
        "grid": grid,
        "blocks": blocks if len(blocks) == len(grid) else blocks * len(grid),
        "normalize": len(grid) < 3,
        "chunk_size": args.chunk_size,
    }
    shape = (args.batch, case.tokens, args.heads, args.dim)
    return predicted(case.operator, shape, gpu, layout=layout, causal=args.causal)


def _entries(args: argparse.Namespace) -> dict[str, Any]:
    video = (
        {"normalizer": "none"} if args.grid is not None and len(args.grid) == 3 else {}
    )  # a norm per head follows there (SPEC 6.4)
    mhla = {"name": "mhla", "blocks": _blocks(args), **video}
    return {"softmax": "softmax", "linear": {"name": "linear", "feature_map": "relu_eps"}, "mhla": mhla}


def _blocks(args: argparse.Namespace) -> int | list[int]:
    """Return the blocks as an option: one number where all axes have as many."""
    blocks = args.blocks or [128]
    return blocks[0] if len(blocks) == 1 else blocks


def _causal_entries(args: argparse.Namespace) -> dict[str, Any]:
    """Return the entries with a row of the mixing matrix for every chunk of the longest text.

    So no summary is dropped at any length.
    """
    chunks = -(-max(*args.tokens, args.slope_to) // args.chunk_size)
    chunked = {"chunk_size": args.chunk_size}
    return {
        "softmax": "softmax",
        "linear": {"name": "linear", **chunked},
        "mhla": {"name": "mhla", "max_chunks": chunks, **chunked},
    }


def _summary(cases: list[Case], tokens: int) -> dict[str, float]:
    from mhla_lightning.bench.timing import ratio, slope

    at = {case.operator: case for case in cases if case.tokens == tokens}
    softmax, linear, mhla = at["softmax"], at["linear"], at["mhla"]
    rows = [case.row() for case in cases if case.operator == "mhla" and case.tokens >= SLOPE_FROM]
    summary = {
        "sdpa_over_mhla_forward": ratio(softmax.forward, mhla.forward),
        "sdpa_over_mhla_step": ratio(softmax.step, mhla.step),
        "mhla_over_linear_forward": ratio(mhla.forward, linear.forward),
        "mhla_over_linear_step": ratio(mhla.step, linear.step),
        "mhla_over_gemm_forward": mhla.row()["forward_over_gemm"],
        "mhla_over_gemm_step": mhla.row()["step_over_gemm"],
    }
    if len(rows) > 1:
        counts = [row["tokens"] for row in rows]
        summary["slope_forward"] = slope(counts, [row["forward_seconds"] for row in rows])
        summary["slope"] = slope(counts, [row["step_seconds"] for row in rows])
        summary["slope_memory"] = slope(counts, [row["peak_bytes"] for row in rows])
    return summary


def _tables(result: dict[str, Any], tokens: int) -> list[Any]:
    from rich.table import Table

    times = Table(title="milliseconds; x GEMM = time over that of a matrix product with the same FLOPs")
    for heading in (
        "tokens",
        "operator",
        "forward",
        "step",
        "forward x GEMM",
        "step x GEMM",
        "peak MiB",
        "turns",
    ):
        times.add_column(heading, justify="left" if heading == "operator" else "right")
    for heading in gpu_headings(result["rows"]):
        times.add_column(heading, justify="right")
    for row in result["rows"]:
        ms = (f"{row[key] * 1e3:.2f}" for key in ("forward_seconds", "step_seconds"))
        over = (f"{row[key]:.2f}" for key in ("forward_over_gemm", "step_over_gemm"))
        times.add_row(
            f"{row['tokens']:,}",
            row["operator"],
            *ms,
            *over,
            f"{row['peak_bytes'] / 2**20:.1f}",
            f"{row['turns']}",
            *gpu_cells(row),
        )
    slopes = (
        f" (slope: mhla from {SLOPE_FROM:,} tokens on, log over log tokens)"
        if "slope" in result["summary"]
        else ""
    )
    title = f"summary at {tokens:,} tokens{slopes}"
    return [times, summary_table(title, result["summary"])]
