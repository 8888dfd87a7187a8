"""Images with captions to encode: a folder of files, or packed shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mhla_lightning.data.check import check_split
from mhla_lightning.data.index import INDEX_NAME, SPLITS, ShardIndex, read_index
from mhla_lightning.data.members import IMAGE_EXTENSIONS, image_extension
from mhla_lightning.data.pixels import FILE_FORMATS, BadImage, decode
from mhla_lightning.data.prepare.caption_files import CAPTION, CaptionFiles, read_caption_list
from mhla_lightning.data.prepare.latents.captions import check_text_options
from mhla_lightning.data.prepare.latents.images import ShardPart, is_packed
from mhla_lightning.data.prepare.latents.shard_captions import TEXT, caption_in, shard_texts
from mhla_lightning.data.prepare.pack import PackOptions, PlannedSplit, fingerprint_of, plan
from mhla_lightning.data.prepare.places import find_splits, folder_split
from mhla_lightning.data.prepare.samples import Sample
from mhla_lightning.data.prepare.sources.base import SampleSource, SourcePart, files_fingerprint, png_bytes
from mhla_lightning.data.prepare.walking import files_below, visible
from mhla_lightning.data.split import Split
from mhla_lightning.errors import DataError, UserError, unknown_name
from mhla_lightning.textfiles import JSON_SUFFIXES, NotText, is_json

LIST = "captions.jsonl"  # of a folder
UNCAPTIONED = ("refuse", "skip")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
_LISTS = (*JSON_SUFFIXES, ".csv", ".tsv", ".parquet", ".caption")  # other forms of captions
_HEADER = ShardIndex("images", ())


@dataclass(frozen=True)
class CaptionOptions:
    """Where the captions of images are, and what encodes them.

    Args:
        text_encoder: see text_encoders.load_text_encoder, also for tokens and instruction.
        tokens: the most of a caption; None is the encoder's: 300 of Gemma-2, else 512.
        instruction: what the encoder reads before a caption; None is nothing.
        file: a list of captions of a folder's images; None is captions.jsonl in the folder or, without it,
            NAME.txt beside each image.
        key: of a caption in the list, or in the member json of a packed sample. None is `caption`, and
            prefers the member txt.
        uncaptioned: refuse or skip images without a caption.
        long_captions: refuse or cut captions with more tokens.
    """

    text_encoder: str
    tokens: int | None = None
    instruction: str | None = None
    file: str | Path | None = None
    key: str | None = None
    uncaptioned: str = "refuse"
    long_captions: str = "refuse"

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        check_text_options(self.tokens, self.long_captions)
        if self.uncaptioned not in UNCAPTIONED:
            raise UserError("uncaptioned", unknown_name("choice", self.uncaptioned, UNCAPTIONED))
        if self.file is not None and not is_json(self.file):
            raise UserError(
                "captions",
                f"{self.file} is no list of captions; it must be a file {', '.join(JSON_SUFFIXES)} with "
                f'lines {{"file": "NAME.jpg", "{self.key or CAPTION}": "..."}}',
            )


@dataclass
class CaptionSurvey:
    """What a pass over the captions of a source finds.

    Args:
        splits: the images that have one, by split; their samples hold it as the member txt.
        captions: of all of them -> the sample that each was first found at.
        total: images in all.
        left_out: (split, name, reason) of images without a caption.
    """

    splits: list[PlannedSplit] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)
    total: int = 0
    left_out: list[tuple[str, str, str]] = field(default_factory=list)

    def remarks(self) -> list[str]:
        """Return a remark on the images that are left out."""
        if not self.left_out:
            return []
        split, name, missing = self.left_out[0]
        count = f"{len(self.left_out)} of {self.total} images have no caption and are left out"
        return [f"{count}; the first is {name} of {split} ({missing})"]

    def keep(self, split: str, name: str, caption: str | None, missing: str, options: CaptionOptions) -> bool:
        """Count an image, and return whether it has a caption.

        Raises:
            DataError: it has none, and such images are not skipped.
        """
        self.total += 1
        if caption:
            self.captions.setdefault(caption, f"{name} of {split}")
            return True
        if options.uncaptioned == "refuse":
            raise DataError(
                f"{split} sample {name}",
                f"{missing}; write one, or leave such images out with `uncaptioned` skip",
            )
        self.left_out.append((split, name, missing))
        return False


class CaptionedSource(ABC):
    """Images with captions.

    Attributes:
        names: of the splits.
        fingerprint: changes with images, captions, order and splits.
        origin: where the captions are, for the user.
    """

    names: tuple[str, ...]
    fingerprint: str
    origin: str

    @abstractmethod
    def survey(self, options: CaptionOptions) -> CaptionSurvey:
        """Find the captions of all images. Raises DataError for one that is missing or no text."""


def open_captioned(source: str | Path, options: PackOptions, captions: CaptionOptions) -> CaptionedSource:
    """Open images with captions.

    Args:
        source: folder or address of packed shards, whose splits and order are kept; or a folder of images,
            with folders train, val and test or without.
        options: val and seed are for a folder of images.
        captions: where the captions are.

    Raises:
        UserError: a source that does not exist, or options that do not fit it.
        DataError: no images, or a list of captions that cannot be read.
    """
    if not is_packed(source):
        return CaptionedFolder(Path(source).expanduser(), options, captions)
    if options.val is not None:
        raise UserError("val", f"got {options.val}, but {source} is packed and has its splits; leave it out")
    if captions.file is not None:
        raise UserError(
            "captions",
            f"got {captions.file}, but {source} is packed: its captions are members KEY.txt or KEY.json; "
            "leave it out",
        )
    return CaptionedShards(str(source), captions.key)


class CaptionedFolder(CaptionedSource):
    """A folder of images, with a caption of each in a list or beside it."""

    def __init__(self, folder: Path, options: PackOptions, captions: CaptionOptions) -> None:
        if not folder.is_dir():
            raise UserError("source", f"{folder} is no folder of images and no packed shards")
        self._root, self._options = folder, options
        self._files = self._by_split()
        listed = Path(captions.file).expanduser() if captions.file is not None else folder / LIST
        if captions.file is not None or listed.is_file():
            key = captions.key or CAPTION
            self._captions = CaptionFiles(folder, read_caption_list(listed, key), listed)
            self.origin, texts = str(listed), files_fingerprint(listed.parent, [listed])
        elif captions.key is not None:
            raise UserError(
                "caption_key",
                f"got {captions.key}, but {folder} has no {LIST} and is not packed: captions in NAME.txt "
                "have no keys",
            )
        else:
            self._captions = CaptionFiles(folder)
            self.origin = f"NAME.txt beside each image of {folder}"
            beside = [path.with_suffix(".txt") for path in self._all()]
            texts = files_fingerprint(folder, (path for path in beside if path.is_file()))
        self.fingerprint = fingerprint_of(files_fingerprint(folder, self._all()), texts)
        self.names = tuple(
            name for name in SPLITS if name in self._files or (name == "val" and "train" in self._files)
        )

    def survey(self, options: CaptionOptions) -> CaptionSurvey:
        found, others = CaptionSurvey(), self._others()
        parts: dict[str, SourcePart] = {}
        for split, files in self._files.items():
            pairs = []
            for path in files:
                caption, missing = self._captions.find(path)
                if found.keep(split, _name(path, self._root), caption, missing + others, options):
                    pairs.append((path, caption))
            if not pairs:
                raise DataError(str(self._root), f"no image of {split} has a caption{others}")
            parts[split] = CaptionedFiles(self._root, pairs)
        found.splits = plan(SampleSource(_HEADER, parts, self.fingerprint), self._options)
        return found

    def _by_split(self) -> dict[str, list[Path]]:
        """Return the images of the folders train, val and test, or all as train."""
        root = self._root
        folders = {"train": root}
        if (root / "train").is_dir():
            folders = {name: root / name for name in SPLITS if (root / name).is_dir()}
        else:
            odd = next(
                (path for path in sorted(root.iterdir()) if path.is_dir() and folder_split(path.name)), None
            )
            if odd is not None:
                raise DataError(
                    str(odd),
                    f"looks like a split, and there is no folder train beside it; splits are folders "
                    f"{', '.join(SPLITS)}",
                )
        files = {
            split: files_below(folder, lambda name: visible(name) and name.lower().endswith(_SUFFIXES))
            for split, folder in folders.items()
        }
        empty = next((split for split, found in files.items() if not found), None)
        if empty is not None:
            raise DataError(str(folders[empty]), f"holds no images: {', '.join(_SUFFIXES)}")
        return files

    def _all(self) -> list[Path]:
        return [path for files in self._files.values() for path in files]

    def _others(self) -> str:
        """Name files that may hold captions in a form that is not read."""
        known = self._captions.source
        found = [
            path.name
            for path in sorted(self._root.iterdir())
            if path.suffix.lower() in _LISTS and path != known and path.is_file()
        ]
        forms = f'; read are NAME.txt and {LIST} with lines {{"file": "NAME.jpg", "{CAPTION}": "..."}}'
        return f" ({', '.join(found[:3])} is not read{forms})" if found else ""


@dataclass(frozen=True)
class CaptionedFiles:
    """A part of a folder: files with their captions.

    Args:
        root: of the folder.
        files: (path, caption).
    """

    root: Path
    files: list[tuple[Path, str]]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Sample]:
        for path, caption in self.files:
            yield Sample(_name(path, self.root), {TEXT: caption.encode(), **_image(path)})

    def take(self, positions: Sequence[int]) -> CaptionedFiles:
        return replace(self, files=[self.files[position] for position in positions])


def _name(path: Path, root: Path) -> str:
    """Return the name of a sample: its place below the root."""
    return str(path.relative_to(root).with_suffix("")).replace("/", "-")


def _image(path: Path) -> dict[str, bytes]:
    """Return the member of an image file. JPEG, PNG and WebP are kept, other formats become PNG.

    What is no image keeps its bytes, so that it is counted where images are decoded.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror}); repair or remove it") from error
    extension = image_extension(data)
    if extension is None:
        try:
            return {"png": png_bytes(decode(data, FILE_FORMATS).image)}
        except BadImage:
            return {"png": data}
    return {extension: data}


class CaptionedShards(CaptionedSource):
    """Packed images with captions: KEY.txt or KEY.json beside KEY.jpg."""

    def __init__(self, source: str, key: str | None) -> None:
        self._key = key
        self._splits = {name: Split(read_index(store), store) for name, store in find_splits(source).items()}
        for split in self._splits.values():
            if split.index.kind != "images":
                raise DataError(
                    split.store.address(INDEX_NAME),
                    f"holds {split.index.kind}; images with captions are needed",
                )
            check_split(split, "size" if "://" not in source else "none")
        self.names = tuple(self._splits)
        self.origin = f"members of the shards of {source}"
        self.fingerprint = " ".join(f"{name} {split.index.hash}" for name, split in self._splits.items())

    def survey(self, options: CaptionOptions) -> CaptionSurvey:
        found = CaptionSurvey()
        for name, split in self._splits.items():
            positions = []
            for position, (sample, members) in enumerate(shard_texts(split, name)):
                try:
                    caption, missing = caption_in(members, self._key)
                except NotText as error:
                    raise DataError(f"{name} sample {sample}", f"its caption: {error}") from error
                if found.keep(name, sample, caption, missing, options):
                    positions.append(position)
            if not positions:
                raise DataError(split.store.address(INDEX_NAME), "lists no image that has a caption")
            part = CaptionedPart(ShardPart(split, positions), self._key)
            found.splits.append(PlannedSplit(name, part, list(range(len(part))), 1))
        return found


@dataclass(frozen=True)
class CaptionedPart:
    """Packed samples, each with its caption as the member txt.

    Args:
        part: the samples.
        key: see shard_captions.caption_in.
    """

    part: ShardPart
    key: str | None

    def __len__(self) -> int:
        return len(self.part)

    def __iter__(self) -> Iterator[Sample]:
        for sample in self.part:
            caption, _ = caption_in(sample.members, self.key)
            yield replace(sample, members={**_images(sample.members), TEXT: (caption or "").encode()})

    def take(self, positions: Sequence[int]) -> CaptionedPart:
        return replace(self, part=self.part.take(positions))


def _images(members: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in members.items() if name in IMAGE_EXTENSIONS}
