"""Ten interruptions of every kind in one run, which ends as if there had been none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mhla_lightning.runs.folder import complete_checkpoints, read_metrics
from tests.slurm.cluster import HERE, Cluster, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2700)]
# however fast the machine is, the time limit comes before the last step; and two runs side by side have room
STEPS, PAUSE = (
    1500,
    0.09,
)
CALLBACKS = [
    {"class_path": "mhla_lightning.callbacks.EMA", "init_args": {"decay": 0.9}},
    {"class_path": "trouble.Trouble", "init_args": {"pause": PAUSE}},
]
RECIPE = [
    "--nodes",
    "2",
    "--trainer.strategy",
    "ddp",
    "--trainer.max_steps",
    str(STEPS),
    "--trainer.val_check_interval",
    "300",
]
RECIPE += [
    "--checkpoint.every_n_steps",
    "50",
    "--trainer.log_every_n_steps",
    "5",
    "--trainer.callbacks",
    json.dumps(CALLBACKS),
]
NAME, WHOLE = "cut", "whole"


def warn_steps(cluster: Cluster, job: str) -> None:
    cluster.call("scancel", "-s", "USR1", job)


def warn_shell(cluster: Cluster, job: str) -> None:
    cluster.call("scancel", "-b", "-s", "USR1", job)


def terminate_steps(cluster: Cluster, job: str) -> None:
    cluster.call("scancel", "-s", "TERM", job)


def terminate_shell(cluster: Cluster, job: str) -> None:
    cluster.call("scancel", "-b", "-s", "TERM", job)


def terminate_one_rank(cluster: Cluster, job: str) -> None:
    cluster.kill(NAME, 1, signal.SIGTERM)


def requeue(cluster: Cluster, job: str) -> None:
    cluster.call("scontrol", "requeue", job)


def kill_rank(cluster: Cluster, job: str) -> None:
    cluster.kill(NAME, 1, signal.SIGKILL)


def kill_node(cluster: Cluster, job: str) -> None:
    """Its daemon dies; SLURM gives the node up, queues the job again, and the node comes back."""
    os.kill(int((cluster.root / "pid" / "slurmd.node2.pid").read_text()), signal.SIGKILL)
    wait_for(
        "SLURM gives node2 up",
        lambda: cluster.squeue(job) == "PENDING",
        told=lambda: cluster.call("sinfo", "-N").stdout + cluster.logs(NAME),
    )
    subprocess.run([HERE / "node.sh", cluster.root, "node2"], check=True)


def nothing(cluster: Cluster, job: str) -> None:
    """The time limit comes by itself."""


INTERRUPTIONS: list[Callable[[Cluster, str], None]] = [
    warn_steps,
    warn_shell,
    terminate_steps,
    terminate_shell,
    terminate_one_rank,
    requeue,
    kill_rank,
    kill_node,
    warn_shell,  # EARLY
    nothing,
]
EARLY = 8  # this one comes while the attempt still starts


def test_ten_interruptions(cluster: Cluster) -> None:
    job, whole = cluster.submit(NAME, *RECIPE, "--time", "30"), ""
    for number, interrupt in enumerate(INTERRUPTIONS):
        if interrupt is nothing:  # now it waits for its next attempt
            cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=2")
        interrupt_attempt(cluster, job, number, interrupt)
        if interrupt is kill_node:  # which would have hit both
            whole = cluster.submit(WHOLE, *RECIPE, "--time", "60")  # no limit of its own may end it
    cluster.call(
        "scontrol", "update", f"JobId={job}", "TimeLimit=60"
    )  # enough of short attempts: the rest at one go
    wait_for("the end", lambda: cluster.squeue(job) == "COMPLETED", 900, told=lambda: cluster.logs(NAME))

    row = cluster.status(NAME)
    assert (row["state"], row["restarts"], row["step"], row["job"]) == (
        "COMPLETED",
        len(INTERRUPTIONS),
        STEPS,
        job,
    )
    assert f"attempt {len(INTERRUPTIONS) + 1} of {NAME}" in cluster.mhla("logs", NAME).stdout
    assert not cluster.training(NAME), "orphans"
    assert [path.name for path in cluster.run(NAME).checkpoints.iterdir() if path.name.startswith(".")] == []

    wait_for(
        "the uninterrupted run",
        lambda: cluster.squeue(whole) == "COMPLETED",
        900,
        told=lambda: cluster.logs(WHOLE),
    )
    assert cluster.status(WHOLE)["restarts"] == 0
    assert_equal_curves(cluster, NAME, WHOLE)


def interrupt_attempt(
    cluster: Cluster, job: str, number: int, interrupt: Callable[[Cluster, str], None]
) -> None:
    """Waits until this attempt trains (or, the ninth, until its processes are there), interrupts it, and
    waits until SLURM counts a restart.
    """
    wait_for(
        f"attempt {number + 1}",
        lambda: len(cluster.attempts(NAME, "started")) > number,
        told=lambda: cluster.logs(NAME),
    )
    begun = cluster.attempts(NAME, "started")[number].begun or 0
    if number == EARLY:
        wait_for("processes", lambda: cluster.training(NAME), told=lambda: cluster.logs(NAME))
        time.sleep(1)
    elif interrupt is not nothing:
        wait_for(
            f"steps of attempt {number + 1}",
            lambda: trains(cluster, begun + 10),
            400,
            told=lambda: cluster.logs(NAME),
        )
    began = time.monotonic()
    interrupt(cluster, job)
    wait_for(
        f"restart after {interrupt.__name__}",
        lambda: restarts(cluster, job) > number,
        told=lambda: cluster.logs(NAME),
    )
    print(
        f"{interrupt.__name__}: step {cluster.progress(NAME).get('step')}, "
        f"{time.monotonic() - began:.0f} s until queued again",
        flush=True,
    )


def trains(cluster: Cluster, step: int) -> bool:
    progress = cluster.progress(NAME)
    last = read_metrics_step(cluster)
    return progress.get("state") == "running" and last >= step


def read_metrics_step(cluster: Cluster) -> int:
    losses = read_metrics(cluster.run(NAME).metrics).get("train/loss", [(0, 0.0)])
    return losses[-1][0]


def restarts(cluster: Cluster, job: str) -> int:
    text = cluster.call("scontrol", "show", "job", "-o", job).stdout
    return int(text.split("Restarts=")[1].split()[0])


def assert_equal_curves(cluster: Cluster, one: str, other: str) -> None:
    """Every loss, learning rate, gradient norm and validation is equal to the bit, and TensorBoard shows
    each once.
    """
    series = {name: read_metrics(cluster.run(name).metrics) for name in (one, other)}
    exact = [
        tag
        for tag in series[other]
        if tag in ("train/loss", "train/lr", "train/grad_norm") or tag.startswith("val")
    ]
    assert len(exact) == 7  # no top-5 of four classes
    for tag in exact:
        assert series[one][tag] == series[other][tag], tag
    assert [step for step, _ in series[one]["train/loss"]] == list(range(5, STEPS + 1, 5))
    events = EventAccumulator(str(cluster.run(one).tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    for tag in exact:
        assert [event.step for event in events.Scalars(tag)] == [step for step, _ in series[one][tag]], tag
    newest = [complete_checkpoints(cluster.run(name).path)[-1] for name in (one, other)]
    assert [path.name for path in newest] == [f"step-{STEPS:08d}"] * 2
    assert average(newest[0]) == average(newest[1])


def average(checkpoint: Path) -> dict[str, bytes]:
    """The files of the averaged weights."""
    return {path.name: path.read_bytes() for path in sorted((checkpoint / "ema").iterdir())}
