"""The model card of an exported folder: recipe, data, numbers, licence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UNNAMED = "not named; its owner writes it here"


@dataclass(frozen=True)
class Record:
    """What a model card tells of the training.

    Attributes:
        recipe: its name; None means no recipe trained the model.
        data: the data module and the name of its data.
        numbers: tag -> value at the end of training.
        command: that trains the model and measures the numbers.
        licence: of the weights, by Hugging Face's short name such as `apache-2.0`; None leaves it open.
    """

    recipe: str | None = None
    data: str | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    command: str | None = None
    licence: str | None = None


def model_card(
    name: str,
    record: Record,
    facts: Mapping[str, Any],
    header: Mapping[str, Any],
    usage: str,
    notes: str = "",
) -> bytes:
    """Return README.md of a folder.

    Args:
        name: of the backbone.
        record: of the training.
        facts: further rows of the table, as Markdown.
        header: of the card's metadata: library_name, pipeline_tag, tags.
        usage: Python code that opens the folder.
        notes: Markdown at the end.
    """
    rows = {
        **facts,
        "Recipe": UNNAMED if record.recipe is None else f"`{record.recipe}`",
        "Data": record.data or UNNAMED,
        "Licence of the weights": record.licence or UNNAMED,
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    licence = {} if record.licence is None else {"license": record.licence}
    metadata = "\n".join(f"{key}: {json.dumps(value)}" for key, value in {**header, **licence}.items())
    return f"""---
{metadata}
---

# {name}

A model with Multi-Head Linear Attention (arXiv 2601.07832), trained and exported by mhla-lightning.

| | |
|---|---|
{table}

{_numbers(record)}
```python
{usage}
```
{notes}""".encode()


def _cell(value: object) -> str:
    """Return a value as one cell of a Markdown table."""
    return str(value).replace("\n", " ").replace("|", "\\|")


def _numbers(record: Record) -> str:
    """Return the section of numbers; empty where none is known."""
    if not record.numbers:
        return ""
    rows = "\n".join(f"| {_cell(tag)} | {value:.6g} |" for tag, value in sorted(record.numbers.items()))
    command = "" if record.command is None else f"\n```\n{record.command}\n```\n"
    return f"At the end of training:\n\n| Metric | Value |\n|---|---|\n{rows}\n{command}"
