"""`mhla` and `lightning`: help without torch, every verb, unknown verbs."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from mhla_lightning.cli.main import VERBS, main, mistake
from mhla_lightning.errors import UserError


def test_help_lists_every_verb_without_loading_torch() -> None:
    code = (
        "import sys; sys.argv=['mhla','--help']\nfrom mhla_lightning.cli.main import main\ntry: "
        "main()\nexcept SystemExit: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.rstrip().endswith("False")
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"mhla {verb}" in capsys.readouterr().out


def test_an_unknown_verb_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "unknown verb 'trian'" in capsys.readouterr().err


def test_the_lightning_command_is_ours_for_run_alone() -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from mhla_lightning.cli.main import lightning; sys.exit(lightning())",
    ]
    run = subprocess.run([*command, "run", "no-such-recipe"], capture_output=True, text=True, check=False)
    assert (run.returncode, "unknown recipe 'no-such-recipe'" in run.stderr) == (2, True)
    other = subprocess.run([*command, "login"], capture_output=True, text=True, check=False)
    assert (other.returncode, "belongs to lightning-sdk, which is not installed" in other.stderr) == (2, True)


def test_a_run_leaves_no_log_handler_behind(capsys: pytest.CaptureFixture[str]) -> None:
    """A later command of the same process would log to the earlier one's stdout, which may be closed."""
    logger = logging.getLogger("mhla_lightning")
    before = list(logger.handlers), logger.level
    assert main(["run", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    assert (list(logger.handlers), logger.level) == before


def test_a_message_never_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(UserError("a\x1b[31mb", "c\x07d, \u00e9")) == 2
    assert capsys.readouterr().err == "error: a\\x1b[31mb: c\\x07d, \u00e9\n"
