"""What the tags of a run's curves are about: groups and units. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

HEATMAPS = "weights/mixing"
"""Begins the tags of the heat maps: TensorBoard sorts groups by name and opens two, train and val."""
MIXING_VALUES = "mixing_values/"
"""Begins the tags of the mixing matrices as tensors; the layer's name follows."""
READS_TEXT = ".cross_attn."
"""In the names of the mixing matrices between tokens and a text."""

ATTENTION = "val_attention/"
"""Begins the tags of callbacks.AttentionCurves, `val_attention/MEASURE/layer_N`: after train and val."""

GROUPS = ("Loss", "Quality", "Speed", "Memory", "Health", "Loss by noise level", "Attention")
_SPEED = ("samples_per_second", "tokens_per_second", "tokens_per_second_per_gpu", "mfu", "time_")
_HEALTH = ("lr", "grad_norm", "skipped", "skipped_steps", "consumed/")
_UNITS = {
    "top1": "share of samples",
    "top5": "share of samples",
    "accuracy": "share of tokens",
    "bits_per_byte": "bits per byte",
    "samples_per_second": "samples/s",
    "tokens_per_second": "tokens/s",
    "tokens_per_second_per_gpu": "tokens/s per GPU",
    "time_data": "seconds per step",
    "time_compute": "seconds per step",
    "mfu": "share of the GPU's peak",
    "memory_allocated_gib": "GiB",
    "memory_reserved_gib": "GiB",
    "skipped": "samples",
    "skipped_steps": "steps",
    "consumed": "samples",
    "lr": "learning rate",
    "grad_norm": "norm",
}
_ATTENTION_UNITS = {
    "rank": "rank",
    "effective_rank": "effective rank",
    "entropy": "nats",
    "relative_entropy": "share of uniform attention's",
    "locality": "0: as uniform, 1: own token",
    "own_block": "share of the attention",
}


LAYOUT: dict[str, dict[str, list[str]]] = {
    "Loss": {
        "training": [r"^train/loss$"],
        "validation (val_ema: averaged weights)": [r"^val(_\w+)?/loss$"],
    },
    "Quality": {
        "accuracy": [r"^val(_\w+)?/(top\d|accuracy)"],
        "bits per byte": [r"^val(_\w+)?/bits_per_byte$"],
        "loss by noise level, validation": [r"^loss_by_time/val"],
    },
    "Speed": {
        "samples a second": [r"^train/samples_per_second$"],
        "tokens a second": [r"^train/tokens_per_second"],
        "seconds a step: waiting for data, computing": [r"^train/time_"],
        "share of the GPU's peak (MFU)": [r"^train/mfu$"],
    },
    "Memory": {"GiB, peaks so far": [r"^train/memory_"]},
    "Health": {
        "gradient norm": [r"^train/grad_norm$"],
        "learning rate": [r"^train/lr$"],
        "samples and steps left out": [r"^train/skipped"],
        "samples of each source": [r"^train/consumed/"],
    },
    "Attention": {
        "effective rank": [r"^val_attention/effective_rank/"],
        "relative entropy": [r"^val_attention/relative_entropy/"],
        "locality": [r"^val_attention/locality/"],
        "share of the own block": [r"^val_attention/own_block/"],
    },
}
"""The first screen of TensorBoard: category -> title of a chart -> regular expressions of its tags."""


def layout(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Return LAYOUT for TensorBoard's writer, without charts that stay empty.

    A CPU has no memory of a GPU, for example, and a classifier no bits per byte.

    Args:
        tags: logged so far; before the first validation all charts of validation are kept.
    """
    known = list(tags)
    validated = any(tag.startswith("val/") for tag in known)

    def kept(expression: str) -> bool:
        waits = not validated and not expression.startswith(("^train/", "^val_attention/"))
        return waits or any(re.search(expression, tag) for tag in known)

    found = {
        category: {title: ["Multiline", one] for title, one in charts.items() if any(map(kept, one))}
        for category, charts in LAYOUT.items()
    }
    return {category: charts for category, charts in found.items() if charts}


def group_of(tag: str) -> str:
    """Return the one of GROUPS that a tag belongs to.

    >>> group_of("train/loss"), group_of("val_ema/top1"), group_of("train/memory_allocated_gib")
    ('Loss', 'Quality', 'Memory')
    """
    split, _, name = tag.partition("/")
    if split == "loss_by_time":
        return "Loss by noise level"
    if tag.startswith(ATTENTION):
        return "Attention"
    if split == "train" and name.startswith("memory"):
        return "Memory"
    if split == "train" and name.startswith(_SPEED):
        return "Speed"
    if split == "train" and name.startswith(_HEALTH):
        return "Health"
    return "Loss" if name.startswith("loss") else "Quality"


def unit_of(tag: str) -> str:
    """Return the unit of a tag's values; its last name where it has none."""
    split, _, name = tag.partition("/")
    if split == "loss_by_time":
        return "loss"
    if tag.startswith(ATTENTION):
        return _ATTENTION_UNITS.get(name.partition("/")[0], name)
    return _UNITS.get(name, _UNITS.get(name.partition("/")[0], name))


def matrix_titles(names: Iterable[str], first: int = 0) -> list[str]:
    """Return titles of mixing matrices.

    They are `layer 3`, or `text, layer 3` of the attention to a text.

    Args:
        names: of their layers, in the order of the layers.
        first: number of the first layer of either kind.
    """
    titles, numbers = [], {False: first, True: first}
    for name in names:
        text = READS_TEXT in name
        titles.append(f"{'text, ' if text else ''}layer {numbers[text]}")
        numbers[text] += 1
    return titles
