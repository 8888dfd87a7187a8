"""Writes a .safetensors file tensor by tensor.

Of a checkpoint larger than memory one tensor is held at a time; safetensors' own save_file wants all of
them. The format: 8 bytes with the length of the header, the header in JSON, the bytes of the tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mhla_lightning.errors import UserError
from mhla_lightning.runs.disk_errors import complaint, lack_of_room
from mhla_lightning.weights.stored import DTYPES, Stored

Rename = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes


@dataclass(frozen=True)
class FilePart:
    """Tensors of a file that are read together.

    Attributes:
        outline: by name, on the meta device.
        read: returns the tensors.
    """

    outline: Mapping[str, Tensor]
    read: Callable[[], Mapping[str, Tensor]]


def parts_of(weights: Stored, rename: Rename = dict) -> list[FilePart]:
    """Return one part for each tensor.

    Args:
        weights: the tensors.
        rename: maps one tensor under its name to the tensors that are written for it.
    """
    return [
        FilePart(rename({name: value}), partial(_read, weights, name, rename))
        for name, value in weights.outline.items()
    ]


def _read(weights: Stored, name: str, rename: Rename) -> Mapping[str, Tensor]:
    return rename({name: weights[name]})


def write_safetensors(
    path: Path, parts: Sequence[FilePart], metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Write a new file and flush it to the disk.

    Args:
        path: of the new file.
        parts: its tensors.
        metadata: of the header.
        dtype: of the floating tensors; None leaves them.

    Raises:
        UserError: a disk that is full or cannot be written; the file is removed then.
    """
    ordered = sorted(
        parts,
        key=lambda part: -max((_typed(value, dtype).itemsize for value in part.outline.values()), default=0),
    )
    entries, size = _entries(ordered, dtype)
    header = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    lack = lack_of_room(path.parent, 8 + len(header) + size, "the file")
    if lack is not None:
        raise UserError(str(path), lack)
    with _new(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in ordered:
            _write_part(file, part, dtype)


@contextmanager
def _new(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file: flushed to the disk in the end, or removed where the block fails."""
    try:
        with path.open("xb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise UserError(str(path), complaint(error, path.parent)) from error


def _entries(parts: Sequence[FilePart], dtype: torch.dtype | None) -> tuple[dict[str, Any], int]:
    """Return the header's entries and the bytes of all tensors.

    Larger types come first, so that every tensor begins at a multiple of its item size.
    """
    entries: dict[str, Any] = {}
    end = 0
    for part in parts:
        for name, value in part.outline.items():
            kind = _typed(value, dtype)
            begin, end = end, end + value.numel() * kind.itemsize
            entries[name] = {"dtype": _NAMES[kind], "shape": list(value.shape), "data_offsets": [begin, end]}
    return entries, end


def _typed(value: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and value.is_floating_point() else value.dtype


def _write_part(file: IO[bytes], part: FilePart, dtype: torch.dtype | None) -> None:
    tensors = part.read()
    for name, outline in part.outline.items():
        value = tensors[name].detach().to(_typed(outline, dtype)).contiguous()
        assert value.shape == outline.shape, (
            f"{name} is {tuple(value.shape)}, announced as {tuple(outline.shape)}"
        )
        file.write(value.reshape(-1).view(torch.uint8).numpy().data)
