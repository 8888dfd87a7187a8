"""`mhla export` of runs trained by one process, DDP and ZeRO, and other readers of weights."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mhla_lightning.backbones import build_backbone
from mhla_lightning.cli.main import main
from mhla_lightning.conversion.hub import HubModel
from mhla_lightning.inference.loading import find_language_run, load_model
from mhla_lightning.runs.folder import RunFolder, newest_checkpoint, read_metrics
from mhla_lightning.weights.warm_start import read_weights
from tests.helpers.images import TINY_RECIPE
from tests.helpers.ranks import Nursery
from tests.helpers.texts import text_folder, texts_of_all_lengths

LANGUAGE = """
seed_everything: 0
trainer: {accelerator: cpu, devices: 2, max_steps: 3, val_check_interval: 3, callbacks: []}
model:
  class_path: mhla_lightning.tasks.LanguageTask
  init_args:
    backbone: lm_tiny
    attention: {name: mhla, chunk_size: 8, max_chunks: 8}
    backbone_options: {context: 64, embed_dim: 32, depth: 2, intermediate: 64}
    optimizer: {lr: 1.0e-2}
data:
  class_path: mhla_lightning.data.TokenDataModule
  init_args:
    {path: data, source: texts, tokenizer: bytes, length: 64, batch_size: 8, num_workers: 0, val: 0.2}
checkpoint: {every_n_steps: 3, keep_last: 1}
"""
SHORT = ["--trainer.max_steps", "3", "--trainer.val_check_interval", "3", "--checkpoint.every_n_steps", "3"]
# with the default, small weights are not split
ZERO3 = "{name: zero3, zero_optimization: {stage3_param_persistence_threshold: 0}}"
STRATEGIES = {"ddp": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": ZERO3}
SHARDED = [
    pytest.param("zero1", marks=pytest.mark.slow),
    pytest.param("zero2", marks=pytest.mark.slow),
    "zero3",
]  # stage 1 writes what stage 2 does, by the same code
WEIGHTS = {"averaged": [], "raw": ["--no-ema"]}


class Runs:
    """Runs of three steps, each trained when it is first requested.

    `single` trains on one process, all others on two.

    Args:
        folder: holds the recipes tiny.yaml and language.yaml.
        nursery: starts the ranks.
    """

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        self.folder, self.root, self.nursery = folder, folder / "runs", nursery

    def __call__(self, name: str) -> Path:
        if not (self.root / name).exists():
            if name == "language":
                arguments = ["language.yaml", "--trainer.strategy", "zero2"]
            else:
                arguments = [
                    "tiny.yaml",
                    *SHORT,
                    *(
                        []
                        if name == "single"
                        else ["--trainer.devices", "2", "--trainer.strategy", STRATEGIES[name]]
                    ),
                ]
            self.nursery.run(
                1 if name == "single" else 2,
                ["run", *arguments, "--run-id", name, "--runs", str(self.root)],
                self.folder,
            )
        return self.root / name


@pytest.fixture(scope="module")
def trained(nursery: Nursery, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("export")
    (folder / "tiny.yaml").write_text(TINY_RECIPE.replace("PATH", str(shards)))
    (folder / "language.yaml").write_text(LANGUAGE)
    text_folder(folder / "texts", texts_of_all_lengths(60, 200))
    return Runs(folder, nursery)


@pytest.fixture
def runs(trained: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The runs, for commands in another folder."""
    monkeypatch.setenv("MHLA_RUNS", str(trained.root))
    monkeypatch.chdir(tmp_path)
    return trained


def checkpoint_of(run: Path) -> Path:
    found = newest_checkpoint(run)
    assert found is not None
    return found


def exported(runs: Runs, name: str, *arguments: str) -> dict[str, Tensor]:
    """The tensors of `mhla export RUN --to FILE`, which runs once."""
    file = runs.folder / f"{name}{''.join(arguments)}.safetensors"
    if not file.exists():
        assert main(["export", runs(name).name, "--to", str(file), *arguments]) == 0
    return load_file(file)


def joined(folder: Path) -> tuple[dict[str, np.ndarray], int]:
    """Join the ranks' files without our reader.

    Returns:
        flat weights by name, and the number of tensors that were split.
    """
    parts: dict[str, dict[int, np.ndarray]] = {}
    for file in sorted(folder.glob("rank-*")):
        with safe_open(file, "np") as opened:
            facts = json.loads(opened.metadata()["stretches"])
            for key in opened.keys():  # noqa: SIM118  no mapping
                kind, _, name = key.partition("/")
                if kind == "weight":
                    parts.setdefault(name, {})[facts[name]["start"]] = opened.get_tensor(key)
    split = sum(len(found) > 1 for found in parts.values())
    return {
        name: np.concatenate([found[start] for start in sorted(found)]) for name, found in parts.items()
    }, split


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), *SHARDED])
@pytest.mark.slow
def test_the_export_is_that_of_one_process(runs: Runs, strategy: str, weights: str) -> None:
    single, found = exported(runs, "single", *WEIGHTS[weights]), exported(runs, strategy, *WEIGHTS[weights])
    assert found.keys() == single.keys()
    assert max(float((found[name] - value).abs().max()) for name, value in single.items()) < 1e-6
    other = exported(runs, "single", *WEIGHTS["raw" if weights == "averaged" else "averaged"])
    assert max(float((other[name] - value).abs().max()) for name, value in single.items()) > 1e-5, (
        "the average is not the weights"
    )


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("strategy", SHARDED)
def test_the_export_equals_the_rank_files_bit_for_bit(runs: Runs, strategy: str, weights: str) -> None:
    found = exported(runs, strategy, *WEIGHTS[weights])
    held, split = joined(checkpoint_of(runs(strategy)) / ("ema" if weights == "averaged" else "shards"))
    assert split > 0
    assert found.keys() == {name.removeprefix("backbone.") for name in held}
    for name, values in held.items():
        assert np.array_equal(
            found[name.removeprefix("backbone.")].numpy().reshape(-1).view(np.int32), values.view(np.int32)
        )


def test_torch_and_timm_load_a_classifier(runs: Runs) -> None:
    state = exported(runs, "zero3")
    assert main(["export", "zero3", "--to", "folder", "--format", "timm"]) == 0
    with safe_open(runs.folder / "zero3.safetensors", "pt") as opened:
        header = opened.metadata()
    backbone: Any = build_backbone(
        header["backbone"],
        attention=json.loads(header["attention"]),
        **json.loads(header["backbone_options"]),
    )
    backbone.load_state_dict(state)
    config = json.loads(Path("folder/config.json").read_text())
    assert config["architecture"] == "deit_tiny_mhla"
    by_path = timm.create_model(
        config["architecture"], checkpoint_path="folder/model.safetensors", **config["model_args"]
    )
    by_folder = timm.create_model("local-dir:folder", pretrained=True)
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        logits = [model.eval()(images) for model in (backbone, by_path, by_folder)]
    assert logits[0].std() > 1e-3
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    prepared = timm.data.resolve_model_data_config(by_folder)
    assert (prepared["input_size"], prepared["crop_pct"]) == ((3, 8, 8), 1.0)
    assert timm.create_model("local-dir:folder", pretrained=True, num_classes=7)(images).shape == (3, 7)
    assert timm.create_model("local-dir:folder", pretrained=True, img_size=16).grid == (8, 8)


def test_the_hub_takes_a_classifier_from_its_run(runs: Runs) -> None:
    shutil.copytree(runs("single"), "copy")
    command = ["/there/mhla", "run", "/there/tiny.yaml", "--data.path=/there/digits"]
    Path("copy/environment.json").write_text(json.dumps({"command": command}))
    model = HubModel.from_run("copy")
    model.save_pretrained("hub/model")
    card = Path("hub/model/README.md").read_text()
    last = json.loads(Path("copy/summary.json").read_text())["last"]
    told = ["| Recipe | `tiny` |", "`ImageDataModule` of `", "\nmhla run tiny.yaml --data.path=digits\n"]
    for part in (*told, *(f"| {tag} |" for tag in last)):
        assert part in card, part
    assert str(runs.folder) not in card
    expected, found = exported(runs, "single"), load_file("hub/model/model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(HubModel.from_pretrained("hub/model")(images), model(images))


@pytest.mark.slow  # test_bundle.py: an exported folder, in a process of its own
def test_transformers_loads_a_language_model(runs: Runs) -> None:
    transformers = pytest.importorskip("transformers")
    state = exported(runs, "language")
    assert main(["export", "language", "--to", "folder", "--format", "hf"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained("folder")
    assert type(theirs).__module__ == "mhla_lightning.integrations.transformers"
    ours = load_model(find_language_run("language"))
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    tokens = torch.randint(0, 256, (2, 40))
    with torch.no_grad():
        logits = ours(tokens)
        assert torch.equal(theirs(tokens).logits, logits)
    assert logits.std() > 1e-3
    assert theirs.config.eos_token_id == 256


def test_generate_and_validate_read_the_files_of_the_ranks(runs: Runs) -> None:
    assert (
        main(["generate", runs("language").name, "--prompt", "abc", "--greedy", "--max-new-tokens", "5"]) == 0
    )
    found = find_language_run("language").identity()
    assert (found["averaged"], found["checkpoint"]) == (False, "step-00000003")
    validate = ["run", "tiny.yaml", "--mode", "validate", "--ckpt", str(checkpoint_of(runs("zero3"))), *SHORT]
    output = runs.nursery.run(1, [*validate, "--runs", str(runs.root)], runs.folder)
    measured = dict(re.findall(r"(val\w*/\w+)\W+([\d.]+)", output))
    written = read_metrics(RunFolder(runs("zero3")).metrics)
    assert {"val/loss", "val_ema/loss", "val/top1"} <= measured.keys()
    assert all(
        float(value) == pytest.approx(written[tag][-1][1], abs=1e-4) for tag, value in measured.items()
    )


def test_a_warm_start_reads_the_files_of_the_ranks(runs: Runs) -> None:
    checkpoint, averaged, raw = (
        checkpoint_of(runs("zero3")),
        exported(runs, "zero3"),
        exported(runs, "zero3", "--no-ema"),
    )
    places = {
        runs("zero3"): averaged,
        checkpoint: averaged,
        checkpoint / "shards": raw,
        checkpoint / "trainer.ckpt": raw,
    }
    for place, wanted in places.items():
        _, found = read_weights(str(place))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_checkpoint_folder_counts_as_its_run_and_types_change(runs: Runs) -> None:
    whole = exported(runs, "zero3", "--no-ema")
    assert (
        main(
            [
                "export",
                str(checkpoint_of(runs("zero3"))),
                "--no-ema",
                "--to",
                "half.safetensors",
                "--dtype",
                "bfloat16",
            ]
        )
        == 0
    )
    assert all(
        torch.equal(value, whole[name].bfloat16()) for name, value in load_file("half.safetensors").items()
    )
    assert main(["export", "half.safetensors", "--to", "folder", "--format", "timm"]) == 0
    assert Path("folder/model.safetensors").stat().st_mode == Path("folder/config.json").stat().st_mode


def cut(checkpoint: Path) -> None:
    file = checkpoint / "shards" / "rank-00001-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def lose(checkpoint: Path) -> None:
    (checkpoint / "shards" / "rank-00001-of-00002.safetensors").unlink()


def garble(checkpoint: Path) -> None:
    (checkpoint / "trainer.ckpt").write_bytes(b"nothing")


def without_average(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "ema")


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "shards")


@pytest.mark.parametrize(
    ("damage", "arguments", "words"),
    [
        (cut, ["--no-ema"], "rank-0000"),
        (lose, ["--no-ema"], "shards"),
        (garble, ["--no-ema"], "trainer.ckpt"),
        (empty, ["--no-ema"], "shards"),
        (without_average, ["--ema"], "leave out --ema"),
        (None, ["--ckpt", "7"], "--ckpt: 7"),
        (None, ["--format", "hf"], "--format: hf"),
        (None, ["--format", "wan"], "--format: wan"),
        (None, ["--format", "timm"], "--format: timm"),
        (None, ["--to", "here.safetensors"], "--to: here.safetensors"),
        (None, ["--to", "no/where.safetensors"], "--to: no/where.safetensors"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_mistakes_give_one_line(
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Any,
    arguments: list[str],
    words: str,
) -> None:
    shutil.copytree(runs("zero3"), tmp_path / "copy")
    Path("here.safetensors").touch()
    if damage is not None:
        damage(checkpoint_of(tmp_path / "copy"))
    before = sorted(tmp_path.rglob("*"))
    to = [] if "--to" in arguments else ["--to", "out.safetensors"]
    assert main(["export", "copy", *to, *arguments]) == 2
    sentence = capsys.readouterr().err
    assert words in sentence
    assert sentence.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["out.safetensors", "out"])
def test_a_full_disk_leaves_nothing(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    runs("zero3")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        assert main(["export", "zero3", "--to", target]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(r"^error: .*is full\n$", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
