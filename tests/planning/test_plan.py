"""`mhla plan`: what is worked out, what is refused, what is said."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.cli.main import main
from mhla_lightning.config.recipes import apply_overrides, load_recipe, recipe_names
from mhla_lightning.config.resolve import Resolved, resolve
from mhla_lightning.errors import UserError
from mhla_lightning.planning import plan as planning
from mhla_lightning.planning.gpus import GIB, GPU, GPUS, find_gpu, parse_bytes
from mhla_lightning.planning.plan import Plan, make_plan

DIGITS = "classification/deit_tiny_mhla_mnist_cpu"


def recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Resolved:
    return _resolved(name, json.dumps(overrides or {}))


@cache
def _resolved(name: str, overrides: str) -> Resolved:
    """Several tests plan one recipe: building a model of 24 layers to resolve it takes seconds."""
    return resolve(apply_overrides(load_recipe(name).values, json.loads(overrides)))


def plan_of(name: str, overrides: Mapping[str, Any] | None = None, **options: Any) -> Plan:
    return make_plan(recipe(name, overrides), **options)


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations that are known at once: a gibibyte a sample, half of it with checkpoint_activations."""

    def activations(task: Any, micro_batch: int, precision: Any) -> int:
        return micro_batch * GIB // (1 if task.checkpoint_activations == "none" else 2)

    monkeypatch.setattr(planning, "activation_bytes", activations)


_MEASURED: dict[tuple[str, int, str], int] = {}


@pytest.fixture
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations of one recipe, measured once for every setting; for tests that plan the same recipe."""
    measure = planning.activation_bytes

    def activations(task: Any, micro_batch: int, precision: Any) -> int:
        key = (task.checkpoint_activations, micro_batch, precision.name)
        if key not in _MEASURED:
            _MEASURED[key] = measure(task, micro_batch, precision)
        return _MEASURED[key]

    monkeypatch.setattr(planning, "activation_bytes", activations)


def test_the_average_of_the_recipe_takes_memory(no_measuring: None) -> None:
    plain, averaged = (
        plan_of(DIGITS, {"trainer.callbacks": callbacks}).stages["ddp"].state
        for callbacks in ([], [{"class_path": "mhla_lightning.callbacks.EMA"}])
    )
    assert averaged.average > plain.average == 0


@pytest.mark.parametrize(
    "name",
    [
        "language/lm_340m_mhla_fineweb_edu",
        "image_dit/dit_xl2_mhla_imagenet256",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "language/lm_340m_softmax_fineweb_edu",
                "language/lm_340m_hybrid_fineweb_edu",
                "video_dit/wan_1_3b_mhla_finetune",
                "video_dit/wan_1_3b_hybrid_finetune",
            )
        ),
    ],
)
def test_flops_are_what_torch_counts(name: str) -> None:
    task = recipe(name).task
    with torch.device("meta"):
        twin = task.rehearsal()
        twin.configure_model()
        batch = {key: x.to("meta") for key, x in twin.example_batch(1).items()}
        inputs = (
            [batch["tokens"]]
            if "tokens" in batch
            else [batch["latent"], torch.rand(1), batch.get("text", batch.get("label"))]
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            twin.backbone(*inputs)  # type: ignore[misc]
    assert task.flops_per_sample == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    "name", ["mamba2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gla", "gated_deltanet"))]
)  # each builds a model of 24 layers
def test_baselines_for_cuda_are_planned_without_their_package(name: str) -> None:
    """Parameters, FLOPs and hours; activations are what their kernels keep, which nobody models."""
    found = plan_of(f"language/lm_340m_{name}_fineweb_edu", gpu=find_gpu("h100-80g"))
    assert found.parameters["total"] == pytest.approx(340e6, rel=0.01)
    assert found.length.steps == 38147
    assert found.activations is None
    assert any("CUDA" in note for note in found.notes)
    assert found.seconds == pytest.approx(14.8 * 3600, rel=0.02)


def test_whole_plan_of_a_small_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.json"
    words = [
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
        "--gpu",
        "h100-80g",
        "--strategy",
        "zero2",
        "--data.micro_batch_size",
        "4",
    ]
    assert (
        main(
            [
                "plan",
                DIGITS,
                *words,
                "--trainer.max_steps",
                "100",
                "--data.path",
                str(tmp_path / "none"),
                "--json",
                str(target),
            ]
        )
        == 0
    )
    shown, plan = capsys.readouterr().out, json.loads(target.read_text())
    batch = plan["values"]["data"]["init_args"]["batch_size"]
    assert plan["batches"] == {"batch": batch, "ranks": 8, "micro": 4, "accumulation": batch // 32}
    assert (plan["strategy"], plan["fits"]) == ("zero2", True)
    assert plan["length"] == {"steps": 100, "samples": None, "epochs": None}
    assert "how many epochs that makes is not known" in shown
    assert plan["training_flops"] == 3 * 100 * batch * plan["flops_per_sample"]
    kinds = {kind: count for kind, count in plan["parameters"].items() if kind not in ("total", "trained")}
    assert sum(kinds.values()) == plan["parameters"]["total"] == plan["parameters"]["trained"]
    assert kinds["mixing matrices"] > 0
    assert plan["deepspeed"]["train_micro_batch_size_per_gpu"] == 4
    assert plan["deepspeed"]["gradient_accumulation_steps"] == batch // 32
    assert "train_micro_batch_size_per_gpu: 4" in shown
    assert set(plan["stages"]) == {
        "ddp",
        "zero1",
        "zero2",
        "zero3",
        "zero2_offload",
        "zero3_offload",
        "zero3_nvme",
    }
    assert plan["activations"] > 0
    assert "> zero2 " in shown


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", name, "--gpus-per-node", "8", "--gpu", "h100-80g", "--strategy", "zero2"])
    shown = capsys.readouterr()
    assert code == 0 or (code == 2 and len(shown.err.strip().splitlines()) == 1)
    assert "could not be modelled" not in shown.out


@pytest.mark.usefixtures("no_measuring")
class TestPlan:
    def test_a_remainder_names_the_sizes_that_work(self) -> None:
        with pytest.raises(
            UserError, match=r"cannot be divided over 24 ranks; the nearest sizes that work: 240 or 264"
        ):
            plan_of("image_dit/dit_s2_mhla_imagenet256", nodes=3, gpus_per_node=8)
        with pytest.raises(UserError, match=r"sizes that work: 1, 2, 4, 8, 16, 32") as error:
            plan_of("image_dit/dit_s2_mhla_imagenet256", {"data.micro_batch_size": 5}, gpus_per_node=8)
        assert error.value.key == "data.micro_batch_size"

    def test_odd_batches_of_mixup_are_refused_without_data(self) -> None:
        with pytest.raises(UserError, match="a micro batch of 1 is odd"):
            plan_of("classification/deit_tiny_mhla_imagenet1k", {"data.micro_batch_size": 1})

    def test_steps_of_epochs_need_the_data(self) -> None:
        plan = plan_of("classification/deit_tiny_mhla_imagenet1k")
        assert (plan.length.steps, plan.training_flops, plan.seconds) == (None, None, None)
        assert plan.length.epochs == recipe("classification/deit_tiny_mhla_imagenet1k").data.epochs
        assert plan.notes == ("no shards in data/imagenet1k: how many steps that makes is not known",)

    def test_a_recipe_has_one_length(self) -> None:
        with pytest.raises(UserError, match="the recipe has no length"):
            plan_of("image_dit/dit_s2_mhla_imagenet256", {"trainer.max_steps": -1})

    def test_time_is_flops_over_what_the_gpus_reach(self) -> None:
        plan = plan_of(
            "image_dit/dit_s2_mhla_imagenet256", gpu=GPUS["h100-80g"], gpus_per_node=8, utilisation=0.5
        )
        assert plan.training_flops == 3 * plan.flops_per_sample * plan.batches.batch * (
            plan.length.steps or 0
        )
        assert plan.seconds == pytest.approx(plan.training_flops / (8 * 989e12 * 0.5))
        exact = plan_of(
            "image_dit/dit_s2_mhla_imagenet256", {"trainer.precision": "32-true"}, gpu=GPUS["h100-80g"]
        )
        assert exact.peak == 67e12

    @pytest.mark.parametrize(
        ("gib", "chosen", "fits", "advice"),
        [
            (44.0, "ddp", True, ()),
            (39.5, "ddp", False, ("trainer.strategy zero2", "trainer.strategy zero3")),
            (30.0, "ddp", False, ("data.micro_batch_size 16", "model.checkpoint_activations blocks")),
            (
                8.0,
                "zero3",
                False,
                ("data.micro_batch_size 4", "model.checkpoint_activations blocks, data.micro_batch_size 8"),
            ),
            (0.5, "zero3", False, ()),
        ],
        ids=["fits", "another strategy", "a change", "a smaller change", "nothing"],
    )
    @pytest.mark.usefixtures("measured_once")
    def test_what_would_fit_is_named(
        self, gib: float, chosen: str, fits: bool, advice: tuple[str, ...]
    ) -> None:
        plan = plan_of(
            "language/lm_340m_mhla_fineweb_edu",
            {"data.batch_size": 256},
            gpus_per_node=8,
            strategy=chosen,
            gpu=GPU("g", int(gib * GIB)),
        )
        assert plan.fits is fits
        assert plan.advice[: len(advice)] == advice
        assert bool(plan.advice) == bool(advice)

    def test_a_strategy_of_someone_else_is_planned_beside(self) -> None:
        values = recipe(DIGITS)
        plan = make_plan(
            values, strategy={"class_path": "lightning.pytorch.strategies.FSDPStrategy"}, gpu=GPUS["l4-24g"]
        )
        assert (plan.strategy, plan.fits, plan.deepspeed) == (None, None, None)
        assert "the memory of this trainer.strategy is not known" in plan.notes[-1]

    @pytest.mark.usefixtures("no_measuring")
    def test_changes_of_a_preset_count(self) -> None:
        changed = {"name": "zero3", "zero_optimization": {"stage3_param_persistence_threshold": 0}}
        plans = [
            plan_of("language/lm_340m_mhla_fineweb_edu", gpus_per_node=8, strategy=entry)
            for entry in ("zero3", changed)
        ]
        assert plans[0].stages["zero3"].state.weights > plans[1].stages["zero3"].state.weights
        assert plans[1].deepspeed is not None
        assert plans[1].deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] == 0

    def test_what_cannot_be_measured_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*_: Any) -> int:
            raise RuntimeError("needs a CUDA device")

        monkeypatch.setattr(planning, "activation_bytes", fails)
        plan = plan_of(DIGITS, gpu=GPUS["h100-80g"])
        assert (plan.activations, plan.fits) == (None, None)
        assert "activations could not be modelled without a GPU: needs a CUDA device" in plan.notes

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (
                ["--gpu", "h100"],
                r"--gpu: .*did you mean 'h100-80g'\? .*; or give --gpu-memory",
            ),
            (["--gpu-memory", "much"], "--gpu-memory"),
            (["--nodes", "0"], "--nodes"),
            (["--utilisation", "0"], "--utilisation"),
            (["--strategy", "zero4"], "zero4"),
            (["--trainer.precision", "64-true"], "64-true"),
            (["--json", "/nowhere/plan.json"], "--json"),
        ],
    )
    def test_mistakes_are_one_sentence(
        self, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["plan", DIGITS, *words]) == 2
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1
        assert re.search(sentence, error)

    def test_memory_of_an_unknown_gpu_can_be_given(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", DIGITS, "--gpu-memory", "40GiB", "--data.micro_batch_size", "4"]) == 0
        assert "ddp fits into 36.80 GiB, 92% of 40.00 (40GiB)." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "size"), [("40GiB", 40 * 2**30), ("80 GB", 80 * 10**9), ("1.5gib", 3 * 2**29), ("1024", 1024)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text, "gpu_memory") == size


def test_given_memory_replaces_that_of_a_known_gpu() -> None:
    gpu = find_gpu("a100-80g", "40GiB")
    assert gpu is not None
    assert (gpu.memory, gpu.bf16) == (40 * GIB, 312e12)
    assert find_gpu(None) is None
