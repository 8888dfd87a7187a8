"""Rank files: tensors that several ranks hold in parts, in one .safetensors file a rank.

They are read back whole or in any other parts. A file holds flat stretches `KIND/NAME`. Its header gives
each tensor's shape and where its stretch begins. So a reader needs neither the number of ranks nor the
strategy of the run. DeepSpeed's own checkpoints are pickles and bound to the number of ranks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mhla_lightning.errors import DataError
from mhla_lightning.runs.folder import FORMAT
from mhla_lightning.weights.stored import Stored, outline_of

FOLDER = "shards"
WEIGHT = "weight"
_FILE = re.compile(r"rank-(\d{5})-of-(\d{5})(?:-lot-(\d{3})-of-(\d{3}))?\.safetensors")


@dataclass(frozen=True)
class Stretch:
    """A part of a tensor that one rank holds.

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        start: first element of the part, in the flattened tensor.
        tensors: flat parts by kind: `weight`, and the optimizer's `exp_avg`, `exp_avg_sq`; all of one length.
        scalars: values that the optimizer keeps once for each tensor (`step`).
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, float] = field(default_factory=dict)


def file_name(rank: int, world_size: int, lot: int = 0, lots: int = 1) -> str:
    """Return the name of one rank's file, or of one of its several files.

    Args:
        rank: of the writer.
        world_size: number of ranks.
        lot: number of this file among the rank's files.
        lots: files of the rank.
    """
    part = f"-lot-{lot:03d}-of-{lots:03d}" if lots > 1 else ""
    return f"rank-{rank:05d}-of-{world_size:05d}{part}.safetensors"


def holds_rank_files(folder: Path) -> bool:
    """Return whether a folder holds rank files."""
    return folder.is_dir() and any(_FILE.fullmatch(path.name) for path in folder.iterdir())


def write_rank_file(path: Path, stretches: Sequence[Stretch]) -> None:
    """Write one rank's file."""
    tensors = {f"{kind}/{part.name}": value for part in stretches for kind, value in part.tensors.items()}
    facts = {
        part.name: {"shape": list(part.shape), "start": part.start, "scalars": dict(part.scalars)}
        for part in stretches
    }
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={"format": str(FORMAT), "stretches": json.dumps(facts)})


@dataclass(frozen=True)
class _StoredStretch:
    """A stretch of a tensor in a file: the elements from `start` on."""

    file: Path
    start: int
    numel: int


class RankFileReader:
    """Reader of the rank files of one folder.

    Args:
        folder: holds `rank-...safetensors`.

    Attributes:
        shapes: shape of each whole tensor, by name.
        kinds: kinds of each tensor (`weight`, `exp_avg`, ...), by name.
        scalars: see :class:`Stretch`, by name.

    Raises:
        DataError: files missing or damaged, or parts that do not add up to their tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, list[str]] = {}
        self.scalars: dict[str, dict[str, float]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._parts: dict[str, list[_StoredStretch]] = {}
        self._open: dict[Path, Any] = {}
        for file in self._files():
            self._take(file)
        for name in self.shapes:
            parts = self._parts.get(name, [])
            parts.sort(key=lambda part: part.start)
            ends = [0, *(part.start + part.numel for part in parts)]
            if [part.start for part in parts] != ends[:-1] or ends[-1] != math.prod(self.shapes[name]):
                raise DataError(
                    str(folder),
                    f"its rank files do not hold all of {name} {self.shapes[name]}, only (start, length) "
                    f"{[(part.start, part.numel) for part in parts]}",
                )

    def _files(self) -> list[Path]:
        found = {path: match for path in self.folder.glob("rank-*") if (match := _FILE.fullmatch(path.name))}
        counts = {int(match[2]) for match in found.values()}
        ranks = {int(match[1]) for match in found.values()}
        if len(counts) != 1 or ranks != set(range(next(iter(counts)))):
            raise DataError(
                str(self.folder),
                f"it holds the files of ranks {sorted(ranks)} of {sorted(counts)}; a checkpoint has one of "
                "every rank",
            )
        for rank in sorted(ranks):
            own = [match for match in found.values() if int(match[1]) == rank]
            numbers, lots = sorted(int(match[3] or 0) for match in own), {int(match[4] or 1) for match in own}
            if lots != {len(own)} or numbers != [*range(len(own))]:
                raise DataError(
                    str(self.folder),
                    f"it holds files {numbers} of {sorted(lots)} of rank {rank}; a checkpoint has them all",
                )
        return sorted(found)

    def _take(self, file: Path) -> None:
        try:
            opened = safe_open(file, "pt")
            self._list(file, opened, json.loads((opened.metadata() or {})["stretches"]))
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise DataError(str(file), f"it is damaged or no rank file of a checkpoint ({error})") from error

    def _list(self, file: Path, opened: Any, facts: Mapping[str, Mapping[str, Any]]) -> None:
        self._open[file] = opened
        for key in opened.keys():  # noqa: SIM118  not a mapping
            kind, _, name = key.partition("/")
            self.kinds.setdefault(name, [])
            if kind not in self.kinds[name]:
                self.kinds[name].append(kind)
            if kind == WEIGHT:
                outline = outline_of(opened.get_slice(key))
                self._dtypes[name] = outline.dtype
                self._parts.setdefault(name, []).append(
                    _StoredStretch(file, facts[name]["start"], len(outline))
                )
        for name, fact in facts.items():
            self.shapes[name] = tuple(fact["shape"])
            if fact["scalars"]:
                self.scalars[name] = fact["scalars"]

    def read(self, name: str, kind: str = WEIGHT, start: int = 0, numel: int | None = None) -> Tensor:
        """Return a flat stretch of a tensor.

        Args:
            name: of the tensor.
            kind: `weight`, or one of the optimizer's.
            start: first element.
            numel: elements; None reads the whole tensor.
        """
        end = math.prod(self.shapes[name]) if numel is None else start + numel
        found = []
        for part in self._parts[name]:
            low, high = max(start, part.start), min(end, part.start + part.numel)
            if low < high:
                found.append(
                    self._open[part.file].get_slice(f"{kind}/{name}")[low - part.start : high - part.start]
                )
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        """Return a tensor in its shape."""
        return self.read(name, kind).view(self.shapes[name])

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self.shapes)

    def weights(self) -> Stored:
        """Return all weights, put together one at a time."""
        outline = {
            name: torch.empty(self.shapes[name], dtype=self._dtypes[name], device="meta")
            for name in self.names()
        }
        return Stored(outline, self.whole)
