"""Every recipe trains compiled as it trains plainly, made narrow and two layers deep; slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from mhla_lightning.config.recipes import apply_overrides, load_recipe, recipe_names
from mhla_lightning.config.resolve import resolve
from mhla_lightning.tasks import Task

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
NARROW: dict[str, dict[str, Any]] = {
    "ClassificationTask": {"embed_dim": 48, "num_heads": 2},
    "ImageDiffusionTask": {"embed_dim": 48, "num_heads": 2},
    "VideoDiffusionTask": {"embed_dim": 48, "num_heads": 2, "ffn_dim": 64},
    "LanguageTask": {"embed_dim": 64, "intermediate": 64, "vocab_size": 512},
    "RecallTask": {"embed_dim": 64, "intermediate": 64},
}


def narrow_task(name: str, **overrides: Any) -> Task:
    values = load_recipe(name).values
    kind = values["model"]["class_path"].rpartition(".")[2]
    options = {} if "convnet" in name else {**NARROW[kind], "depth": 3}
    changed = {f"model.backbone_options.{key}": value for key, value in options.items()}
    task = resolve(apply_overrides(values, {**changed, "model.init_from": None, **overrides})).task
    torch.manual_seed(0)
    task.configure_model()
    return task


@pytest.mark.parametrize("name", recipe_names())
def test_it_trains_compiled_as_plainly(name: str) -> None:
    torch.compiler.reset()
    plain = narrow_task(name)
    compiled = narrow_task(name, **{"model.compile": {"what": "blocks", "backend": "aot_eager"}})
    example = plain.example_batch(2)
    batch = {key: torch.randn(x.shape) if x.is_meta else x for key, x in example.items()}
    losses = []
    for task in (plain, compiled):
        torch.manual_seed(1)  # of drop path
        loss = cast(Tensor, task.train().training_step(batch, 0))
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    for mine, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None and theirs.grad is not None:
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5 * scale + 1e-9)


def test_inductor_trains_a_classifier(tmp_path: Path) -> None:
    """The default backend writes C++ here; its kernels sum in another order."""
    name = "classification/deit_tiny_mhla_mnist_cpu"
    torch.compiler.reset()
    plain, compiled = narrow_task(name), narrow_task(name, **{"model.compile": "blocks"})
    example = plain.example_batch(4)
    batch = {key: torch.randn(x.shape) if x.is_meta else x for key, x in example.items()}
    losses = []
    for task in (plain, compiled):
        optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            torch.manual_seed(1)
            loss = cast(Tensor, task.train().training_step(batch, 0))
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
