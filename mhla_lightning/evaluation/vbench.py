"""Prepare a folder for VBench (arXiv 2311.17982) and call its package. Imports no torch.

The package needs numpy below 2 and an old transformers, so it often has an environment of its own. It is
called in a process of the interpreter that has it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhla_lightning.errors import UserError, unknown_name
from mhla_lightning.evaluation import vbench_call
from mhla_lightning.evaluation.sampled import PREPARED, sampled_files, written_before
from mhla_lightning.runs.folder import read_json, write_json

PER_PROMPT = 5
"""Videos of each prompt that VBench expects."""

ANY_PROMPT = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""Dimensions that VBench measures on any prompts."""

DIMENSIONS = (
    *ANY_PROMPT,
    "temporal_flickering",
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "temporal_style",
    "appearance_style",
    "overall_consistency",
)
INSTALL = (
    "pip install vbench in an environment of its own, because it needs numpy below 2, and name its "
    "interpreter in `python`"
)

VIDEOS, RESULTS = "videos", "results"
"""Subfolders of the prepared folder."""

_LONGEST = 255  # bytes of a file's name
_NAME = "vbench"
_WHERE = (
    "import importlib.util as u; s = u.find_spec('vbench'); print(s.submodule_search_locations[0] if s "
    "else '')"
)


@dataclass(frozen=True)
class Package:
    """An installed VBench.

    Attributes:
        python: its interpreter.
        folder: of the package.
    """

    python: str
    folder: Path

    def prompts(self) -> list[str]:
        """Return VBench's prompts, each once.

        Raises:
            UserError: the package holds no list of them.
        """
        listed = read_json(self.folder / "VBench_full_info.json")
        if not isinstance(listed, list):
            raise UserError(
                str(self.folder), "this package holds no VBench_full_info.json; install vbench 0.1.5 or newer"
            )
        return list(dict.fromkeys(str(entry["prompt_en"]) for entry in listed))


def find_package(python: str | None = None) -> Package | None:
    """Find VBench in an interpreter; None where it is not installed.

    Args:
        python: path of the interpreter; None means ours.

    Raises:
        UserError: no such interpreter.
    """
    python = python or sys.executable
    try:
        asked = subprocess.run([python, "-c", _WHERE], capture_output=True, text=True, check=False, cwd="/")
    except OSError as error:
        raise UserError("python", f"{python} cannot be started ({error.strerror})") from error
    if asked.returncode:
        raise UserError("python", f"{python} is no Python interpreter (exit code {asked.returncode})")
    folder = asked.stdout.strip()
    return Package(python, Path(folder)) if folder else None


def sampled_videos(folder: Path) -> list[tuple[Path, str]]:
    """Return files and prompts of a folder of `mhla sample`, in its order.

    Raises:
        UserError: no samples.json, a name in it outside the folder, or a missing file.
    """
    return sampled_files(folder, "videos")


def video_names(prompts: Iterable[str]) -> list[str]:
    """Return VBench's names of videos: PROMPT-INDEX.mp4, with an index from 0 for each prompt.

    Raises:
        UserError: a prompt that cannot be a file name.
    """
    counts: dict[str, int] = {}
    names = []
    for prompt in prompts:
        index = counts[prompt] = counts.get(prompt, -1) + 1
        name = f"{prompt}-{index}.mp4"
        if (
            "/" in prompt
            or "\0" in prompt
            or not prompt.strip()
            or prompt.startswith(".")
            or len(name.encode()) > _LONGEST
        ):
            raise UserError(
                "prompts",
                f"{prompt[:80]!r} cannot be a file name, which VBench needs: no '/', no '.' in front, at "
                "most 248 bytes",
            )
        names.append(name)
    return names


def check_target(to: Path) -> set[str]:
    """Check that :func:`lay_out` can use a folder; nothing is made or changed.

    Args:
        to: the folder, which may not exist yet.

    Returns:
        names of the videos in it that an earlier call wrote.

    Raises:
        UserError: a file in the place of a folder, no right to write, or a file in TO/videos that no earlier
            call wrote.
    """
    written = written_before(to, "videos", to / VIDEOS, to / RESULTS)
    try:
        found = sorted((to / VIDEOS).iterdir()) if (to / VIDEOS).is_dir() else []
    except OSError as error:  # a name that is too long
        raise UserError("to", f"{to} cannot be used ({error.strerror})") from error
    for path in found:
        if path.name not in written or not path.is_file():
            raise UserError(
                "to",
                f"{to / VIDEOS} holds {path.name}, which mhla did not write; name an empty or a new folder",
            )
    return {path.name for path in found}  # from the folder, since a name in the list could point outside


def lay_out(videos: Iterable[tuple[Path, str]], to: Path) -> list[str]:
    """Put videos into TO/videos under VBench's names (:func:`video_names`).

    They replace the videos of an earlier call; no other file is removed.

    Args:
        videos: files and their prompts.
        to: the folder; it gets hard links where the file system has them, else copies.

    Returns:
        names, in the order of the videos.

    Raises:
        UserError: a prompt that cannot be a file name, or a folder that :func:`check_target` refuses or that
            cannot be written.
    """
    videos = list(videos)
    names = video_names(prompt for _, prompt in videos)
    earlier = check_target(to)
    folder = to / VIDEOS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Written first, so that a call that is stopped leaves no video that the next call does not know.
        write_json(to / PREPARED, {"videos": sorted(earlier.union(names))})
        for name in earlier:
            (folder / name).unlink()
        for name, (file, _) in zip(names, videos, strict=True):
            try:
                os.link(file, folder / name)
            except OSError:  # another file system, or one without links
                shutil.copyfile(file, folder / name)
    except OSError as error:
        raise UserError("to", f"{to} cannot be written ({error.strerror})") from error
    return names


def check_dimensions(dimensions: Sequence[str], standard: bool) -> None:
    """Check names of dimensions.

    Args:
        dimensions: their names.
        standard: whether the videos show VBench's own prompts.

    Raises:
        UserError: an unknown dimension, or one that needs VBench's own prompts.
    """
    for name in dimensions:
        if name not in DIMENSIONS:
            raise UserError("dimensions", unknown_name("dimension", name, DIMENSIONS))
        if not standard and name not in ANY_PROMPT:
            raise UserError(
                "dimensions", f"'{name}' needs VBench's own prompts; on others: {', '.join(ANY_PROMPT)}"
            )


def run_vbench(
    package: Package, videos: Path, output: Path, dimensions: Sequence[str], standard: bool, device: str
) -> dict[str, float]:
    """Call VBench; its messages go to OUTPUT/vbench.log and its progress to stderr.

    VBench fetches networks that are not in its cache.

    Args:
        package: the installed VBench.
        videos: the folder VIDEOS of :func:`lay_out`.
        output: folder of the results.
        dimensions: to measure.
        standard: whether the videos show VBench's own prompts.
        device: name of a torch device.

    Returns:
        dimension -> score.

    Raises:
        UserError: VBench failed.
    """
    output.mkdir(parents=True, exist_ok=True)
    mode = "vbench_standard" if standard else "custom_input"
    given = {
        "videos": str(videos.absolute()),
        "output": str(output.absolute()),
        "name": _NAME,
        "dimensions": list(dimensions),
    }
    log, results = output / "vbench.log", output / f"{_NAME}_eval_results.json"
    results.unlink(missing_ok=True)
    with log.open("w") as said:
        command = [
            package.python,
            vbench_call.__file__,
            json.dumps({**given, "mode": mode, "device": device}),
        ]
        done = subprocess.run(command, stdout=said, check=False, cwd=output)
    found: Any = read_json(results)
    if done.returncode or not isinstance(found, dict):
        raise UserError(
            str(log),
            f"VBench failed (exit code {done.returncode}); its last message is above, the others in this "
            "file",
        )
    return {name: float(value[0] if isinstance(value, list) else value) for name, value in found.items()}
