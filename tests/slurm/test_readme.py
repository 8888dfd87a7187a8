"""The way of docs/slurm.md from laptop to cluster, line by line; and the same recipe under ZeRO."""

from __future__ import annotations

import json
import re

import pytest

from tests.slurm.cluster import REPOSITORY, Cluster, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2700)]
RECIPE = "classification/deit_tiny_mhla_mnist_cpu"


def guide_lines() -> list[str]:
    text = (REPOSITORY / "docs/slurm.md").read_text()
    block = re.search(r"## From laptop to cluster in six lines\n\n```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return block[1].splitlines()


def top1(cluster: Cluster, name: str) -> float:
    return float(json.loads(cluster.run(name).summary.read_text())["last"]["val/top1"])


def test_six_lines(cluster: Cluster) -> None:
    lines = guide_lines()
    assert len(lines) == 6
    said = [cluster.call("bash", "-c", line).stdout for line in lines]
    assert "50 steps" in said[0]
    assert said[1].startswith("#!/bin/bash")
    assert re.match(r"job \d+: run digits, 2 nodes x 1 process", said[2])
    assert "COMPLETED" in said[3]
    assert "COMPLETED" in said[4]
    assert "600/600" in said[4]
    shown = re.search(r"val/top1 *│ *([\d.]+)", said[5])
    assert shown is not None, said[5]
    assert float(shown[1]) == pytest.approx(top1(cluster, "digits"), abs=1e-3)
    assert top1(cluster, "digits") > 0.93, "what the recipe promises on one machine"


def test_zero2(cluster: Cluster) -> None:
    """DeepSpeed starts by srun alone, too, and learns what DDP learns."""
    job = cluster.submit(
        "zero2", "--nodes", "2", "--time", "60", "--trainer.strategy", "zero2", recipe=RECIPE
    )
    wait_for(
        "its end",
        lambda: cluster.squeue(job) in ("COMPLETED", "FAILED"),
        900,
        told=lambda: cluster.logs("zero2"),
    )
    assert cluster.status("zero2")["state"] == "COMPLETED", cluster.logs("zero2")
    assert top1(cluster, "zero2") > 0.93
