"""The notebooks of examples/ as pages: their cells, and the outputs that `make notebooks` recorded."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.scripts.pages import ROOT

SOURCES = ROOT / "examples" / "notebooks"
RECORDS = ROOT / "docs" / "notebooks"
_MATH = re.compile(r"(`+)(?s:.+?)\1|\$\$(?P<block>(?s:.+?))\$\$|\$(?P<inline>[^$\n]+)\$")


def cells(notebook: Path) -> list[dict[str, Any]]:
    """Return the cells of a notebook file, each with its `source` as one text."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in found]


def digest(source: str) -> str:
    """Return what identifies the code of a cell in the record of its outputs."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def record(notebook: Path) -> list[dict[str, Any]]:
    """Return the recorded outputs of the code cells of a notebook.

    Each has `code`, the digest of its cell; `text`; and `pictures`, names of files beside the record.

    Raises:
        ValueError: the code has changed since.
    """
    file = RECORDS / f"{notebook.stem}.json"
    found = json.loads(file.read_text(encoding="utf-8"))["cells"] if file.is_file() else []
    code = [digest(cell["source"]) for cell in cells(notebook) if cell["cell_type"] == "code"]
    if code != [one["code"] for one in found]:
        raise ValueError(f"{file} holds the outputs of other code than {notebook}; run `make notebooks`")
    return found


def page(notebook: Path) -> str:
    """Return a notebook in Markdown, with its recorded outputs."""
    source = notebook.relative_to(ROOT).as_posix()
    outputs = iter(record(notebook))
    parts = []
    for cell in cells(notebook):
        if cell["cell_type"] == "markdown":
            parts.append(with_mathml(cell["source"]))
        else:
            parts.append(f"```python\n{cell['source']}\n```")
            parts += _shown(next(outputs))
    return "\n\n".join([*parts, f"The notebook: `{source}`. Its outputs here are of one run on a CPU.\n"])


def _shown(output: dict[str, Any]) -> Iterator[str]:
    if output["text"] or output["pictures"]:
        text = f"<pre>{html.escape(output['text'])}</pre>\n" if output["text"] else ""
        pictures = "".join(f'<img src="{name}" alt="What the cell draws">\n' for name in output["pictures"])
        yield f'<div class="cell-output">\n{text}{pictures}</div>'


def with_mathml(text: str) -> str:
    """Return Markdown whose formulas between dollars are MathML, which browsers show without a script."""
    from latex2mathml.converter import convert

    def formula(match: re.Match[str]) -> str:
        if match["block"] is not None:
            return f'<div class="formula">{convert(match["block"].strip(), display="block")}</div>'
        # In a span, because Markdown takes a line that begins with <math> for a block.
        return match[0] if match["inline"] is None else f"<span>{convert(match['inline'])}</span>"

    return _MATH.sub(formula, text)
