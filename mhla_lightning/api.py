"""The verbs from Python: `run`, `compare`, `analyze`, `sample`, `predict` and so on.

Options are those of the command line in Python's spelling: `--max-new-tokens 5` is `max_new_tokens=5`. They
pass the same parser and the same checks, and a mistake is a UserError.
"""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypedDict, Unpack

from mhla_lightning.cli.spelling import VerbParser
from mhla_lightning.errors import UserError, unknown_name
from mhla_lightning.runs.folder import RunFolder, read_object
from mhla_lightning.training.launch import RunOptions, launch_run
from mhla_lightning.training.report import LogReport

if TYPE_CHECKING:
    from mhla_lightning.cli.generate import Output
    from mhla_lightning.inference.text.continuation import Continuation

PathLike = str | Path


class RunStopped(RuntimeError):
    """A run or a comparison ended before its last step; the same call resumes it.

    Args:
        code: exit code of the command: 75 stopped after saving, 130 by Ctrl-C, others crashed.
        reason: in plain words.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} (exit code {code})")
        self.code = code


@dataclass(frozen=True)
class RunSummary:
    """The end of a run.

    Attributes:
        folder: of the run.
        steps: optimizer steps; 0 of an evaluation.
        seconds: of training.
        last, best: value of each tag at the end, and the best of it.
        ended_early: why training ended before `max_steps`; None where it did not.
    """

    folder: Path
    steps: int
    seconds: float
    last: dict[str, float]
    best: dict[str, float]
    ended_early: str | None = None


@dataclass(frozen=True)
class Continued:
    """A prompt and its continuation.

    Attributes:
        prompt, text: as given, and the new text.
        tokens: new tokens.
        finished: why it ended: length, end or stop.
    """

    prompt: str
    text: str
    tokens: int
    finished: str


@dataclass(frozen=True)
class Samples:
    """Drawn images or videos.

    Attributes:
        folder: that holds them.
        kind: of the samples.
        count: of the samples.
        files: what -> file: images and grid, or videos, sheet and list.
        settings: that determine the pixels.
    """

    folder: Path
    kind: Literal["images", "videos"]
    count: int
    files: dict[str, Path]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Prediction:
    """An image and its likeliest classes, the likeliest first.

    Attributes:
        file: of the image.
        classes: their names; empty where the image cannot be used.
        probabilities: of these classes.
        problem: why the image cannot be used; None where it can.
    """

    file: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    problem: str | None = None


@dataclass(frozen=True)
class ExportedWeights:
    """Written weights.

    Attributes:
        path: file or folder.
        tensors: names of all tensors.
        added: those under names that only MHLA has.
        opened_by: the call that opens the folder; None for plain weights.
    """

    path: Path
    tensors: list[str]
    added: list[str]
    opened_by: str | None


@dataclass(frozen=True)
class AttentionNumbers:
    """What attention does inside some runs.

    Attributes:
        picture: PNG with all plots.
        runs: as in analysis.json: a mapping a run, with `layers`.
    """

    picture: Path
    runs: list[dict[str, Any]]


@dataclass(frozen=True)
class ComparisonTable:
    """The result of a comparison.

    Attributes:
        folder: holds the runs, table.json and curves.png.
        rows: as in table.json: name, overrides, scores and costs.
    """

    folder: Path
    rows: list[dict[str, Any]]


class GenerateArguments(TypedDict, total=False):
    """Options of `mhla generate`; prompts are arguments."""

    runs: PathLike
    ckpt: PathLike | int
    no_ema: bool
    device: str
    tokenizer: str
    extrapolation: str
    dtype: str
    max_new_tokens: int
    greedy: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: Sequence[str]
    batch_size: int
    cuda_graph: str


class SampleArguments(TypedDict, total=False):
    """Options of `mhla sample`."""

    runs: PathLike
    ckpt: PathLike | int
    no_ema: bool
    device: str
    n: int
    guidance: float
    guidance_interval: tuple[float, float]
    guidance_channels: int
    sampler: str
    steps: int
    seed: int
    batch_size: int
    processes: int
    out: PathLike
    classes: str
    prompts: PathLike
    prompt: Sequence[str]
    frames: int
    size: str
    rate: float


class PredictArguments(TypedDict, total=False):
    """Options of `mhla predict`."""

    runs: PathLike
    ckpt: PathLike | int
    no_ema: bool
    device: str
    top_k: int
    batch_size: int
    to: PathLike


class ExportArguments(TypedDict, total=False):
    """Options of `mhla export`."""

    format: str
    dtype: str
    runs: PathLike
    ckpt: PathLike | int
    ema: bool
    no_ema: bool
    trust_checkpoint: bool


class AnalyzeArguments(TypedDict, total=False):
    """Options of `mhla analyze`."""

    runs: PathLike
    ckpt: PathLike | int
    no_ema: bool
    device: str
    to: PathLike
    samples: int
    queries: Sequence[int]
    block_size: Sequence[int]
    max_tokens: int


class CompareArguments(TypedDict, total=False):
    """Options of `mhla compare`."""

    over: Sequence[str]
    variants: PathLike
    seeds: str
    against: str
    jobs: int
    eval: Sequence[str]
    runs: PathLike


def run(
    recipe: PathLike,
    overrides: Mapping[str, Any] | None = None,
    *,
    runs: PathLike | None = None,
    run_id: str | None = None,
    fresh: bool = False,
    accept_changes: bool = False,
    mode: Literal["fit", "validate", "test"] = "fit",
    ckpt: PathLike | None = None,
) -> RunSummary:
    """Train a recipe to its end, resume its run, or evaluate a checkpoint of it.

    Args:
        recipe: name of a packaged recipe, or path of a YAML file.
        overrides: dotted key -> value, as `{"trainer.max_steps": 50}`.
        runs, run_id, fresh, accept_changes, mode, ckpt: see :class:`RunOptions`.

    Raises:
        UserError: a mistake in the recipe, the data or the options.
        RunStopped: it stopped before its last step.
    """
    report = _Kept()
    texts = [None if value is None else str(value) for value in (runs, ckpt)]
    options = RunOptions(texts[0], run_id, fresh, accept_changes, mode, texts[1])
    done = launch_run(str(recipe), overrides, options, report)
    if done.code or done.run is None:
        raise RunStopped(done.code, report.last_problem or "the run stopped")
    if mode != "fit":
        return RunSummary(done.run.path, 0, 0.0, report.values, {})
    return _summary(done.run)


def generate(
    run: PathLike, prompts: str | Sequence[str] = "", **options: Unpack[GenerateArguments]
) -> list[Continued]:
    """Continue prompts with the language model of a run, as `mhla generate` does.

    Args:
        run: id or folder.
        prompts: one text or several.
        options: see :class:`GenerateArguments`.

    Raises:
        UserError: an argument, the run or a prompt is wrong.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    from mhla_lightning.cli.generate import perform

    done = perform(_arguments("generate", [str(run)], {"prompt": texts, **options}), _take_all)
    return [Continued(**row) for row in done.output.rows()]


def sample(run: PathLike, **options: Unpack[SampleArguments]) -> Samples:
    """Draw images or videos from a diffusion run, as `mhla sample` does.

    Args:
        run: id or folder.
        options: see :class:`SampleArguments`.

    Raises:
        UserError: an argument or the run is wrong.
    """
    from mhla_lightning.cli.sample import perform

    drawn = perform(_arguments("sample", [str(run)], options))
    return Samples(drawn.folder, drawn.kind, drawn.count, drawn.places, drawn.settings)


def predict(
    run: PathLike, images: PathLike | Sequence[PathLike], **options: Unpack[PredictArguments]
) -> list[Prediction]:
    """Name the likeliest classes of images with a classifier's run, as `mhla predict` does.

    Args:
        run: id or folder.
        images: files, and folders of them.
        options: see :class:`PredictArguments`.

    Raises:
        UserError: an argument or the run is wrong, or no image can be used.
    """
    places = [images] if isinstance(images, str | Path) else list(images)
    from mhla_lightning.cli.predict import perform

    # An absolute path is no option.
    _, rows = perform(
        _arguments("predict", [str(run), *(str(Path(place).absolute()) for place in places)], options)
    )
    return [Prediction(row.file, row.classes, row.probabilities, row.problem) for row in rows]


def export(run: PathLike, to: PathLike, **options: Unpack[ExportArguments]) -> ExportedWeights:
    """Write the weights of a run as one file, or as a folder that other libraries open.

    Args:
        run: id, run or checkpoint folder, or a file of `mhla import`.
        to: a new file that ends in .safetensors, or a new or empty folder.
        options: see :class:`ExportArguments`.

    Raises:
        UserError: an argument, the run or its weights are wrong.
    """
    from mhla_lightning.cli.export import perform

    _, written = perform(_arguments("export", [str(run)], {"to": to, **options}))
    added = [name for name, _ in written.added]
    opened_by = None if written.opened_by is None else written.opened_by.replace("DIR", str(to))
    return ExportedWeights(Path(to), [*(name for name, _ in written.shared), *added], added, opened_by)


def compare_recipe(
    recipe: PathLike, overrides: Mapping[str, Any] | None = None, **options: Unpack[CompareArguments]
) -> ComparisonTable:
    """Train variants of a recipe side by side, as `mhla compare` does; finished runs are reused.

    Args:
        recipe: name of a packaged recipe, or path of a YAML file.
        overrides: dotted key -> value, for every row.
        options: see :class:`CompareArguments`.

    Raises:
        UserError: an argument or a row is wrong.
        RunStopped: a run of it did not finish.
    """
    from rich.console import Console

    from mhla_lightning.cli.compare import perform
    from mhla_lightning.compare.variants import arguments

    args = _arguments("compare", [str(recipe)], options)
    args.overrides = arguments(dict(overrides or {}))
    code, folder = perform(args, Console(quiet=True))
    if code:
        raise RunStopped(code, f"a run of {folder} did not finish; its log is there")
    return ComparisonTable(folder, read_object(folder / "table.json")["rows"])


def analyze(run: PathLike | Sequence[PathLike], **options: Unpack[AnalyzeArguments]) -> AttentionNumbers:
    """Look into the attention of runs, as `mhla analyze` does.

    Args:
        run: id or folder, or several.
        options: see :class:`AnalyzeArguments`.

    Raises:
        UserError: an argument or a run is wrong.
    """
    from rich.console import Console

    from mhla_lightning.cli.analyze import perform

    names = [run] if isinstance(run, str | Path) else list(run)
    words: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    done = perform(_arguments("analyze", list(map(str, names)), words), Console(quiet=True))
    return AttentionNumbers(done.picture, done.result["runs"])


class _Kept(LogReport):
    """Logs a run's progress, and keeps what its caller needs."""

    def __init__(self) -> None:
        self.last_problem = ""
        self.values: dict[str, float] = {}

    def problem(self, text: str) -> None:
        super().problem(text)
        self.last_problem = text

    def metrics(self, title: str, last: Mapping[str, float], best: Mapping[str, float] | None = None) -> None:
        super().metrics(title, last, best)
        self.values = dict(last)


def _summary(run: RunFolder) -> RunSummary:
    found = read_object(run.summary)
    return RunSummary(
        run.path,
        found.get("steps", 0),
        found.get("seconds", 0.0),
        found.get("last", {}),
        found.get("best", {}),
        found.get("ended_early"),
    )


def _take_all(output: Output, steps: Iterable[Continuation]) -> bool:
    for new in steps:
        output.take(new)
    return False


class _Parser(VerbParser):
    """The parser of a verb; a mistake is an exception instead of an exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(None, message)


def _arguments(verb: str, words: list[str], options: Mapping[str, Any]) -> Namespace:
    """Parse options as the command line of a verb does.

    Args:
        verb: name of the verb.
        words: its arguments without a name.
        options: name in Python -> value; None and False leave an option out.

    Raises:
        UserError: an option that the verb does not have, or a value that does not fit.
    """
    parser = _Parser(prog=verb, allow_abbrev=False)
    importlib.import_module(f"mhla_lightning.cli.{verb}").add_arguments(parser)
    written = parser.written()
    for name, value in options.items():
        if name not in written:
            raise UserError(name, unknown_name("option", name, written))
        option = written[name]
        if isinstance(value, tuple):
            words += [option, *map(str, value)]
        elif isinstance(value, list):
            words += [f"{option}={item}" for item in value]
        elif value is True:
            words.append(option)
        elif value is not None and value is not False:
            words.append(f"{option}={value}")
    return parser.parse_args(words)
