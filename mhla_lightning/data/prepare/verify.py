"""The search for all that is wrong with shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np

from mhla_lightning.data.index import INDEX_NAME, ShardEntry, ShardIndex, parse_index, read_index
from mhla_lightning.data.kinds import kind_of
from mhla_lightning.data.members import scan_shard
from mhla_lightning.data.prepare.parallel import run_jobs
from mhla_lightning.data.prepare.places import find_splits
from mhla_lightning.data.prepare.verify_shard import Findings, Problem, VerifyJob, reason_for, verify_shard
from mhla_lightning.data.stores import Store
from mhla_lightning.errors import DataError

OnProgress = Callable[[str, int, int], None]  # split, samples done, samples in all
MOST_PROBLEMS = 10_000  # kept in a report; all are counted


@dataclass
class VerifyReport:
    """The problems that verify found.

    Args:
        problems: the first 10,000.
        found: number of all problems.
        samples: number of samples, as the index gives it.
        unusable: samples that cannot be trained on.
        shards: number of shards.
    """

    problems: list[Problem] = field(default_factory=list)
    found: int = 0
    samples: int = 0
    unusable: int = 0
    shards: int = 0

    def add(self, problems: Sequence[Problem], found: int | None = None) -> None:
        """Add problems.

        Args:
            problems: to keep.
            found: how many there are; None where all are given.
        """
        self.problems += problems[: MOST_PROBLEMS - len(self.problems)]
        self.found += len(problems) if found is None else found


def verify(
    path: str, split: Sequence[str] | None = None, workers: int = 1, on_progress: OnProgress | None = None
) -> VerifyReport:
    """Check everything in the splits at `path`.

    The check covers the index; presence, size, sha256 and tar structure of shards; their number of samples
    and their offsets. It also covers keys that occur twice, and whether every sample decodes.

    Args:
        path: see places.find_splits.
        split: names of the splits; None is all.
        workers: processes; each holds one sample, and one remote shard in the temporary folder.
        on_progress: called with a split, its samples done and its samples in all.

    Raises:
        UserError, DataError: there is nothing to check.
        Interrupted: a worker process ended by itself.
    """
    report, indices = VerifyReport(), {}
    for name, store in find_splits(path, split).items():
        index = _index(name, store, report)
        if index is not None and _is_known(name, index, report):
            indices[name] = index
            _verify_split(name, store, index, workers, report, on_progress or (lambda *_: None))
    first = next(iter(indices), None)
    for name, index in indices.items():
        if first is not None and (index.kind, index.classes) != (indices[first].kind, indices[first].classes):
            report.add(
                [
                    Problem(
                        f"{name}/{INDEX_NAME}",
                        "",
                        f"lists another kind or other classes than {first}/{INDEX_NAME}; pack both in one go",
                    )
                ]
            )
    return report


def _index(name: str, store: Store, report: VerifyReport) -> ShardIndex | None:
    """Return the index of a split.

    One with wrong sums is reported and used all the same, so that its shards are checked.
    """
    address = store.address(INDEX_NAME)
    try:
        index = read_index(store)
    except DataError as error:
        report.add([Problem(f"{name}/{INDEX_NAME}", "", reason_for(error, address))])
        try:
            index = parse_index(_summed_anew(store.read(INDEX_NAME)), address)
        except (DataError, KeyError, TypeError, ValueError):
            return None
    if not index.samples:
        report.add([Problem(f"{name}/{INDEX_NAME}", "", "lists no samples: the split is empty")])
    return index


def _is_known(name: str, index: ShardIndex, report: VerifyReport) -> bool:
    try:
        kind_of(index)
    except DataError as error:
        report.add([Problem(f"{name}/{INDEX_NAME}", "", error.reason)])
        report.samples += index.samples
        report.unusable += index.samples
        return False
    return True


def _summed_anew(text: bytes) -> bytes:
    content = json.loads(text)
    index = ShardIndex(content["kind"], tuple(ShardEntry(**shard) for shard in content["shards"]))
    return json.dumps(content | {"samples": index.samples, "hash": index.hash}).encode()


def _verify_split(
    name: str, store: Store, index: ShardIndex, workers: int, report: VerifyReport, on_progress: OnProgress
) -> None:
    firsts = index.first_indices()
    jobs = [
        VerifyJob(name, store, replace(index, shards=(entry,)), firsts[number])
        for number, entry in enumerate(index.shards)
    ]
    report.samples += index.samples
    report.shards += len(jobs)
    done, found = 0, []
    on_progress(name, 0, index.samples)
    with closing(run_jobs(verify_shard, jobs, workers)) as results:
        for findings in results:
            found.append(findings)
            done += findings.samples
            report.unusable += findings.unusable
            on_progress(name, done, index.samples)
    found.sort(key=lambda findings: findings.first)  # workers finish in any order
    for findings in found:
        report.add(findings.problems, findings.found)
    if index.keys_per_shard:
        _same_shards(name, index, report)
    else:
        _same_keys(name, store, found, report)


def _same_shards(name: str, index: ShardIndex, report: VerifyReport) -> None:
    first: dict[str, str] = {}
    for entry in index.shards:
        copied = first.setdefault(entry.sha256, entry.name)
        if copied != entry.name:
            report.add([Problem(f"{name}/{entry.name}", "", f"is a copy of {name}/{copied}; remove one")])


def _same_keys(name: str, store: Store, found: list[Findings], report: VerifyReport) -> None:
    """Report keys that occur in two shards: equal 64-bit hashes first, then the keys themselves."""
    hashes = np.concatenate([findings.keys for findings in found]) if found else np.zeros(0, np.uint64)
    values, counts = np.unique(hashes, return_counts=True)
    twice = values[counts > 1]
    if not len(twice):
        return
    seen: dict[str, str] = {}
    for findings in found:
        places = np.flatnonzero(np.isin(findings.keys, twice))
        if not len(places):
            continue
        with store.open(findings.shard) as file:
            keys = scan_shard(file, store.address(findings.shard)).keys
        for place in places:
            key = keys[place]
            if key in seen:
                report.add(
                    [
                        Problem(
                            f"{name}/{findings.shard}",
                            key,
                            f"the key is in {name}/{seen[key]} too; every sample needs a name of its own",
                        )
                    ]
                )
            seen.setdefault(key, findings.shard)
