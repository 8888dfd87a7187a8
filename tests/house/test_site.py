"""The documentation site: generated pages, links, and a whole build."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import mhla_lightning
from docs.scripts import check_links, commands, pages, python_pages, recipe_keys
from docs.scripts.docstring_lists import split_entries
from mhla_lightning.cli.main import VERBS
from mhla_lightning.config.recipes import load_recipe, recipe_names
from tests.house.source import ROOT


@pytest.fixture(scope="module")
def keys_page() -> str:
    return recipe_keys.page()


def test_the_commands_page_has_every_verb_and_option() -> None:
    page = commands.page()
    assert [line for line in page.splitlines() if line.startswith("## ")] == [f"## mhla {v}" for v in VERBS]
    assert "### mhla data pack" in page
    assert "`--run-id NAME`" in page


def test_the_recipes_page_has_every_recipe_with_its_purpose() -> None:
    page = recipe_keys.list_page()
    assert all(f"| `{name}` | " in page for name in recipe_names())
    assert "75.8 % top-1" in page


@pytest.mark.parametrize("name", recipe_names())
def test_the_keys_page_has_every_key_of_a_recipe(name: str, keys_page: str) -> None:
    values = load_recipe(name).values
    for section in ("model", "data"):
        written = _keys(values[section]["init_args"], section)
        missing = [key for key in written if f"`{key}`" not in keys_page]
        assert not missing


def test_links_of_the_keys_page_lead_to_the_guides(keys_page: str) -> None:
    assert "](../trainer-arguments.md#loggers)" in keys_page
    assert "](../strategies.md)" in keys_page


def _keys(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """The dotted keys of a section; options of operators and backbones are in tables of their own."""
    for key, value in values.items():
        place = f"{prefix}.{key}"
        if isinstance(value, Mapping) and key not in ("attention", "backbone_options", "diffusion"):
            yield from _keys(value, place)
        else:
            yield place


def test_links_of_trainer_notes_work_from_the_keys_page(keys_page: str) -> None:
    assert "](../trainer-arguments.md#loggers)" in keys_page
    assert "](#" not in keys_page


def test_the_python_page_names_everything_public() -> None:
    page = python_pages.page()
    aliases = {"compare"}  # stands for compare_recipe
    assert all(f"heading: mhla.{name}\n" in page for name in set(mhla_lightning.__all__) - aliases)


def test_links_to_files_of_the_checkout_become_links_to_pages() -> None:
    text = "[a](docs/data.md#make-shards) [b](CONTRIBUTING.md) [c](https://x.org) ![d](docs/images/d.svg)"
    moved = pages.relinked(text, "README.md", "index.md")
    assert moved == "[a](data.md#make-shards) [b](contributing.md) [c](https://x.org) ![d](images/d.svg)"
    assert pages.relinked("[a](../README.md#start)", "docs/faq.md", "faq.md") == "[a](index.md#start)"
    assert pages.relinked("[a](profiles/x.yaml)", "cluster/README.md", "rooms/cluster.md").endswith("x.yaml)")


def test_entries_of_several_arguments_are_read_one_by_one() -> None:
    assert split_entries("Args:\n    seed, order: of it.\n    x: y") == (
        "Args:\n    seed: of it.\n    order: of it.\n    x: y"
    )


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<a href="b.html#there">', None),
        ('<a href="c.html">', "a.html: no target for c.html"),
        ('<a href="b.html#gone">', "a.html: no target for b.html#gone"),
        ('<script src="https://x.org/y.js">', "a.html: loads https://x.org/y.js"),
        ('<img src="none.png">', "a.html: no target for none.png"),
        ('<a href="https://x.org">', None),
    ],
)
def test_the_link_checker_names_each_problem(tmp_path: Path, html: str, problem: str | None) -> None:
    (tmp_path / "a.html").write_text(html)
    (tmp_path / "b.html").write_text('<h2 id="there">')
    assert list(check_links.problems(tmp_path)) == ([problem] if problem else [])


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_its_links_have_targets(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert list(check_links.problems(tmp_path / "site")) == []
