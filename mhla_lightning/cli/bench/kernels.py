"""Model the time of MHLA's Triton kernels on a GPU from their launches.

The torch path and FlashAttention are beside them. Without --measure nothing is measured. --code compiles the
kernels ahead of time.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from mhla_lightning.cli.output import demand_at_least, measuring_bar, write_json
from mhla_lightning.errors import UserError

HELP = "modelled times, bytes and machine code of the Triton kernels; needs no GPU but for --measure"
EXAMPLE = "--case DeiT"
CAPABILITIES = (80, 90)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla bench kernels`."""
    parser.add_argument(
        "--code",
        action="store_true",
        help="compile every kernel for sm_80 and sm_90 and show registers and spills (minutes)",
    )
    parser.add_argument(
        "--measure", action="store_true", help="measure the table on this machine's GPU, beside the model"
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=7,
        help="with --measure: turns after a warm-up, at least 5 (default: %(default)s)",
    )
    parser.add_argument(
        "--case", metavar="TEXT", default="", help="only cases whose name contains this (default: all)"
    )


def run(args: argparse.Namespace) -> int:
    """Carries out the verb."""
    demand_at_least(args, turns=5)
    if args.measure:
        _demand_gpu()
    from rich.console import Console

    from mhla_lightning.bench.kernel_launches import CASES, GPUS, OperatorCase, operator_times
    from mhla_lightning.bench.language_launches import LANGUAGE_CASES

    console = Console()
    cases = [case for case in (*CASES, *LANGUAGE_CASES) if args.case in case.name]
    rows = [times.row() for gpu in GPUS for times in operator_times(cases, gpu)]
    for gpu in GPUS:
        console.print(_times(rows, gpu.name))
    result: dict[str, Any] = {"modelled": rows}
    if args.measure:
        result["measured"] = _measured(args, [c for c in cases if isinstance(c, OperatorCase)], console)
        console.print(_measured_table(result["measured"]))
        console.print("language rows are measured by mhla bench attention --causal and mhla bench decode")
    if args.code:
        result["code"] = _code(cases)
        console.print(_code_table(result["code"]))
    write_json(args.json, result)
    return 0


def _demand_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("measure", "there is no CUDA device here; without it the table is modelled")


def _measured(args: argparse.Namespace, cases: list[Any], console: Any) -> list[dict[str, Any]]:
    import torch

    from mhla_lightning.bench.kernel_times import PATHS, measured_times

    torch.manual_seed(0)
    with measuring_bar(console, len(cases) * len(PATHS) * (args.turns + 1)) as on_case:
        return measured_times(cases, args.turns, torch.device("cuda"), on_case)


def _measured_table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="measured: forward and backward of one layer's operator in bf16, milliseconds")
    for heading in ("case", "form"):
        table.add_column(heading)
    for heading in ("Triton", "modelled", "torch", "modelled", "FlashAttention", "modelled"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = []
        for path in ("triton", "torch", "flash"):
            modelled = row.get(f"{path}_modelled_ms")
            cells += [f"{row[f'{path}_ms']:.3f}", "-" if modelled is None else f"{modelled:.3f}"]
        table.add_row(row["case"], row["form"], *cells)
    return table


def _times(rows: list[dict[str, Any]], gpu: str) -> Any:
    from rich.table import Table

    table = Table(title=f"modelled for {gpu}, not measured: an operator in bf16, torch to Triton")
    table.add_column("case", min_width=20)
    table.add_column("form", no_wrap=True)
    for heading in ("kernels", "ms", "Flash ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in (row for row in rows if row["gpu"] == gpu):
        counts = " to ".join("+".join(map(str, row[f"{path}_kernels"])) for path in ("torch", "triton"))
        times = " to ".join(f"{row[f'{path}_ms']:.2f}" for path in ("torch", "triton"))
        table.add_row(row["case"], row["form"], counts, times, f"{row['flash_ms']:.2f}")
    return table


def _code(cases: list[Any]) -> list[dict[str, Any]]:
    from mhla_lightning.bench.kernel_code import compile_launch
    from mhla_lightning.bench.kernel_launches import kernel_launches

    return [
        {"case": case.name, **asdict(compile_launch(launch, capability))}
        for case in cases
        for capability in CAPABILITIES
        for launch in _distinct(kernel_launches(case, capability // 10))
    ]


def _distinct(both: tuple[list[Any], list[Any]]) -> list[Any]:
    """Return the launches of forward and backward, those of many layers once."""
    return list({id(launch): launch for launches in both for launch in launches}.values())


def _code_table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="compiled ahead of time, bf16 operands")
    for heading in ("case", "kernel"):
        table.add_column(heading)
    keys = ("capability", "warps", "registers", "shared", "spilled", "tensor_core", "warp_group")
    for heading in ("sm", "warps", "registers", "shared bytes", "spilled", "tensor core", "of Hopper"):
        table.add_column(heading, justify="right")
    for row in rows:
        name = row["name"].removesuffix("_kernel").replace("_", " ")
        table.add_row(row["case"], name, *(f"{row[key]:,}" for key in keys))
    return table
