"""The notebooks in examples/notebooks/: stripped, public names alone, shown by the site, and executed."""

from __future__ import annotations

import ast
import base64
import importlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from docs.scripts import notebooks, run_notebooks
from docs.scripts.notebooks import RECORDS, SOURCES, cells
from docs.scripts.pages import notebooks as notebook_pages
from tests.house.source import ROOT

NOTEBOOKS = sorted(SOURCES.glob("*.ipynb"))
_CODE = ("execution_count", "outputs")
each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(notebook: Path) -> list[ast.Module]:
    """The parsed code cells."""
    return [ast.parse(cell["source"]) for cell in cells(notebook) if cell["cell_type"] == "code"]


@each
def test_a_notebook_is_stripped_and_names_no_machine(notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert content["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(set(cell) <= {"cell_type", "id", "metadata", "source", *_CODE} for cell in content["cells"])
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["execution_count"], cell["outputs"]) == (None, [])


@each
def test_stripping_restores_the_file_that_jupyter_has_changed(notebook: Path, tmp_path: Path) -> None:
    ran = json.loads(notebook.read_text(encoding="utf-8"))
    ran["metadata"]["language_info"]["version"] = "3.11.7"
    for cell in ran["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["1\n"]}]
            cell |= {"execution_count": 3, "metadata": {"scrolled": True}}
    (tmp_path / "ran.ipynb").write_text(json.dumps(ran), encoding="utf-8")
    run_notebooks.strip(tmp_path / "ran.ipynb")
    assert (tmp_path / "ran.ipynb").read_text(encoding="utf-8") == notebook.read_text(encoding="utf-8")


@each
def test_its_imports_resolve_to_public_names(notebook: Path) -> None:
    nodes = [node for tree in code_of(notebook) for node in ast.walk(tree)]
    private = [node.attr for node in nodes if isinstance(node, ast.Attribute) and node.attr.startswith("_")]
    assert [name for name in private if not name.startswith("__")] == []
    ours = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
                if node.module.startswith("mhla_lightning"):
                    assert alias.name in module.__all__, f"{node.module}.{alias.name} is not public"
                    ours.add(alias.name)
    assert ours


@each
def test_its_links_have_targets(notebook: Path) -> None:
    text = "\n".join(cell["source"] for cell in cells(notebook) if cell["cell_type"] == "markdown")
    targets = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert targets
    assert [link for link in targets if not (SOURCES / link).exists()] == []


@each
def test_the_site_the_readme_and_getting_started_lead_to_it(notebook: Path) -> None:
    text = (ROOT / "mkdocs.yml").read_text().replace("!!python/object/apply:pymdownx.slugs.slugify ", "")
    tabs: dict[str, list] = {
        name: pages for tab in yaml.safe_load(text)["nav"] for name, pages in tab.items()
    }
    place = notebook_pages()[notebook.relative_to(ROOT).as_posix()]
    assert [place] in [list(entry.values()) for entry in tabs["Notebooks"]]
    assert f"(examples/notebooks/{notebook.name})" in (ROOT / "README.md").read_text()
    assert f"(../examples/notebooks/{notebook.name})" in (ROOT / "docs/getting-started.md").read_text()


@each
def test_the_recorded_outputs_are_of_this_code(notebook: Path) -> None:
    found = notebooks.record(notebook)
    assert any(output["pictures"] for output in found)
    assert any(output["text"] for output in found)


def test_the_recorded_pictures_are_small_and_all_used() -> None:
    used = {name for path in NOTEBOOKS for one in notebooks.record(path) for name in one["pictures"]}
    sizes = {path.name: path.stat().st_size for path in RECORDS.glob("*.png")}
    assert set(sizes) == used
    assert max(sizes.values()) <= 150 * 1024, sizes
    assert sum(sizes.values()) <= 1024**2, sizes


def test_formulas_become_mathml_and_code_stays() -> None:
    pytest.importorskip("latex2mathml", reason="the extra docs is not installed")
    shown = notebooks.with_mathml("Token $q_i$ costs `$5`.\n\n$$\nS = \\sum_b m_{ib}\n$$\n")
    assert shown.count("<math") == 2
    assert "<msub><mi>q</mi><mi>i</mi></msub>" in shown
    assert 'display="block"' in shown
    assert "`$5`" in shown


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A notebook of two cells in a checkout of its own."""
    source = tmp_path / "examples" / "small.ipynb"
    source.parent.mkdir()
    both = [
        {"cell_type": "markdown", "source": ["# Small"]},
        {"cell_type": "code", "source": ["print(1 < 2)\n", "draw()"]},
    ]
    source.write_text(json.dumps({"cells": both}))
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    for module in (notebooks, run_notebooks):
        monkeypatch.setattr(module, "RECORDS", tmp_path)
    return source


def run_of(notebook: Path) -> SimpleNamespace:
    """What nbclient returns for the notebook `small`."""
    drawn = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(drawn, "png")
    outputs = [
        SimpleNamespace(output_type="stream", name="stdout", text="True & so on\n"),
        SimpleNamespace(output_type="stream", name="stderr", text="a warning\n"),
        SimpleNamespace(
            output_type="display_data", data={"image/png": base64.b64encode(drawn.getvalue()).decode()}
        ),
    ]
    first, second = cells(notebook)
    return SimpleNamespace(
        cells=[SimpleNamespace(**first), SimpleNamespace(**{**second, "outputs": outputs})]
    )


def test_a_page_shows_recorded_text_and_pictures(small: Path) -> None:
    pytest.importorskip("latex2mathml", reason="the extra docs is not installed")
    run_notebooks.write_record(small, run_of(small))
    page = notebooks.page(small)
    assert page.startswith("# Small\n\n```python\nprint(1 < 2)\ndraw()\n```\n\n")
    assert "<pre>True &amp; so on</pre>" in page
    assert '<img src="small-00-0.png"' in page
    assert "a warning" not in page
    with Image.open(small.parents[1] / "small-00-0.png") as drawn:
        assert drawn.size == (4, 3)


def test_outputs_of_other_code_are_refused(small: Path) -> None:
    with pytest.raises(ValueError, match="make notebooks"):
        notebooks.record(small)  # no record yet
    run_notebooks.write_record(small, run_of(small))
    small.write_text(small.read_text().replace("1 < 2", "1 < 3"))
    with pytest.raises(ValueError, match="make notebooks"):
        notebooks.record(small)


RESULTS: dict[str, tuple[str, Callable[..., bool]]] = {
    "1_mhla_from_its_equations": (
        r"rank of the linear matrix: (\d+)[^$]*rank of the MHLA matrix: (\d+)",
        lambda linear, mhla: linear == 16 and mhla > 128,
    ),
    "2_train_a_classifier": (r"held-out digits read: ([\d.]+) %", lambda top1: top1 > 80),
    "3_language_model_and_its_state": (
        r"mhla +(\d+) KiB after 256 tokens, +(\d+) KiB after 4,096",
        lambda short, long: short == long > 0,
    ),
    "4_swap_attention_and_fine_tune": (
        r"mhla, swapped +([\d.]+)[^$]*mhla, fine-tuned +([\d.]+)[^$]*mhla, from random +([\d.]+)",
        lambda swapped, tuned, scratch: tuned < min(swapped, scratch),
    ),
    "5_your_own_operator": (r"agents +([\d.]+) %", lambda top1: top1 > 60),
}
"""Notebook -> where its result is printed, and what must be true of it."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@each
def test_it_runs_in_a_fresh_kernel(notebook: Path) -> None:
    """Issue 21: executed by nbclient, about a minute each on a quiet machine."""
    run = run_notebooks.executed(notebook)
    text = "\n".join(run_notebooks.printed(cell) for cell in run.cells if cell.cell_type == "code")
    pattern, holds = RESULTS[notebook.stem]
    found = re.search(pattern, text)
    assert found is not None, text
    assert holds(*map(float, found.groups())), found.group()
    assert any(run_notebooks.pictures(cell) for cell in run.cells if cell.cell_type == "code")
