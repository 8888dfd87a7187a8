"""A text-to-image run in pixels from its start to its weights: grids, a kill, an export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mhla_lightning.cli.main import main
from mhla_lightning.runs.folder import RunFolder
from tests.helpers.captioned_images import write_captioned, write_recipe
from tests.helpers.killed_runs import continued_alike
from tests.helpers.ranks import Nursery

CALLBACKS = """[{class_path: mhla_lightning.callbacks.SampleLog},
  {class_path: mhla_lightning.callbacks.EMA, init_args: {decay: 0.9}},
  {class_path: mhla_lightning.callbacks.SampleGrids, init_args: {grids: 1, first: 4, steps: 2, per_class: 2,
    prompts: [a box in the left, bar, '']}}]"""


@pytest.mark.slow  # four trainings, three of them in processes of their own
def test_a_killed_run_resumes_bit_for_bit_and_its_weights_are_loaded_back(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", write_captioned(tmp_path / "shards"))
    whole = continued_alike(nursery, recipe, "--trainer.callbacks", CALLBACKS)
    tags = {json.loads(line)["tag"] for line in (whole / "metrics.jsonl").read_text().splitlines()}
    assert {"train/loss", "val/loss", "val_ema/loss"} <= tags
    events = EventAccumulator(str(RunFolder(whole).tensorboard), size_guidance={"images": 0})
    events.Reload()
    (grid,) = events.Images("samples")
    assert (grid.step, grid.width, grid.height) == (40, 3 * 9 + 1, 2 * 9 + 1)

    assert main(["export", "whole", "--to", "whole.safetensors"]) == 0
    assert main(["export", "whole", "--to", "folder"]) == 0
    assert main(["import", "sana", "folder", "--out", "again.safetensors"]) == 0
    one, other = load_file("whole.safetensors"), load_file("again.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    started = ["--trainer.max_steps", "1", "--model.init_from", "whole.safetensors"]
    still = ["--model.optimizer.lr", "1e-20", "--trainer.val_check_interval", "1"]
    assert main(["run", str(recipe), "--run-id", "next", *started, *still]) == 0
    draw = ["--prompt", "a box in the left", "--steps", "2", "--device", "cpu"]
    for name in ("whole", "next"):
        assert main(["sample", name, *draw, "--out", name]) == 0
    drawn = [np.load(next((tmp_path / name / "parts").glob("*.npy"))) for name in ("whole", "next")]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1


@pytest.mark.slow  # starts a run
def test_a_text_model_refuses_images_without_captions_and_wide_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", write_captioned(tmp_path / "bare", captions=False))
    assert main(["run", str(recipe), "--run-id", "bare"]) == 2
    assert "its first sample has no caption (KEY.txt)" in capsys.readouterr().err
    captioned = write_captioned(tmp_path / "shards")
    wide = ["--data.path", str(captioned), "--data.text_encoder.tokens", "7"]
    assert main(["run", str(recipe), "--run-id", "wide", *wide]) == 2
    assert "--model.backbone_options.text_length: it is 6" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))
