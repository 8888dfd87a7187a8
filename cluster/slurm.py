"""SLURM's commands."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from mhla_lightning.errors import UserError

_TIMEOUT = 120  # seconds that a command may take


class Slurm:
    """SLURM's commands, called with lists of arguments and never through a shell."""

    def test(self, script: str, runs: Path) -> None:
        """Ask SLURM whether it would accept the job.

        Args:
            script: text for sbatch.
            runs: folder of all runs.

        Raises:
            UserError: it would not, with its own reason; or there is no sbatch on this machine.
        """
        self._submit(["--test-only"], script, runs)

    def submit(self, script: str, runs: Path) -> str:
        """Queue the job; return its id.

        Args:
            script: text for sbatch.
            runs: folder of all runs.

        Raises:
            UserError: SLURM refuses it.
        """
        return self._submit(["--parsable"], script, runs).split(";")[0].strip()

    def _submit(self, options: Sequence[str], script: str, runs: Path) -> str:
        folder = next(path for path in (runs, *runs.parents) if path.is_dir())
        # The new job must inherit nothing of an allocation that this shell may run in.
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("SLURM_") or name == "SLURM_CONF"
        }
        done = self.call(["sbatch", *options], stdin=script, cwd=folder, env=clean)
        if done.returncode:
            raise UserError(None, f"SLURM refuses the job: {_reason(done.stderr)}; {_requested(script)}")
        return done.stdout

    def cancel(self, jobs: Sequence[str]) -> None:
        """Cancel jobs, queued or running.

        Raises:
            UserError: SLURM refuses.
        """
        done = self.call(["scancel", *jobs])
        if done.returncode:
            raise UserError("run", f"SLURM refuses to cancel {', '.join(jobs)}: {_reason(done.stderr)}")

    def call(
        self,
        command: Sequence[str],
        stdin: str | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run one of SLURM's commands and return its output.

        Args:
            command: its words.
            stdin: text for its standard input.
            cwd: its working directory; None is this process's.
            env: its environment; None is this process's.

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
                command[0],
                "there is no such command on this machine: SLURM is needed, on a login node or in an "
                "allocation (a dry run needs none)",
            ) from error
        except subprocess.TimeoutExpired as error:
            raise UserError(
                command[0], f"the command has not answered for {_TIMEOUT} s; SLURM cannot be reached"
            ) from error


def _reason(stderr: str) -> str:
    """SLURM's own reason, without the prefixes of its commands."""
    lines = [
        re.sub(r"^(sbatch: |scancel: )?(error: )?|^allocation failure: ", "", line).strip()
        for line in stderr.splitlines()
    ]
    kept = [line for line in lines if line and not line.startswith("Batch job submission failed")] or [
        line for line in lines if line
    ]
    return kept[0] if kept else "it gives no reason"


def _requested(script: str) -> str:
    """The options of a script that SLURM may have refused."""
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
