"""`mhla submit`, status, logs, cancel and resume in every state a job can be in."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from mhla_lightning.runs.folder import read_metrics
from tests.slurm.cluster import Cluster, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
LONG = [
    "--trainer.max_steps",
    "100000",
    "--trainer.val_check_interval",
    "100000",
    "--checkpoint.every_n_steps",
    "100000",
]
LONG += ["--trainer.log_every_n_steps", "10"]


def trouble(**at: int) -> list[str]:
    return ["--trainer.callbacks", json.dumps([{"class_path": "trouble.Trouble", "init_args": at}])]


def ended(cluster: Cluster, job: str) -> bool:
    return cluster.squeue(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def test_unknown_and_local_runs(cluster: Cluster) -> None:
    for verb in ("status", "logs", "cancel", "resume"):
        done = cluster.mhla(verb, "nothing", check=False)
        assert (done.returncode, done.stderr.startswith("error: RUN: ")) == (2, True), done.stderr
        done = cluster.mhla(verb, "99999", check=False)
        assert done.returncode == 2, done.stdout
    (cluster.run("local").path).mkdir(parents=True)
    cluster.run("local").recipe.write_text((cluster.work / "tiny.yaml").read_text())
    assert cluster.status("local")["state"] == "NEW"
    for verb, key in (("logs", "RUN"), ("cancel", "RUN"), ("resume", "--profile")):
        assert cluster.mhla(verb, "local", check=False).stderr.startswith(f"error: {key}: ")


def background(cluster: Cluster, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mhla_lightning", *words],
        cwd=cluster.work,
        env=cluster.env,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_life(cluster: Cluster) -> None:
    """Pending on another run, running, cancelled, resumed, preempted and waiting for its next attempt,
    completed; two runs side by side.
    """
    first = cluster.submit("first", *LONG, "--trainer.max_steps", "1500", "--nodes", "2")
    other = cluster.submit("other", *LONG)
    check_pending(cluster, cluster.submit("waiting", "--after", "first"))
    wait_for(
        "first trains",
        lambda: cluster.progress("first").get("step", 0) >= 10,
        told=lambda: cluster.logs("first"),
    )
    wait_for(
        "other trains",
        lambda: cluster.progress("other").get("step", 0) >= 10,
        told=lambda: cluster.logs("other"),
    )
    check_running(cluster)
    with (
        background(cluster, "logs", first, "-f") as following,
        background(cluster, "status", "other", "--watch", "1") as watching,
    ):
        time.sleep(2)
        assert f"cancelled job {first}" in cluster.mhla("cancel", first).stdout
        said, _ = following.communicate(timeout=120)
        assert "run first: 1500 steps" in said
        assert said.rstrip().endswith(f"job {first}: CANCELLED"), said[-500:]
        check_cancelled(cluster)
        cluster.call("scancel", "-b", "-s", "USR1", other)
        wait_for(
            "other waits for its next attempt",
            lambda: cluster.squeue(other) == "PENDING",
            told=lambda: cluster.logs("other"),
        )
        check_requeued(cluster)
        assert "RUNNING" in watching.communicate(timeout=60)[0]
    assert (following.returncode, watching.returncode) == (0, 0)
    check_resumed(cluster, first)


def check_pending(cluster: Cluster, job: str) -> None:
    row = cluster.status("waiting")
    assert (row["state"], row["reason"], row["job"]) == ("PENDING", "Dependency", job)
    assert (
        f"job {job} has printed nothing yet (PENDING, Dependency)" in cluster.mhla("logs", "waiting").stdout
    )
    assert "which was PENDING" in cluster.mhla("cancel", "waiting").stdout
    assert cluster.status(job)["state"] == "CANCELLED"


def check_running(cluster: Cluster) -> None:
    row = cluster.status("first")
    assert (row["state"], row["nodes"], row["restarts"], row["max_steps"]) == (
        "RUNNING",
        "node[1-2]",
        0,
        1500,
    )
    assert row["job_time_left"] is not None
    assert "RUNNING" in cluster.mhla("status").stdout
    assert cluster.mhla("resume", "first", check=False).stderr.startswith("error: RUN: ")


def check_cancelled(cluster: Cluster) -> None:
    wait_for("its processes end", lambda: not cluster.training("first"), 60)
    row = cluster.status("first")
    assert (row["state"], row["restarts"]) == ("CANCELLED", 0)
    assert row["checkpoint"] == f"step-{row['step']:08d}", "it had the time to save"
    assert "nothing to cancel" in cluster.mhla("cancel", "first").stdout
    assert "run first" in cluster.mhla("logs", "first", "--rank", "0").stdout
    assert cluster.mhla("logs", "first", "--rank", "3", check=False).stderr.startswith("error: --rank: ")


def check_requeued(cluster: Cluster) -> None:
    row = cluster.status("other")
    assert (row["state"], row["restarts"], row["reason"]) == ("REQUEUED", 1, "BeginTime")
    assert cluster.progress("other")["state"] == "preempted"
    assert f"stopped at step {row['step']}; queued again" in cluster.mhla("logs", "other").stdout
    assert "cancelled job" in cluster.mhla("cancel", "other").stdout  # by now it may run again


def check_resumed(cluster: Cluster, cancelled: str) -> None:
    """The run resumes from its step, on another number of nodes; no log of the first job is shown."""
    at = cluster.status("first")["step"]
    assert cluster.mhla("resume", "first", "--nodes", "1").stdout.startswith("job ")
    again = cluster.status("first")["job"]
    assert again != cancelled
    wait_for("first ends", lambda: ended(cluster, again), 600, told=lambda: cluster.logs("first"))
    row = cluster.status("first")
    assert (row["state"], row["step"]) == ("COMPLETED", 1500)
    assert f"attempt 1 of first on node1, from step {at}" in cluster.mhla("logs", "first").stdout
    steps = [step for step, _ in read_metrics(cluster.run("first").metrics)["train/loss"]]
    assert steps == list(range(10, 1501, 10))


def test_crash_at_step_0_is_not_queued_again(cluster: Cluster) -> None:
    job = cluster.submit("crash", *trouble(crash=0))
    wait_for("the crash", lambda: ended(cluster, job), told=lambda: cluster.logs("crash"))
    time.sleep(8)  # longer than SLURM waits before it starts a requeued job
    row = cluster.status("crash")
    assert (row["state"], row["restarts"]) == ("FAILED", 0)
    said = cluster.mhla("logs", "crash").stdout
    assert "trouble on purpose" in said
    assert "failed with exit code 1 at step 0; not queued again: it made 0 steps" in said
    assert "nothing to cancel" in cluster.mhla("cancel", "crash").stdout
    assert not cluster.training("crash")


def test_user_mistake_in_the_job_is_not_queued_again(cluster: Cluster) -> None:
    job = cluster.submit("mistake", "--model.atention", "mhla")
    wait_for("its end", lambda: ended(cluster, job), told=lambda: cluster.logs("mistake"))
    assert cluster.status("mistake")["state"] == "FAILED"
    assert "a mistake in the recipe or the data" in cluster.mhla("logs", "mistake").stdout


def test_timed_out(cluster: Cluster) -> None:
    """A rank that hangs cannot save: SLURM kills it at the time limit, the state says so, and resume goes
    on.
    """
    job = cluster.submit("hangs", *trouble(hang=6), "--time", "1", "--checkpoint.every_n_steps", "4")
    wait_for("the time limit", lambda: ended(cluster, job), told=lambda: cluster.logs("hangs"))
    row = cluster.status("hangs")
    assert row["state"] == "TIMEOUT"
    assert row["checkpoint"] == "step-00000004"
    assert not cluster.training("hangs")
    assert "TIMEOUT" in cluster.mhla("logs", "hangs", "-f").stdout
    assert (
        f"#SBATCH --signal=B:{signal.SIGUSR1.name.removeprefix('SIG')}@10"
        in cluster.mhla("resume", "hangs", "--dry-run").stdout
    )


def test_seeds_and_after(cluster: Cluster) -> None:
    """An array of three seeds makes three runs, each with files of its own; what waits for it starts when
    all have finished.
    """
    array = cluster.submit("seeds", "--array", "0-2", "--trainer.max_steps", "8")
    chained = cluster.submit("chained", "--after", array, "--trainer.max_steps", "4")
    names = [f"seeds-seed{seed}" for seed in range(3)]
    wait_for(
        "the chained run", lambda: ended(cluster, chained), told=lambda: "\n".join(map(cluster.logs, names))
    )
    recipes, losses = set(), set()
    for seed, name in enumerate(names):
        row = cluster.status(name)
        assert (row["state"], row["step"], row["job"]) == ("COMPLETED", 8, f"{array}_{seed}")
        recipes.add(cluster.run(name).recipe.read_text())
        losses.add(json.loads(cluster.run(name).summary.read_text())["last"]["val/loss"])
        assert cluster.run(name).recipe.read_text().count(f"seed_everything: {seed}") == 1
    assert len(recipes) == len(losses) == 3
    assert len(json.loads(cluster.mhla("status", array, "--json", "-").stdout)["rows"]) == 3
    assert "seeds-seed0, seeds-seed1, seeds-seed2" in cluster.mhla("logs", array, check=False).stderr
    assert cluster.status("chained")["state"] == "COMPLETED"
    assert "training is finished" in cluster.mhla("logs", "chained", "-f").stdout
    assert "has ended (COMPLETED); there is nothing to cancel" in cluster.mhla("cancel", "chained").stdout
    ends = [cluster.attempts(name, "finished")[0].time for name in names]
    assert cluster.attempts("chained", "started")[0].time >= max(ends)
    assert "is finished; there is nothing to resume" in cluster.mhla("resume", "chained").stdout
