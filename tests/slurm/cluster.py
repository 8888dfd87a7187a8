"""A real SLURM of two nodes on this machine, and what tests do with it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mhla_lightning.cluster.jobs import Attempt, attempts
from mhla_lightning.runs.folder import RunFolder, read_json
from tests.helpers.images import TINY_RECIPE

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]

# A module of the tests' own, on the path of jobs that ask for it: training that goes wrong at a chosen step.
TROUBLE = '''
import time
import lightning.pytorch as pl

class Trouble(pl.Callback):
    """crash raises at that step; hang sleeps there for ever; pause sleeps for seconds before every step."""
    def __init__(self, crash: int = -1, hang: int = -1, pause: float = 0.0):
        self.crash, self.hang, self.pause = crash, hang, pause
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(self.pause)
        if trainer.global_step == self.crash:
            raise RuntimeError("trouble on purpose")
        while trainer.global_step == self.hang:
            time.sleep(1)
'''


class Cluster:
    """The running SLURM and a folder to work in.

    Attributes:
        root: of SLURM. work: current directory of every command; runs lie in work/runs.
    """

    def __init__(self, root: Path, work: Path, shards: Path) -> None:
        self.root, self.work = root, work
        self.env = {
            **os.environ,
            "SLURM_CONF": str(root / "etc" / "slurm.conf"),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }
        self.env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env.pop("MHLA_RUNS", None)
        (work / "tiny.yaml").write_text(TINY_RECIPE.replace("PATH", str(shards)))
        (work / "modules").mkdir()
        (work / "modules" / "trouble.py").write_text(TROUBLE)
        profile = {
            "gpus_per_node": 0,
            "cpus_per_task": 1,
            "time": "10",
            "before": [f"export PYTHONPATH={shlex.quote(str(work / 'modules'))}"],
            "signal_seconds": 20,
            "first_steps": 5,
        }
        (work / "site.yaml").write_text(json.dumps(profile))

    def call(
        self, *command: str, check: bool = True, env: dict[str, str] | None = None, timeout: float = 900
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=self.work,
            env={**self.env, **(env or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, (
            f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def mhla(
        self, *words: str, check: bool = True, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`mhla ...` in a process of its own."""
        return self.call(sys.executable, "-m", "mhla_lightning", *words, check=check, env=env)

    def submit(self, name: str, *words: str, recipe: str = "tiny.yaml") -> str:
        """Queues a run without the check of the recipe (which imports torch); returns the job id."""
        said = self.mhla(
            "submit", recipe, "--profile", "site.yaml", "--run-id", name, "--no-check", *words
        ).stdout
        match = re.match(r"job (\d+)", said)
        assert match, said
        return match[1]

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.work / "runs" / name)

    def status(self, name: str) -> dict[str, Any]:
        """The row of `mhla status`."""
        (row,) = json.loads(self.mhla("status", name, "--json", "-").stdout)["rows"]
        return row

    def squeue(self, job: str) -> str:
        """SLURM's own word for a job's state."""
        return self.call("squeue", "-h", "-t", "all", "-j", job, "-o", "%T", check=False).stdout.strip()

    def progress(self, name: str) -> dict[str, Any]:
        return read_json(self.run(name).progress) or {}

    def attempts(self, name: str, kind: str) -> list[Attempt]:
        return [attempt for attempt in attempts(self.run(name)) if attempt.kind == kind]

    def training(self, name: str, rank: int | None = None) -> list[int]:
        """Processes that train a run (of one rank), found by their command line and SLURM's environment."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended
            ours = (
                b"mhla_lightning" in words and f"SLURM_CONF={self.env['SLURM_CONF']}".encode() in environment
            )
            of_rank = rank is None or f"SLURM_PROCID={rank}".encode() in environment
            if ours and of_rank and name.encode() in words and b"python" in words[0]:
                found.append(int(folder.name))
        return sorted(found)

    def kill(self, name: str, rank: int, number: signal.Signals) -> None:
        """A signal to one rank (the oldest process: its loader's workers are younger)."""
        os.kill(self.training(name, rank)[0], number)

    def logs(self, name: str) -> str:
        """For messages of failing tests."""
        return "\n".join(
            f"== {path.name}\n{path.read_text()[-3000:]}"
            for path in sorted((self.run(name).path / "slurm").glob("*.log"))
        )


def wait_for(what: str, done: Callable[[], Any], seconds: float = 240, told: Callable[[], str] = str) -> Any:
    """Polls until `done` says something true; returns it."""
    end = time.monotonic() + seconds
    while not (value := done()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}\n{told()}"
        time.sleep(0.2)
    return value


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Iterator[Cluster]:
    """Starts SLURM, ends it with everything that it runs."""
    root = Path(tempfile.mkdtemp(prefix="mhla-slurm-"))
    root.chmod(0o755)  # munge refuses a socket that not everybody can reach
    work = tmp_path_factory.mktemp("work of it's $(own)")
    started = subprocess.run([HERE / "start.sh", root], capture_output=True, text=True, check=False)
    if started.returncode:
        pytest.fail(started.stderr, pytrace=False)
    try:
        yield Cluster(root, work, shards)
    finally:
        stopped = subprocess.run([HERE / "stop.sh", root], capture_output=True, text=True, check=False)
    assert "left-over" not in stopped.stdout, f"processes of jobs were left: {stopped.stdout}"
    shutil.rmtree(root)
