"""The folder of a run and the names of its files.

Standard library only, so that `status` and `compare` answer at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mhla_lightning.errors import UserError

FORMAT = 1
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors of a full disk."""
_STEP = re.compile(r"step-(\d{8,})")
_JOB = re.compile(r"\d+(_\d+)?")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LONGEST = 200  # bytes of a run id; a file system takes 255, and names of files and copies add to it


def runs_root(given: str | None = None) -> Path:
    """Return the folder of all runs: the given one, else $MHLA_RUNS, else ./runs."""
    return Path(given or os.environ.get("MHLA_RUNS") or "runs").resolve()


def check_run_id(run_id: str) -> str:
    """Return a run id that names one folder under the root.

    Raises:
        UserError: a text that could lead out of the root.
    """
    if len(run_id) > _LONGEST:
        raise UserError(
            "run_id", f"'{shortened(run_id)}' has {len(run_id)} characters; a name has at most {_LONGEST}"
        )
    if not _RUN_ID.fullmatch(run_id) or ".." in run_id:
        raise UserError(
            "run_id",
            f"'{run_id}' is no plain name; use letters, digits, '.', '_' and '-', a letter or digit first",
        )
    return run_id


def shortened(text: str, length: int = 40) -> str:
    """Return a text for a message: one that is longer than `length` loses its middle."""
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 4 :]}"


def default_run_id(recipe_name: str, resolved: Mapping[str, Any]) -> str:
    """Return `<recipe name>-<hash>`, by which the same command finds the same folder.

    Args:
        recipe_name: its folders are left out.
        resolved: the resolved recipe; the first 8 hex digits of its sha256 are taken.
    """
    stem = os.fsdecode(os.fsencode(Path(recipe_name).stem)[: _LONGEST - 9])
    return f"{stem}-{recipe_hash(resolved)[:8]}"


def recipe_hash(resolved: Mapping[str, Any]) -> str:
    """Return the sha256 of a resolved recipe; the order of keys makes no difference."""
    return hashlib.sha256(json.dumps(resolved, sort_keys=True, default=str).encode()).hexdigest()


class RunFolder:
    """The paths of one run.

    Args:
        path: the folder; :meth:`create` makes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.environment = path / "environment.json"
        self.progress = path / "progress.json"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.job = path / "job.json"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"

    @property
    def run_id(self) -> str:
        return self.path.name

    def create(self) -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be written.
            OSError: the disk is full.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.tensorboard.mkdir(exist_ok=True)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise UserError(
                str(self.path),
                f"the run folder cannot be written: {error.strerror}; choose another place with `runs` or "
                "$MHLA_RUNS",
            ) from error

    def finished(self) -> bool:
        """Return whether training has reached its end, and its numbers can be read."""
        return read_object(self.progress).get("state") == "finished" and "last" in read_object(self.summary)


def find_run(run: str, root: Path, key: str = "run") -> RunFolder:
    """Find a run by its id, its folder or its SLURM job id.

    Args:
        run: one of these.
        root: folder of all runs.
        key: of the error: the argument that holds `run`.

    Raises:
        UserError: no such run (the reason names some), or the job of an array, which has several runs.
    """
    found = find_runs(run, root, key)
    if len(found) > 1:
        runs = ", ".join(one.run_id for one in found)
        raise UserError(key, f"job {run} is an array of runs: {runs}; name one of them")
    return found[0]


def find_runs(run: str, root: Path, key: str = "run") -> list[RunFolder]:
    """Find a run like :func:`find_run`, or all runs of a job array.

    Raises:
        UserError: no such run; the reason names some.
    """
    for path in (root / run, Path(run)):
        if is_run(path):
            return [RunFolder(path.resolve())]
    of_job = _runs_of_job(run, root) if _JOB.fullmatch(run) else []
    if of_job:
        return of_job
    known = sorted(p.parent.name for p in root.glob("*/recipe.yaml"))
    more = f" and {len(known) - 10} more" if len(known) > 10 else ""
    raise UserError(
        key, f"no run '{shortened(run, 200)}' in {root}; runs there: {', '.join(known[:10]) or 'none'}{more}"
    )


def check_folder(key: str, folder: str | Path) -> Path:
    """Refuse, before any work, a folder that could not be made or written; return its path.

    Raises:
        UserError: something else is in its place, or this user may not read and write there; `key` is the
            error's.
    """
    path = Path(folder).absolute()
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(key, f"{folder} cannot be used, because {there} is no folder")
    if not os.access(there, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(key, f"{folder} cannot be used: no right to read and write in {there}")
    return Path(folder)


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run."""
    try:
        return (folder / "recipe.yaml").is_file()
    except OSError:  # a name that is too long, or no right to look
        return False


def _runs_of_job(job: str, root: Path) -> list[RunFolder]:
    """The runs that were queued as this job, or as tasks of this array."""
    jobs = {path.parent: read_object(path).get("jobs") or [] for path in sorted(root.glob("*/job.json"))}
    return [
        RunFolder(folder)
        for folder, ids in jobs.items()
        if any(one == job or one.startswith(f"{job}_") for one in ids)
    ]


def step_folder(step: int) -> str:
    """Return the name of a checkpoint folder."""
    return f"step-{step:08d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoint folders of a run, oldest first."""
    found = [
        (int(match[1]), path)
        for path in (run / "checkpoints").glob("step-*")
        if (match := _STEP.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found) if (path / "COMPLETE").is_file()]


def newest_checkpoint(run: Path) -> Path | None:
    """Return the complete checkpoint with the highest step; None where there is none."""
    return next(reversed(complete_checkpoints(run)), None)


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read metrics.jsonl as tag -> [(step, value), ...], in the order written.

    Lines that a kill, a power cut or a full disk has cut are left out.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for row in read_lines(path):
        tag, step, value = row.get("tag"), row.get("step"), row.get("value")
        if isinstance(tag, str) and isinstance(step, int) and isinstance(value, int | float):
            series.setdefault(tag, []).append((step, value))
    return series


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a .jsonl file; lines that are cut or damaged are left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line.strip(b"\0"))  # a power cut may leave zeros behind a whole line
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def read_json(path: Path) -> Any:
    """Read a JSON file; None where it is missing or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def read_object(path: Path) -> dict[str, Any]:
    """Read the object of a JSON file; empty where the file is missing, cut or damaged."""
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Replace a JSON file at once; see :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n", durable)


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """Replace a file at once: a reader sees the old content or the new, never a part.

    The block writes the new content to the file that it is given. A block that fails changes nothing.

    Args:
        path: the file.
        durable: wait for the disk, so that the content outlives a power cut; this takes milliseconds.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Replace a text file at once.

    Args:
        path, durable: see :func:`replacing`.
        text: its new content.
    """
    with replacing(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def overwrite_json(path: Path, value: Any) -> None:
    """Write over an existing JSON file, for a full disk, which has no room for a second one.

    A power cut in between leaves it damaged. Nothing happens where the file is missing or the disk fails.
    """
    try:
        with path.open("r+b") as file:
            file.write(json.dumps(value, indent=2).encode() + b"\n")
            file.truncate()
    except OSError:
        pass
