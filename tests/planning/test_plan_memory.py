"""Memory of a planned run against measured bytes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from mhla_lightning.backbones.activations import offloading_as_on_gpu
from mhla_lightning.config.recipes import load_recipe
from mhla_lightning.config.resolve import resolve
from mhla_lightning.planning.memory import peak_bytes
from mhla_lightning.planning.state_memory import ModelSize, partitioned, replicated
from mhla_lightning.planning.step_memory import (
    Precision,
    activation_bytes,
    build,
    find_precision,
    training_step,
)
from mhla_lightning.strategies.config import zero_config
from mhla_lightning.tasks import (
    ClassificationLossConfig,
    ClassificationTask,
    ImageDiffusionTask,
    LanguageTask,
    Task,
    VideoDiffusionTask,
)
from tests.helpers import zero_bytes

CPU = torch.device("cpu")
FAMILIES = ("classification", "language", "image_dit", "video_dit")
OPERATORS = ("softmax", "linear", "mhla")
SETTINGS = [
    (precision, checkpoint)
    for precision in ("32-true", "bf16-mixed", "bf16-true")
    for checkpoint in ("none", "blocks")
]
FEW = [
    (family, attention, *SETTINGS[(number + number // 3) % 4])  # the first four settings in turn
    for number, (family, attention) in enumerate(product(FAMILIES, OPERATORS))
]


@pytest.fixture(autouse=True)
def _torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan counts torch's own operations; the compiled ones of a CPU keep less."""
    monkeypatch.setenv("MHLA_KERNEL", "torch")


def make_task(family: str, attention: Any, depth: int = 4, **options: Any) -> Task:
    """A model of every kind that a CPU trains in a moment."""
    if family == "classification":
        return ClassificationTask(
            "deit_tiny",
            attention,
            {"img_size": 64, "patch_size": 8, "depth": depth},
            num_classes=10,
            loss=ClassificationLossConfig(mixup=0.8),
            **options,
        )
    if family == "language":
        sizes: dict[str, Any] = {"vocab_size": 300, "context": 128, "embed_dim": 64, "depth": depth}
        return LanguageTask("lm_tiny", attention, sizes, **options)
    if family == "image_dit":
        sizes = {"input_size": 16, "embed_dim": 64, "num_heads": 4, "depth": depth, "num_classes": 10}
        return ImageDiffusionTask("dit_s2", attention, sizes, **options)
    return VideoDiffusionTask("wan_tiny", attention, {"input_size": [4, 32, 32], "depth": depth}, **options)


def measured_bytes(task: Task, precision: Precision, samples: int) -> int:
    """Return the bytes of a real step."""
    real = task.rehearsal()
    build(real, precision)
    batch = {
        name: torch.randn(x.shape, dtype=precision.weights) if x.is_meta else x
        for name, x in real.example_batch(samples).items()
    }
    return peak_bytes(training_step(real, batch, precision), CPU)


def check_activations(task: Task, precision_name: str, samples: int = 4) -> None:
    """A real step on the CPU, whose tensors hold numbers, against the estimate, which knows fewer layers
    and no numbers.
    """
    precision = find_precision(precision_name)
    estimate = activation_bytes(task, samples, precision)
    measured = measured_bytes(task, precision, samples)
    assert estimate == pytest.approx(measured, rel=0.15)
    assert estimate == pytest.approx(measured, rel=0.01)  # it is nearer than the 15 % of the issue


@pytest.mark.parametrize(
    ("family", "attention", "precision", "checkpoint"),
    [case if case[1] == "mhla" else pytest.param(*case, marks=pytest.mark.slow) for case in FEW],
)
def test_activations_are_those_of_a_real_step(
    family: str, attention: str, precision: str, checkpoint: Any
) -> None:
    check_activations(make_task(family, attention, checkpoint_activations=checkpoint), precision)


@pytest.mark.parametrize(
    "family",
    [
        "classification",
        *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "classification"),
    ],
)
@pytest.mark.parametrize("attention", ["mhla", pytest.param("softmax", marks=pytest.mark.slow)])
def test_recomputed_operators_take_less(family: str, attention: str) -> None:
    check_activations(make_task(family, attention, checkpoint_activations="attention"), "32-true")
    # SDPA keeps little beside its inputs and its output. What it saves in a few layers is less than what one
    # layer takes while it runs again.
    depth = 4 if attention == "mhla" else 16
    kept, estimate, least = (
        activation_bytes(
            make_task(family, attention, depth, checkpoint_activations=how), 4, find_precision("32-true")
        )
        for how in ("none", "attention", "blocks")
    )
    assert least < estimate < kept


class HostCopy:
    """What `Offload` keeps of a tensor on a GPU, in memory that this test does not count."""

    def __init__(self, tensor: Tensor) -> None:
        self.host = tensor.float().numpy().copy()
        self.dtype = tensor.dtype

    def back(self) -> Tensor:
        return torch.tensor(self.host, dtype=self.dtype)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "family",
    ["image_dit", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "image_dit")],
)
def test_activations_on_the_host_do_not_count(
    monkeypatch: pytest.MonkeyPatch, family: str, precision: str
) -> None:
    """A real step really moves its tensors out of what is counted."""
    plain, task = (make_task(family, "mhla", checkpoint_activations=how) for how in ("none", "offload"))
    estimates = [activation_bytes(made, 16, find_precision(precision)) for made in (plain, task)]
    assert estimates[1] < 0.5 * estimates[0]
    monkeypatch.setattr("mhla_lightning.backbones.activations._Away", HostCopy)
    with offloading_as_on_gpu():
        assert estimates[1] == pytest.approx(measured_bytes(task, find_precision(precision), 16), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "checkpoint"), SETTINGS)
@pytest.mark.parametrize("attention", [*OPERATORS, ["softmax", "mhla", "mhla"]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_of_every_setting(family: str, attention: Any, precision: str, checkpoint: Any) -> None:
    check_activations(make_task(family, attention, depth=8, checkpoint_activations=checkpoint), precision)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "image_dit/dit_xl2_mhla_imagenet256",
        "video_dit/wan_1_3b_hybrid_finetune",
        "language/lm_340m_mhla_fineweb_edu",
    ],
)
def test_few_layers_say_what_all_take(name: str) -> None:
    recipe = resolve(load_recipe(name).values)
    precision = find_precision(recipe.trainer["precision"])
    assert activation_bytes(recipe.task, 1, precision) == pytest.approx(
        activation_bytes(recipe.task, 1, precision, extrapolate=False), rel=0.01
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_gradients_and_optimizer_are_exact(family: str) -> None:
    """bf16-mixed keeps float32 weights, so its bytes are those of 32-true."""
    task = make_task(family, "mhla", depth=2).rehearsal()
    build(task, find_precision("32-true"))
    optimizer = task.build_optimizer()
    optimizer.step()
    for precision in ("32-true", "bf16-mixed"):
        state = replicated(ModelSize.of(task), find_precision(precision), average=True)
        assert state.weights == sum(x.nbytes for x in [*task.parameters(), *task.buffers()])
        assert state.gradients == sum(p.grad.nbytes for p in task.parameters() if p.grad is not None)
        assert state.optimizer == state_bytes(optimizer)
        assert task.backbone is not None
        assert state.average == sum(
            4 * x.numel() for x in task.backbone.state_dict().values() if x.is_floating_point()
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_masters_of_bf16_weights_are_exact(family: str) -> None:
    """As ZeRO holds them: a flat float32 master for each group of the optimizer."""
    task = make_task(family, "mhla", depth=2).rehearsal()
    build(task, find_precision("bf16-true"))
    groups = task.build_optimizer().param_groups
    masters = [parameters_to_vector(group["params"]).detach().float() for group in groups]
    masters = [torch.nn.functional.pad(master, (0, len(master) % 2)) for master in masters]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW(masters)
    optimizer.step()
    for name in ("zero1", "zero2"):
        state = partitioned(
            name,
            ModelSize.of(task),
            find_precision("bf16-true"),
            1,
            True,
            zero_config(name)["zero_optimization"],
            4,
        )
        odd = sum(master.nbytes // 2 for master in masters) - sum(
            2 * p.numel() for group in groups for p in group["params"]
        )
        assert state.weights == sum(x.nbytes for x in [*task.parameters(), *task.buffers()]) + odd
        assert state.optimizer == state_bytes(optimizer) + sum(master.nbytes for master in masters)
        assert state.gradients == 4 * sum(map(len, masters)) - (2 * odd if name == "zero1" else 0)


@pytest.mark.slow
def test_what_two_ranks_of_deepspeed_hold_is_exact(tmp_path: Path) -> None:
    """Flat weights, float32 masters and moments of a rank after a real step, by stage and precision."""
    log = run_two_ranks(tmp_path)
    measured = json.loads(
        next(line for line in log.splitlines() if line.startswith("BYTES ")).removeprefix("BYTES ")
    )
    assert len(measured) == 9
    with torch.device("meta"):
        task = zero_bytes.make_task().rehearsal()
        task.configure_model()
    size = replace(ModelSize.of(task), fixed=0)
    for case, held in measured.items():
        stage, precision = case.split()
        config = zero_config(zero_bytes.entry(int(stage)))["zero_optimization"]
        state = partitioned(f"zero{stage}", size, find_precision(precision), 2, False, config, 4)
        assert {"weights": state.weights, "optimizer": state.optimizer} == held, case


def run_two_ranks(folder: Path) -> str:
    """What rank 0 of tests/zero_bytes.py prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    logs = [folder / f"rank{rank}.txt" for rank in range(2)]
    ranks = []
    for rank, path in enumerate(logs):
        with path.open("w") as log:
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, zero_bytes.__file__],
                    env=shared | place,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    codes = [process.wait(timeout=500) for process in ranks]
    assert codes == [0, 0], logs[0].read_text()[-2000:]
    return logs[0].read_text()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(x.nbytes for state in optimizer.state.values() for x in state.values())


def test_frozen_weights_have_neither_gradients_nor_moments() -> None:
    size = ModelSize.of(built("language", train_only=["mixing"]))
    state = replicated(size, find_precision("32-true"), average=False)
    trained = size.trained_elements
    assert 0 < trained < size.elements
    assert (state.gradients, state.buffers, state.optimizer) == (
        4 * trained,
        0,
        8 * trained + 4 * sum(map(len, size.trained)),
    )


def built(family: str, **options: Any) -> Task:
    with torch.device("meta"):
        task = make_task(family, "mhla", **options).rehearsal()
        task.configure_model()
    return task


def test_stages_split_what_they_say() -> None:
    size, ranks = ModelSize.of(built("video_dit")), 8
    precision = find_precision("bf16-true")
    states = {
        name: partitioned(name, size, precision, ranks, True, zero_config(name)["zero_optimization"], 4)
        for name in ("zero1", "zero2", "zero3")
    }
    whole = size.elements
    assert [round(states[name].weights / (2 * whole), 1) for name in states] == [
        1.0,
        1.0,
        1.1,
    ]  # all tensors of this model are small: whole beside their parts
    assert [round(states[name].gradients / (4 * whole), 3) for name in states] == [1.0, 0.125, 0.125]
    for state in states.values():
        assert state.optimizer / (12 * whole) == pytest.approx(1 / ranks, rel=0.01)
        assert state.average / (4 * whole) == pytest.approx(1 / ranks, rel=0.01)
    config = zero_config("zero3")["zero_optimization"] | {"stage3_param_persistence_threshold": 0}
    assert partitioned("zero3", size, precision, ranks, True, config, 4).weights / (
        2 * whole
    ) == pytest.approx(1 / ranks, rel=0.01)


@pytest.mark.parametrize(
    ("name", "optimizer", "weights"),
    [("zero2_offload", "host", "gpu"), ("zero3_offload", "host", "host"), ("zero3_nvme", "disk", "disk")],
)
def test_offloaded_bytes_lie_where_the_preset_says(name: str, optimizer: str, weights: str) -> None:
    size = ModelSize.of(built("image_dit"))
    plain = "zero2" if name == "zero2_offload" else "zero3"
    there = partitioned(
        plain, size, find_precision("bf16-true"), 4, True, zero_config(plain)["zero_optimization"], 4
    )
    moved = partitioned(
        name, size, find_precision("bf16-true"), 4, True, zero_config(name)["zero_optimization"], 4
    )
    assert (moved.optimizer, moved.gradients, moved.average) == (0, 0, 0)
    assert (moved.weights < there.weights) == (weights != "gpu")
    assert {"host": moved.host, "disk": moved.disk}[optimizer] >= there.optimizer
    assert (moved.disk > 0) == (optimizer == "disk")
