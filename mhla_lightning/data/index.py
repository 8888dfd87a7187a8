"""`index.json` and `NAME.offsets.npy`: what a split holds, read and written (the format is described in this folder's README). No torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mhla_lightning.errors import DataError

FORMAT = 1
KINDS = ("images", "tokens", "latents", "video_latents", "clips")
SPLITS = ("train", "val", "test")
INDEX_NAME = "index.json"


@dataclass(frozen=True)
class ShardEntry:
    """One tar file of a split: its plain file name, number of samples, size in bytes and sha256 (64 hex digits)."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """All shards of one split, in order. A sample's global index is its shard's first index plus its position in the shard."""

    kind: str
    shards: tuple[ShardEntry, ...]
    classes: tuple[str, ...] = ()
    tokenizer: str | None = None
    vae: dict[str, Any] | None = None

    @property
    def samples(self) -> int:
        """Number of samples of the split."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def hash(self) -> str:
        """sha256 over the lines `name sha256 samples`: equal hashes are equal data in equal order."""
        lines = (f"{shard.name} {shard.sha256} {shard.samples}\n" for shard in self.shards)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def first_index(self, shard: int) -> int:
        """Global index of the first sample of shard number `shard` (of one past the last sample for shard == len(shards))."""
        return self.first_indices()[shard]

    def first_indices(self) -> list[int]:
        """Global index of every shard's first sample, and the number of samples at the end: len(shards) + 1 integers."""
        return list(accumulate((shard.samples for shard in self.shards), initial=0))


def write_index(split_dir: str | Path, index: ShardIndex) -> None:
    """Write `index` as split_dir/index.json."""
    content = {"format": FORMAT, "kind": index.kind, "samples": index.samples, "shards": [asdict(shard) for shard in index.shards]}
    content |= {"classes": list(index.classes), "tokenizer": index.tokenizer, "vae": index.vae, "hash": index.hash}
    Path(split_dir, INDEX_NAME).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_index(split_dir: str | Path) -> ShardIndex:
    """Read and validate split_dir/index.json.

    Raises DataError when the file is missing, is no JSON, has another format, contradicts itself, or names a shard by more than a plain file name.
    """
    path = Path(split_dir, INDEX_NAME)
    content = _load(path)
    if content.get("format") != FORMAT:
        raise DataError(f"{path} has format {content.get('format')!r}, but this version reads format {FORMAT}: pack the data again (mhla data pack)")
    if content.get("kind") not in KINDS:
        raise DataError(f"{path} has kind {content.get('kind')!r}; valid: {', '.join(KINDS)}")
    index = _build(path, content)
    _agrees(path, content, index)
    return index


def offsets_path(split_dir: str | Path, shard: str) -> Path:
    """Where the offsets of a shard lie: beside it, as NAME.offsets.npy."""
    return Path(split_dir, f"{shard}.offsets.npy")


def read_offsets(split_dir: str | Path, entry: ShardEntry) -> np.ndarray:
    """Byte offsets of a shard: int64 (samples + 1,), each sample's first tar header, then the end of the last sample.

    Raises DataError when the file is missing, unreadable, of another type or length, or not growing inside the shard's size.
    """
    path = offsets_path(split_dir, entry.name)
    try:
        offsets = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is missing or unreadable ({error}): copy it again or pack the data again") from error
    if offsets.dtype != np.int64 or offsets.shape != (entry.samples + 1,):
        raise DataError(f"{path} holds {offsets.dtype} {offsets.shape}, but {entry.name} needs int64 ({entry.samples + 1},): copy it again")
    if offsets[0] < 0 or offsets[-1] > entry.bytes or (np.diff(offsets) <= 0).any():
        raise DataError(f"{path} does not grow from 0 to at most the {entry.bytes} bytes of {entry.name}: copy it again or pack the data again")
    return offsets


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: make it with 'mhla data pack SOURCE --to {path.parent.parent}'") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a JSON {type(content).__name__} where an object is expected")
    return content


def _build(path: Path, content: dict[str, Any]) -> ShardIndex:
    try:
        shards = tuple(ShardEntry(str(s["name"]), int(s["samples"]), int(s["bytes"]), str(s["sha256"])) for s in content["shards"])
        classes = tuple(str(name) for name in content["classes"] or ())
        return ShardIndex(content["kind"], shards, classes, content["tokenizer"], content["vae"])
    except KeyError as error:
        raise DataError(f"{path} lacks the key {error}") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} has a value of the wrong type ({error})") from error


def _agrees(path: Path, content: dict[str, Any], index: ShardIndex) -> None:
    names = [shard.name for shard in index.shards]
    for name in names:
        if not _is_plain(name):
            raise DataError(f"{path} names the shard {name!r}; a shard is a plain file name ending in .tar, beside its index")
    if len(set(names)) != len(names):
        raise DataError(f"{path} lists a shard twice: {sorted(name for name in set(names) if names.count(name) > 1)[0]}")
    if content.get("samples") != index.samples:
        raise DataError(f"{path} says {content.get('samples')} samples, but its shards hold {index.samples}: it was edited or damaged")
    if content.get("hash") != index.hash:
        raise DataError(f"{path} says hash {content.get('hash')}, but its shards give {index.hash}: it was edited or damaged")


def _is_plain(name: str) -> bool:
    return name.endswith(".tar") and Path(name).name == name and not name.startswith(".") and not set(name) & set("\\:|\0\n")
