"""Videos to shards of clips.

The same videos and options give the same bytes, with any number of processes and however often the work was
interrupted.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import random
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path

from mhla_lightning.data.encoders.videos import av_package
from mhla_lightning.data.index import Clip, ShardIndex
from mhla_lightning.data.prepare.clips.inputs import Video, open_videos
from mhla_lightning.data.prepare.clips.layout import place
from mhla_lightning.data.prepare.clips.options import ClipOptions, bucket_name, clip_bytes
from mhla_lightning.data.prepare.clips.probing import Probe, ProbeJob, probe
from mhla_lightning.data.prepare.clips.shards import ClipJob, ClipTally, Cut, write_clips
from mhla_lightning.data.prepare.pack import Progress, check_target, fingerprint_of
from mhla_lightning.data.prepare.parallel import Interrupted, check_workers, run_jobs
from mhla_lightning.data.prepare.replacing import Building, Note, build, demand_free
from mhla_lightning.data.prepare.shards import SHARD_BYTES, shard_name
from mhla_lightning.data.prepare.tallies import Done, finished_shard
from mhla_lightning.errors import DataError, UserError

_FEWEST_SHARDS = {"train": 16, "val": 4}  # so that small sets can still be dealt over ranks x workers
_MP4_SHRINKS = 40  # roughly, for H.264 at the quality used here
_READING = 2  # how films are read; work that was begun in another way is begun anew
SPLITS = ("train", "val")


@dataclass
class ClipReport:
    """What was written.

    Args:
        indices: by folder below the target: train and val, or SIZE/train and SIZE/val.
        skipped: (file or clip, reason).
        short: videos without a clip.
        seconds: of clips, by folder.
    """

    indices: dict[str, ShardIndex] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _PlannedFolder:
    """The clips of a folder, in the order of writing.

    Args:
        folder: below the target.
        header: an index that describes the clips.
        cuts: the clips by video.
        bounds: the first clip of every shard, and the number of clips.
    """

    folder: str
    header: ShardIndex
    cuts: list[Cut]
    bounds: list[int]


def make_clips(
    source: str | Path,
    to: str | Path,
    options: ClipOptions,
    *,
    captions: str | Path | None = None,
    need_captions: bool = True,
    overwrite: bool = False,
    workers: int = 1,
    wait: bool = True,
    on_progress: Progress | None = None,
    on_note: Note | None = None,
) -> ClipReport:
    """Write the clips of videos under `to`; with several sizes, under to/SIZE.

    Args:
        source: see inputs.open_videos.
        to: the folder to make.
        options: how videos become clips.
        captions: see inputs.open_videos.
        need_captions: see inputs.open_videos.
        overwrite: see pack.pack, also for the arguments that follow.
        workers: processes.
        wait: wait for another process that makes `to`.
        on_progress: called with a folder, its clips done and its clips in all.
        on_note: called with remarks for the user.

    Raises:
        UserError: a bad argument, or a target in use.
        DataError: a bad source, a missing caption, or too many videos that cannot be read.
        Interrupted: work that the same call can continue.
    """
    target = check_target(source, to)
    check_workers(workers)
    demand_free(target, overwrite)
    av_package("cutting clips")
    videos = open_videos(source, captions, need_captions)
    folders = [f"{bucket}{split}" for bucket in _buckets(options) for split in SPLITS]
    progress, note = on_progress or (lambda *_: None), on_note or (lambda _: None)
    with build(target, _fingerprint(videos, options), folders, overwrite, wait, note) as building:
        probes = _probe(building, videos, options, workers, progress)
        report = ClipReport(
            skipped=[
                (str(videos[found.number].path), found.error) for found in probes if found.error is not None
            ]
        )
        report.short = [
            str(videos[found.number].path) for found in probes if found.error is None and found.bucket is None
        ]
        splits = _plan(videos, probes, options)
        _write(building, splits, options, workers, progress, note, report)
        for folder in set(folders) - set(report.indices):
            for path in (building.folder / "data" / folder, (building.folder / "data" / folder).parent):
                if path != building.folder / "data" and not any(path.iterdir()):
                    path.rmdir()
    return report


def _buckets(options: ClipOptions) -> list[str]:
    return [""] if len(options.clips) == 1 else [f"{bucket_name(clip)}/" for clip in options.clips]


def _fingerprint(videos: Sequence[Video], options: ClipOptions) -> str:
    digest = hashlib.sha256()
    for video in videos:
        try:
            stat = video.path.stat()
        except OSError as error:
            raise DataError(
                str(video.path), f"cannot be read ({error.strerror}); repair or remove it"
            ) from error
        facts = str(video.path), stat.st_size, stat.st_mtime_ns, video.caption
        digest.update(f"{facts!r}\n".encode(errors="surrogateescape"))
    return fingerprint_of(
        "clips",
        _READING,
        digest.hexdigest(),
        repr(replace(options, max_skipped_share=0.0)),
        importlib.metadata.version("av"),
    )


def _probe(
    building: Building, videos: Sequence[Video], options: ClipOptions, workers: int, on_progress: Progress
) -> list[Probe]:
    """Look at every video; the findings of an earlier call are kept.

    Raises DataError when too many videos cannot be read.
    """
    kept = building.folder / "probes.jsonl"
    found = _read_probes(kept)
    held_out = float(options.val) if options.val_by == "time" else None
    cut = options.cut if options.shots else None
    jobs = [
        ProbeJob(number, video.path, options.clips, held_out, cut)
        for number, video in enumerate(videos)
        if number not in found
    ]
    on_progress("look", len(found), len(videos))
    with open(kept, "a", encoding="utf-8") as file, closing(run_jobs(probe, jobs, workers)) as results:
        for result in results:
            found[result.number] = result
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            on_progress("look", len(found), len(videos))
    bad = [found[number] for number in sorted(found) if found[number].error is not None]
    if bad and (len(bad) > options.max_skipped_share * len(videos) or len(bad) == len(videos)):
        raise DataError(
            str(videos[bad[0].number].path),
            f"{bad[0].error}; {len(bad)} of {len(videos)} videos cannot be read, more than "
            f"`max_skipped_share` {options.max_skipped_share:g} allows",
        )
    return [found[number] for number in range(len(videos))]


def _read_probes(path: Path) -> dict[int, Probe]:
    found = {}
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            result = Probe(**json.loads(line))
            train, val = (tuple((start, stop) for start, stop in part) for part in (result.train, result.val))
            found[result.number] = replace(result, train=train, val=val)  # JSON made lists of the tuples
        except (ValueError, TypeError):
            continue  # a killed process or a power cut left the line unfinished
    path.write_text("".join(json.dumps(asdict(result)) + "\n" for result in found.values()))
    return found


def _plan(videos: Sequence[Video], probes: Sequence[Probe], options: ClipOptions) -> list[_PlannedFolder]:
    """Decide which folders get which clips, from the videos and the options alone.

    Raises DataError where nothing is left for training or for validation.
    """
    splits = []
    for number, (bucket, clip) in enumerate(zip(_buckets(options), options.clips, strict=True)):
        members = [found for found in probes if found.error is None and found.bucket == number]
        random.Random(f"{options.seed}/{bucket}").shuffle(members)
        for split, cuts in _divide(videos, members, clip, options).items():
            if cuts:
                splits.append(
                    _PlannedFolder(
                        bucket + split,
                        ShardIndex("clips", (), clip=clip),
                        cuts,
                        _bounds(split, clip, cuts, options),
                    )
                )
    for split in SPLITS:
        if not any(found.folder.endswith(split) for found in splits):
            longest = max((found.seconds for found in probes), default=0.0)
            if split == "train" or not splits:
                sizes = " or ".join(map(str, options.clips))
                raise DataError(
                    "source",
                    f"no clip of {sizes} fits into a {'shot' if options.shots else 'video'}; the longest "
                    f"video has {longest:.2f} s",
                )
            raise DataError(
                "val",
                f"nothing is left for it of {len(videos)} video{'s' * (len(videos) > 1)}; choose "
                "`val_by` time, or shorter clips",
            )
    return splits


def _divide(
    videos: Sequence[Video], members: list[Probe], clip: Clip, options: ClipOptions
) -> dict[str, list[Cut]]:
    """Return the clips of the videos of one size, by split, in the order of `members`."""
    if options.val_by == "time":
        return {split: _cuts(videos, members, split, clip, options) for split in SPLITS}
    count = _held_out(len(members), options.val)
    return {
        "train": _cuts(videos, members[count:], "train", clip, options),
        "val": _cuts(videos, members[:count], "train", clip, options),
    }


def _held_out(videos: int, val: int | float) -> int:
    """Return how many videos of a size are held out; none of a single one."""
    if isinstance(val, int) or val >= 1:
        if videos > 1 and not (val < videos and val == int(val)):
            raise UserError(
                "val",
                f"got {val}; it must be a number of videos from 1 to {videos - 1}, or a share above 0 "
                "and below 1",
            )
        return int(val) if videos > 1 else 0
    return min(videos - 1, math.ceil(videos * val)) if videos else 0


def _cuts(
    videos: Sequence[Video], members: Iterable[Probe], stretches: str, clip: Clip, options: ClipOptions
) -> list[Cut]:
    """Return the clips of videos.

    Args:
        videos: all of them.
        members: the videos to cut.
        stretches: the name of their stretches, train or val.
        clip: size and rate.
        options: how videos become clips.
    """
    found = ((member, place(getattr(member, stretches), clip, options.stride_of(clip))) for member in members)
    return [
        Cut(videos[member.number], tuple(starts), member.last, member.seekable)
        for member, starts in found
        if starts
    ]


def _bounds(split: str, clip: Clip, cuts: Sequence[Cut], options: ClipOptions) -> list[int]:
    """Return the first clip of every shard, and the number of clips."""
    clips = sum(len(cut.starts) for cut in cuts)
    size = clip_bytes(clip) / (1 if options.store_of(clip) == "npy" else _MP4_SHRINKS)
    shards = max(_FEWEST_SHARDS[split], math.ceil(size * clips / SHARD_BYTES))
    if split == "train" and options.shards is not None:
        shards = options.shards
    shards = min(shards, clips)
    return [clips * shard // shards for shard in range(shards + 1)]


def _write(
    building: Building,
    splits: Sequence[_PlannedFolder],
    options: ClipOptions,
    workers: int,
    on_progress: Progress,
    on_note: Note,
    report: ClipReport,
) -> None:
    """Write the shards that are not finished yet, and the indices.

    Raises DataError when too many clips cannot be read, Interrupted when shards are kept.
    """
    jobs = list(chain.from_iterable(_jobs(building, split, options) for split in splits))
    finished = ((job, finished_shard(building, job.split, job.name, ClipTally)) for job in jobs)
    done: dict[tuple[str, str], Done[ClipTally]] = {
        (job.split, job.name): found for job, found in finished if found is not None
    }
    if done:
        on_note(f"{len(done)} of {len(jobs)} shards were finished before and are kept")
    totals = {split.folder: split.bounds[-1] for split in splits}

    def advance(folder: str) -> None:
        on_progress(
            folder,
            sum(shard.tally.planned for (name, _), shard in done.items() if name == folder),
            totals[folder],
        )

    for folder in totals:
        advance(folder)
    try:
        with closing(
            run_jobs(write_clips, [job for job in jobs if (job.split, job.name) not in done], workers)
        ) as results:
            for shard in results:
                done[shard.split, shard.entry.name] = shard
                advance(shard.split)
                _judge(done.values(), sum(totals.values()), options)
    except Interrupted:
        raise
    except UserError as error:
        if len(done) > 1:  # hours of work may be finished; keep them until the mistake is corrected
            raise Interrupted(error.key, error.reason) from error
        raise
    _judge(done.values(), sum(shard.tally.planned for shard in done.values()), options)
    for split in splits:
        _finish(
            building, split, [done[job.split, job.name] for job in jobs if job.split == split.folder], report
        )


def _jobs(building: Building, split: _PlannedFolder, options: ClipOptions) -> Iterable[ClipJob]:
    assert split.header.clip is not None
    store = options.store_of(split.header.clip)
    flat = [(number, start) for number, cut in enumerate(split.cuts) for start in cut.starts]
    for shard, (first, stop) in enumerate(zip(split.bounds, split.bounds[1:], strict=False)):
        grouped = groupby(flat[first:stop], key=lambda pair: pair[0])
        cuts = tuple(
            replace(split.cuts[number], starts=tuple(start for _, start in pairs))
            for number, pairs in grouped
        )
        yield ClipJob(
            building,
            split.header,
            split.folder,
            shard_name(Path(split.folder).name, shard),
            first,
            cuts,
            store,
        )


def _judge(done: Iterable[Done[ClipTally]], planned: int, options: ClipOptions) -> None:
    """Raise DataError when too many of the planned clips were left out."""
    skipped = [one for shard in done for one in shard.tally.skipped]
    if skipped and len(skipped) > options.max_skipped_share * planned:
        found = (
            f"{len(skipped)} of {planned} clips cannot be read, more than the share "
            f"{options.max_skipped_share:g} that is allowed"
        )
        raise DataError("max_skipped_share", f"{found}; the last: {skipped[-1][1]}")


def _finish(
    building: Building, split: _PlannedFolder, shards: Sequence[Done[ClipTally]], report: ClipReport
) -> None:
    index = replace(split.header, shards=tuple(shard.entry for shard in shards))
    if not index.samples:
        raise DataError(split.folder, f"no clip can be read; {': '.join(shards[0].tally.skipped[0])}")
    assert index.clip is not None
    building.write_index(split.folder, index)
    report.indices[split.folder] = index
    report.seconds[split.folder] = index.samples * index.clip.frames / index.clip.rate
    report.skipped += [one for shard in shards for one in shard.tally.skipped]
