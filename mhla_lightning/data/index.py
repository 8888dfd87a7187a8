"""`index.json` and `NAME.offsets.npy` of a split (format: data/README.md). No torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mhla_lightning.data.npy import load_npy
from mhla_lightning.data.stores import Store, open_store
from mhla_lightning.data.stores.addresses import plain_key_advice
from mhla_lightning.errors import DataError, UserError

FORMAT = 1
KINDS = ("images", "tokens", "latents", "video_latents", "clips")
SPLITS = ("train", "val", "test")
INDEX_NAME = "index.json"
EMPTY_TEXT = "empty_text.npy"  # beside the splits of latents with captions: features of the empty text
MAX_INDEX_BYTES = 2**28
MAX_LENGTH = 2**28  # tokens of a row, which is read in one piece
MAX_SHARD_BYTES = 2**53  # larger integers are not exact in every reader of JSON


@dataclass(frozen=True)
class ShardEntry:
    """One tar file of a split: plain file name, samples, size in bytes, sha256 (64 hex digits)."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class VAE:
    """The VAE that made latents.

    `mhla data latents` writes all fields. None is unknown in an index, and not compared in a recipe.

    Args:
        name: folder, or name on the Hugging Face hub.
        scale: a latent z is used as (z - shift) * scale.
        shift: see scale.
        shape: (C, h, w) or (C, t, h, w) of one sample.
        model: class of diffusers.
        sha256: of weights and configuration (encoders/vaes.py).
        moments: whether a latent is the mean of the posterior, stored with its log-variance.
        flipped: whether the latents of the mirrored image are stored too.
        mean: of every channel over the split, as the latents are used; never compared.
        std: of every channel over the split, as the latents are used; never compared.
    """

    name: str
    scale: float
    shift: float
    shape: tuple[int, ...]
    model: str | None = None
    sha256: str | None = None
    moments: bool | None = None
    flipped: bool | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def fits(self, found: VAE) -> bool:
        """Return whether latents of `found` satisfy this VAE of a recipe.

        Their sha256 must agree or, where one is unknown, their names: a VAE may be moved.
        """
        same = self.sha256 == found.sha256 if self.sha256 and found.sha256 else self.name == found.name
        wanted = (self.scale, self.shift, tuple(self.shape))
        if not same or wanted != (found.scale, found.shift, found.shape):
            return False
        more = (
            (self.model, found.model),
            (self.sha256, found.sha256),
            (self.moments, bool(found.moments)),
            (self.flipped, bool(found.flipped)),
        )
        return all(asked is None or asked == there for asked, there in more)

    def __str__(self) -> str:
        """Describe it in one line, without statistics."""
        known = [f"scale {self.scale:g}", f"shift {self.shift:g}", f"shape {tuple(self.shape)}"]
        known += [f"sha256 {self.sha256[:12]}"] if self.sha256 else []
        known += [
            ("" if said else "no ") + what
            for what, said in (("moments", self.moments), ("flips", self.flipped))
            if said is not None
        ]
        return f"{self.name} ({', '.join([self.model, *known] if self.model else known)})"


@dataclass(frozen=True)
class TextEncoding:
    """The encoder that makes features of text (encoders/text_encoders.py).

    Args:
        name: words:N, a folder, or a name on the Hugging Face hub.
        tokens: largest number of rows of a text.
        channels: of a row.
        sha256: of weights and vocabulary; None is unknown in an index, and not compared in a recipe.
        empty: sha256 of the features of the empty text, stored beside the splits.
        instruction: name of what the encoder reads before every text (encoders/instructions.py); None is
            nothing.
    """

    name: str
    tokens: int
    channels: int
    sha256: str | None = None
    empty: str | None = None
    instruction: str | None = None

    def __post_init__(self) -> None:
        """Raise UserError for sizes below 1."""
        for name in ("tokens", "channels"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"text_encoder.{name}", f"{getattr(self, name)} is too small; it must be at least 1"
                )

    def fits(self, found: TextEncoding) -> bool:
        """Return whether features of `found` satisfy this encoder of a recipe.

        Their sha256 must agree or, where one is unknown, their names.
        """
        same = self.sha256 == found.sha256 if self.sha256 and found.sha256 else self.name == found.name
        alike = (self.channels, self.instruction) == (found.channels, found.instruction)
        return same and alike and self.tokens >= found.tokens

    def facts(self) -> dict[str, Any]:
        """Return plain values; without an instruction they are those of versions that knew none."""
        return {
            key: value
            for key, value in asdict(self).items()
            if key != "instruction" or self.instruction is not None
        }

    def __str__(self) -> str:
        """Describe it in one line."""
        more = f", instruction {self.instruction}" if self.instruction else ""
        more += f", sha256 {self.sha256[:12]}" if self.sha256 else ""
        return f"{self.name} ({self.tokens} tokens of {self.channels} channels{more})"


@dataclass(frozen=True)
class Clip:
    """The size of all clips of a split.

    frames; height and width in pixels; rate in frames a second.
    """

    frames: int
    height: int
    width: int
    rate: float

    def __post_init__(self) -> None:
        """Raise ValueError for an impossible size or rate."""
        if min(self.frames, self.height, self.width) < 1 or not 0 < self.rate < 1e6:
            raise ValueError(f"clips of {self}")

    def __str__(self) -> str:
        """Describe it in one line."""
        return f"{self.frames} frames of {self.height}x{self.width} at {self.rate:g} a second"


@dataclass(frozen=True)
class ShardIndex:
    """All shards of one split, in order.

    A sample's global index is the first index of its shard plus its position in the shard.

    Args:
        kind: of the samples, one of KINDS.
        shards: in order.
        classes: names by label.
        tokenizer: name; of tokens.
        vae: that made them; of latents.
        length: tokens of a row; of tokens.
        clip: size of the clips; of clips, and of the clips behind video latents.
        text: encoder of the captions; of latents.
        keys_per_shard: whether keys begin anew in each shard, in shards that others made.
    """

    kind: str
    shards: tuple[ShardEntry, ...]
    classes: tuple[str, ...] = ()
    tokenizer: str | None = None
    vae: VAE | None = None
    length: int | None = None
    clip: Clip | None = None
    text: TextEncoding | None = None
    keys_per_shard: bool = False

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
        """sha256 over the lines `name sha256 samples`; equal hashes mean equal data in equal order."""
        lines = (f"{shard.name} {shard.sha256} {shard.samples}\n" for shard in self.shards)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def first_index(self, shard: int) -> int:
        """Return the global index of the first sample of a shard.

        For shard == len(shards), it is the number of samples.
        """
        return self.first_indices()[shard]

    def first_indices(self) -> list[int]:
        """Return the global index of the first sample of every shard, then the number of samples."""
        return list(accumulate((shard.samples for shard in self.shards), initial=0))


def write_index(split_dir: str | Path, index: ShardIndex) -> None:
    """Write `index` as split_dir/index.json."""
    content = {
        "format": FORMAT,
        "kind": index.kind,
        "samples": index.samples,
        "shards": [asdict(shard) for shard in index.shards],
    }
    content |= {
        "classes": list(index.classes),
        "tokenizer": index.tokenizer,
        "vae": index.vae and _vae_content(index.vae),
        "length": index.length,
    }
    content |= {"clip": asdict(index.clip)} if index.clip is not None else {}
    content |= (
        {"text": {key: value for key, value in asdict(index.text).items() if value is not None}}
        if index.text is not None
        else {}
    )
    content |= {"keys_per_shard": True} if index.keys_per_shard else {}
    content |= {"hash": index.hash}
    Path(split_dir, INDEX_NAME).write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def read_index(split: str | Path | Store) -> ShardIndex:
    """Read and validate the index.json of a split.

    split: a folder, an address or an open store. Raises DataError when the file is missing, is no JSON, has
    another format, or contradicts itself. A shard must have a plain file name.
    """
    store = split if isinstance(split, Store) else open_store(split)
    address = store.address(INDEX_NAME)
    size = store.size(INDEX_NAME)
    if size is None:
        folder = address.rpartition("/")[0]
        if next(Path(folder).glob("*.tar"), None) is not None:
            raise DataError(
                address, f"the file is missing beside its tar files: make it with 'mhla data index {folder}'"
            )
        others = "text: mhla data tokenize, videos: mhla data clips"
        raise DataError(
            address,
            f"the file is missing{plain_key_advice(folder)}: make it with 'mhla data pack SOURCE --to "
            f"{folder.rpartition('/')[0]}' ({others})",
        )
    if size > MAX_INDEX_BYTES:
        raise DataError(address, f"it has {size} bytes; an index has at most {MAX_INDEX_BYTES}")
    return parse_index(store.read(INDEX_NAME, 0, size), address)


def parse_index(text: bytes, address: str) -> ShardIndex:
    """Return the index in the bytes of an index.json. Raises DataError as read_index does."""
    content = _load(text, address)
    if content.get("format") != FORMAT:
        raise DataError(
            address,
            f"its format is {content.get('format')!r}, but this version reads format {FORMAT}: pack the data "
            "again (mhla data pack)",
        )
    if content.get("kind") not in KINDS:
        raise DataError(address, f"its kind is {content.get('kind')!r}; valid: {', '.join(KINDS)}")
    index = _build(address, content)
    _agrees(address, content, index)
    return index


def offsets_path(split_dir: str | Path, shard: str) -> Path:
    """Return the path of the offsets of a shard: NAME.offsets.npy beside it."""
    return Path(split_dir, f"{shard}.offsets.npy")


def parse_offsets(data: bytes, entry: ShardEntry, kind: str, address: str) -> np.ndarray:
    """Return the byte offsets of a shard's samples, int64 (samples + 1,).

    Each is the byte of a sample's first tar header; the last is the end of the last sample. Rows of tokens
    share the header of their member, so their offsets repeat.

    Args:
        data: bytes of the offsets file.
        entry: the shard.
        kind: of the samples.
        address: of the offsets file, for messages.

    Raises DataError when the array is unreadable, has another type or length, or does not grow inside the
    shard's size.
    """
    try:
        offsets = load_npy(data, "its array")
    except DataError as error:
        raise DataError(
            address, f"it is unreadable ({error.reason}): copy it again or run 'mhla data index'"
        ) from error
    if offsets.dtype != np.int64 or offsets.shape != (entry.samples + 1,):
        raise DataError(
            address,
            f"it holds {offsets.dtype} {offsets.shape}, but {entry.name} needs int64 ({entry.samples + 1},): "
            "copy it again",
        )
    if (
        offsets[0] < 0
        or offsets[-1] > entry.bytes
        or (np.diff(offsets) < (0 if kind == "tokens" else 1)).any()
    ):
        raise DataError(
            address,
            f"it does not grow from 0 to at most the {entry.bytes} bytes of {entry.name}: copy it again or "
            "pack "
            "the data again",
        )
    return offsets


def _load(text: bytes, address: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(address, f"it cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(address, f"it holds a JSON {type(content).__name__} where an object is expected")
    return content


def _build(path: str, content: dict[str, Any]) -> ShardIndex:
    try:
        shards = tuple(
            ShardEntry(str(s["name"]), int(s["samples"]), int(s["bytes"]), str(s["sha256"]))
            for s in content["shards"]
        )
        classes = tuple(str(name) for name in content["classes"] or ())
        _plausible(shards)
        _typed(content, "classes", list)
        _typed(content, "tokenizer", str)
        _typed(content, "length", int)
        _typed(content, "keys_per_shard", bool)
        if not 0 <= (content.get("length") or 0) <= MAX_LENGTH:
            raise ValueError(f"rows of {content['length']} tokens")
        clip, text = _clip(content), _text(content)
        return ShardIndex(
            content["kind"],
            shards,
            classes,
            content["tokenizer"],
            _vae(content),
            content.get("length"),
            clip=clip,
            text=text,
            keys_per_shard=bool(content.get("keys_per_shard")),
        )
    except KeyError as error:
        raise DataError(path, f"it lacks the key {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(path, f"it has a value of the wrong type ({error})") from error


def _plausible(shards: tuple[ShardEntry, ...]) -> None:
    for shard in shards:
        if not 0 <= shard.samples <= shard.bytes < MAX_SHARD_BYTES:
            raise ValueError(f"{shard.samples} samples in {shard.bytes} bytes")
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise ValueError(f"the sha256 {shard.sha256[:70]!r}")


def _typed(content: dict[str, Any], key: str, wanted: type) -> None:
    value = content.get(key)
    if value is not None and type(value) is not wanted:
        raise TypeError(f"{key} is a {type(value).__name__}")


def _vae(content: dict[str, Any]) -> VAE | None:
    found = content["vae"]
    if found is None and content["kind"] in ("latents", "video_latents"):
        raise ValueError("latents without a vae: name, scale, shift and shape")
    if found is None:
        return None
    for key, wanted in (("model", str), ("sha256", str), ("moments", bool), ("flipped", bool)):
        _typed(found, key, wanted)
    shape, mean, std = (
        tuple(int(n) for n in found["shape"]),
        *(tuple(float(x) for x in found.get(key, ())) for key in ("mean", "std")),
    )
    if any(values and len(values) != shape[0] for values in (mean, std)):
        raise ValueError(f"statistics of {len(mean)} and {len(std)} channels for latents {shape}")
    said = {key: found.get(key) for key in ("model", "sha256", "moments", "flipped")}
    return VAE(
        str(found["name"]), float(found["scale"]), float(found["shift"]), shape, **said, mean=mean, std=std
    )


def _clip(content: dict[str, Any]) -> Clip | None:
    found = content.get("clip")
    if found is None and content["kind"] == "clips":
        raise ValueError("clips without a clip: frames, height, width and rate")
    if found is None:
        return None
    for key in ("frames", "height", "width"):
        if type(found[key]) is not int:
            raise TypeError(f"{key} is a {type(found[key]).__name__}")
    return Clip(found["frames"], found["height"], found["width"], float(found["rate"]))


def _text(content: dict[str, Any]) -> TextEncoding | None:
    _typed(content, "text", dict)
    found = content.get("text")
    if found is None:
        return None
    for key, wanted in (("tokens", int), ("channels", int)):
        _typed(found, key, wanted)
    for key in ("sha256", "empty", "instruction"):
        _typed(found, key, str)
    if min(found["tokens"], found["channels"]) < 1:
        raise ValueError(f"texts of {found['tokens']} tokens of {found['channels']} channels")
    return TextEncoding(
        str(found["name"]),
        found["tokens"],
        found["channels"],
        found.get("sha256"),
        found.get("empty"),
        found.get("instruction"),
    )


def _vae_content(vae: VAE) -> dict[str, Any]:
    """Return the known fields; so the index of latents from elsewhere has the old format."""
    return {key: value for key, value in asdict(vae).items() if value is not None and value != ()}


def _agrees(path: str, content: dict[str, Any], index: ShardIndex) -> None:
    names = [shard.name for shard in index.shards]
    for name in names:
        if not _is_plain(name):
            raise DataError(
                path, f"it names the shard {name!r}; a shard is a plain file name with .tar, beside its index"
            )
    if len(set(names)) != len(names):
        twice = min(name for name in names if names.count(name) > 1)
        raise DataError(path, f"it lists a shard twice: {twice}")
    if content.get("samples") != index.samples:
        raise DataError(
            path,
            f"its number of samples is {content.get('samples')!r}, but its shards hold {index.samples}: it "
            "was "
            "edited or damaged",
        )
    if content.get("hash") != index.hash:
        found = repr(content.get("hash")).strip("'")  # stays in one line
        raise DataError(
            path, f"its hash is {found}, but its shards give {index.hash}: it was edited or damaged"
        )


def _is_plain(name: str) -> bool:
    return (
        name.endswith(".tar")
        and Path(name).name == name
        and not name.startswith(".")
        and name.isprintable()
        and not set(name) & set("\\:|")
    )
