"""`mhla completion`: what the scripts complete."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from mhla_lightning.cli import completion
from mhla_lightning.cli.main import VERBS, main
from mhla_lightning.config.recipes import recipe_names


@pytest.fixture(scope="module")
def script() -> str:
    return completion.bash()


def _complete(script: str, *words: str) -> set[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _mhla; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_bash_completes_verbs_options_and_recipes(script: str) -> None:
    assert _complete(script, "mhla", "") == set(VERBS)
    assert _complete(script, "mhla", "comp") == {"compare", "completion"}
    assert "--run-id" in _complete(script, "mhla", "run", "--r")
    assert set(recipe_names()) <= _complete(script, "mhla", "plan", "")
    assert {"pack", "verify"} <= _complete(script, "mhla", "data", "")
    assert _complete(script, "mhla", "data", "pack", "--to") == {"--to"}
    assert "--prompt" not in _complete(script, "mhla", "run", "--")
    assert _complete(script, "lightning", "run", "classification/convnet_m") == {
        "classification/convnet_mnist_cpu"
    }


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_scripts_of_other_shells_name_the_same(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(
        word in text for word in ("test-operator", "--run-id", "pack", "language/lm_tiny_mhla_stdlib_cpu")
    )
    if shutil.which(shell):
        assert subprocess.run([shell, "-n", "/dev/stdin"], input=text, text=True, check=False).returncode == 0


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["completion", "tcsh"])
    assert stopped.value.code == 2
    assert "tcsh" in capsys.readouterr().err
