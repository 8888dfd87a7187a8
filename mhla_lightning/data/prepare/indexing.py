"""An index and offsets for shards that others made."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mhla_lightning.data.index import (
    INDEX_NAME,
    KINDS,
    SPLITS,
    VAE,
    Clip,
    ShardIndex,
    read_index,
    write_index,
)
from mhla_lightning.data.prepare.parallel import run_jobs
from mhla_lightning.data.prepare.places import find_splits, folder_split, split_word, tar_files
from mhla_lightning.data.prepare.replacing import Note
from mhla_lightning.data.prepare.survey import Survey, SurveyJob, survey_shard
from mhla_lightning.data.prepare.walking import visible
from mhla_lightning.data.stores import LocalStore, open_store
from mhla_lightning.errors import DataError, UserError, unknown_name

OnProgress = Callable[[str, int, int], None]  # split, shards done, shards in all
_COMPRESSED = {
    (".tar.gz", ".tgz"): "gunzip",
    (".tar.bz2", ".tbz2"): "bunzip2",
    (".tar.xz", ".txz"): "unxz",
    (".tar.zst", ".tzst"): "unzstd",
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """Facts about shards that the shards themselves do not hold.

    None takes the fact from the index that is replaced, where there is one.

    Args:
        kind: of all samples; None is the kind of the first sample of the first shard.
        classes: names by label; the last resort are the numbers from 0 to the largest label.
        vae: what made the latents; its shape is read from them.
        tokenizer: its name.
        rate: of clips, frames a second; the last resort are the clips' own files.
        captioned: whether images have captions, KEY.txt or KEY.json, instead of classes.
    """

    kind: str | None = None
    classes: tuple[str, ...] | None = None
    vae: VAE | None = None
    tokenizer: str | None = None
    rate: float | None = None
    captioned: bool = False

    def __post_init__(self) -> None:
        """Raise UserError for an unknown kind or an impossible rate."""
        if self.rate is not None and not 0 < self.rate <= 1000:
            raise UserError(
                "rate", f"got {self.rate}; it must be a number of frames a second above 0 and at most 1000"
            )
        if self.kind is not None and self.kind not in KINDS:
            raise UserError("kind", unknown_name("kind", self.kind, KINDS))
        if self.captioned and (self.classes is not None or self.kind not in (None, "images")):
            foreign = "classes" if self.classes is not None else "kind"
            raise UserError(
                foreign, "it contradicts `captioned`: images with captions, which have no classes"
            )


def index_shards(
    path: str,
    facts: Facts | None = None,
    overwrite: bool = False,
    workers: int = 1,
    on_progress: OnProgress | None = None,
    on_note: Note | None = None,
) -> dict[str, ShardIndex]:
    """Write index.json and offsets for tar files, and return the indices by split.

    All shards are read before anything is written; the tar files themselves are not changed.

    Args:
        path: a local folder of train/, val/, test/ or of one split.
        facts: that the shards do not hold.
        overwrite: replace an index.
        workers: processes.
        on_progress: called with a split, its shards done and its shards in all.
        on_note: called with remarks for the user; None logs them.

    Raises:
        UserError: a path or facts that do not fit.
        DataError: shards that training could not read.
    """
    facts, folders = facts or Facts(), _folders(path, overwrite)
    with _work_folders(folders) as work:
        surveys: dict[str, list[Survey]] = {}
        kind = facts.kind
        for name, folder in folders.items():
            job = SurveyJob(folder, "images" if facts.captioned else kind, work[name], facts.captioned)
            surveys[name] = _survey(name, job, workers, on_progress or (lambda *_: None))
            kind = surveys[name][0].kind
        labels = max(survey.labels for found in surveys.values() for survey in found)
        indices = {name: _index(folders[name], found, facts, labels) for name, found in surveys.items()}
        for name, index in indices.items():
            write_index(work[name], index)
            read_index(work[name])  # refuses, for instance, names of shards that training would refuse
        for name, folder in folders.items():
            _publish(work[name], folder)
    for name, index in indices.items():
        _remark(name, index, surveys[name], on_note or _log.info)
    return indices


def _remark(name: str, index: ShardIndex, surveys: Sequence[Survey], on_note: Note) -> None:
    if index.keys_per_shard:
        on_note(f"{name}: keys begin anew in each shard, so a sample is named by its shard and its key")
    bad = [survey for survey in surveys if survey.unusable]
    if bad:
        on_note(
            f"{name}: {sum(survey.unusable for survey in bad)} of {index.samples} images cannot be used, and "
            f"training skips them; the first is {bad[0].reason}"
        )


def _folders(path: str, overwrite: bool) -> dict[str, Path]:
    store = open_store(path)
    if not isinstance(store, LocalStore):
        raise UserError(
            path,
            "is not a folder of this machine; index the shards where they are, and upload "
            "index.json and the offsets with them",
        )
    root = Path(store.address(".")).absolute()
    places = [root, *(root / name for name in SPLITS)]
    for place in places:
        _demand_plain_names(place)
    if not any(tar_files(place) for place in places):
        raise DataError(path, "holds no tar files, neither itself nor in train/, val/ or test/")
    _demand_split_folders(root)
    folders = {name: Path(found.address(".")).absolute() for name, found in find_splits(path).items()}
    for folder in folders.values():
        if (folder / INDEX_NAME).exists() and not overwrite:
            raise UserError(str(folder / INDEX_NAME), "exists; pass `overwrite` to write it anew")
        if not tar_files(folder):
            raise DataError(str(folder), "holds no tar files")
    return folders


def _demand_plain_names(folder: Path) -> None:
    """Refuse tar files that would be passed over: compressed ones, and others than *.tar."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.name.lower()
        tool = next((tool for suffixes, tool in _COMPRESSED.items() if name.endswith(suffixes)), None)
        if tool is not None and visible(name):
            raise UserError(
                str(path),
                "is compressed, so single samples cannot be read from it; decompress it first "
                f"({tool} {path.name})",
            )
        if name.endswith(".tar") and not path.name.endswith(".tar"):
            raise UserError(str(path), f"is not called *.tar; rename it to {path.name[:-4]}.tar")


def _demand_split_folders(root: Path) -> None:
    """Refuse shards of several splits in one folder, and splits whose folders have other names."""
    if root.name in SPLITS:
        return
    files = tar_files(root)
    below = [path for path in sorted(root.iterdir()) if path.is_dir() and tar_files(path)]
    beside = next((path.name for path in below if path.name in SPLITS), None)
    if files and beside is not None:
        raise UserError(
            str(files[0]), f"is beside the split {beside}; move it into a folder train, val or test"
        )
    for path in below:
        split = folder_split(path.name)
        if split not in (None, path.name):
            raise UserError(
                str(path), f"looks like a split; splits are folders train, val and test: rename it to {split}"
            )
    _demand_one_split(root, files)


def _demand_one_split(root: Path, files: Sequence[Path]) -> None:
    """Refuse files whose names tell that they are of several splits."""
    found: dict[str, tuple[str, str]] = {}  # split and a file by word
    for file in files:
        meant = split_word(file.name)
        if meant is not None:
            found.setdefault(meant[0], (meant[1], file.name))
    splits = [name for name in SPLITS if name in {split for split, _ in found.values()}]
    if len(splits) > 1:
        moves = " && ".join(f"mv *{word}*.tar {split}/" for word, (split, _) in found.items())
        raise UserError(
            str(root),
            f"holds shards of {' and '.join(splits)} by their names "
            f"({', '.join(name for _, name in found.values())}), and would become one split; give each a "
            f"folder (mkdir {' '.join(splits)} && {moves}), or move all into train/ if they are one split",
        )


@contextmanager
def _work_folders(folders: dict[str, Path]) -> Iterator[dict[str, Path]]:
    """Make a hidden folder inside each split for unfinished files, and remove it in the end."""
    work = {name: folder / f".indexing-{uuid.uuid4().hex[:8]}" for name, folder in folders.items()}
    try:
        for folder in work.values():
            folder.mkdir()
        yield work
    except OSError as error:
        raise UserError(str(error.filename), f"cannot be written ({error.strerror})") from error
    finally:
        for folder in work.values():
            shutil.rmtree(folder, ignore_errors=True)


def _survey(name: str, split: SurveyJob, workers: int, on_progress: OnProgress) -> list[Survey]:
    """Read all shards of a split, by name; the first one decides on the kind.

    Args:
        name: of the split.
        split: the job of all shards, with the folder as its path.
        workers: processes.
        on_progress: called with the split, its shards done and its shards in all.
    """
    paths = tar_files(split.path)
    on_progress(name, 0, len(paths))
    first = survey_shard(replace(split, path=paths[0]))
    found = [first]
    with closing(
        run_jobs(survey_shard, [replace(split, path=path, kind=first.kind) for path in paths[1:]], workers)
    ) as results:
        for survey in results:
            found.append(survey)
            on_progress(name, len(found), len(paths))
    on_progress(name, len(found), len(paths))
    found.sort(key=lambda survey: survey.entry.name)
    _demand_alike(split.path, found)
    return found


def _demand_alike(folder: Path, surveys: Sequence[Survey]) -> None:
    first = surveys[0]
    for survey in surveys:
        if survey.clip != first.clip:
            raise DataError(
                str(folder / survey.entry.name),
                f"holds clips of {survey.clip}, unlike {first.entry.name}; all clips of a split must "
                "be alike",
            )
        if (survey.length, survey.shape, survey.labels > 0) != (first.length, first.shape, first.labels > 0):
            what = (
                f"rows of {survey.length} tokens"
                if survey.length
                else f"latents of {survey.shape}, {survey.labels} classes"
            )
            raise DataError(
                str(folder / survey.entry.name),
                f"holds {what}, unlike {first.entry.name}; all samples of a split must be alike",
            )


def _keys_per_shard(folder: Path, surveys: Sequence[Survey]) -> bool:
    """Return whether keys begin anew in each shard.

    Raises:
        DataError: two shards share few keys, as by mistake, or samples that are equal, as copies are.
    """
    owners: dict[str, tuple[Survey, int]] = {}
    anew = False
    for survey in surveys:
        twice = [place for place, key in enumerate(survey.keys) if key in owners]
        few = 2 * len(twice) < min(len(survey.keys), len(surveys[0].keys))
        if twice and (
            few or all(_content(survey, place) == _content(*owners[survey.keys[place]]) for place in twice)
        ):
            key = survey.keys[twice[0]]
            raise DataError(
                str(folder / survey.entry.name),
                f"holds sample {key}, which is in {owners[key][0].entry.name} too ({len(twice)} such samples "
                "in all); remove them, or give them other names",
            )
        anew = anew or bool(twice)
        for place, key in enumerate(survey.keys):
            owners.setdefault(key, (survey, place))
    return anew


def _content(survey: Survey, place: int) -> bytes | str:
    """Return what tells a sample from others, or its shard where samples were not read."""
    return survey.contents[place] if survey.contents else survey.entry.sha256


def _index(folder: Path, surveys: Sequence[Survey], facts: Facts, labels: int) -> ShardIndex:
    """Return the index of a split.

    Args:
        folder: of the split.
        surveys: of its shards.
        facts: of the user.
        labels: 1 + the largest class number of all splits.
    """
    first, old = surveys[0], _old(folder)
    names = (
        facts.classes
        if facts.classes is not None
        else old.classes
        if len(old.classes) >= labels
        else tuple(map(str, range(labels)))
    )
    if facts.classes is not None and labels > len(names):
        raise UserError("classes", f"{len(names)} classes are named, but labels go up to {labels - 1}")
    vae = facts.vae or old.vae
    if first.shape and vae is None:
        raise UserError(
            "vae",
            f"{folder} holds {first.kind}, which need the name, scale and shift of their VAE for training",
        )
    if facts.vae is not None and not first.shape:
        raise UserError("vae", f"{folder} holds {first.kind}, which no VAE made; leave it out")
    tokenizer = facts.tokenizer or old.tokenizer if first.length else None
    vae = replace(vae, shape=first.shape) if vae is not None and first.shape else None
    entries, clip = tuple(survey.entry for survey in surveys), _clip(folder, first, facts, old)
    return ShardIndex(
        first.kind,
        entries,
        names if labels else (),
        tokenizer,
        vae,
        first.length,
        clip=clip,
        keys_per_shard=_keys_per_shard(folder, surveys),
    )


def _clip(folder: Path, first: Survey, facts: Facts, old: ShardIndex) -> Clip | None:
    if first.clip is None:
        return None
    rate = facts.rate or first.clip.rate or (old.clip.rate if old.clip is not None else None)
    if rate is None:
        raise UserError("rate", f"{folder} holds clips without their frames a second; name them")
    return Clip(first.clip.frames, first.clip.height, first.clip.width, rate)


def _old(folder: Path) -> ShardIndex:
    """Return the index that is being replaced, or an empty one where it cannot be read."""
    try:
        return read_index(folder)
    except DataError:
        return ShardIndex("images", ())


def _publish(work: Path, folder: Path) -> None:
    """Move finished files into the split.

    The index comes last: a folder without an index is not taken for a split.
    """
    (folder / INDEX_NAME).unlink(missing_ok=True)
    for path in sorted(work.iterdir(), key=lambda path: path.name == INDEX_NAME):
        os.replace(path, folder / path.name)
    for left in folder.glob("*.tar.offsets.npy"):
        if not (folder / left.name.removesuffix(".offsets.npy")).exists():
            left.unlink()  # its shard is gone
