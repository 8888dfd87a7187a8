"""FLOPs of recomputation in a plan, against torch's count of real steps and against formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.cli.main import main
from mhla_lightning.planning import plan as planning
from mhla_lightning.planning.step_flops import recomputed_flops
from mhla_lightning.planning.step_memory import build, find_precision, training_step
from mhla_lightning.tasks import ClassificationTask, ImageDiffusionTask, LanguageTask, Task

EXACT = find_precision("32-true")


def language(how: Any, attention: Any = "mhla", depth: int = 4) -> Task:
    sizes = {"vocab_size": 60, "context": 64, "embed_dim": 64, "depth": depth}
    return LanguageTask("lm_tiny", attention, sizes, checkpoint_activations=how)


def images(how: Any) -> Task:
    sizes = {"input_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 4, "num_classes": 10}
    return ImageDiffusionTask("dit_s2", "linear", sizes, checkpoint_activations=how)


def counted(task: Task) -> int:
    """FLOPs of a real step of two samples, on tensors that hold numbers."""
    build(task, EXACT)
    batch = {name: torch.randn(x.shape) if x.is_meta else x for name, x in task.example_batch(2).items()}
    with FlopCounterMode(display=False) as counter:
        training_step(task, batch, EXACT)()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (images, "blocks"),
        pytest.param(images, "attention", marks=pytest.mark.slow),  # six more builds of small models
        pytest.param(language, "blocks", marks=pytest.mark.slow),
        pytest.param(language, "attention", marks=pytest.mark.slow),
    ],
)
def test_recomputed_flops_are_those_of_real_steps(make: Any, how: str) -> None:
    """A step of two samples, with and without, of a model deeper than the ones that the plan counts."""
    extra = counted(make(how)) - counted(make("none"))
    assert recomputed_flops(make(how), 4, EXACT) == extra // 2
    assert extra > 0
    assert recomputed_flops(make("offload"), 4, EXACT) == 0


def test_a_block_runs_again_up_to_its_last_product() -> None:
    """Nothing needs the output of the MLP's last product, so torch stops before it."""
    tokens, width, depth = 16, 192, 4
    sizes = {"img_size": 32, "patch_size": 8, "depth": depth}
    task = ClassificationTask("deit_tiny", "linear", sizes, num_classes=10, checkpoint_activations="blocks")
    ends = 2 * tokens * width * 3 * 8 * 8 + 2 * width * 10
    last = 2 * tokens * width * 4 * width
    assert recomputed_flops(task, 2, EXACT) == task.flops_per_sample - ends - depth * last


def test_softmax_counts_as_on_a_gpu() -> None:
    """torch has no rule for the CPU's kernel. Causal rows count in full: q k^T, and the product with v."""
    task = language("attention", "softmax", depth=2)
    assert recomputed_flops(task, 2, EXACT) == 2 * 2 * 64 * 64 * (64 + 64)


def test_the_plan_counts_and_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "activation_bytes", lambda *_: 2**20)  # test_plan_memory.py measures them
    name, target = "classification/deit_tiny_mhla_mnist_cpu", tmp_path / "plan.json"
    words = ["--model.checkpoint_activations", "blocks", "--trainer.max_steps", "10"]
    assert main(["plan", name, *words, "--data.path", str(tmp_path), "--json", str(target)]) == 0
    plan, shown = json.loads(target.read_text()), " ".join(capsys.readouterr().out.split())
    sample = 3 * plan["flops_per_sample"] + plan["recomputed_flops"]
    assert plan["training_flops"] == 10 * plan["batches"]["batch"] * sample
    assert 0.5 < plan["recomputed_flops"] / plan["flops_per_sample"] < 1
    assert "times the forward, for what the backward runs again" in shown
    assert "activations: modelled" in shown
    assert plan["sources"]["activations"].startswith("modelled")
