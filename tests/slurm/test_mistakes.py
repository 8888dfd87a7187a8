"""Mistakes that SLURM, the disk or the site refuses: nothing is queued, and no run folder stays."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm
SITE = {"gpus_per_node": 0, "cpus_per_task": 1, "time": "10"}

MISTAKES: list[tuple[str, dict[str, object], list[str], list[str]]] = [
    ("wrong partition", {**SITE, "partition": "nope"}, [], ["partition nope"]),
    ("too many nodes", SITE, ["--nodes", "9"], ["nodes 9"]),
    ("too many CPUs", {**SITE, "cpus_per_task": 99}, [], ["cpus-per-task 99"]),
    ("over-long time", SITE, ["--time", "5-00:00:00"], ["time 5-00:00:00"]),
    ("no such feature", {**SITE, "constraint": "bigmem"}, [], ["constraint bigmem"]),
    ("time that is none", SITE, ["--time", "soon"], ["error: --time: "]),
    ("missing key", {"cpus_per_task": 1, "time": "10"}, [], ["error: --profile.gpus_per_node: "]),
    (
        "missing image",
        {**SITE, "container": {"kind": "apptainer", "image": "/no/such.sif"}},
        [],
        ["error: --profile.container.image: ", "/no/such.sif"],
    ),
    ("missing venv", {**SITE, "venv": "/no/env"}, [], ["error: --profile.venv: ", "/no/env/bin/activate"]),
    ("unknown run to wait for", SITE, ["--after", "nothing"], ["error: --after: "]),
]


@pytest.mark.parametrize(
    ("profile", "words", "told"),
    [case[1:] for case in MISTAKES],
    ids=[case[0] for case in MISTAKES],
)
def test_one_line_and_nothing_queued(
    profile: dict[str, object], words: list[str], told: list[str], cluster: Cluster
) -> None:
    (cluster.work / "bad.yaml").write_text(json.dumps(profile))
    done = cluster.mhla(
        "submit", "tiny.yaml", "--profile", "bad.yaml", "--run-id", "bad", "--no-check", *words, check=False
    )
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert all(text in done.stderr for text in told), done.stderr
    assert nothing_of(cluster, "bad")


def nothing_of(cluster: Cluster, name: str) -> bool:
    return (
        name not in cluster.call("squeue", "-h", "-t", "all", "-o", "%j").stdout.split()
        and not cluster.run(name).path.exists()
    )


def test_a_bad_recipe_is_refused_before_queueing(cluster: Cluster) -> None:
    """The checks that --no-check skips: names, and a batch that nodes x processes do not divide."""
    for words, told in (
        (["--model.atention", "mhla"], "error: --model.atention: "),
        (["--nodes", "2", "--data.batch_size", "15"], "15"),
    ):
        done = cluster.mhla(
            "submit", "tiny.yaml", "--profile", "site.yaml", "--run-id", "bad", *words, check=False
        )
        assert (done.returncode, told in done.stderr, len(done.stderr.splitlines())) == (2, True, 1), (
            done.stderr
        )
        assert nothing_of(cluster, "bad")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of half a megabyte, less than the copy of the code."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"this container may not mount a disk to fill: {mounted.stderr}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_full_disk(full_disk: Path, cluster: Cluster) -> None:
    done = cluster.mhla(
        "submit",
        "tiny.yaml",
        "--profile",
        "site.yaml",
        "--run-id",
        "bad",
        "--no-check",
        "--runs",
        str(full_disk),
        check=False,
    )
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "--runs" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(full_disk.iterdir())
    assert nothing_of(cluster, "bad")


def test_without_slurm(cluster: Cluster, tmp_path: Path) -> None:
    """On a laptop submit is refused, and --dry-run works."""
    (tmp_path / "python3").symlink_to("/usr/bin/env")
    bare = {"PATH": str(tmp_path)}
    submit = ["submit", "tiny.yaml", "--profile", "site.yaml", "--run-id", "bad", "--no-check"]
    done = cluster.mhla(*submit, check=False, env=bare)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("error: sbatch: ")
    assert nothing_of(cluster, "bad")
    assert cluster.mhla(*submit, "--dry-run", env=bare).stdout.startswith("#!/bin/bash\n")
    assert os.listdir(tmp_path) == ["python3"]
