"""Recipes on Lightning's own command line, LightningCLI.

    python -m mhla_lightning.lightning_cli fit --config classification/deit_tiny_mhla_mnist_cpu \\
        --trainer.max_steps 200 --model.attention softmax

It is `lightning run` in the words of LightningCLI: the same checks, run folders and numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from mhla_lightning.cli.main import exit_code, mistake
from mhla_lightning.cli.run import Terminal, add_place, print_config, shown
from mhla_lightning.cli.spelling import VerbParser
from mhla_lightning.config.recipes import parse_overrides
from mhla_lightning.config.resolve import CheckpointConfig, HealthConfig, resolve
from mhla_lightning.errors import UserError
from mhla_lightning.runs.disk_errors import disk_errors
from mhla_lightning.tasks import Task
from mhla_lightning.training.launch import Launched, Mode, RunOptions, launch_resolved, read_recipe
from mhla_lightning.training.report import LogReport, Report

_MODES = ("fit", "validate", "test", "predict")


class RecipeCLI(LightningCLI):
    """LightningCLI whose configuration is a recipe and whose `fit` is `lightning run`.

    A recipe holds what LightningCLI's parser does not take: `checkpoint`, `health`, `imports`, names of
    presets, older names of keys. So `lightning run`'s reading and checks replace its parsing, and its launch
    replaces the call of the trainer. Subclasses have Lightning's hooks: `before_fit`, `after_fit`, and so on.

    Args:
        args: the words of the command line; None takes sys.argv.
        run: whether to run a subcommand; otherwise model and data are built, and `args` has none.
        report: shows the progress; None logs it.

    Attributes:
        model: the task.
        datamodule: the data of the recipe.
        trainer: Lightning's Trainer once a subcommand has run.
        launched: how the run ended; None before.

    Raises:
        UserError: a mistake in the recipe, the data or the arguments.
    """

    def __init__(
        self, args: Sequence[str] | None = None, run: bool = True, report: Report | None = None
    ) -> None:
        self.report: Report = report or LogReport()
        self.launched: Launched | None = None
        self._with_subcommand = run
        self._predictions: Path | None = None
        super().__init__(
            Task,
            LightningDataModule,
            save_config_callback=None,  # the run folder has recipe.yaml
            parser_kwargs={"prog": "python -m mhla_lightning.lightning_cli"},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,  # type: ignore[arg-type]  # ours is narrower
            run=run,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands that a run has, and what of the trainer's arguments they leave out."""
        known = LightningCLI.subcommands()
        left_out = {"ckpt_path", "weights_only", "verbose", "return_predictions"}
        return {mode: known[mode] | left_out for mode in _MODES}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a recipe and a run have beside Lightning's arguments, for `--help`."""
        add_place(parser)
        parser.add_argument("--ckpt_path", metavar="PATH", help=_CKPT)
        parser.add_argument("--predictions", metavar="FILE", help=_PREDICTIONS)
        parser.add_class_arguments(CheckpointConfig, "checkpoint")
        parser.add_class_arguments(HealthConfig, "health")
        parser.add_argument("--imports", type=list[str], help="modules to import first")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the recipe as `lightning run` does; `--help` is Lightning's own."""
        words = sys.argv[1:] if args is None else args
        if not isinstance(words, list | tuple):
            raise UserError("args", f"{type(words).__name__} is given; write the words of a command line")
        if not words or any(word in ("-h", "--help") for word in words):
            parser.parse_args(list(words))  # ends the process
        given, rest = _parser(self._with_subcommand).parse_known_args(words)
        overrides = parse_overrides(rest)
        if given.print_config:
            print_config(given.config, overrides)
            raise SystemExit(0)
        mode: Mode = given.subcommand or "fit"
        self._predictions = _new_file(given.predictions, mode)
        recipe = read_recipe(given.config, overrides)
        self.recipe_name, self.resolved = recipe.name, resolve(recipe.values)
        self.options = RunOptions(
            given.runs, given.run_id, given.fresh, given.accept_changes, mode, given.ckpt_path
        )
        values = Namespace(**self.resolved.values)
        self.config = Namespace({"subcommand": mode, mode: values}) if self._with_subcommand else values

    def instantiate_classes(self) -> None:
        """Take the objects that are built already."""
        self.config_init = self.config
        self.model, self.datamodule = self.resolved.task, self.resolved.data
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return what has the subcommands until the run has built the trainer."""
        if kwargs:
            raise UserError("trainer", f"{', '.join(kwargs)} cannot be set here; they are keys of the recipe")
        return _Launch(self)  # type: ignore[return-value]


class _Launch:
    """The subcommands of a run; afterwards `cli.trainer` is Lightning's Trainer."""

    def __init__(self, cli: RecipeCLI) -> None:
        self.cli = cli

    def fit(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        cli = self.cli
        cli.launched = launch_resolved(cli.recipe_name, cli.resolved, cli.options, cli.report)
        if cli.launched.trainer is not None:
            cli.trainer = cli.launched.trainer
        if cli._predictions is not None:
            with disk_errors(cli._predictions.parent):
                torch.save(cli.launched.predictions, cli._predictions)

    validate = test = predict = fit


_CKPT = "checkpoint folder or run that validate, test and predict take (default: the run's newest)"
_PREDICTIONS = "new file of predict: a list of mappings, one a batch; torch.load reads it"


def _new_file(name: str | None, mode: Mode) -> Path | None:
    """Return the file for predictions; None in other modes.

    Raises:
        UserError: it cannot be written, or another mode has one.
    """
    if mode != "predict":
        if name is not None:
            raise UserError("predictions", f"the subcommand {mode} predicts nothing; leave it out")
        return None
    if name is None:
        raise UserError(
            "predictions", "predict needs a file for what it predicts; name one, e.g. predictions.pt"
        )
    file = Path(name)
    if file.exists():
        raise UserError("predictions", f"{file} exists already; name a new file")
    if not file.absolute().parent.is_dir():
        raise UserError("predictions", f"{file} is in a folder that does not exist")
    return file


def _parser(with_subcommand: bool) -> VerbParser:
    """Return the parser of all words that are no keys of a recipe."""
    parser = VerbParser(prog="python -m mhla_lightning.lightning_cli", allow_abbrev=False)
    if with_subcommand:
        parser.add_argument("subcommand", choices=_MODES, metavar="SUBCOMMAND")
    else:
        parser.set_defaults(subcommand=None)
    parser.add_argument("-c", "--config", metavar="RECIPE", required=True)
    parser.add_argument("--ckpt_path", metavar="PATH", help=_CKPT)
    parser.add_argument("--predictions", metavar="FILE", help=_PREDICTIONS)
    parser.add_argument("--print_config", action="store_true")
    add_place(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code of `lightning run`."""

    def command() -> int:
        try:
            with shown():
                launched = RecipeCLI(argv, report=Terminal()).launched
        except UserError as error:
            return mistake(error, _parser(True), takes_overrides=True)
        return 0 if launched is None else launched.code

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
