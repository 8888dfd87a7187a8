"""Whole models are pickled, for spawned processes and `torch.save(model)`."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from mhla_lightning.backbones import build_backbone
from tests.helpers.classifiers import TINY_VLT

SMALL: dict[str, dict[str, Any]] = {
    "deit_tiny": {"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "dit_s2": {"input_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "wan_tiny": {},
    "lm_tiny": {"depth": 2, "embed_dim": 16},
    "convnet_tiny": {},
    "vlt_tiny": TINY_VLT,
}


@pytest.mark.parametrize("name", SMALL)
def test_a_model_is_pickled(name: str) -> None:
    model = build_backbone(name, attention="none" if name == "convnet_tiny" else "mhla", **SMALL[name])
    other = pickle.loads(pickle.dumps(model)).state_dict()
    assert all(torch.equal(value, other[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "shape"), [("deit_tiny", (0, 3, 64, 64)), ("lm_tiny", (0, 12))])
def test_a_model_takes_an_empty_batch(name: str, shape: tuple[int, ...]) -> None:
    model = build_backbone(name, attention="mhla", **SMALL[name])
    batch = torch.zeros(shape, dtype=torch.int64 if name == "lm_tiny" else torch.float32)
    assert len(model(batch)) == 0
    with torch.no_grad():
        assert len(model.eval()(batch)) == 0
