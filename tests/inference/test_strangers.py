"""A run folder from a stranger runs no code: every way in, through every verb that rebuilds a run.

Before the checks the ways `import`, `deep`, `data`, `dataclass` and `function` ran the module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mhla_lightning.cli.main import main
from mhla_lightning.config.classes import check_packages
from mhla_lightning.config.resolve import Resolved
from mhla_lightning.evaluation.networks import find_classifier
from mhla_lightning.inference.rebuilding import rebuild
from mhla_lightning.integrations.from_run import to_hf
from mhla_lightning.runs.folder import RunFolder
from mhla_lightning.tasks import LanguageTask
from tests.helpers.errors import refused
from tests.helpers.images import TINY_RECIPE
from tests.helpers.language_runs import RECIPE as LANGUAGE

Values = dict[str, Any]
EVIL = {"class_path": "stranger_module.Evil"}
CODE = """
import pathlib
from mhla_lightning.tasks import LanguageTask
MARKER = pathlib.Path(__file__).with_name("marker")
MARKER.touch()
class Evil:
    def __init__(self, **given): MARKER.touch()
class LinearTask(LanguageTask):
    pass
def evil(**given): MARKER.touch()
"""
DIFFUSION = """
model: {class_path: mhla_lightning.tasks.ImageDiffusionTask, init_args: {backbone: dit_s2}}
data: {class_path: mhla_lightning.data.ImageDataModule, init_args: {path: .}}
"""
VIDEO = DIFFUSION.replace("ImageDiffusionTask", "VideoDiffusionTask").replace("dit_s2", "wan_tiny")


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a stranger's code would leave; its module can be imported."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "stranger_module.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "stranger_module", raising=False)
    return tmp_path / "code" / "marker"


def folder(tmp_path: Path, recipe: str | Values) -> Path:
    """A run folder with one checkpoint, complete as far as the verbs look before they rebuild the run."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    for name in ("COMPLETE", "trainer.ckpt", "weights.safetensors"):
        (checkpoint / name).touch()
    (run / "tokenizer_name.json").write_text('{"format": 1, "name": "bytes"}')
    (run / "recipe.yaml").write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    return run


def with_options(recipe: str, options: Values) -> Values:
    """A recipe with further `backbone_options`, which take any values."""
    values: Values = yaml.safe_load(recipe)
    arguments = values["model"]["init_args"]
    arguments["backbone_options"] = {**(arguments.get("backbone_options") or {}), **options}
    return values


def rebuilt(run: Path) -> Resolved:
    return rebuild(RunFolder(run), LanguageTask, "a test needs a language model")


def shell(marker: Path, path: str = "subprocess.Popen") -> Values:
    return {"class_path": path, "init_args": {"args": ["touch", str(marker)]}}


def flow(value: Values) -> str:
    return yaml.safe_dump(value, default_flow_style=True)


def in_options(value: Any) -> Callable[[Values, Path], None]:
    def change(values: Values, marker: Path) -> None:
        values["model"]["init_args"]["backbone_options"]["x"] = value(marker) if callable(value) else value

    return change


def in_model(**arguments: Any) -> Callable[[Values, Path], None]:
    return lambda values, marker: values["model"]["init_args"].update(arguments)


HOLDER = "torch.nn.Identity"
REEXPORT = "torch.utils.collect_env.subprocess.Popen"
WAYS: dict[str, tuple[Callable[[Values, Path], None], str]] = {
    "import": (in_options(EVIL), "model.backbone_options.x.class_path"),
    "deep": (
        in_options([{"y": {"class_path": HOLDER, "init_args": {"z": [EVIL]}}}]),
        "model.backbone_options.x.0.y.z.0.class_path",
    ),
    "dict_kwargs": (
        lambda values, marker: values["model"].update(dict_kwargs={"x": EVIL}),
        "model.dict_kwargs.x.class_path",
    ),
    "data": (
        lambda values, marker: values["data"]["init_args"].update(reading={"num_workers": EVIL}),
        "data.reading.num_workers.class_path",
    ),
    "data class": (lambda values, marker: values["data"].update(EVIL), "data.class_path"),
    "task": (lambda values, marker: values["model"].update(EVIL), "model.class_path"),
    "main module": (
        lambda values, marker: values["model"].update(class_path="mhla_lightning.__main__.main"),
        "model.class_path",
    ),
    "dataclass": (in_model(loss="stranger_module.Evil"), "model.loss"),
    "function": (in_model(backbone={"class_path": "stranger_module.evil"}), "model.backbone.class_path"),
    "text": (in_options(flow(EVIL)), "model.backbone_options.x"),
    "text in a text": (in_options(flow({"y": flow(EVIL)})), "model.backbone_options.x"),
    "escaped text": (in_options('{"class\\u005fpath": "stranger_module.Evil"}'), "model.backbone_options.x"),
    "shell": (in_options(shell), "model.backbone_options.x.class_path"),
    "shell of torch": (
        in_options(lambda marker: shell(marker, REEXPORT)),
        "model.backbone_options.x.class_path",
    ),
    "text of torch": (
        in_options(lambda marker: flow(shell(marker, REEXPORT))),
        "model.backbone_options.x",
    ),
    "shell for an object": (
        lambda values, marker: values["model"]["init_args"].update(loss=shell(marker, REEXPORT)),
        "model.loss.class_path",
    ),
    "class for plain values": (in_options({"class_path": HOLDER}), "model.backbone_options.x.class_path"),
    "wrong kind": (in_model(optimizer={"class_path": HOLDER}), "model.optimizer.class_path"),
    "no path": (in_options({"class_path": ["os.system"]}), "model.backbone_options.x.class_path"),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_class_of_a_stranger_is_imported_or_built(way: str, tmp_path: Path, marker: Path) -> None:
    values = yaml.safe_load(LANGUAGE)
    change, key = WAYS[way]
    change(values, marker)
    with refused(key):
        rebuilt(folder(tmp_path, values))
    assert not marker.exists()
    assert "stranger_module" not in sys.modules


VERBS: dict[str, tuple[str, list[str]]] = {
    "generate": (LANGUAGE, ["generate", "RUN", "--prompt", "a", "--device", "cpu"]),
    "eval lm": (LANGUAGE, ["eval", "lm", "RUN", "--tasks", "x", "--device", "cpu"]),
    "export a language model": (LANGUAGE, ["export", "RUN", "--to", "OUT", "--format", "hf"]),
    "export a classifier": (TINY_RECIPE, ["export", "RUN", "--to", "OUT"]),
    "sample images": (DIFFUSION, ["sample", "RUN", "--n", "1", "--out", "OUT", "--device", "cpu"]),
    "sample videos": (VIDEO, ["sample", "RUN", "--prompt", "a", "--out", "OUT", "--device", "cpu"]),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_rebuilds_a_run_refuses_its_code(
    verb: str, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, words = VERBS[verb]
    named = {"RUN": str(folder(tmp_path, with_options(recipe, {"x": EVIL}))), "OUT": str(tmp_path / "out")}
    assert main([named.get(word, word) for word in words]) == 2
    said = capsys.readouterr().err
    assert "model.backbone_options.x.class_path: 'stranger_module.Evil' is not imported" in said
    assert not marker.exists()


@pytest.mark.parametrize(("call", "recipe"), [(to_hf, LANGUAGE), (find_classifier, TINY_RECIPE)])
def test_the_doors_in_python_refuse_it_too(
    call: Callable[[str], object], recipe: str, tmp_path: Path, marker: Path
) -> None:
    with refused("model.backbone_options.x.class_path"):
        call(str(folder(tmp_path, with_options(recipe, {"x": EVIL}))))
    assert not marker.exists()


def test_the_copy_in_a_checkpoint_is_no_way_round(tmp_path: Path, marker: Path) -> None:
    values = with_options(LANGUAGE, {"x": EVIL})
    run = folder(tmp_path, values)
    (run / "recipe.yaml").rename(run / "checkpoints" / "step-00000001" / "recipe.yaml")
    (run / "recipe.yaml").write_text("model: [")
    with refused("model.backbone_options.x.class_path"):
        rebuilt(run)
    assert not marker.exists()


def test_imports_count_in_the_folders_recipe_and_never_in_a_checkpoint(tmp_path: Path, marker: Path) -> None:
    values = {**yaml.safe_load(LANGUAGE), "imports": ["stranger_module"]}
    values["model"]["class_path"] = "stranger_module.LinearTask"
    run = folder(tmp_path, values)
    copy = run / "checkpoints" / "step-00000001" / "recipe.yaml"
    copy.write_text((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text("model: [")
    with refused(str(run / "recipe.yaml")):
        rebuilt(run)
    assert not marker.exists()
    (run / "recipe.yaml").write_text(copy.read_text())
    assert type(rebuilt(run).task).__name__ == "LinearTask"
    assert marker.exists()


def test_code_inside_the_run_folder_is_never_imported(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder(tmp_path, {**yaml.safe_load(LANGUAGE), "imports": ["brought_along"]})
    (run / "brought_along.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(run)  # python -m mhla_lightning, started in the folder
    with refused("imports.0"):
        rebuilt(run)
    assert not marker.exists()


@pytest.mark.parametrize("value", [float("nan"), ["x: [.nan]", float("nan")]])
def test_no_number_of_a_recipe_is_followed_without_end(value: Any) -> None:
    """NaN differs from itself, so a search for texts that differ once parsed never ended."""
    check_packages({"init_args": {"mean": value}}, "model", ("mhla_lightning",))
    with refused("model.evil.class_path"):
        check_packages({"init_args": {"mean": value, "evil": {"class_path": "os.system"}}}, "model", ())
