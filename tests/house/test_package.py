"""The house: what the wheel holds, what imports what, what the command line answers without torch."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from mhla_lightning.cli.main import VERBS, main

ROOT = Path(__file__).parents[2]
TRACKED_FOLDERS = ("mhla_lightning", "callbacks", "recipes", "cluster")


def tracked() -> list[Path]:
    out = subprocess.run(
        ["git", "ls-files", *TRACKED_FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [
        Path(line) for line in out.splitlines() if not (ROOT / line).is_symlink() and (ROOT / line).is_file()
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves a folder behind that the next one would pick up."""
    target = tmp_path_factory.mktemp("wheel")
    source = target / "source"
    shutil.copytree(
        ROOT,
        source,
        symlinks=True,
        ignore=shutil.ignore_patterns(
            ".venv", ".git", "runs-*", "build", "dist", "*.egg-info", "__pycache__"
        ),
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(target),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_one_package_with_every_tracked_file(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"mhla_lightning"}
    expected = {
        str(path) if path.parts[0] == "mhla_lightning" else f"mhla_lightning/{path}" for path in tracked()
    }
    assert expected - set(names) == set()


def test_compromised_lightning_releases_are_excluded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in ("lightning", "pytorch-lightning"):
        (line,) = [d for d in project["dependencies"] if d.startswith((f"{name}>", f"{name}="))]
        assert "!=2.6.2" in line
        assert "!=2.6.3" in line
        assert ">=2.6.6" in line


FORBIDDEN = {
    "mhla_lightning/attention": (
        "lightning",
        "deepspeed",
        "timm",
        "mhla_lightning.backbones",
        "mhla_lightning.tasks",
        "mhla_lightning.data",
    ),
    "mhla_lightning/backbones": (
        "lightning",
        "deepspeed",
        "mhla_lightning.tasks",
        "mhla_lightning.data",
        "mhla_lightning.callbacks",
    ),
    "mhla_lightning/tasks": (
        "mhla_lightning.data",
        "mhla_lightning.callbacks",
        "mhla_lightning.strategies",
        "mhla_lightning.checkpoints",
    ),
    "mhla_lightning/data": (
        "mhla_lightning.tasks",
        "mhla_lightning.callbacks",
        "mhla_lightning.cli",
        "mhla_lightning.backbones",
    ),
    "callbacks": ("mhla_lightning.cli", "mhla_lightning.data", "mhla_lightning.tasks"),
    "cluster": ("torch", "lightning"),
}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_arrows_point_down(folder: str) -> None:
    for path in (p for p in tracked() if p.suffix == ".py" and str(p).startswith(f"{folder}/")):
        for name in imports(ROOT / path):
            assert not any(name == bad or name.startswith(f"{bad}.") for bad in FORBIDDEN[folder]), (
                f"{path} imports {name}"
            )


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


def test_bench_attention_writes_rows_and_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhla_lightning.bench.timing.GEMM_SIDE", 64)
    target = tmp_path / "bench.json"
    arguments = [
        "bench",
        "attention",
        "--tokens",
        "64",
        "128",
        "--slope-to",
        "0",
        "--heads",
        "2",
        "--dim",
        "8",
        "--blocks",
        "8",
        "--turns",
        "5",
    ]
    assert main([*arguments, "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    assert [(row["tokens"], row["operator"]) for row in result["rows"]] == [
        (n, name) for n in (64, 128) for name in ("softmax", "linear", "mhla")
    ]
    assert all(row["forward_seconds"] > 0 and row["turns"] == 5 for row in result["rows"])
    keys = (
        "sdpa_over_mhla_forward",
        "sdpa_over_mhla_step",
        "mhla_over_linear_forward",
        "mhla_over_linear_step",
        "mhla_over_gemm_forward",
        "mhla_over_gemm_step",
    )
    assert set(keys) <= result["summary"].keys()


def test_bench_refuses_what_cannot_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", "--turns", "2"]) == 2
    assert "--turns is 2; it must be at least 5" in capsys.readouterr().err
    assert main(["bench", "attention", "--tokens", "100", "--blocks", "99", "--slope-to", "0"]) == 2
    assert "blocks=99 does not fit an axis of 100 tokens" in capsys.readouterr().err
