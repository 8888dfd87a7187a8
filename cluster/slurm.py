"""From (recipe, profile, overrides) to a batch script, by pure functions; and the few calls of SLURM's own
commands.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mhla_lightning.cluster.profile import Profile, minutes
from mhla_lightning.config.recipes import Recipe, apply_overrides
from mhla_lightning.errors import UserError

TEMPLATE = "train.sbatch.j2"
SCRIPT, RECIPE_FILE, JOB_LOG = "slurm/train.sbatch", "slurm/recipe.yaml", "slurm/job.log"
_MOST_WORKERS = 16
_NODE_VARIABLE = re.compile(r"\{([A-Z_][A-Z0-9_]*)\}")
_TIMEOUT = 120  # seconds that a command of SLURM's may take


@dataclass(frozen=True)
class Options:
    """What a submission adds to recipe and profile.

    run_id: of the run; with seeds each run is called `<run_id>-seed<N>`. runs: folder of all runs. cwd: where
        training starts, for relative paths.
    nodes, devices, time: None is the recipe's or profile's own. seeds: an array job, one run each. after:
        SLURM job ids that must have finished.
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
        return [f"{self.run_id}-seed{seed}" for seed in self.seeds] or [self.run_id]


@dataclass(frozen=True)
class Submission:
    """script: text for sbatch. recipes: run id -> recipe of that run. nodes, devices: of the job; devices
    are processes a node.
    """

    script: str
    recipes: dict[str, dict[str, Any]]
    nodes: int
    devices: int


def prepare(recipe: Recipe, profile: Profile, overrides: Mapping[str, Any], options: Options) -> Submission:
    """The batch script and the recipes of a submission; touches no file but the template.

    Raises:
        UserError: more devices than the profile's nodes have, a path that SLURM or Python's search path
            cannot hold, a bad time.
    """
    _check_paths(profile, options)
    given = apply_overrides(recipe.values, overrides)
    trainer = given.setdefault("trainer", {})
    if options.seeds and "seed_everything" in overrides:
        raise UserError(
            "seed_everything cannot be an override beside --array: every run takes one of the array's seeds"
        )
    asked = options.devices if options.devices is not None else overrides.get("trainer.devices")
    on_gpu, devices = _devices(trainer, profile, asked)
    nodes = options.nodes if options.nodes is not None else int(trainer.get("num_nodes") or 1)
    if nodes < 1:
        raise UserError(f"--nodes is {nodes}; it must be at least 1")
    workers, threads = _workers_and_threads(
        given, profile.cpus_per_task, on_gpu, fixed="data.num_workers" in overrides
    )
    values = apply_overrides(
        given, {"trainer.num_nodes": nodes, "trainer.devices": devices, "data.num_workers": workers}
    )
    recipes = {name: deepcopy(values) for name in options.run_ids()}
    for name, seed in zip(recipes, options.seeds, strict=False):
        recipes[name]["seed_everything"] = seed
    return Submission(_script(profile, options, nodes, devices, on_gpu, threads), recipes, nodes, devices)


def _check_paths(profile: Profile, options: Options) -> None:
    for path in (options.runs, options.cwd):
        text = str(path)
        bad = next((mark for mark in ("\n", "\\", ":") if mark in text), None) or (
            "," if profile.container and "," in text else None
        )
        if bad is not None:
            raise UserError(
                f"the path {text!r} holds {bad!r}, which SLURM, containers or Python's search path "
                "take for their own; use another folder"
            )


def _devices(trainer: Mapping[str, Any], profile: Profile, asked: Any) -> tuple[bool, int]:
    """(trains on GPUs, processes a node)."""
    accelerator = str(trainer.get("accelerator") or "auto")
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and profile.gpus_per_node > 0)
    if on_gpu and profile.gpus_per_node == 0:
        raise UserError(
            f"trainer.accelerator is {accelerator}, and profile {profile.name} has gpus_per_node 0; "
            "choose another profile or accelerator cpu"
        )
    wanted = asked
    if wanted is None:
        own = trainer.get("devices")
        wanted = profile.gpus_per_node if on_gpu else own if isinstance(own, int) else 1
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise UserError(
            f"trainer.devices is {wanted!r}; under SLURM it is a number of processes a node, from 1"
        )
    if on_gpu and wanted > profile.gpus_per_node:
        raise UserError(
            f"{wanted} devices a node are asked for, and nodes of profile {profile.name} have "
            f"{profile.gpus_per_node} (gpus_per_node)"
        )
    return on_gpu, wanted


def _workers_and_threads(values: Mapping[str, Any], cpus: int, on_gpu: bool, fixed: bool) -> tuple[int, int]:
    """Loader processes and threads of each training process on its `cpus`.

    On a GPU the loader gets all but two; on a CPU training itself needs them, and the recipe's workers stay
    as far as there is room. A recipe without workers (0: tiny samples) and an override are left alone.
    """
    own = int(((values.get("data") or {}).get("init_args") or {}).get("num_workers", 4) or 0)
    workers = own
    if own and not fixed:
        workers = max(1, min(_MOST_WORKERS, cpus - 2)) if on_gpu else max(1, min(own, cpus - 1))
    return workers, max(1, cpus - workers)


def _script(profile: Profile, options: Options, nodes: int, devices: int, on_gpu: bool, threads: int) -> str:
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


def sbatch_options(profile: Profile, options: Options, nodes: int, devices: int, on_gpu: bool) -> list[str]:
    """The `#SBATCH` lines. Paths are relative to the folder of all runs, where sbatch is called: run ids
    are plain names, other paths are not.
    """
    limit = options.time or profile.time
    folder = f"{options.run_id}-seed%a" if options.seeds else options.run_id
    # SLURM looks at limits every 30 s: a warning comes up to 60 s early, and must not come before training
    # has begun.
    warning = min(profile.signal_seconds, minutes(limit, "--time") * 60 // 6)
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
    """A path that each node completes, as shell text: `{NAME}` is the node's environment variable NAME,
    all else stands as it is.
    """
    if text is None:
        return None
    parts = _NODE_VARIABLE.split(str(Path(text).expanduser()))
    return "".join(
        f'"${{{part}:?}}"' if index % 2 else shlex.quote(part) if part else ""
        for index, part in enumerate(parts)
    )


def _plain(value: Any) -> str:
    """A YAML value as the text of an environment variable: null is empty, true and false are 1 and 0."""
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)


class Slurm:
    """SLURM's commands, each called with a list of arguments and never through a shell."""

    def test(self, script: str, runs: Path) -> None:
        """Asks SLURM whether it would take the job.

        Raises:
            UserError: it would not, with its own words; no sbatch on this machine.
        """
        self._submit(["--test-only"], script, runs)

    def submit(self, script: str, runs: Path) -> str:
        """Queues the job; returns its id.

        Raises:
            UserError: SLURM refuses it.
        """
        return self._submit(["--parsable"], script, runs).split(";")[0].strip()

    def _submit(self, options: Sequence[str], script: str, runs: Path) -> str:
        folder = next(path for path in (runs, *runs.parents) if path.is_dir())
        # Nothing of an allocation that this shell may stand in carries over into the new job.
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("SLURM_") or name == "SLURM_CONF"
        }
        done = self.call(["sbatch", *options], stdin=script, cwd=folder, env=clean)
        if done.returncode:
            raise UserError(f"SLURM does not take the job: {_reason(done.stderr)}; {_requested(script)}")
        return done.stdout

    def cancel(self, jobs: Sequence[str]) -> None:
        """Ends jobs, queued or running.

        Raises:
            UserError: SLURM refuses.
        """
        done = self.call(["scancel", *jobs])
        if done.returncode:
            raise UserError(f"SLURM does not cancel {', '.join(jobs)}: {_reason(done.stderr)}")

    def call(
        self,
        command: Sequence[str],
        stdin: str | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs one of SLURM's commands and returns what it said.

        Raises:
            UserError: the command does not exist here, or does not answer.
        """
        try:
            return subprocess.run(
                command,
                input=stdin or "",
                capture_output=True,
                text=True,
                cwd=cwd,
                env=env,
                timeout=_TIMEOUT,
                check=False,
            )
        except FileNotFoundError as error:
            raise UserError(
                f"there is no {command[0]} on this machine: this verb needs SLURM, on a login node "
                "or in an allocation (submit --dry-run needs none)"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"{command[0]} has not answered for {_TIMEOUT} s; SLURM is not reachable"
            ) from error


def _reason(stderr: str) -> str:
    """SLURM's own words on one line; of several that say the same the first."""
    lines = [
        re.sub(r"^(sbatch: |scancel: )?(error: )?|^allocation failure: ", "", line).strip()
        for line in stderr.splitlines()
    ]
    kept = [line for line in lines if line and not line.startswith("Batch job submission failed")] or [
        line for line in lines if line
    ]
    return kept[0] if kept else "it gives no reason"


def _requested(script: str) -> str:
    """The options that SLURM may have refused."""
    wanted = (
        "partition",
        "account",
        "qos",
        "constraint",
        "nodes",
        "ntasks-per-node",
        "cpus-per-task",
        "gpus-per-node",
        "mem",
        "time",
    )
    found = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script, re.MULTILINE))
    return "asked for " + ", ".join(f"{name} {found[name]}" for name in wanted if name in found)
