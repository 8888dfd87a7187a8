"""Measure the quality of trained models; importing this package imports no torch."""

from mhla_lightning.evaluation.registry import (
    EVALUATIONS,
    Evaluation,
    RequestedEvaluation,
    register_evaluation,
    requested_evaluation,
    with_options,
)

__all__ = [
    "EVALUATIONS",
    "Evaluation",
    "RequestedEvaluation",
    "register_evaluation",
    "requested_evaluation",
    "with_options",
]
