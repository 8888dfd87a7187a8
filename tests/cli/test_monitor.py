"""`mhla monitor`: the names under which TensorBoard shows runs."""

from __future__ import annotations

from pathlib import Path

from mhla_lightning.cli.monitor import link_runs


def make_run(folder: Path) -> Path:
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "recipe.yaml").touch()
    return folder


def links(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path.resolve() for path in folder.rglob("*") if path.is_symlink()}


def test_every_run_has_its_name_also_those_that_start_later(tmp_path: Path) -> None:
    root, shown = tmp_path / "runs", tmp_path / "links"
    shown.mkdir()
    digits, row = make_run(root / "digits"), make_run(root / "compare-1" / "mhla-seed0")
    (digits / "slurm").mkdir()
    (digits / "slurm" / "recipe.yaml").touch()  # a job's copy, no run
    link_runs([], root, shown)
    expected = {"digits": digits / "tensorboard", "compare-1/mhla-seed0": row / "tensorboard"}
    assert links(shown) == expected
    later = make_run(root / "later")
    link_runs([], root, shown)
    assert links(shown) == expected | {"later": later / "tensorboard"}
    assert not list((digits / "tensorboard").iterdir())


def test_one_run_has_its_name_too(tmp_path: Path) -> None:
    root, shown = tmp_path / "runs", tmp_path / "links"
    shown.mkdir()
    run = make_run(root / "digits")
    make_run(root / "other")
    link_runs(["digits"], root, shown)
    assert links(shown) == {"digits": run / "tensorboard"}
