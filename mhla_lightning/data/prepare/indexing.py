"""An index and offsets for shards that others made."""

from __future__ import annotations

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
from mhla_lightning.data.prepare.places import find_splits, tar_files
from mhla_lightning.data.prepare.survey import Survey, SurveyJob, survey_shard
from mhla_lightning.data.stores import LocalStore, open_store
from mhla_lightning.errors import DataError, UserError, unknown_name

OnProgress = Callable[[str, int, int], None]  # split, shards done, shards in all


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
    """

    kind: str | None = None
    classes: tuple[str, ...] | None = None
    vae: VAE | None = None
    tokenizer: str | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        """Raise UserError for an unknown kind or an impossible rate."""
        if self.rate is not None and not 0 < self.rate <= 1000:
            raise UserError(
                "rate", f"got {self.rate}; it must be a number of frames a second above 0 and at most 1000"
            )
        if self.kind is not None and self.kind not in KINDS:
            raise UserError("kind", unknown_name("kind", self.kind, KINDS))


def index_shards(
    path: str,
    facts: Facts | None = None,
    overwrite: bool = False,
    workers: int = 1,
    on_progress: OnProgress | None = None,
) -> dict[str, ShardIndex]:
    """Write index.json and offsets for tar files, and return the indices by split.

    All shards are read before anything is written; the tar files themselves are not changed.

    Args:
        path: a local folder of train/, val/, test/ or of one split.
        facts: that the shards do not hold.
        overwrite: replace an index.
        workers: processes.
        on_progress: called with a split, its shards done and its shards in all.

    Raises:
        UserError: a path or facts that do not fit.
        DataError: shards that training could not read.
    """
    facts, folders = facts or Facts(), _folders(path, overwrite)
    with _work_folders(folders) as work:
        surveys: dict[str, list[Survey]] = {}
        kind = facts.kind
        for name, folder in folders.items():
            surveys[name] = _survey(name, folder, work[name], kind, workers, on_progress or (lambda *_: None))
            kind = surveys[name][0].kind
        labels = max(survey.labels for found in surveys.values() for survey in found)
        indices = {name: _index(folders[name], found, facts, labels) for name, found in surveys.items()}
        for name, index in indices.items():
            write_index(work[name], index)
            read_index(work[name])  # refuses, for instance, names of shards that training would refuse
        for name, folder in folders.items():
            _publish(work[name], folder)
    return indices


def _folders(path: str, overwrite: bool) -> dict[str, Path]:
    store = open_store(path)
    if not isinstance(store, LocalStore):
        raise UserError(
            path,
            "is not a folder of this machine; index the shards where they are, and upload "
            "index.json and the offsets with them",
        )
    root = Path(store.address(".")).absolute()
    packed = sorted(
        file for pattern in ("*.tar.gz", "*.tgz", "*/*.tar.gz", "*/*.tgz") for file in root.glob(pattern)
    )
    if packed:
        raise UserError(
            str(packed[0]),
            "is compressed, so single samples cannot be read from it; decompress it first "
            f"(gunzip {packed[0].name})",
        )
    if not root.is_dir() or not (tar_files(root) or any(tar_files(root / name) for name in SPLITS)):
        raise DataError(path, "holds no tar files, neither itself nor in train/, val/ or test/")
    folders = {name: Path(found.address(".")).absolute() for name, found in find_splits(path).items()}
    for folder in folders.values():
        if (folder / INDEX_NAME).exists() and not overwrite:
            raise UserError(str(folder / INDEX_NAME), "exists; pass `overwrite` to write it anew")
        if not tar_files(folder):
            raise DataError(str(folder), "holds no tar files")
    return folders


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


def _survey(
    name: str, folder: Path, work: Path, kind: str | None, workers: int, on_progress: OnProgress
) -> list[Survey]:
    """Read all shards of a split, by name; the first one decides on the kind."""
    paths = tar_files(folder)
    on_progress(name, 0, len(paths))
    first = survey_shard(SurveyJob(paths[0], kind, work))
    found = [first]
    with closing(
        run_jobs(survey_shard, [SurveyJob(path, first.kind, work) for path in paths[1:]], workers)
    ) as results:
        for survey in results:
            found.append(survey)
            on_progress(name, len(found), len(paths))
    on_progress(name, len(found), len(paths))
    found.sort(key=lambda survey: survey.entry.name)
    _demand_alike(folder, found)
    return found


def _demand_alike(folder: Path, surveys: Sequence[Survey]) -> None:
    owners: dict[str, str] = {}
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
        for key in survey.keys:
            if key in owners:
                raise DataError(
                    str(folder / survey.entry.name),
                    f"holds sample {key}, which is in {owners[key]} too; every sample of a split needs a "
                    "name of its own",
                )
            owners[key] = survey.entry.name


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
    return ShardIndex(first.kind, entries, names if labels else (), tokenizer, vae, first.length, clip=clip)


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
