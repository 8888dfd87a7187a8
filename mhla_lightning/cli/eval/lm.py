"""Evaluates the language model of a run with lm-evaluation-harness and prints one table.

TASKS are names of the harness, separated by commas. `paper` means the paper's nine: wikitext, lambada_openai,
winogrande, piqa, arc_challenge, openbookqa, arc_easy, boolq and mmlu. `longbench` means the 14 English tasks
of LongBench and their average in percent; a prompt beyond --max-length loses its middle. The data come from
the Hugging Face hub, or from a task file of yours:
  mhla eval lm RUN --tasks paper --json results.json
  mhla eval lm RUN --tasks longbench --max-length 16384 --extrapolation shift
  mhla eval lm RUN --tasks my_task --include tasks/ --limit 100
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mhla_lightning.cli.language_run import add_run_arguments, demand_at_least_one, find, load
from mhla_lightning.cli.output import write_json
from mhla_lightning.errors import UserError

HELP = "lm-evaluation-harness on a language run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mhla eval lm`."""
    add_run_arguments(parser)
    parser.add_argument(
        "--tasks", metavar="TASKS", required=True, help="names separated by commas; also paper and longbench"
    )
    parser.add_argument("--include", metavar="DIR", help="folder of further task files (YAML)")
    parser.add_argument(
        "--limit",
        metavar="N",
        type=float,
        help="samples of each task; below 1, a share of them (default: all)",
    )
    parser.add_argument(
        "--num-fewshot", metavar="N", type=int, help="examples before each question (default: the task's own)"
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=8, help="texts in the model at once (default: 8)"
    )
    parser.add_argument(
        "--max-length",
        metavar="N",
        type=int,
        help="tokens in the model at once (default: those of a training row)",
    )
    parser.add_argument(
        "--seed", metavar="S", type=int, default=0, help="of examples and random choices (default: 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    demand_at_least_one(args, "batch_size")
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise UserError("tasks", "names no task; write for example wikitext,lambada_openai or paper")
    if args.limit is not None and not args.limit > 0:
        raise UserError("limit", f"{args.limit:g} is not above 0")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError("num_fewshot", f"{args.num_fewshot} is too small; it must be at least 0")
    if args.include is not None and not Path(args.include).is_dir():
        raise UserError("include", f"{args.include} is no folder")
    found, device = find(args)
    from mhla_lightning.evaluation.lm_harness import HarnessLM, load_tasks, run_harness
    from mhla_lightning.inference.loading import check_length

    max_length = args.max_length or found.task.context
    if max_length < 2:
        raise UserError("max_length", f"{max_length} is too small; it must be at least 2")
    check_length(found, max_length)
    manager, tasks = load_tasks(names, args.include)
    model = HarnessLM(load(args, found, device), found.tokenizer, max_length, args.batch_size, args.seed)
    limit = int(args.limit) if args.limit is not None and args.limit >= 1 else args.limit
    table = run_harness(model, tasks, manager, limit=limit, num_fewshot=args.num_fewshot)
    _print(
        f"{found.run.run_id} {found.checkpoint.name}, {'averaged' if found.averaged else 'raw'} weights",
        table,
    )
    if shortened := model.shortened.total():
        print(f"{shortened} prompts did not fit {max_length} tokens with their answers and were shortened")
    facts = {
        "run": found.run.run_id,
        "checkpoint": found.checkpoint.name,
        "averaged": found.averaged,
        "max_length": max_length,
        "limit": args.limit,
        "shortened": dict(model.shortened),
    }
    write_json(
        args.json, {"rows": [{"task": task, **values} for task, values in table.items()], "summary": facts}
    )
    return 0


def _print(title: str, rows: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for heading in ("task", "metric", "value", "samples"):
        table.add_column(heading, justify="right" if heading in ("value", "samples") else "left")
    for task, values in rows.items():
        for metric, value in values.items():
            if metric != "samples":
                table.add_row(task, metric, f"{value:.4f}", str(values.get("samples", "")))
    Console().print(table)
