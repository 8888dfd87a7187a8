"""A run of a VLT from its start to timm: batch normalisation, four stages, lists of operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from mhla_lightning.cli.main import main
from tests.helpers.killed_runs import exact_metrics, fit, fit_killed
from tests.helpers.ranks import Nursery

VLT = [
    "--model.backbone",
    "vlt_tiny",
    "--model.attention",
    "[[mhla, linear], {name: mhla, preset: ravlt}, softmax, softmax]",
    "--model.backbone_options",
    "{img_size: 8, embed_dims: [8, 8, 16, 16], depths: [2, 1, 1, 1], num_heads: [1, 1, 2, 2], head_dim: 16}",
]


@pytest.mark.slow  # three trainings in processes of their own
def test_a_killed_vlt_resumes_bit_for_bit_and_timm_opens_it(
    nursery: Nursery, recipe: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    extra = [*VLT, "--checkpoint.every_n_steps", "3"]
    fit(nursery, recipe, whole, *extra)
    assert fit_killed(nursery, recipe, cut, 7, *extra)
    fit(nursery, recipe, cut, *extra)
    assert exact_metrics(cut) == exact_metrics(whole)
    files = []
    for run in (whole, cut):
        folder = tmp_path / f"timm-{run.name}"
        assert main(["export", str(run), "--format", "timm", "--to", str(folder)]) == 0
        files.append(load_file(folder / "model.safetensors"))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'timm-cut'}", pretrained=True).eval()
    held = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    assert held.keys() == files[1].keys()
    assert all(torch.equal(value, files[1][name]) for name, value in held.items())
    assert [type(block.attn.attention).__name__ for block in model.stages[0].blocks] == ["MHLA", "Linear"]
    features: Any = timm.create_model(
        f"local-dir:{tmp_path / 'timm-cut'}", pretrained=True, features_only=True, img_size=64
    ).eval()
    assert [tuple(found.shape[-2:]) for found in features(torch.zeros(1, 3, 64, 64))] == [
        (16, 16),
        (8, 8),
        (4, 4),
        (2, 2),
    ]
