"""The README and the guides: length, links, and the example in Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mhla_lightning.config.recipes import load_recipe
from tests.house.source import ROOT, tracked

GUIDES = [name for name in tracked("*.md") if name.startswith("docs/") or "/" not in name]


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1500


@pytest.mark.parametrize("guide", GUIDES)
def test_every_link_has_a_target(guide: str) -> None:
    text = (ROOT / guide).read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        name, _, heading = link.partition("#")
        if name.startswith("http"):
            continue
        target = (ROOT / guide).parent / name if name else ROOT / guide
        assert target.exists(), f"{guide}: {link}"
        if heading:
            assert heading in headings(target), f"{guide}: {link}"


def headings(path: Path) -> set[str]:
    """The anchors of a guide, as GitHub writes them."""
    found = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in found}


def test_the_example_of_the_readme_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    space: dict[str, object] = {}
    exec(code, space)
    assert tuple(space["y"].shape) == (8, 280, 192)  # type: ignore[attr-defined]


def test_every_guide_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"({name})" in text for name in tracked("docs/*.md"))


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_sentences_are_short(page: str) -> None:
    long = [sentence for sentence in sentences((ROOT / page).read_text()) if len(sentence.split()) > 25]
    assert not long


def sentences(text: str) -> list[str]:
    """The sentences of a page, without code; a list item, a heading and a cell of a table end one."""
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    parts = re.split(r"\n\s*\n|\n(?=[-#|\d])|\|", text)
    return [one for part in parts for one in re.split(r"(?<=[.?!:;])\s+", " ".join(part.split()))]


def test_the_figures_are_small() -> None:
    sizes = {name: (ROOT / name).stat().st_size for name in tracked("docs/images/*")}
    assert sizes
    assert max(sizes.values()) <= 300 * 1024, sizes
    assert sum(sizes.values()) <= 2 * 1024**2, sizes


def test_every_figure_is_drawn_by_make_figures() -> None:
    script = (ROOT / "docs/scripts/figures.py").read_text()
    assert all(f'"{Path(name).name}"' in script for name in tracked("docs/images/*"))


def hours_of_the_paper() -> dict[str, str]:
    """Recipe -> GPU hours, of the tables of docs/paper.md that have recipes in their first column."""
    text = (ROOT / "docs/paper.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"(?m)^\| `\w+/.*", text)]
    return {cells[0].strip("`"): cells[1] for cells in rows}


def test_each_recipe_of_the_paper_has_its_hours() -> None:
    found = hours_of_the_paper()
    assert len(found) == 24
    assert all(float(hours) > 0 for hours in found.values())


@pytest.mark.slow  # builds twenty-four models without weights: ten seconds
def test_the_hours_of_the_paper_are_those_of_mhla_plan() -> None:
    from mhla_lightning.config.resolve import resolve
    from mhla_lightning.planning.gpus import GPUS

    for recipe, hours in hours_of_the_paper().items():
        found = resolve(load_recipe(recipe).values)
        epochs = found.data.epochs or 0
        steps = found.trainer.get("max_steps") or epochs * 1_281_167 / found.data.batch_size
        flops = 3 * found.task.flops_per_sample * found.data.batch_size * steps
        peak = GPUS["h100-80g"].bf16
        assert peak is not None
        modelled = flops / (0.4 * peak) / 3600
        assert hours == (f"{modelled:.1f}" if modelled < 10 else f"{modelled:.0f}"), recipe
