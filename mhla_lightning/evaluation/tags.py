"""Whether a metric is better high or low."""

from __future__ import annotations

from mhla_lightning.evaluation.registry import EVALUATIONS


def higher_is_better(tag: str) -> bool:
    """Return whether a high value of this TensorBoard tag is good.

    True for accuracies (top1, top5, accuracy) and for the numbers that an evaluation lists in `higher`.
    """
    name, _, number = tag.rpartition("/")
    return (
        number in EVALUATIONS[name].higher if name in EVALUATIONS else number.startswith(("top", "accuracy"))
    )
