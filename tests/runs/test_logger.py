"""metrics.jsonl after a kill."""

from __future__ import annotations

import json
from pathlib import Path

from mhla_lightning.runs.logger import keep_until


def test_later_and_cut_lines_are_dropped(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    keep_until(metrics, 3)
    assert not metrics.exists()
    lines = [json.dumps({"step": step, "tag": "loss", "value": 0.5}) for step in (1, 3, 4)]
    metrics.write_text("\n".join(lines) + '\n{"step": 2, "ta')
    keep_until(metrics, 3)
    assert metrics.read_text().splitlines() == lines[:2]
