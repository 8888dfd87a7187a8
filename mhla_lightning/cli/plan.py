"""Work out what a recipe takes on a cluster, without a GPU.

Prints batches, parameters, FLOPs, length, and the memory on every GPU under every strategy.

RECIPE is a name of `mhla recipes list` or the path of a YAML file. Overrides follow as --dotted.key VALUE,
for example
  mhla plan language/lm_340m_mhla_fineweb_edu --nodes 4 --gpus-per-node 8 --gpu h100-80g --strategy zero2
  --data.micro_batch_size 4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mhla_lightning.cli.output import check_json, demand_at_least, write_json
from mhla_lightning.config.recipes import apply_overrides, load_recipe, parse_overrides, parse_yaml
from mhla_lightning.planning.gpus import GIB, GPUS, MIB, USABLE, find_gpu

if TYPE_CHECKING:
    from mhla_lightning.planning.plan import Plan, Stage

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mhla plan`."""
    parser.usage = "%(prog)s RECIPE [options] [--dotted.key VALUE ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="name of a packaged recipe, or path of a YAML file")
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="machines (default: the recipe's trainer.num_nodes)"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="N",
        help="GPUs of each (default: the recipe's trainer.devices, 1 where that is auto)",
    )
    parser.add_argument("--gpu", metavar="NAME", help=f"kind of GPU: {', '.join(GPUS)}")
    parser.add_argument(
        "--gpu-memory", metavar="SIZE", help="memory of a GPU, for example 40GiB, in place of what --gpu says"
    )
    parser.add_argument(
        "--strategy", metavar="NAME", help="as trainer.strategy: ddp, zero1, zero2, zero3, zero2_offload, ..."
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="share of the GPU's peak that the time assumes (default 0.4)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON too")


def run(args: argparse.Namespace) -> int:
    """Carries out the verb; returns the exit code."""
    check_json(args.json)
    gpu = find_gpu(args.gpu, args.gpu_memory)
    recipe = load_recipe(args.recipe)
    values = apply_overrides(recipe.values, _spread(args) | parse_overrides(args.overrides))
    from mhla_lightning.config.resolve import resolve
    from mhla_lightning.planning.plan import make_plan

    resolved = resolve(values)
    nodes, devices = int(resolved.trainer.get("num_nodes", 1)), resolved.trainer.get("devices", "auto")
    plan = make_plan(
        resolved, nodes=nodes, gpus_per_node=_count(devices), gpu=gpu, utilisation=args.utilisation
    )
    _print(recipe.name, plan)
    write_json(args.json, {"recipe": recipe.name, **plan.to_dict()})
    return 0


def _spread(args: argparse.Namespace) -> dict[str, Any]:
    """The options that are keys of the recipe."""
    for name in ("nodes", "gpus_per_node"):
        if getattr(args, name) is not None:
            demand_at_least(args, **{name: 1})
    given = {
        "trainer.num_nodes": args.nodes,
        "trainer.devices": args.gpus_per_node,
        "trainer.strategy": None if args.strategy is None else parse_yaml(args.strategy),
    }
    return {key: value for key, value in given.items() if value is not None}


def _count(devices: Any) -> int:
    """GPUs of a node; `auto` cannot be known here and is 1."""
    if isinstance(devices, (list, tuple)):
        return len(devices)
    try:
        return max(1, int(devices))
    except (TypeError, ValueError):
        return 1


def _print(name: str, plan: Plan) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=True)
    for heading, text in _lines(name, plan):
        console.print(f"{heading:12} {text}", markup=False)
    console.print(_table(plan))
    for text in _verdict(plan):
        console.print(text, markup=False)
    if plan.deepspeed is not None:
        import yaml

        console.print(
            "\nDeepSpeed's configuration:",
            yaml.safe_dump(plan.deepspeed, sort_keys=False),
            sep="\n",
            end="",
            markup=False,
        )


def _lines(name: str, plan: Plan) -> Iterator[tuple[str, str]]:
    model, batches = plan.values["model"]["init_args"], plan.batches
    yield "recipe", f"{name}: {model['backbone']}, attention {_entry(model['attention'])}, {plan.precision}"
    yield (
        "",
        f"checkpoint_activations {model['checkpoint_activations']}; everything: lightning run {name} "
        "--print_config",
    )
    gpu = "" if plan.gpu is None else f" {plan.gpu.name}"
    yield (
        "cluster",
        f"{_many(plan.nodes, 'node')} x {_many(plan.gpus_per_node, 'GPU')}{gpu}, strategy "
        f"{plan.strategy or 'of another kind'}",
    )
    yield (
        "batch",
        f"{batches.batch:,} = {batches.ranks:,} ranks x {batches.micro:,} samples at once x "
        f"{batches.accumulation:,} accumulated",
    )
    yield "parameters", _parameters(plan)
    forward, tokens = plan.flops_per_sample, plan.tokens
    yield (
        "FLOPs",
        f"forward {_si(forward)} a sample, {_si(forward / tokens)} a token ({tokens:,} tokens); "
        "training takes three times that" + _again(plan),
    )
    yield "length", _length(plan)
    if plan.seconds is not None and plan.gpu is not None:
        yield (
            "time",
            f"{_time(plan.seconds)}, assuming {plan.utilisation:.0%} of the peak of "
            f"{_si(plan.peak or 0)}/s a GPU",
        )


def _again(plan: Plan) -> str:
    """What the backward runs again."""
    if not plan.recomputed_flops:
        return ""
    return (
        f", and {_si(plan.recomputed_flops)} a sample, {plan.recomputed_flops / plan.flops_per_sample:.2f} "
        "times the forward, for what the backward runs again"
    )


def _parameters(plan: Plan) -> str:
    kinds = {kind: count for kind, count in plan.parameters.items() if kind not in ("total", "trained")}
    trained = (
        "all train"
        if plan.parameters["trained"] == plan.parameters["total"]
        else f"{plan.parameters['trained']:,} train"
    )
    return (
        f"{plan.parameters['total']:,}, {trained} "
        f"({', '.join(f'{kind} {count:,}' for kind, count in kinds.items())})"
    )


def _length(plan: Plan) -> str:
    steps, samples, epochs = plan.length.steps, plan.length.samples, plan.length.epochs
    parts = [] if steps is None else [f"{_many(steps, 'step')}, {steps * plan.batches.batch:,} samples"]
    parts += (
        [] if epochs is None else [f"{epochs:,.4g} epochs" + ("" if samples is None else f" of {samples:,}")]
    )
    parts += [] if plan.training_flops is None else [f"{_si(plan.training_flops)} in all"]
    return "; ".join(parts)


def _table(plan: Plan) -> Any:
    from rich.table import Table

    columns = (
        "weights",
        "gradients",
        "optimizer",
        "EMA",
        "buffers",
        "activations",
        "sum",
        "host RAM/node",
        "disk/node",
    )
    stages = plan.stages.values()
    shown = [
        name
        for name in columns
        if not (name.endswith("/node") or name == "EMA")
        or any(_cell(plan, stage, name) != "-" for stage in stages)
    ]
    unit = _unit(plan)
    table = Table(
        "strategy",
        *shown,
        "" if plan.gpu is None else f"of {_number(plan.gpu.usable, unit)}",
        title=f"{unit} on each GPU, at most",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, stage in plan.stages.items():
        verdict = "" if stage.fits is None else "fits" if stage.fits else "too much"
        cells = [_cell(plan, stage, column) for column in shown]
        table.add_row(
            f"> {name}" if name == plan.strategy else f"  {name}",
            *cells,
            verdict,
            style="bold" if name == plan.strategy else None,
        )
    return table


def _cell(plan: Plan, stage: Stage, column: str) -> str:
    state = stage.state
    values = {
        "weights": state.weights,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "EMA": state.average,
        "buffers": state.buffers,
        "activations": None if plan.activations is None else max(plan.activations, state.step),
        "sum": stage.total,
        "host RAM/node": state.host * plan.gpus_per_node,
        "disk/node": state.disk * plan.gpus_per_node,
    }
    value = values[column]
    return "?" if value is None else "-" if value == 0 else _number(value, _unit(plan))


def _unit(plan: Plan) -> str:
    """GiB, or MiB where a model is small."""
    return (
        "GiB" if max(stage.total or stage.state.total(0) for stage in plan.stages.values()) >= GIB else "MiB"
    )


def _number(size: int, unit: str) -> str:
    value = size / (GIB if unit == "GiB" else MIB)
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _verdict(plan: Plan) -> Iterator[str]:
    yield (
        "activations: modelled, from the allocations of a training step on tensors without data; "
        "the rest: by formula. Nothing here was measured on a GPU."
    )
    if any(
        plan.activations is not None and stage.state.step > plan.activations for stage in plan.stages.values()
    ):
        yield "activations: where the optimizer's step takes more for a moment, that."
    if plan.gpu is not None and plan.strategy is not None and plan.fits is not None:
        room = f"{_number(plan.gpu.usable, 'GiB')} GiB, {USABLE:.0%} of {_number(plan.gpu.memory, 'GiB')}"
        yield f"{plan.strategy} {'fits' if plan.fits else 'does not fit'} into {room} ({plan.gpu.name})."
    for number, change in enumerate(plan.advice):
        yield f"{'what would fit:' if not number else '            or:'} {change}"
    if plan.fits is False and not plan.advice:
        yield "nothing would fit: take GPUs with more memory, or a smaller model."
    for note in plan.notes:
        yield f"note: {note}"


def _entry(attention: Any) -> str:
    if isinstance(attention, list):
        return f"[{', '.join(_entry(part) for part in attention)}]"
    return str(attention["name"]) if isinstance(attention, dict) else str(attention)


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def _si(flops: float) -> str:
    """1.5e12 -> 1.5 TFLOP."""
    for exponent, prefix in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if flops >= 10**exponent:
            return f"{flops / 10**exponent:.3g} {prefix}FLOP"
    return f"{flops:.3g} FLOP"


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
