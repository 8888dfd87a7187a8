"""The page about all studies: Markdown, written from their folders alone. Imports no torch."""

from __future__ import annotations

import html
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mhla_lightning.compare.comparison import score, values_by_seed
from mhla_lightning.compare.student import half_width
from mhla_lightning.evidence.claims import Claim, ClaimVerdict
from mhla_lightning.evidence.plots import plot_png
from mhla_lightning.evidence.results import StudyResult
from mhla_lightning.runs.folder import replacing, write_text

_LONGEST = 400  # characters of a text out of a folder
_RULE = """\
A rule gives each verdict, from the 95 % interval (Student's t) over seeds, paired seed by seed:

- **shown**: the whole interval is beyond the claimed difference, in the claimed direction.
- **contradicted**: the whole interval is on the other side.
- **not shown**: everything else; too few seeds or too small a difference.
- **not run**: no number yet.

Where the paper proves a bound, no interval decides: each seed must keep it.

The intervals are not corrected for the number of claims: of 20 true ties one may show a difference.
"""


def write_page(file: Path, results: Sequence[StudyResult]) -> list[Path]:
    """Write the page, and its pictures in a folder beside it that has its name.

    Args:
        file: of the page.
        results: in their order on the page.

    Returns:
        all files that were written.
    """
    pictures = file.parent / file.stem
    pictures.mkdir(parents=True, exist_ok=True)
    written = {}
    for result in results:
        study = result.work.study
        for number, plot in enumerate(study.plots):
            target = pictures / f"{study.name}-{number + 1}.png"
            content = plot_png(plot, result.rows, study.metrics)
            if content is None:
                target.unlink(missing_ok=True)  # of an earlier page
                continue
            with replacing(target) as temporary:
                temporary.write_bytes(content)
            written[study.name, number] = target
    links = {key: f"{file.stem}/{path.name}" for key, path in written.items()}
    write_text(file, "\n".join(_lines(results, links)) + "\n")
    return [file, *written.values()]


def _lines(results: Sequence[StudyResult], pictures: Mapping[tuple[str, int], str]) -> Iterator[str]:
    yield "# Evidence\n"
    yield "The paper's claims at the scale of a small machine: small models, few steps, small data."
    yield "Nothing here says what holds at the paper's scale."
    yield "`mhla reproduce` trains, measures and writes this page; no number is written by hand.\n"
    yield from _state(results)
    yield "## Claims\n"
    answers = Counter(verdict.answer for result in results for _, verdict in result.verdicts)
    yield f"{', '.join(f'{count} {answer}' for answer, count in answers.most_common())}.\n"
    yield from claims_table(results)
    yield f"\n{_RULE}"
    yield "## Machine and commands\n"
    yield from _machines(results)
    for result in results:
        yield from _study(result, pictures)


def _state(results: Sequence[StudyResult]) -> Iterator[str]:
    """Say what has run and what has not."""
    complete = [one for one in results if one.complete]
    if len(complete) == len(results):
        yield f"Complete: {', '.join(_safe(one.work.study.title) for one in results)}.\n"
        return
    yield f"**This page is not complete: {len(complete)} of {len(results)} studies are.**\n"
    for one in results:
        if not one.complete:
            yield f"- {_safe(one.work.study.title)}: {one.done} of {one.units} runs are finished."
    yield ""


def claims_table(results: Sequence[StudyResult]) -> Iterator[str]:
    """Yield the lines of the table of all claims."""
    yield "| study | claim | the paper | here | verdict |"
    yield "|---|---|---|---|---|"
    for result in results:
        for claim, verdict in result.verdicts:
            cells = (result.work.study.title, claim.says, claim.paper)
            here = number_of(claim, verdict, result.work.study.metrics)
            yield f"| {' | '.join(map(_safe, cells))} | {_safe(here)} | **{verdict.answer}** |"


def number_of(claim: Claim, verdict: ClaimVerdict, titles: Mapping[str, str]) -> str:
    """Return the quantity that decides a claim: mean, interval and number of seeds."""
    title = titles.get(claim.metric, claim.metric)
    what = f"{title}: {claim.row}"
    if claim.than is not None:
        what = f"{title}: {claim.row} minus {claim.than}"
    if claim.base is not None:
        base = titles.get(claim.base.metric, claim.base.metric)
        what += f"; less {base}: {claim.base.row} minus {claim.base.than}"
    if verdict.mean is None:
        return what
    number = score(verdict.mean, verdict.half).replace("±", "± ")
    sign = "+" if verdict.mean > 0 and claim.than is not None else ""
    if claim.always:
        return f"{what} is {'at least' if claim.sign > 0 else 'at most'} {number} (n = {verdict.seeds})"
    interval = "" if verdict.half is not None else ", no interval"
    return f"{what} = {sign}{number}{interval} (n = {verdict.seeds})"


def _machines(results: Sequence[StudyResult]) -> Iterator[str]:
    every = [one for result in results for one in result.sessions]
    if not every:
        yield "Nothing has run yet.\n"
        return
    for line in dict.fromkeys(_machine(one) for one in every):
        yield f"- {line}"
    days = sorted({_text(one.get("ended"))[:10] for one in every})
    yield f"- Date: {days[0] if len(days) == 1 else f'{days[0]} to {days[-1]}'}."
    minutes = sum(_number(one.get("seconds")) for one in every) / 60
    jobs = sorted({int(_number(one.get("jobs"))) for one in every})
    yield f"- Total: {minutes:.1f} minutes, {' or '.join(map(str, jobs))} processes at once."
    load = max(_number(one.get("load")) for one in every)
    yield f"- Largest load of the machine at a start: {load:.1f} processes."
    yield "- The whole again: `mhla reproduce`. One study: the command in its section.\n"


def _machine(one: Mapping[str, Any]) -> str:
    commit = _text(one.get("commit"))[:12]
    changed = " with local changes" if one.get("changed") is True else ""
    code = f"commit {commit}{changed}" if commit else f"mhla-lightning {_text(one.get('version'))}"
    cores = int(_number(one.get("cores")))
    versions = f"torch {_text(one.get('torch'))}, Python {_text(one.get('python'))}"
    return f"{_text(one.get('cpu'))}, {cores} cores; {versions}; {code}."


def _study(result: StudyResult, pictures: Mapping[tuple[str, int], str]) -> Iterator[str]:
    work, study = result.work, result.work.study
    yield f"## {_safe(study.title)}\n"
    yield f"{_safe(study.about)}\n"
    for reason in work.missing:
        yield f"The data that this study prefers was missing: {_safe(reason)}.\n"
    if work.source is not None:
        yield f"Data: `{work.source.name}`.\n"
    yield from results_table(result)
    yield ""
    for number, _ in enumerate(study.plots):
        if (study.name, number) in pictures:
            yield f"![{_safe(study.title)}]({pictures[study.name, number]})\n"
    for line in result.remarks:
        yield f"- Note: {_safe(line)}."
    absent = [claim.metric for claim, verdict in result.verdicts if verdict.answer == "not run"]
    for metric in dict.fromkeys(absent) if result.complete else ():
        yield f"- Note: all runs are finished, and none has the number {_safe(metric)}."
    if result.remarks or (absent and result.complete):
        yield ""
    seeds = ",".join(map(str, study.seeds))
    minutes = sum(_number(one.get("seconds")) for one in result.sessions) / 60
    yield f"Command: `mhla reproduce {study.name} --seeds {seeds}`, {result.done} of {result.units} runs."
    yield f"It took {minutes:.1f} minutes; {study.minutes:g} are modelled on two quiet cores.\n"


def results_table(result: StudyResult) -> Iterator[str]:
    """Yield the lines of a study's table: means with 95 % intervals, and the paper's numbers."""
    titles, paper = result.work.study.metrics, result.work.study.paper
    headings = [*titles.values(), *(["the paper"] if paper else [])]
    yield f"| row | n | {' | '.join(map(_safe, headings))} |"
    yield f"|---|---|{'---|' * len(headings)}"
    for row in result.rows:
        found = [list(values_by_seed(row, tag).values()) for tag in titles]
        counts = [len(values) for values in found if values] or [0]  # some numbers are of other rows alone
        count = str(max(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        cells = [*map(_mean, found), *([_safe(paper.get(row["name"], "-"))] if paper else [])]
        yield f"| {_safe(row['name'])} | {count} | {' | '.join(cells)} |"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return score(statistics.fmean(values), half_width(values)).replace("±", "± ")


def _safe(text: str) -> str:
    """Return a text of a study as a part of a line: no HTML, no link, no cell of its own."""
    line = html.escape(" ".join(text.split()), quote=False)
    return line.replace("|", "&#124;").replace("](", "] (")


def _text(value: object) -> str:
    """Return a text of a folder, which may be a stranger's, without any markup."""
    return re.sub(r"([*_\[\]`\\])", r"\\\1", _safe(value[:_LONGEST])) if isinstance(value, str) else "unknown"


def _number(value: object) -> float:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12
    return float(value) if whole else 0.0  # type: ignore[arg-type]
