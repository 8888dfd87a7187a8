"""A study: a YAML file of what is trained or measured for some claims.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhla_lightning.compare.variants import VariantRow, read_rows, rows_from_file
from mhla_lightning.config.recipes import RECIPES, STUDIES, load_recipe, read_yaml, variants_file
from mhla_lightning.errors import UserError, inside, unknown_name
from mhla_lightning.evidence.claims import Claim, read_claim
from mhla_lightning.runs.folder import check_run_id

_SHARED = ("title", "about", "value", "minutes", "seeds", "metrics", "paper", "plots", "claims")
_TRAINED = (
    "recipe",
    "overrides",
    "sources",
    "variants",
    "rows",
    "needs",
    "evaluations",
    "analyze",
)
_MEASURED = ("bench",)
_FEWEST_SEEDS = 3
ATTENTION, SPEED = "attention", "speed"
"""First part of the tags of numbers of attention, and of speed."""
BENCH_ROWS = ("softmax", "linear", "mhla")


@dataclass(frozen=True)
class Source:
    """Data that a study can take.

    Args:
        name: of the data, for the page.
        overrides: of all runs.
    """

    name: str
    overrides: Mapping[str, Any]


@dataclass(frozen=True)
class NeededRun:
    """A run that an evaluation needs, such as a classifier.

    Args:
        recipe: name or path.
        overrides: of the recipe.
    """

    recipe: str
    overrides: Mapping[str, Any]


@dataclass(frozen=True)
class Plot:
    """A picture of a study.

    Args:
        metrics: tags. Without `x` each is a panel with an interval a row; with it they are points of lines.
        x: place of each metric on the horizontal axis; empty without lines.
        x_title, y_title: of the axes.
        log: both axes are logarithmic.
    """

    metrics: Sequence[str]
    x: Sequence[float]
    x_title: str
    y_title: str
    log: bool


@dataclass(frozen=True)
class Trained:
    """The runs of a study.

    Args:
        recipe: name or path.
        overrides: of all rows.
        sources: data in the order of preference; empty takes the recipe's.
        rows: what is compared.
        needs: runs that are trained first, by their names; evaluations name them.
        evaluations: name -> options.
        samples: held-out samples whose attention is analyzed; 0 analyzes none.
        analyzed: names of the rows that are.
    """

    recipe: str
    overrides: Mapping[str, Any]
    sources: Sequence[Source]
    rows: Sequence[VariantRow]
    needs: Mapping[str, NeededRun]
    evaluations: Mapping[str, Mapping[str, Any]]
    samples: int
    analyzed: Sequence[str]


@dataclass(frozen=True)
class Study:
    """What is done for some claims.

    Args:
        name: of the file.
        title: heading of the page.
        about: a paragraph of the page.
        value: place in the order in which a budget is spent, the smallest first.
        minutes: on two quiet cores, with `seeds`.
        seeds: of every row; repetitions of a measurement of speed.
        metrics: tag -> heading of the page's table.
        paper: row -> what the paper reports for it, a column of the page's table.
        plots: pictures.
        claims: what is decided.
        trained: the runs; None for a measurement of speed.
        bench: options of `mhla bench attention`; None where runs are trained.
    """

    name: str
    title: str
    about: str
    value: float
    minutes: float
    seeds: Sequence[int]
    metrics: Mapping[str, str]
    paper: Mapping[str, str]
    plots: Sequence[Plot]
    claims: Sequence[Claim]
    trained: Trained | None
    bench: Mapping[str, Any] | None

    def row_names(self) -> list[str]:
        """Return the names of the rows in the order of the table."""
        return [row.name for row in self.trained.rows] if self.trained else list(BENCH_ROWS)


def study_names() -> list[str]:
    """Return the names of the packaged studies."""
    return sorted(path.stem for path in (RECIPES / STUDIES).glob("*.yaml"))


def read_studies(wanted: Sequence[str]) -> list[Study]:
    """Return studies by name or path, in the order of their value.

    All packaged ones are returned where none is named.

    Raises:
        UserError: an unknown or repeated name, or a file that is no study.
    """
    names = list(wanted) or study_names()
    found = [read_study(_file(name)) for name in names]
    titles = [study.name for study in found]
    for number, name in enumerate(titles):
        if name in titles[:number]:
            raise UserError("table", f"study '{name}' is named twice")
    return sorted(found, key=lambda study: (study.value, study.name))


def _file(name: str) -> Path:
    if name in study_names():
        return RECIPES / STUDIES / f"{name}.yaml"
    if Path(name).is_file() and name.endswith((".yaml", ".yml")):
        return Path(name)
    raise UserError("table", unknown_name("study (no such .yaml file either)", name, study_names()))


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        UserError: no YAML, or a key that is unknown, missing or of another form; the key is dotted, as in
            the file.
    """
    given = read_yaml(path)
    if not isinstance(given, Mapping):
        raise UserError(str(path), f"the file holds {type(given).__name__}; a study is a mapping")
    try:
        return _study(check_run_id(path.stem), given)
    except UserError as error:
        if error.key is None or "/" in error.key:
            raise
        raise UserError(error.key, f"{error.reason} (study {path})") from error


def _study(name: str, given: Mapping[str, Any]) -> Study:
    of_kind = _MEASURED if "bench" in given else _TRAINED
    for key in given:
        if key not in (*_SHARED, *of_kind):
            raise UserError(str(key), unknown_name("key", key, [*_SHARED, *of_kind], of="a study"))
    bench = _mapping(given, "bench") if "bench" in given else None
    trained = None if bench is not None else _trained(given)
    rows = [row.name for row in trained.rows] if trained else list(BENCH_ROWS)
    claims = _list(given, "claims")
    if not claims:
        raise UserError("claims", "is empty; a study decides at least one claim")
    metrics = {str(tag): str(title) for tag, title in _mapping(given, "metrics").items()}
    return Study(
        name,
        _text(given, "title"),
        _text(given, "about"),
        _number(given, "value"),
        _number(given, "minutes"),
        _seeds(given),
        metrics,
        _paper(given, rows),
        [_each(f"plots.{n}", _plot, one) for n, one in enumerate(_list(given, "plots", []))],
        [_each(f"claims.{n}", lambda one: _claim(one, rows, metrics), one) for n, one in enumerate(claims)],
        trained,
        bench,
    )


def _each(place: str, read: Callable[[Any], Any], given: object) -> Any:
    """Read an item of a list; its errors have the item's place."""
    with inside(place):
        try:
            return read(given)
        except UserError as error:
            raise UserError(error.key or place, error.reason) from error


def _paper(given: Mapping[str, Any], rows: Sequence[str]) -> dict[str, str]:
    """Return the paper's number of each row that has one."""
    found = _mapping(given, "paper", {})
    for row, number in found.items():
        if row not in rows:
            raise UserError("paper", unknown_name("row", row, rows))
        if not isinstance(number, str) or not number.strip():
            raise UserError(f"paper.{row}", f"found {number!r}; it must be text, such as 75.8 %")
    return found


def _claim(given: object, rows: Sequence[str], metrics: Mapping[str, str]) -> Claim:
    """Read a claim about a number of the table, or of attention."""
    claim = read_claim(given, rows)
    for metric in (claim.metric, *([claim.base.metric] if claim.base else [])):
        if metric not in metrics and not metric.startswith(f"{ATTENTION}/"):
            raise UserError("metric", unknown_name("metric", metric, metrics, of="the study's table"))
    return claim


def _trained(given: Mapping[str, Any]) -> Trained:
    recipe = _text(given, "recipe")
    load_recipe(recipe)
    rows = _rows(given)
    evaluations = _mapping(given, "evaluations", {})
    for name, options in evaluations.items():
        if not isinstance(options, Mapping):
            raise UserError(f"evaluations.{name}", f"found {options!r}; it must be a mapping of options")
    return Trained(
        recipe,
        _mapping(given, "overrides", {}),
        [_each(f"sources.{n}", _source, one) for n, one in enumerate(_list(given, "sources", []))],
        rows,
        {
            check_run_id(str(name)): _each(f"needs.{name}", _needed, one)
            for name, one in _mapping(given, "needs", {}).items()
        },
        evaluations,
        *_analyzed(given.get("analyze", 0), [row.name for row in rows]),
    )


def _analyzed(given: object, rows: Sequence[str]) -> tuple[int, Sequence[str]]:
    """Return how many samples are analyzed, and of which rows: of all unless they are named."""
    samples, chosen = given, list(rows)
    if isinstance(given, Mapping):
        if set(given) != {"samples", "rows"}:
            raise UserError(
                "analyze", f"found {given!r}; it is a number of samples, or a mapping with samples and rows"
            )
        samples, chosen = given["samples"], given["rows"]
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 0:
        raise UserError("analyze", f"found {samples!r}; it is a number of held-out samples, 0 for none")
    if not isinstance(chosen, list) or not chosen:
        raise UserError("analyze.rows", f"found {chosen!r}; it is a list of rows")
    for name in chosen:
        if name not in rows:
            raise UserError("analyze.rows", unknown_name("row", str(name), rows))
    return samples, chosen


def _rows(given: Mapping[str, Any]) -> list[VariantRow]:
    """Return the rows: a mapping, or names of rows of a variants file."""
    rows = given.get("rows")
    if "variants" not in given:
        if not isinstance(rows, Mapping) or not rows:
            raise UserError(
                "rows", f"found {rows!r}; write a mapping from row names to overrides, or name `variants`"
            )
        return read_rows(rows, "rows")
    found = {row.name: row for row in rows_from_file(variants_file(_text(given, "variants")))}
    if rows is None:
        return list(found.values())
    if not isinstance(rows, list) or not rows:
        raise UserError("rows", f"found {rows!r}; beside `variants` it is a list of its rows")
    for name in rows:
        if name not in found:
            raise UserError("rows", unknown_name("row", name, found, of=str(given["variants"])))
    return [found[name] for name in rows]


def _source(given: object) -> Source:
    if not isinstance(given, Mapping) or "data.source" not in given or "data.path" not in given:
        raise UserError(None, f"found {given!r}; it is a mapping with data.source and data.path")
    return Source(_text(given, "data.source"), {str(key): value for key, value in given.items()})


def _needed(given: object) -> NeededRun:
    if not isinstance(given, Mapping) or set(given) - {"recipe", "overrides"}:
        raise UserError(None, f"found {given!r}; it is a mapping with recipe and overrides")
    recipe = _text(given, "recipe")
    load_recipe(recipe)
    return NeededRun(recipe, _mapping(given, "overrides", {}))


def _plot(given: object) -> Plot:
    keys = ("metrics", "x", "x_title", "y_title", "log")
    if not isinstance(given, Mapping):
        raise UserError(None, f"found {given!r}; it is a mapping with {', '.join(keys)}")
    for key in given:
        if key not in keys:
            raise UserError(str(key), unknown_name("key", key, keys, of="a plot"))
    metrics, x = _list(given, "metrics"), _list(given, "x", [])
    if not metrics or not all(isinstance(tag, str) for tag in metrics):
        raise UserError("metrics", f"found {metrics!r}; it is a list of tags")
    if x and (len(x) != len(metrics) or not all(isinstance(place, int | float) for place in x)):
        raise UserError("x", f"found {x!r}; it needs a number for each of the {len(metrics)} metrics")
    titles = [_text(given, key) if key in given else "" for key in ("x_title", "y_title")]
    return Plot(metrics, x, titles[0], titles[1], given.get("log") is True)


def _seeds(given: Mapping[str, Any]) -> list[int]:
    seeds = _list(given, "seeds")
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)
    if not whole or len(set(seeds)) < len(seeds) or len(seeds) < _FEWEST_SEEDS:
        raise UserError(
            "seeds", f"found {seeds!r}; a study has at least {_FEWEST_SEEDS} different whole numbers"
        )
    return seeds


def _mapping(given: Mapping[str, Any], key: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    value = given.get(key, default)
    if not isinstance(value, Mapping):
        raise UserError(key, f"found {value!r}; it must be a mapping")
    return {str(name): item for name, item in value.items()}


def _list(given: Mapping[str, Any], key: str, default: list[Any] | None = None) -> list[Any]:
    value = given.get(key, default)
    if not isinstance(value, list):
        raise UserError(key, f"found {value!r}; it must be a list")
    return value


def _text(given: Mapping[str, Any], key: str) -> str:
    value = given.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(key, f"found {value!r}; it must be text")
    return value.strip()


def _number(given: Mapping[str, Any], key: str) -> float:
    value = given.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(key, f"found {value!r}; it must be a number above 0")
    return float(value)
