"""Every command and every block of Python in README and docs: parsed here, executed behind `slow`."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import mhla_lightning
from mhla_lightning.cli.main import verb_parser
from mhla_lightning.config.quick_checks import check_names
from mhla_lightning.config.recipes import apply_overrides, load_recipe, parse_overrides
from mhla_lightning.config.signatures import source_file
from mhla_lightning.errors import UserError
from tests.helpers.blocks import NOTEBOOKS, PAGES, Command, Python, blocks
from tests.house.source import ROOT

STAND_INS = (
    "classification/deit_tiny_mhla_mnist_cpu",
    "language/lm_tiny_mhla_stdlib_cpu",
    "image_dit/dit_tiny_mhla_mnist_cpu",
    "video_dit/wan_tiny_mhla_clips_cpu",
)
"""What RECIPE may be; a command has to fit one of them."""

NOT_EXECUTED = {
    r"make ": "installs or tests everything: CI's workflow runs it",
    r"pip install ": "needs a network",
    r"mhla monitor\b": "serves until Ctrl-C; tests/cli/test_monitor.py",
    r"mhla (submit|logs|status|cancel|resume)\b": "needs a cluster; tests/slurm runs them on one",
    r"lightning run classification/\S+ --mode validate --ckpt digits": "a run of the cluster; tests/slurm",
    r"mhla eval (lm|fid|vbench|clip|geneval|dpg) ": "needs a network, or tools and files of the reader; "
    "tests/evaluation",
    r"mhla analyze .*compare-HASH": "runs of a comparison of the reader; tests/analysis",
    r".*(deit_tiny_mhla_images_cpu|mhla (predict|export) photos)": "needs images of the reader; "
    "tests/inference/test_predict.py runs each",
    r"mhla predict .* IMAGE": "the image is the reader's",
    r"mhla import ": "needs public weights; tests/conversion imports small ones",
    r"mhla data (?!pack mnist)": "needs files of the reader; tests/data runs each verb",
    r"python -m mhla_lightning\.lightning_cli ": "tests/cli/test_lightning_cli.py runs it",
    r"mhla bench ": "measures for minutes on a quiet machine; tests/bench runs each verb",
    r"mhla compare ": "trains for minutes; tests/cli compares shorter runs",
    r"mhla reproduce( (?!--list)|$)": "trains for hours; tests/evidence runs a tiny study",
    r"mhla test-operator my_package": "needs the reader's package",
    r"mhla sample digits .* --seed 1": "a run of the tutorial of images, which draws from it",
    r"lightning run (video_dit/wan_1_3b|text_to_image/sana_600m)": "needs a GPU and public weights",
    r"hf download ": "needs a network",
    r"mhla sample wan ": "a run of Wan2.1",
    r"--": "options of a command, alone",
    r".*\b(RECIPE|RUN)\b": "the reader chooses the recipe or run",
}
"""Beginning of a command -> why the slow tests do not execute it."""

PYTHON_NOT_EXECUTED = {
    "from mhla_lightning.hf import ProjectMixingCallback": "a part: model and data are the reader's",
    "from transformers import pipeline": "DIR is the reader's; the tutorial of language models opens one",
    "summary = mhla.run": "the runs are the reader's; tests/cli/test_api.py calls each verb",
    'checkpoint = "runs/RUN/': "RUN is the reader's; tests/tasks/test_sizes.py evaluates one",
    'HubModel.from_run("RUN")': "RUN is the reader's; tests/conversion opens a run of its own",
}

SHORT = {
    "run": "--trainer.max_steps 4 --trainer.val_check_interval 4 --model.schedule.warmup_steps 1",
    "sample": "--n 2 --steps 2",
    "eval samples": "--n 10 --steps 2",
    "generate": "--max-new-tokens 8",
}
"""Verb -> options that the slow tests add."""


def _commands() -> list[Command]:
    return [block for page in PAGES for block in blocks(page) if isinstance(block, Command)]


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS])
def test_every_command_of_a_page_is_valid(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    for command in blocks(page):
        if isinstance(command, Command) and "my_operators" not in str(command):  # the reader's file
            try:
                _check(command.words)
            except (UserError, SystemExit) as error:
                pytest.fail(f"{page}: {command}: {error}")


def _check(words: tuple[str, ...]) -> None:
    first, *rest = words
    if first.startswith("--"):
        _check_overrides("RECIPE", words)
    elif first == "make":
        assert re.search(rf"(?m)^{rest[0]}:", (ROOT / "Makefile").read_text()), rest
    elif first in ("mhla", "lightning"):
        _check_verb(rest)
    elif words[:3] == ("python", "-m", "mhla_lightning.lightning_cli"):
        assert words[3] in ("fit", "validate", "test", "predict"), words
        assert words[4] == "--config", words
    elif first == "hf":
        _check_download(rest)
    else:
        assert first == "pip", first


def _check_download(words: list[str]) -> None:
    """Parse `hf download` by the arguments of the function that it calls."""
    verb, name, *options = words
    assert verb == "download", words
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", name), name
    known = inspect.signature(huggingface_hub.snapshot_download).parameters
    for option in options[::2]:
        key = {"--include": "allow_patterns"}.get(option, option.removeprefix("--").replace("-", "_"))
        assert key in known, option


def _check_verb(words: list[str]) -> None:
    verb, *rest = words
    if verb == "--help":
        return
    module, parser = verb_parser(verb)
    takes_overrides = vars(module).get("TAKES_OVERRIDES", False)
    if not takes_overrides:
        parser.parse_args(rest)
        return
    args, overrides = parser.parse_known_args(rest)
    recipe = getattr(args, "recipe", None)
    if recipe is not None:
        _check_overrides(recipe, overrides)


def _check_overrides(recipe: str, overrides: tuple[str, ...] | list[str]) -> None:
    """Raise the last UserError where no recipe takes the keys; `--run-id` is no key."""
    words = list(_without(overrides, "--run-id"))
    problem: UserError | None = None
    for name in STAND_INS if recipe == "RECIPE" else (recipe,):
        try:
            check_names(apply_overrides(load_recipe(name).values, parse_overrides(words)))
        except UserError as error:
            problem = error
        else:
            return
    assert problem is not None
    raise problem


def _without(words: tuple[str, ...] | list[str], option: str) -> Iterator[str]:
    given = iter(words)
    for word in given:
        if word == option:
            next(given)
        else:
            yield word


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_parses_and_its_imports_exist(page: str) -> None:
    for block in blocks(page):
        if isinstance(block, Python):
            for node in ast.walk(ast.parse(block.code)):
                if isinstance(node, ast.Import):
                    assert all(importlib.util.find_spec(name.name.split(".")[0]) for name in node.names)
                elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mhla_lightning"):
                    _check_import(node.module or "", [name.name for name in node.names])


def _check_import(module: str, names: list[str]) -> None:
    """Check names without importing torch."""
    if module == "mhla_lightning":
        assert set(names) <= set(mhla_lightning.__all__)
        return
    file = source_file(module)
    assert file is not None, module
    assert all(re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) for name in names)


def test_each_reason_for_not_executing_holds_for_a_command() -> None:
    texts = [str(command) for command in _commands()]
    assert all(any(re.match(start, text) for text in texts) for start in NOT_EXECUTED)
    code = [block.code for page in PAGES for block in blocks(page) if isinstance(block, Python)]
    assert all(any(start in text for text in code) for start in PYTHON_NOT_EXECUTED)


def _executed(block: Command | Python) -> bool:
    if isinstance(block, Python):
        return not any(start in block.code for start in PYTHON_NOT_EXECUTED)
    return not any(re.match(start, str(block)) for start in NOT_EXECUTED)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("page", [page for page in PAGES if any(_executed(one) for one in blocks(page))])
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page alone, from an empty folder; Python sees the names of the blocks before it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names: dict[str, Any] = {}
    for block in blocks(page):
        if not _executed(block):
            continue
        if isinstance(block, Python):
            exec(block.code, names)
            continue
        variables = dict(one.split("=", 1) for one in block.variables)
        path = os.pathsep.join([variables.pop("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep)
        alone = ["-X", "utf8"] if block.variables else []  # not forked from a process with another path
        process = subprocess.Popen(
            [sys.executable, *alone, "-m", "mhla_lightning", *_shortened(block.words)],
            env={**os.environ, **variables, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        out, problem = process.communicate()
        assert process.returncode == 0, f"{block}: {out[-500:]}{problem[-2000:]}"


def _shortened(words: tuple[str, ...], short: Mapping[str, str] = SHORT) -> list[str]:
    rest = list(words[1:])
    if rest[0] == "run" and "--mode" in rest:
        return rest
    verb = " ".join(rest[:2]) if " ".join(rest[:2]) in short else rest[0]
    return rest + short.get(verb, "").split()


def test_a_wrong_command_is_found() -> None:
    with pytest.raises(UserError, match="bath_size"):
        _check(("lightning", "run", "RECIPE", "--data.bath_size", "4"))
    with pytest.raises(SystemExit):
        _check(("mhla", "sample", "RUN", "--step", "4"))
