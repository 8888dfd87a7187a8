"""`mhla` and `lightning`: find the verb, and end with exit code 2 on a mistake of the user."""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import io
import keyword
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mhla_lightning import __version__
from mhla_lightning.cli.spelling import VerbParser, spelled
from mhla_lightning.errors import DiskError, UserError, unknown_name
from mhla_lightning.runs.disk_errors import disk_problem
from mhla_lightning.runs.folder import shortened

VERBS = {
    "run": "train a recipe; the same command again resumes it",
    "recipes": "list the recipes that come with the package, or show one",
    "compare": "train variants of a recipe side by side: one table, one plot",
    "reproduce": "decide the paper's claims at small scale: studies with seeds, a page of verdicts",
    "generate": "continue prompts with a language run",
    "sample": "draw images or videos from a diffusion run",
    "predict": "name the likeliest classes of images, with a classifier's run",
    "eval": "evaluate runs: lm-evaluation-harness, FID of samples, a classifier's view of samples, VBench",
    "analyze": "look into the attention of runs: rank, entropy, locality and maps by layer and head",
    "bench": "measure how fast one thing is beside another",
    "test-operator": "check an attention operator of yours against the contract that models rely on",
    "data": "make, check, index and look at shards",
    "import": "read other libraries' checkpoints as weights of our backbones",
    "plan": "estimate what a recipe needs: batches, FLOPs, length, memory under every strategy",
    "export": "write the weights of a run under the names of diffusers or Wan2.1",
    "submit": "queue a recipe as a SLURM job that resumes after preemption and time limits",
    "status": "show state, restarts, step, loss and speed of runs, queued or local",
    "logs": "show the output of a run's job",
    "cancel": "cancel the jobs of runs",
    "resume": "queue a run again, from its newest checkpoint",
    "report": "write one HTML page about runs or a comparison, which opens from disk",
    "monitor": "start TensorBoard on run folders, with the ssh line for a login node",
    "completion": "print a script that lets bash, zsh or fish complete verbs, options and recipes",
    "doctor": "check this machine: versions, devices, commands, write access, processes",
}

GROUPS = {
    "train": ("run", "recipes", "compare", "reproduce", "plan"),
    "use": ("generate", "sample", "predict", "report", "analyze", "eval", "export", "import"),
    "data": ("data",),
    "cluster": ("submit", "status", "logs", "cancel", "resume", "monitor"),
    "measure": ("bench", "test-operator", "doctor", "completion"),
}
"""The verbs in the order of `mhla --help`."""
WELCOME = """Multi-Head Linear Attention on Lightning: train, sample, measure, on a laptop or a cluster.

  mhla recipes list --cpu                                 what trains here in minutes
  lightning run classification/deit_tiny_mhla_mnist_cpu   train one of them; again: resume it
  mhla plan language/lm_340m_mhla_fineweb_edu             what a large one needs, without a GPU
  mhla doctor                                             what this machine has
  mhla --help                                             all verbs
"""
EPILOG = (
    "mhla VERB --help explains a verb. Exit codes: 0 finished, 1 a crash, 2 a mistake in the command, "
    "recipe or data,\n"
    "75 stopped before the last step, after saving (SIGTERM, SIGUSR1, trainer.max_time) or by a full disk,\n"
    "130 by Ctrl-C."
)
_STOPPED = 75
_ABOUT_PATHS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""Numbers of the errors of a path that a user gave."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mhla` or `python -m mhla_lightning`; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: _dispatch(arguments))


def exit_code(command: Callable[[], int]) -> int:
    """Run a command; return its exit code, also where it fails by the user's mistake."""
    _print_any_text()
    try:
        return command()
    except UserError as error:
        return mistake(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) closed early
        _drop_output()
        return 0
    except OSError as error:
        return _report_files(error)
    except MemoryError as error:
        print(f"error: this needs more memory than there is ({error or 'no size is known'})", file=sys.stderr)
        return 2


def mistake(error: UserError, parser: VerbParser | None = None, takes_overrides: bool = False) -> int:
    """Print a mistake of the user, see :func:`spelled`; return the exit code."""
    print(f"error: {_printable(spelled(error, parser, takes_overrides))}", file=sys.stderr)
    return _STOPPED if isinstance(error, DiskError) else 2


def _print_any_text() -> None:
    """Let a terminal or pipe that is not UTF-8 show what it cannot encode as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # Python takes a pipe that replaced a file for a file, and seeks in it
                stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _printable(text: str) -> str:
    """Escape what a stranger's file may have put into a message to command a terminal."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text
    )


def _report_files(error: OSError) -> int:
    """Report a full disk, or a path that cannot be used; return the exit code.

    Raises:
        OSError: an error of another kind.
    """
    problem = disk_problem(error, Path.cwd())
    if problem is not None:
        if error.filename is None:  # it may be standard output that is written to a full disk
            _drop_output()
        print(f"error: {problem}; make room, and give the same command again", file=sys.stderr)
        return _STOPPED
    if error.errno not in _ABOUT_PATHS or error.filename is None:
        raise error
    print(f"error: {shortened(os.fsdecode(error.filename), 200)}: {error.strerror}", file=sys.stderr)
    return 2


def lightning() -> int:
    """Run `lightning`; return the exit code.

    The verb `run` is ours. Every other verb belongs to the package lightning-sdk, where it is installed.
    """
    arguments = sys.argv[1:]
    if arguments[:1] == ["run"]:
        return main(arguments)
    if importlib.util.find_spec("lightning_sdk") is not None:
        importlib.import_module("lightning_sdk.cli.entrypoint").main_cli()
        return 0
    if arguments in ([], ["-h"], ["--help"]):
        print(
            "usage: lightning run RECIPE [--key value ...]\n\n`lightning run` trains a recipe of "
            "mhla-lightning (mhla --help lists all verbs)."
        )
        return 0
    print(
        f"error: `lightning {arguments[0]}` belongs to lightning-sdk, which is not installed; "
        "mhla-lightning brings `lightning run RECIPE`",
        file=sys.stderr,
    )
    return 2


def _dispatch(arguments: list[str]) -> int:
    listing = "\n\n".join(
        f"{group}:\n" + "\n".join(f"  {name:13} {VERBS[name]}" for name in names)
        for group, names in GROUPS.items()
    )
    parser = argparse.ArgumentParser(
        prog="mhla",
        usage="mhla [--version] VERB ...",
        description=f"Multi-Head Linear Attention on Lightning.\n\n{listing}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mhla-lightning {__version__}")
    if not arguments:
        print(WELCOME, end="")
        return 0
    if arguments[0].startswith("-"):
        parser.parse_args(arguments)
        parser.print_help()
        return 0
    if arguments[0] not in VERBS:
        raise UserError(None, unknown_name("verb", arguments[0], VERBS))
    verb, sub = verb_parser(arguments[0])
    takes_overrides = getattr(verb, "TAKES_OVERRIDES", False)
    if takes_overrides:
        args, overrides = sub.parse_known_args(arguments[1:])
        args.overrides = overrides
    else:
        args = sub.parse_args(arguments[1:])
    try:
        return int(verb.run(args))
    except UserError as error:
        return mistake(error, sub, takes_overrides)


def verb_parser(name: str) -> tuple[Any, VerbParser]:
    """Return the module of a verb and the parser of its arguments."""
    module = f"{name}_" if keyword.iskeyword(name) else name.replace("-", "_")  # no module is named `import`
    verb = importlib.import_module(f"mhla_lightning.cli.{module}")
    parser = VerbParser(
        prog=f"mhla {name}",
        description=verb.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.add_arguments(parser)
    return verb, parser
