"""LongBench (arXiv 2308.14508) in lm-evaluation-harness: tasks, long prompts, average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhla_lightning.errors import missing_extra

LONGBENCH = "longbench"
LONGBENCH_TASKS = tuple(
    f"longbench_{name}"
    for name in (
        "narrativeqa",
        "qasper",
        "multifieldqa_en",
        "hotpotqa",
        "2wikimqa",
        "musique",
        "gov_report",
        "qmsum",
        "multi_news",
        "trec",
        "triviaqa",
        "samsum",
        "lcc",
        "repobench-p",
    )
)
"""The 14 English tasks of Gated DeltaNet's table (arXiv 2412.06464); the paper averages 14 too (SPEC 5.2)."""

MISSING_PACKAGES = missing_extra("rouge", "longbench", "LongBench")
"""The reason where the scorers' packages (jieba, fuzzywuzzy, rouge) are not installed."""

AVERAGE = "average_percent"


def cuts_the_middle(task: str | None) -> bool:
    """Return whether a task's long prompts lose their middle; all others lose their beginning.

    LongBench's prompts have the instruction in front and the question at the end.

    Args:
        task: its name in the harness; None for a request of no task.
    """
    return task is not None and task.startswith(f"{LONGBENCH}_")


def average_row(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the row of the average over LONGBENCH_TASKS; none where a task is missing.

    Args:
        table: task -> its metrics, with `score` between 0 and 1, and `samples`.

    Returns:
        {LONGBENCH: {AVERAGE: mean of the tasks' scores in percent, `samples`: their sum}}, or {}.
    """
    if not all("score" in table.get(name, {}) for name in LONGBENCH_TASKS):
        return {}
    rows = [table[name] for name in LONGBENCH_TASKS]
    mean = sum(row["score"] for row in rows) / len(rows)
    return {LONGBENCH: {AVERAGE: 100 * mean, "samples": sum(row.get("samples", 0) for row in rows)}}
