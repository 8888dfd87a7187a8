"""Pictures and mixing matrices in the event files of TensorBoard.

TensorBoard's own reader checks sums in Python, a second for some megabytes, and keeps every scalar.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from mhla_lightning.report.folder import MOST_NAME, SafeFolder
from mhla_lightning.runs.tags import MIXING_VALUES

MOST_EVENTS = 512 * 2**20  # bytes of the event files of a run
MOST_PICTURE = 4 * 2**20  # bytes of one picture
MOST_SIDE = 1024  # blocks of a mixing matrix
_HEADER = struct.Struct("<QI")  # length of a record, and the checksum of the length
_SUM = 4  # bytes of the checksum behind a record
_KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"GIF8": "image/gif", b"\xff\xd8\xff": "image/jpeg"}


@dataclass
class Events:
    """What the event files of a run hold.

    Attributes:
        pictures: tag -> step -> bytes of a PNG, GIF or JPEG.
        mixing: layer -> step -> matrix (blocks, blocks).
    """

    pictures: dict[str, dict[int, bytes]] = field(default_factory=dict)
    mixing: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)

    def forget_from(self, step: int) -> None:
        """Drop what an earlier attempt wrote at a step and later."""
        for table in (self.pictures, self.mixing):
            for found in table.values():
                for late in [one for one in found if one >= step]:
                    del found[late]


def read_events(folder: SafeFolder, tensorboard: Path) -> Events:
    """Read the event files below a folder; of damaged files, what comes before the damage."""
    found, left = Events(), MOST_EVENTS
    pattern = f"{tensorboard.relative_to(folder.path)}/**/events.out.tfevents.*"
    for path in folder.files(pattern, MOST_EVENTS):
        left -= path.stat().st_size
        if left < 0:
            folder.note(
                f"{folder.name(path)} was left out: the event files are above {MOST_EVENTS // 2**20} MiB."
            )
            continue
        for event in _events(folder, path):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                found.forget_from(event.step)
            for value in event.summary.value:
                _keep(folder, found, event.step, value)
    return found


def _events(folder: SafeFolder, path: Path) -> Iterator[Any]:
    """Yield the events of a file; the last may be half written while a run goes on."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            length, _ = _HEADER.unpack(header)
            if length + _SUM > size - file.tell():
                break
            record = file.read(length)
            file.seek(_SUM, 1)
            try:
                yield Event.FromString(record)
            except DecodeError:
                break
        if header:
            folder.note(f"{folder.name(path)} is damaged or being written; what comes before is on the page.")


def _keep(folder: SafeFolder, found: Events, step: int, value: Any) -> None:
    if len(value.tag) > MOST_NAME:
        return
    if value.HasField("image"):
        data = value.image.encoded_image_string
        if picture_kind(data) is None or len(data) > MOST_PICTURE:
            folder.note(
                f"A picture of {value.tag} was left out: it is no PNG, GIF or JPEG, or has above "
                f"{MOST_PICTURE // 2**20} MiB."
            )
        else:
            found.pictures.setdefault(value.tag, {})[step] = data
    elif value.HasField("tensor") and value.tag.startswith(MIXING_VALUES):
        matrix = _matrix(value.tensor)
        if matrix is None:
            folder.note(f"A tensor of {value.tag} is no finite matrix; it was left out.")
        else:
            found.mixing.setdefault(value.tag.removeprefix(MIXING_VALUES), {})[step] = matrix


def _matrix(tensor: Any) -> np.ndarray | None:
    """Return a finite matrix; None for anything else, which a stranger may have written."""
    sides = [dimension.size for dimension in tensor.tensor_shape.dim]
    if len(sides) != 2 or not all(0 < side <= MOST_SIDE for side in sides):
        return None
    if len(tensor.float_val) != sides[0] * sides[1]:  # as torch writes float32
        return None
    matrix = np.array(tensor.float_val, dtype=np.float32).reshape(sides)
    return matrix if np.isfinite(matrix).all() else None


def picture_kind(data: bytes) -> str | None:
    """Return the media type of a picture by its first bytes; None for an unknown one."""
    return next((kind for head, kind in _KINDS.items() if data.startswith(head)), None)
