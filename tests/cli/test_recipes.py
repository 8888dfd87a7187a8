"""`mhla recipes`: every packaged recipe is listed with its purpose, and shown as its file is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.cli.recipes import header_facts, paper_number
from mhla_lightning.config.recipes import RECIPES, recipe_names

CPU_RECIPE = "classification/deit_tiny_mhla_mnist_cpu"


def test_list_shows_every_packaged_recipe_with_its_purpose(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["recipes", "list", "--json", str(tmp_path / "list.json")]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "list.json").read_text())["rows"]
    assert [row["recipe"] for row in rows] == recipe_names() != []
    for row in rows:
        assert row["recipe"] in shown
        assert row["purpose"], f"{row['recipe']} begins without a comment that says what it is for"


def test_list_keeps_to_one_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list", "--task", "classification"]) == 0
    assert CPU_RECIPE in capsys.readouterr().out


def test_list_keeps_to_cpu_recipes_that_hold_every_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list", "--cpu", "MNIST", "pipeline", "deit"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in recipe_names() if name in shown] == [CPU_RECIPE]
    assert max(map(len, shown.splitlines())) <= 100


def test_list_says_when_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list", "wan", "--task", "language"]) == 2
    assert "no recipe fits 'wan' --task language" in capsys.readouterr().err


def test_list_refuses_an_unknown_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list", "--task", "clasification"]) == 2
    assert capsys.readouterr().err.startswith("error: --task: ")


@pytest.mark.parametrize("name", recipe_names())
def test_show_prints_the_file_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", name]) == 0
    assert capsys.readouterr().out == (RECIPES / f"{name}.yaml").read_text()


def test_show_on_a_terminal_keeps_every_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    assert main(["recipes", "show", CPU_RECIPE]) == 0
    assert capsys.readouterr().out == (RECIPES / f"{CPU_RECIPE}.yaml").read_text()


def test_show_names_the_nearest_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "classification/deit_tiny_mhla_minst_cpu"]) == 2
    assert f"did you mean '{CPU_RECIPE}'" in capsys.readouterr().err


def test_recipes_do_not_import_torch() -> None:
    code = (
        "import sys; from mhla_lightning.cli.main import main; main(['recipes', 'list']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
    )


@pytest.mark.parametrize(
    ("text", "purpose", "paper"),
    [
        (
            "# Trains it. Paper: 75.8 % top-1 (Table 2).\nmodel: 1\n",
            "Trains it. Paper: 75.8 % top-1 (Table 2).",
            "75.8 % top-1 (Table 2)",
        ),
        (
            "# Trains it.\n#\n# The paper reports FID 59.80.\nx: 1\n# Paper: 1.0\n",
            "Trains it.",
            "The paper reports FID 59.80",
        ),
        ("# Not a paper row; at least 93 % here.\nx: 1\n", "Not a paper row; at least 93 % here.", None),
        (
            "# As in the paper (arXiv 2601.07832), smaller.\nx: 1\n",
            "As in the paper (arXiv 2601.07832), smaller.",
            None,
        ),
        ("x: 1  # paper: 3.5\n", None, None),
        ("", None, None),
    ],
    ids=["label", "second line", "not a paper row", "arxiv number", "no header", "empty"],
)
def test_header_facts(text: str, purpose: str | None, paper: str | None) -> None:
    assert header_facts(text) == {"purpose": purpose, "paper": paper}


def test_a_labelled_paper_number_may_be_whole() -> None:
    assert paper_number("A model. Paper: perplexity 38") == "perplexity 38"
