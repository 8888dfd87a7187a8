"""Which way a metric is better."""

from __future__ import annotations

from mhla_lightning.evaluation import EVALUATIONS


def higher_is_better(tag: str) -> bool:
    """Accuracies (top1, top5, accuracy) are best high, and what an evaluation says of its own numbers;
    everything else low.
    """
    name, _, number = tag.rpartition("/")
    return (
        number in EVALUATIONS[name].higher if name in EVALUATIONS else number.startswith(("top", "accuracy"))
    )
