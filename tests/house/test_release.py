"""The files of a release: one version, and a workflow whose commands exist."""

from __future__ import annotations

import json
import re

import pytest
import yaml

import mhla_lightning
from tests.house.source import ROOT, tracked


def test_every_file_has_the_same_version() -> None:
    version = mhla_lightning.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.findall(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text())[0] == version
    assert f"mhla_lightning-{version}-py3" in (ROOT / "docs/getting-started.md").read_text()


@pytest.mark.parametrize("name", [*tracked(".github/*.yml"), "mkdocs.yml"])
def test_yaml_of_services_can_be_read(name: str) -> None:
    text = (ROOT / name).read_text().replace("!!python/object/apply:pymdownx.slugs.slugify ", "")
    assert isinstance(yaml.safe_load(text), dict)


def test_the_workflow_calls_targets_of_the_makefile() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = [step.removeprefix("make ") for step in steps if step.startswith("make ")]
    assert targets == ["test", "docs"]
    assert all(re.search(rf"(?m)^{name}:", (ROOT / "Makefile").read_text()) for name in targets)


def test_make_slow_has_every_folder_of_tests_once() -> None:
    makefile = (ROOT / "Makefile").read_text()
    listed = re.findall(r"(?m)^slow-\S+: TESTS := (.+)$", makefile)
    folders = {name.rpartition("/")[0] for name in tracked("tests/*/test_*.py")}
    whole = {"/".join(folder.split("/")[:2]) for folder in folders}
    assert sorted(" ".join(listed).split()) == sorted(whole - {"tests/slurm"})  # has a target of its own


def test_the_image_installs_extras_that_exist() -> None:
    named = re.search(r"(?m)^ARG EXTRAS=(\S+)", (ROOT / "Dockerfile").read_text())
    assert named is not None
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"(?m)^{extra} = \[", project) for extra in named[1].split(","))
    json.loads((ROOT / ".devcontainer.json").read_text())
