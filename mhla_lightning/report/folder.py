"""Files of a run folder that may come from a stranger.

They are of bounded size, and never outside of the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mhla_lightning.runs.folder import read_metrics, read_object

MOST_JSON = 4 * 2**20  # bytes of a JSON file
MOST_METRICS = 256 * 2**20  # bytes of metrics.jsonl
MOST_NAME = 200  # characters of a tag or a row; longer ones are left out or cut
MOST_TEXT = 64 * 2**10  # characters of a recipe that the page shows
_MOST_SIZE = 1e100  # of a number; nan is not below it
_MOST_STEP = 2**53  # whole numbers that JavaScript knows

Curve = list[tuple[int, float]]  # (step, value)


class SafeFolder:
    """Reads files of one folder.

    Args:
        path: the folder.

    Attributes:
        notes: what was left out, one sentence each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        """Keep a sentence about what was left out, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def file(self, path: Path, most: int) -> Path | None:
        """Return a plain file of the folder; None where it is missing, too large or a way out.

        Args:
            path: below the folder.
            most: bytes that it may have.
        """
        try:
            if not path.exists():
                return None
            real = path.resolve()
            size = real.stat().st_size
            plain = real.is_file()
        except (OSError, RuntimeError) as error:
            self.note(f"{self.name(path)} cannot be read ({error}).")
            return None
        if not real.is_relative_to(self.path):
            self.note(f"{self.name(path)} is a link out of the run folder, and was left out.")
            return None
        if not plain:
            self.note(f"{self.name(path)} is no plain file, and was left out.")
            return None
        if size > most:
            self.note(
                f"{self.name(path)} has {size / 1e6:,.1f} MB, above {most / 1e6:,.1f}; it was left out."
            )
            return None
        return real

    def files(self, pattern: str, most: int) -> Iterator[Path]:
        """Yield the files that match a pattern, in the order of their names."""
        for path in sorted(self.path.glob(pattern)):
            found = self.file(path, most)
            if found is not None:
                yield found

    def name(self, path: Path) -> str:
        """Return a path as the page names it: without the way to the folder."""
        return str(path.relative_to(self.path)) if path.is_relative_to(self.path) else path.name

    def object(self, path: Path) -> dict[str, Any]:
        """Read the object of a JSON file; empty where there is none, with a note if damaged."""
        file = self.file(path, MOST_JSON)
        if file is None:
            return {}
        found = read_object(file)
        if not found:
            self.note(f"{self.name(path)} holds no JSON object: it is damaged, or being written.")
        return found

    def text(self, path: Path) -> str:
        """Read a text; one that is long loses its end, with a note."""
        file = self.file(path, MOST_JSON)
        if file is None:
            return ""
        text = file.read_bytes().decode(errors="replace")
        if len(text) > MOST_TEXT:
            self.note(f"{self.name(path)} has {len(text):,} characters; the page shows {MOST_TEXT:,}.")
        return text[:MOST_TEXT]

    def curves(self, path: Path) -> dict[str, Curve]:
        """Read metrics.jsonl: tag -> finite points in the order of steps, the last of each step."""
        file = self.file(path, MOST_METRICS)
        if file is None:
            return {}
        found = {tag: _clean(points) for tag, points in read_metrics(file).items() if len(tag) <= MOST_NAME}
        return {tag: points for tag, points in found.items() if points}


def _clean(points: list[tuple[int, float]]) -> Curve:
    kept = {
        step: number
        for step, value in points
        if 0 <= step < _MOST_STEP and (number := finite(value)) is not None
    }
    return sorted(kept.items())


def finite(value: object) -> float | None:
    """Return a plain number whose square is finite, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < _MOST_SIZE else None


def mappings(value: object) -> list[dict[str, Any]]:
    """Return the mappings of a list, empty for anything else."""
    return [mapping(one) for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def mapping(value: object) -> dict[str, Any]:
    """Return a mapping with text keys, empty for anything else."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}
