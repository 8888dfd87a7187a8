"""`mhla` commands in processes of their own, started in a second: one imported process forks them.

Importing torch, Lightning and DeepSpeed takes 8 s of a core, and a test that trains for a second would mostly
import. A forked rank does what `mhla ARGUMENTS` does under a launcher that sets LOCAL_RANK.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}
_POLL = 0.02  # seconds
_IMPORTED = (
    "deepspeed.runtime.zero.muon.original_muon",
    "fsspec.implementations.local",
    "lightning.pytorch",
    "mhla_lightning.cli.generate",
    "mhla_lightning.cli.run",
    "mhla_lightning.config.resolve",
    "mhla_lightning.data",
    "mhla_lightning.tasks",
    "mhla_lightning.training.session",
    "s3fs",
    "setuptools",
    "torch.utils.flop_counter",
    "torch.utils.tensorboard",
)
"""What a command imports sooner or later; a child would import it anew, in a second."""


@dataclass
class Ranks:
    """Processes of one command.

    Attributes:
        pids: by rank.
        logs: by rank, stdout and stderr together.
        codes: exit codes of those that have ended, by rank; a signal is its negative number.
    """

    nursery: Nursery
    pids: list[int]
    logs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> bool:
        """Whether all have ended."""
        waiting = [rank for rank in range(len(self.pids)) if rank not in self.codes]
        for rank, code in zip(waiting, self.nursery.poll([self.pids[rank] for rank in waiting]), strict=True):
            if code is not None:
                self.codes[rank] = code
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float = 240.0) -> list[int]:
        """Exit codes by rank; whoever has not ended in time is killed."""
        deadline = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"ranks did not end in {seconds} s: {self.output()[-3000:]}")
            time.sleep(_POLL)
        return [self.codes[rank] for rank in range(len(self.pids))]

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """SIGKILL."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if rank not in self.codes:
                os.kill(self.pids[rank], signal.SIGKILL)

    def kill_when(self, reached: Callable[[], bool]) -> None:
        """SIGKILL to all and to the workers that they have started, as soon as something is reached; it
        must be reached before they end.
        """
        while not reached():
            assert not self.poll(), self.output()
            time.sleep(0.002)
        for pid in self.pids:
            os.killpg(pid, signal.SIGKILL)
        assert self.wait() == [-signal.SIGKILL] * len(self.pids)

    def output(self) -> str:
        """What all ranks printed."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs)


class Forked:
    """One `mhla` command, forked, with what tests use of `subprocess.Popen`."""

    def __init__(self, nursery: Nursery, pid: int, streams: Sequence[IO[Any] | None]) -> None:
        self.nursery, self.pid, self.returncode = nursery, pid, None
        self.stdout, self.stderr = streams

    returncode: int | None

    def poll(self) -> int | None:
        """The exit code, None while it runs; a signal is its negative number."""
        if self.returncode is None:
            (self.returncode,) = self.nursery.poll([self.pid])
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; raises TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("mhla", timeout or 0.0)
            time.sleep(_POLL)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """What it still prints on the pipes, and waits for its end."""
        with ThreadPoolExecutor() as pool:
            read = [pool.submit(stream.read) if stream else None for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            out, err = (one.result() if one else None for one in read)
        return out, err

    def send_signal(self, number: int) -> None:
        """To the process alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self.kill()  # a test that has failed waits for nothing
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


class Nursery:
    """The process that forks.

    Args:
        folder: for logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._started = folder, 0
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT)}
        self._socket, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.ranks", str(other.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment,
                pass_fds=[other.fileno()],
            )
        self._ask({"poll": []})

    def start(
        self, world_size: int, arguments: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None
    ) -> Ranks:
        """Starts `mhla ARGUMENTS` as `world_size` ranks. Several need --trainer.devices."""
        self._started += 1
        port = str(_free_port())
        pids, logs = [], []
        for rank in range(world_size):
            logs.append(self.folder / f"run-{self._started}-rank-{rank}.log")
            place = {
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            call = {
                "arguments": list(arguments),
                "cwd": str(cwd),
                "log": str(logs[-1]),
                "env": {**(place if world_size > 1 else {}), **(env or {})},
            }
            pids.append(self._ask(call))
        return Ranks(self, pids, logs)

    def run(
        self, world_size: int, arguments: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None
    ) -> str:
        """Runs to the end, which must be exit code 0; returns the output."""
        ranks = self.start(world_size, arguments, cwd, env)
        codes = ranks.wait()
        assert codes == [0] * world_size, f"{arguments}: {codes}\n{ranks.output()[-6000:]}"
        return ranks.output()

    def popen(
        self,
        arguments: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: Any = None,
        stderr: Any = None,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        text: bool = False,
        bufsize: int = -1,
    ) -> Forked:
        """Starts `mhla ARGUMENTS` as subprocess.Popen would start it; stdin is always empty."""
        ends: list[int] = []
        streams: list[IO[Any] | None] = []
        theirs: list[int] = []
        for place, target in enumerate((stdout, stderr)):
            streams.append(None)
            if target == subprocess.PIPE:
                mine, other = os.pipe()
                streams[place] = open(mine, "r" if text else "rb", -1 if text else bufsize)  # noqa: SIM115
                ends.append(other)
                theirs.append(other)
            elif target == subprocess.STDOUT:
                theirs.append(theirs[0])
            elif target == subprocess.DEVNULL:
                ends.append(os.open(os.devnull, os.O_WRONLY))
                theirs.append(ends[-1])
            elif target is None or isinstance(target, int):
                theirs.append(place + 1 if target is None else target)
            else:
                theirs.append(target.fileno())
        call = {
            "arguments": list(arguments),
            "cwd": str(cwd or Path.cwd()),
            "env": dict(env or os.environ),
            "streams": True,
        }
        socket.send_fds(self._socket, [b"s"], theirs)
        pid = self._ask(call)
        for end in ends:
            os.close(end)
        return Forked(self, pid, streams)

    def poll(self, pids: Sequence[int]) -> list[int | None]:
        """Exit codes of processes, None while they run."""
        return self._ask({"poll": list(pids)})

    def close(self) -> None:
        """Ends it and what it started."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._socket.close()

    def _ask(self, question: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def _serve(descriptors: socket.socket) -> None:
    import torch

    for name in _IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.freeze()  # a child does not copy these pages when it collects garbage
    children: dict[int, int | None] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            answer: Any = [_code(pid, children) for pid in question["poll"]]
        else:
            streams = socket.recv_fds(descriptors, 1, 2)[1] if "streams" in question else []
            answer = os.fork()
            if answer == 0:
                _become(question, streams)
            for stream in streams:
                os.close(stream)
            children[answer] = None
        print(json.dumps(answer), flush=True)
    for pid, code in children.items():
        if code is None and _code(pid, children) is None:
            os.kill(pid, signal.SIGKILL)


def _code(pid: int, children: dict[int, int | None]) -> int | None:
    if children[pid] is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        children[pid] = os.waitstatus_to_exitcode(status) if ended else None
    return children[pid]


def _become(call: dict[str, Any], streams: list[int]) -> None:
    """Never returns."""
    from mhla_lightning.cli.main import main

    os.setsid()  # a signal to its group reaches its workers too
    if streams:
        os.environ.clear()
    else:
        streams = [os.open(call["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)] * 2
    os.dup2(streams[0], 1)
    os.dup2(streams[1], 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(call["env"])
    # a launcher starts the other ranks by the module that runs here
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("mhla_lightning.__main__")
    os.chdir(call["cwd"])
    sys.argv = ["mhla", *call["arguments"]]
    code = 1
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  as the interpreter would
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
