"""The HTML page: tables are written here, curves and sliders are drawn by page.js."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from mhla_lightning.compare.comparison import COSTS
from mhla_lightning.compare.significance import PairedDifference
from mhla_lightning.evaluation.tags import higher_is_better
from mhla_lightning.report import data
from mhla_lightning.report.comparison import ComparisonReport, Interval, RowReport
from mhla_lightning.report.run import RunReport

_HERE = Path(__file__).parent
_DASH = '<span class="none">–</span>'
_COMPARED = ("What was trained", "Data and order", "Environment")  # tables that mark what differs
_TITLE = 4  # names of runs that a title holds
_COLOURS = 8  # in page.css; series after these begin again, with a dotted line


class Page:
    """A page in the making.

    Args:
        title: of the page.
        names: of the series that the page can show and hide.
    """

    def __init__(self, title: str, names: Sequence[str]) -> None:
        self.title, self.names = title, list(names)
        self.lead = ""
        self.sections: list[tuple[str, str, str]] = []  # id, heading, HTML
        self.notes: list[str] = []
        self.data: dict[str, Any] = {"series": self.names}

    def note(self, sentence: str) -> None:
        """Keep a sentence about what was left out, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def section(self, key: str, heading: str, html: str) -> None:
        """Add a section; one without content is left out."""
        if html:
            self.sections.append((key, heading, html))

    def html(self, version: str) -> str:
        """Return the whole page."""
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        self.section("notes", "Notes", f"<ul>{notes}</ul>" if notes else "")
        style, script = (_HERE / "page.css").read_text("utf-8"), (_HERE / "page.js").read_text("utf-8")
        links = "".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _ in self.sections)
        body = "".join(
            f'<section id="{key}"><h2>{escape(heading)}</h2>{html}</section>'
            for key, heading, html in self.sections
        )
        # Nothing but this very script runs, and nothing is fetched, whatever a run folder holds.
        policy = (
            f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
            f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
        )
        made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>{escape(self.title)}</title><style>{style}</style></head>\n<body>"
            f"<header><h1>{escape(self.title)}</h1>{self._lead()}"
            f'<p class="made">mhla report {escape(version)}, {made}</p>'
            f"<nav>{links}</nav></header>{self._controls()}\n<main>{body}</main>"
            '<noscript><p class="made">Curves and sliders need JavaScript; tables do not.</p></noscript>'
            f'<script type="application/json" id="data">{data.script_json(self.data)}</script>'
            f"<script>{script}</script></body></html>\n"
        )

    def _lead(self) -> str:
        return f'<p class="lead">{escape(self.lead)}</p>' if self.lead else ""

    def _controls(self) -> str:
        boxes = "".join(
            f'<label class="chip"><input type="checkbox" checked data-toggle="{number}">{swatch(number)}'
            f"<span>{escape(name)}</span></label>"
            for number, name in enumerate(self.names)
        )
        return (
            f'<div class="controls"><div class="chips" role="group" aria-label="Runs">{boxes}</div>'
            '<div class="tools"><output id="shown"></output>'
            '<label>vertical axis <select id="scale"><option value="linear">linear</option>'
            '<option value="log">logarithmic</option></select></label>'
            '<label>smoothing <input type="range" id="smooth" min="0" max="0.95" step="0.05" value="0">'
            '<output id="smoothed">off</output></label></div></div>'
        )


def run_page(runs: Sequence[RunReport], names: Sequence[str]) -> Page:
    """Return the page of some runs, side by side.

    Args:
        runs: at least one.
        names: shown of each, all different.
    """
    page = Page(", ".join(names) if len(names) <= _TITLE else f"{len(names)} runs", names)
    trained = runs[0].facts["What was trained"] if len(runs) == 1 else {}
    lead = (trained.get(key) for key in ("task", "backbone", "attention", "steps", "state"))
    page.lead = " · ".join(value for value in lead if value)
    for name, run in zip(names, runs, strict=True):
        for note in run.notes:
            page.note(f"{name}: {note}")
    page.section("numbers", "Final numbers", _numbers(runs, names))
    _draw(
        page,
        [
            (number, name, run.curves, False)
            for number, (name, run) in enumerate(zip(names, runs, strict=True))
        ],
        list(enumerate(runs)),
    )
    _facts(page, runs, names)
    return page


def comparison_page(found: ComparisonReport) -> Page:
    """Return the page of a comparison: its table and a plot for each metric come first."""
    page = Page(found.recipe or found.name, [row.name for row in found.rows])
    page.lead = f"Comparison of {len(found.rows)} rows"
    for note in found.notes:
        page.note(note)
    for row in found.rows:
        for run in row.runs:
            for note in run.notes:
                page.note(f"{run.name}: {note}")
    tags = list(dict.fromkeys(tag for row in found.rows for tag in row.scores))
    page.data["intervals"] = data.intervals(found.rows, tags)
    page.section(
        "comparison",
        "Comparison",
        _scores_table(found.rows, tags)
        + _differences_table(found, tags)
        + '<div id="intervals" class="grid"></div>'
        + _costs_table(found.rows)
        + "".join(f'<p class="hint">{escape(remark)}</p>' for remark in found.remarks),
    )
    curves = [one for number, row in enumerate(found.rows) for one in data.row_curves(number, row)]
    first = [(number, row.runs[0]) for number, row in enumerate(found.rows) if row.runs]
    _draw(page, curves, first)
    names = [row.name for row in found.rows if row.runs]
    _facts(page, [run for _, run in first], names, [number for number, _ in first])
    return page


def _draw(page: Page, curves: Sequence[Any], runs: Sequence[tuple[int, RunReport]]) -> None:
    """Add the sections that page.js fills."""
    page.data["charts"] = data.charts(curves)
    page.data["matrices"] = data.matrices(runs, page.note)
    page.data["pictures"] = data.pictures(runs, page.note)
    page.section("curves", "Curves", '<div id="charts"></div>' if page.data["charts"] else "")
    page.section("mixing", "Mixing matrices", '<div id="matrices"></div>' if page.data["matrices"] else "")
    page.section("pictures", "Samples", '<div id="frames"></div>' if page.data["pictures"] else "")


def _facts(
    page: Page, runs: Sequence[RunReport], names: Sequence[str], numbers: Sequence[int] | None = None
) -> None:
    """Add the tables of facts, and the recipes."""
    numbers = list(range(len(runs))) if numbers is None else numbers
    for section in dict.fromkeys(section for run in runs for section in run.facts):
        facts = [run.facts.get(section, {}) for run in runs]
        rows = []
        for label in dict.fromkeys(label for found in facts for label in found):
            values = [found.get(label) for found in facts]
            differ = ' class="differs"' if section in _COMPARED and len(set(values)) > 1 else ""
            cells = "".join(f"<td>{_DASH if value is None else escape(value)}</td>" for value in values)
            rows.append(f'<tr{differ}><th scope="row">{escape(label)}</th>{cells}</tr>')
        if rows:
            key = section.lower().replace(" ", "-")
            marked = any("differs" in row for row in rows)
            hint = '<p class="hint">Coloured rows differ between the runs.</p>' if marked else ""
            page.section(key, section, table(_heads("", names, numbers), rows, "facts") + hint)
    recipes = "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(run.recipe)}</pre></details>"
        for name, run in zip(names, runs, strict=True)
        if run.recipe
    )
    page.section("recipe", "Recipe", recipes)


def _numbers(runs: Sequence[RunReport], names: Sequence[str]) -> str:
    """Return the table of validation: the last value, in brackets the best if it is another."""
    tags = sorted(
        dict.fromkeys(tag for run in runs for tag in run.numbers),
        key=lambda tag: (tag.partition("/")[0], tag),
    )
    rows = []
    comparable = len({run.facts["What was trained"].get("task") for run in runs}) == 1
    for tag in tags:
        found = [run.numbers.get(tag) for run in runs]
        best = _best(tag, [one[0] if one else None for one in found]) if comparable else set()
        cells = "".join(_cell(_last_and_best(one), number in best) for number, one in enumerate(found))
        rows.append(f'<tr><th scope="row">{escape(tag)}{_arrow(tag)}</th>{cells}</tr>')
    if not rows:
        return '<p class="hint">No validation has run yet.</p>'
    hint = (
        "The last value of each metric; in brackets the best of the run, where it is another. "
        "↑ high is good, ↓ low is good."
    )
    return table(_heads("metric", names, range(len(runs))), rows, "numbers") + f'<p class="hint">{hint}</p>'


def _cell(html: str, best: bool) -> str:
    return f'<td class="number{" best" if best else ""}">{html}</td>'


def _last_and_best(one: tuple[float, float] | None) -> str:
    if one is None:
        return _DASH
    last, best = (_number(value) for value in one)
    return last if last == best else f"{last} <small>({best})</small>"


def _scores_table(rows: Sequence[RowReport], tags: Sequence[str]) -> str:
    best = {
        tag: _best(tag, [row.scores[tag].mean if tag in row.scores else None for row in rows]) for tag in tags
    }
    cells = [
        [_cell(_interval(row.scores.get(tag)), number in best[tag]) for tag in tags]
        for number, row in enumerate(rows)
    ]
    counts = {len(one.values) for row in rows for one in row.scores.values()}
    one_seed = (
        "there is no interval, so small differences may be chance. Train with --seeds 0,1,2 to see one."
    )
    if counts <= {1}:
        hint = f"One seed for each row: {one_seed}"
    else:
        hint = (
            "Mean over n seeds ± half of its 95 % confidence interval (Student's t). Where intervals "
            "overlap, the seeds do not settle which row is better."
        )
        if 1 in counts:
            hint += f" With n = 1 {one_seed}"
    heads = [f"{escape(tag)}{_arrow(tag)}" for tag in tags]
    return (
        _rows_table(rows, heads, cells) + f'<p class="hint">{escape(hint)} ↑ high is good, ↓ low is good.</p>'
    )


def _differences_table(found: ComparisonReport, tags: Sequence[str]) -> str:
    """Return the paired tests that `mhla compare` prints, for every metric; empty without any."""
    tests = {(one.row, one.tag): one for one in found.differences}
    shown = [tag for tag in tags if any(one.tag == tag for one in found.differences)]
    if not shown:
        return ""
    cells = []
    for row in found.rows:
        line = [tests.get((row.name, tag)) for tag in shown]
        cells.append([_cell(_DASH if one is None else _difference(one), False) for one in line])
    heads = [f"{escape(tag)}{_arrow(tag)}" for tag in shown]
    hint = (
        f"Difference from {found.differences[0].against}, over n seeds that both rows have. ±: half of its "
        "95 % confidence interval; p: of the paired t test, not corrected for the number of rows."
    )
    return f"<h3>Paired differences</h3>{_rows_table(found.rows, heads, cells)}" + (
        f'<p class="hint">{escape(hint)}</p>'
    )


def _difference(one: PairedDifference) -> str:
    return f"{one.mean:+.4f} <small>±{one.half:.4f}, n = {one.seeds}, p = {one.p:.2g}</small>"


def _costs_table(rows: Sequence[RowReport]) -> str:
    heads = [escape(COSTS[key][0].replace("\n/", "/").replace("/\n", "/")) for key in COSTS]
    cells = [[_cell(escape(row.costs[key]), False) for key in COSTS] for row in rows]
    if any(row.attention for row in rows):
        heads.append("attention")
        for row, line in zip(rows, cells, strict=True):
            line.append(f"<td>{escape(row.attention)}</td>")
    return _rows_table(rows, heads, cells)


def _rows_table(rows: Sequence[RowReport], heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a table with a line for each row of a comparison; page.js dims hidden rows."""
    head = "".join(f'<th scope="col" class="number">{text}</th>' for text in heads)
    lines = []
    for number, (row, line) in enumerate(zip(rows, cells, strict=True)):
        name = f'<th scope="row">{swatch(number)}{escape(row.name)}</th>'
        lines.append(f'<tr data-series="{number}">{name}{"".join(line)}</tr>')
    return table(f"<tr><th>row</th>{head}</tr>", lines, "numbers")


def _interval(one: Interval | None) -> str:
    if one is None:
        return _DASH
    mean, sign, half = one.text().partition(" ±")
    return f"{mean} <small>{f'±{half}, ' if sign else ''}n = {len(one.values)}</small>"


def _best(tag: str, values: Sequence[float | None]) -> set[int]:
    """Return the columns with the best value; empty where there is nothing to compare with."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return set()
    best = (max if higher_is_better(tag) else min)(known)
    return {number for number, value in enumerate(values) if value == best}


def _arrow(tag: str) -> str:
    return f' <span class="arrow">{"↑" if higher_is_better(tag) else "↓"}</span>'


def _heads(first: str, names: Sequence[str], numbers: Sequence[int]) -> str:
    cells = "".join(
        f'<th scope="col">{swatch(number)}{escape(name)}</th>'
        for number, name in zip(numbers, names, strict=True)
    )
    return f"<tr><th>{escape(first)}</th>{cells}</tr>"


def table(head: str, rows: Sequence[str], kind: str) -> str:
    """Return a table that scrolls by itself where it is wider than the page."""
    body = f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{body}</table></div>'


def swatch(number: int) -> str:
    """Return the sign of a series: its colour, which page.css knows by its number."""
    dotted = " again" if number >= _COLOURS else ""
    return f'<i class="swatch s{number % _COLOURS}{dotted}"></i>'


def _number(value: float) -> str:
    return f"{value:,.{_decimals(value)}f}" if 1e-4 <= abs(value) < 1e9 or value == 0 else f"{value:.3e}"


def _decimals(value: float) -> int:
    return 4 if abs(value) < 10 else 3 if abs(value) < 100 else 2 if abs(value) < 10_000 else 0


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
