"""The batch script of a recipe on a site, by pure functions."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mhla_lightning.cluster.profile import Profile, minutes
from mhla_lightning.config.moved_keys import moved_name
from mhla_lightning.config.recipes import Recipe, apply_overrides, argument
from mhla_lightning.errors import UserError

TEMPLATE = "train.sbatch.j2"
SCRIPT, RECIPE_FILE, JOB_LOG = "slurm/train.sbatch", "slurm/recipe.yaml", "slurm/job.log"
_MOST_WORKERS = 16
_NODE_VARIABLE = re.compile(r"\{([A-Z_][A-Z0-9_]*)\}")


@dataclass(frozen=True)
class SubmitOptions:
    """Settings of one submission, beside the recipe and the profile.

    Args:
        run_id: name of the run; with seeds each run is called `<run_id>-seed<N>`.
        runs: folder of all runs.
        cwd: working directory of the training; relative paths begin there.
        nodes: None is the recipe's number.
        devices: processes a node; None is the profile's number of GPUs, on CPUs the recipe's devices.
        time: limit of one attempt; None is the profile's.
        seeds: makes an array job, one run a seed.
        after: SLURM job ids that must finish first.
        python: interpreter where the profile names no venv, conda or container.
    """

    run_id: str
    runs: Path
    cwd: Path
    nodes: int | None = None
    devices: int | None = None
    time: str | None = None
    seeds: tuple[int, ...] = ()
    after: tuple[str, ...] = ()
    python: Path = Path(sys.executable)

    def run_ids(self) -> list[str]:
        """Return the names of the runs, one a seed."""
        return [f"{self.run_id}-seed{seed}" for seed in self.seeds] or [self.run_id]


@dataclass(frozen=True)
class Submission:
    """What is handed to SLURM.

    Args:
        script: text for sbatch.
        recipes: run id -> recipe of that run.
        nodes: of the job.
        devices: processes a node.
    """

    script: str
    recipes: dict[str, dict[str, Any]]
    nodes: int
    devices: int


def prepare(
    recipe: Recipe, profile: Profile, overrides: Mapping[str, Any], options: SubmitOptions
) -> Submission:
    """Make the batch script and the recipes of a submission; read no file but the template.

    Args:
        recipe: as its file gives it.
        profile: the site.
        overrides: dotted key -> value.
        options: of the submission.

    Raises:
        UserError: more devices than the profile's nodes have, a path that SLURM or Python's search path
            cannot hold, a bad time.
    """
    _check_paths(profile, options)
    given = apply_overrides(recipe.values, overrides)
    trainer = given.setdefault("trainer", {})
    if options.seeds and "seed_everything" in overrides:
        raise UserError(
            "seed_everything", "it cannot be set beside `array`: every run takes one of the array's seeds"
        )
    asked = options.devices if options.devices is not None else overrides.get("trainer.devices")
    on_gpu, devices = _devices(trainer, profile, asked)
    nodes = options.nodes if options.nodes is not None else int(trainer.get("num_nodes") or 1)
    if nodes < 1:
        raise UserError("nodes", f"it is {nodes}; it must be at least 1")
    workers_key = moved_name("data.num_workers", given)
    fixed = workers_key in {moved_name(key, given) for key in overrides}
    workers, threads = _workers_and_threads(
        argument(given, workers_key), profile.cpus_per_task, on_gpu, fixed
    )
    values = apply_overrides(
        given, {"trainer.num_nodes": nodes, "trainer.devices": devices, workers_key: workers}
    )
    recipes = {name: deepcopy(values) for name in options.run_ids()}
    for name, seed in zip(recipes, options.seeds, strict=False):
        recipes[name]["seed_everything"] = seed
    return Submission(_script(profile, options, nodes, devices, on_gpu, threads), recipes, nodes, devices)


def _check_paths(profile: Profile, options: SubmitOptions) -> None:
    for name, path in (("runs", options.runs), ("cwd", options.cwd)):
        text = str(path)
        bad = next((mark for mark in ("\n", "\\", ":") if mark in text), None) or (
            "," if profile.container and "," in text else None
        )
        if bad is not None:
            raise UserError(
                name,
                f"the path {text!r} holds {bad!r}, which has a meaning for SLURM, containers or Python's "
                "search path; use another folder",
            )


def _devices(trainer: Mapping[str, Any], profile: Profile, asked: Any) -> tuple[bool, int]:
    """(trains on GPUs, processes a node)."""
    accelerator = str(trainer.get("accelerator") or "auto")
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and profile.gpus_per_node > 0)
    if on_gpu and profile.gpus_per_node == 0:
        raise UserError(
            "trainer.accelerator",
            f"it is {accelerator}, and profile {profile.name} has gpus_per_node 0; choose another `profile` "
            "or accelerator cpu",
        )
    wanted = asked
    if wanted is None:
        own = trainer.get("devices")
        wanted = profile.gpus_per_node if on_gpu else own if isinstance(own, int) else 1
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise UserError(
            "trainer.devices", f"it is {wanted!r}; under SLURM it is a number of processes a node, from 1"
        )
    if on_gpu and wanted > profile.gpus_per_node:
        raise UserError(
            "devices",
            f"{wanted} a node are too many; nodes of profile {profile.name} have {profile.gpus_per_node} "
            "GPUs (gpus_per_node)",
        )
    return on_gpu, wanted


def _workers_and_threads(given: Any, cpus: int, on_gpu: bool, fixed: bool) -> tuple[int, int]:
    """(loader processes, threads) of each training process.

    On a GPU the loader gets all CPUs but two. On a CPU training itself needs them, and the recipe's workers
    stay as far as there is room. 0 workers (tiny samples) and an override stay as they are.

    Args:
        given: workers in the recipe; None is the data module's default.
        cpus: of a training process.
        on_gpu: whether it trains on a GPU.
        fixed: an override sets the workers.
    """
    workers = own = 4 if given is None else int(given)
    if own and not fixed:
        workers = max(1, min(_MOST_WORKERS, cpus - 2)) if on_gpu else max(1, min(own, cpus - 1))
    return workers, max(1, cpus - workers)


def _script(
    profile: Profile, options: SubmitOptions, nodes: int, devices: int, on_gpu: bool, threads: int
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  (shell, not HTML: every text goes through q)
    )
    environment.filters["q"] = lambda value: shlex.quote(str(value))
    image = "" if profile.container is None else str(profile.container.file or profile.container.image)
    mounted = [
        "$RUNS:$RUNS",
        "$PWD:$PWD",
        *(["$CACHES:$CACHES"] if profile.caches else []),
        *(["$TMPDIR:$TMPDIR"] if profile.scratch else []),
    ]
    return environment.get_template(TEMPLATE).render(
        run_id=options.run_id,
        seeds=options.seeds,
        script_path=f"{options.run_ids()[0]}/{SCRIPT}",
        options=sbatch_options(profile, options, nodes, devices, on_gpu),
        runs=options.runs,
        cwd=options.cwd,
        before=profile.before,
        modules=profile.modules,
        venv=Path(profile.venv).expanduser() if profile.venv else None,
        conda=profile.conda,
        bin=None if profile.container else options.python.parent,
        threads=threads,
        interface=profile.interface,
        caches=_node_path(profile.caches),
        scratch=_node_path(profile.scratch),
        env=[(name, _plain(value)) for name, value in profile.env.items()],
        container=profile.container,
        image=image,
        mounted=",".join(mounted),
        mounts="".join(f",{mount}" for mount in profile.container.mounts) if profile.container else "",
        gpus=on_gpu,
        python=profile.container.python if profile.container else "python3",
        first_steps=profile.first_steps,
        failures=profile.failures,
    )


def sbatch_options(
    profile: Profile, options: SubmitOptions, nodes: int, devices: int, on_gpu: bool
) -> list[str]:
    """Return the `#SBATCH` lines.

    Paths are relative to the folder of all runs, where sbatch is called: run ids are plain names, other paths
    may hold anything.

    Args:
        profile: the site.
        options: of the submission.
        nodes, devices: of the job; devices are processes a node.
        on_gpu: whether it trains on GPUs.
    """
    limit = options.time or profile.time
    folder = f"{options.run_id}-seed%a" if options.seeds else options.run_id
    # SLURM looks at limits every 30 s, so a warning comes up to 60 s early. It must not come before training
    # has begun.
    warning = min(profile.signal_seconds, minutes(limit) * 60 // 6)
    given = {
        "job-name": options.run_id,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "reservation": profile.reservation,
        "nodes": nodes,
        "ntasks-per-node": devices,
        "cpus-per-task": profile.cpus_per_task,
        "gpus-per-node": f"{profile.gpu_type + ':' if profile.gpu_type else ''}{devices}" if on_gpu else None,
        "mem": profile.memory,
        "time": limit,
        "array": ",".join(map(str, options.seeds)) or None,
        "dependency": f"afterok:{':'.join(options.after)}" if options.after else None,
        "mail-user": profile.mail.to if profile.mail else None,
        "mail-type": ",".join(profile.mail.events) if profile.mail else None,
        "signal": f"{'B:' if profile.signal == 'batch' else ''}USR1@{warning}",
        "output": f"{folder}/{JOB_LOG}",
        "open-mode": "append",
    }
    lines = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return [*lines, "--requeue", *(["--exclusive"] if profile.exclusive else []), *profile.sbatch]


def _node_path(text: str | None) -> str | None:
    """A path as shell text; `{NAME}` becomes the node's environment variable NAME."""
    if text is None:
        return None
    parts = _NODE_VARIABLE.split(str(Path(text).expanduser()))
    return "".join(
        f'"${{{part}:?}}"' if index % 2 else shlex.quote(part) if part else ""
        for index, part in enumerate(parts)
    )


def _plain(value: Any) -> str:
    """A YAML value as an environment variable: null is empty, true and false are 1 and 0."""
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)
