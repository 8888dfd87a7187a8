"""A folder in the place of LongBench on the hub, in its format, with two rows a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mhla_lightning.evaluation.longbench import LONGBENCH_TASKS

SOURCE = "Xnhyacinth/LongBench"
CLASSES = ["a city", "a reason"]
LONG = "The bird looked at the mat. " * 40


def rows(name: str, answers: tuple[str, str] = ("the mat", "a bird")) -> list[dict[str, Any]]:
    """Two rows of a task: a short context, and one that is too long for a small model."""
    contexts = ("The cat sat on the mat.", LONG)
    return [
        {
            "context": context,
            "question": "Where did it sit?",
            "answers": [answer, "elsewhere"],
            "all_classes": CLASSES,
            "length": len(context),
            "dataset": name,
            "language": "en",
            "_id": f"{name}-{number}",
        }
        for number, (context, answer) in enumerate(zip(contexts, answers, strict=True))
    ]


def write_longbench(root: Path) -> Path:
    """Write ROOT/SOURCE; `datasets` takes it for the hub's in a process that starts in ROOT."""
    folder = root / SOURCE
    folder.mkdir(parents=True)
    lines = ["---", "configs:"]
    for task in LONGBENCH_TASKS:
        name = task.removeprefix("longbench_")
        answers = (CLASSES[0], CLASSES[1]) if name == "trec" else ("the mat", "a bird")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(name, answers)))
        lines += [f"- config_name: {name}", "  data_files:", "  - split: test", f"    path: {name}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder
