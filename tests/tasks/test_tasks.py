"""The classification task, optimizer groups, schedule, warm start; every operator trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mhla_lightning.attention import ATTENTION
from mhla_lightning.cli.main import main
from mhla_lightning.runs.folder import read_metrics
from mhla_lightning.tasks import (
    ClassificationLossConfig,
    ClassificationTask,
    OptimizerConfig,
    ScheduleConfig,
)
from mhla_lightning.weights.warm_start import load_matching, read_weights
from tests.helpers.errors import refused

OPTIONS = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 2}
GOLDEN = Path(__file__).parents[1] / "golden" / "classification.json"


def make(attention: Any = None, **options: Any) -> ClassificationTask:
    torch.manual_seed(0)
    task = ClassificationTask(
        "deit_tiny", attention or {"name": "mhla", "blocks": 2}, OPTIONS, num_classes=4, **options
    )
    task.configure_model()
    return task


def batch(size: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(size, 3, 8, 8, generator=generator),
        "label": torch.arange(size) % 4,
        "weight": torch.ones(size),
        "index": torch.arange(size),
        "epoch": torch.zeros(size, dtype=torch.long),
        "skipped": torch.tensor(0),
    }


def silence(task: ClassificationTask) -> ClassificationTask:
    """Without a Trainer there is nowhere to log to."""
    task.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return task


@pytest.mark.parametrize("decay_mixing", [False, True])
def test_weight_decay_spares_norms_biases_positions_and_mixing(decay_mixing: bool) -> None:
    task = make()
    assert task.backbone is not None
    mixing = {name for name, _ in task.backbone.named_parameters() if name.endswith("mixing.weight")}
    optimizer = OptimizerConfig(weight_decay=0.05, decay_mixing=decay_mixing).build(
        task.backbone, task._weightless(), {"pos_embed", *mixing}, mixing
    )
    names = {id(p): name for name, p in task.backbone.named_parameters()}
    decayed = {
        names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    spared = set(names.values()) - decayed
    assert {"pos_embed", "head.bias", "fc_norm.weight", "blocks.0.attn.qkv.weight"} & decayed == {
        "blocks.0.attn.qkv.weight"
    }
    assert (mixing <= decayed) == decay_mixing
    assert (mixing <= spared) != decay_mixing
    assert all(p.ndim > 1 for name, p in task.backbone.named_parameters() if name in decayed)
    assert len(decayed) + len(spared) == len(names)


def test_schedule_warms_up_and_follows_the_cosine() -> None:
    cosine = ScheduleConfig(warmup_steps=10, warmup_lr=1e-6, min_lr=1e-5)
    assert cosine.lr_at(0, 1e-3, 110) == pytest.approx(1e-6)
    assert cosine.lr_at(5, 1e-3, 110) == pytest.approx((1e-6 + 1e-3) / 2)
    assert cosine.lr_at(10, 1e-3, 110) == pytest.approx(1e-3)
    assert cosine.lr_at(60, 1e-3, 110) == pytest.approx((1e-3 + 1e-5) / 2)
    assert cosine.lr_at(110, 1e-3, 110) == pytest.approx(1e-5)
    assert ScheduleConfig("constant", warmup_steps=2).lr_at(999, 1e-3, 10) == 1e-3
    with refused("schedule.name"):
        cosine.build(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), 1e-3, 0)


def test_padding_counts_nowhere_in_validation() -> None:
    task, padded = silence(make()), batch(6)
    task.evaluate(padded, "val")
    whole = {name: float(metric.compute()) for name, metric in task.metrics["val"].items()}  # type: ignore[operator]
    task = silence(make())
    padded["weight"] = torch.tensor([1.0] * 4 + [0.0] * 2)
    padded["image"][4:] = 100.0
    task.evaluate(padded, "val")
    task.evaluate({k: v[4:] if v.ndim else v for k, v in batch(6).items()}, "val")
    parts = {name: float(metric.compute()) for name, metric in task.metrics["val"].items()}  # type: ignore[operator]
    assert parts == pytest.approx(whole)


def test_loss_is_the_label_smoothed_cross_entropy() -> None:
    task, data = silence(make(loss=ClassificationLossConfig(label_smoothing=0.2))), batch()
    logits = task(data["image"])
    target = torch.nn.functional.one_hot(data["label"], 4) * 0.8 + 0.05
    torch.testing.assert_close(task.training_step(data, 0), -(target * logits.log_softmax(-1)).sum(-1).mean())


def test_mixup_depends_on_the_samples_and_not_on_what_was_drawn_before() -> None:
    losses, mixed = [], ClassificationLossConfig(mixup=0.8, cutmix=1.0)
    for drawn in (0, 5):
        task = silence(make(loss=mixed))
        torch.manual_seed(0)
        torch.rand(drawn)
        losses.append(float(task.training_step(batch(), 0).detach()))
    assert losses[0] == losses[1]
    other = batch()
    other["index"] = other["index"] + 7
    assert float(silence(make(loss=mixed)).training_step(other, 0).detach()) != losses[0]
    assert float(silence(make()).training_step(batch(), 0).detach()) != losses[0]


def test_configuration_is_checked_before_weights_exist() -> None:
    task = ClassificationTask("deit_base", "mhla")
    assert not list(task.backbone.parameters()) if task.backbone else True
    assert task.parameter_count > 80e6
    assert task.flops_per_batch(2) == 6 * task.flops_per_sample
    with refused("num_classes"):
        ClassificationTask("deit_tiny", num_classes=1)
    with refused("attention.blocks"):
        ClassificationTask("deit_tiny", {"name": "mhla", "blocks": 99}, OPTIONS, num_classes=4)
    with refused("backbone_options.img_size"):
        ClassificationTask("deit_tiny", "softmax", OPTIONS | {"img_size": 9}, num_classes=4)


@pytest.mark.parametrize(
    ("make_config", "key"),
    [
        (lambda: OptimizerConfig(lr=0.0), "optimizer.lr"),
        (lambda: OptimizerConfig(weight_decay=-1.0), "optimizer.weight_decay"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), "optimizer.betas"),
        (lambda: ScheduleConfig(min_lr=-1.0), "schedule.min_lr"),
    ],
    ids=["lr", "weight_decay", "betas", "min_lr"],
)
def test_optimizer_and_schedule_refuse_values_that_cannot_be(make_config: Any, key: str) -> None:
    with refused(key):
        make_config()


def test_a_step_clips_by_the_norm_that_a_callback_has_measured() -> None:
    """No second pass over the gradients: here the measured norm is twice the real one."""
    task = make()
    task.training_step(batch(), 0).backward()
    real = torch.nn.utils.get_total_norm([p.grad for p in task.parameters() if p.grad is not None])
    task.clip_by(2 * real)
    task.configure_gradient_clipping(task.build_optimizer(), float(real), "norm")
    clipped = torch.nn.utils.get_total_norm([p.grad for p in task.parameters() if p.grad is not None])
    torch.testing.assert_close(clipped, real / 2)


def test_warm_start_from_every_kind_of_file(tmp_path: Path) -> None:
    source = make()
    assert source.backbone is not None
    state = source.backbone.state_dict()
    save_file(state, tmp_path / "plain.safetensors")
    torch.save(
        {"state_dict": {f"module.backbone.{k}": v for k, v in state.items()}}, tmp_path / "wrapped.ckpt"
    )
    (tmp_path / "folder" / "ema").mkdir(parents=True)
    save_file(state, tmp_path / "folder" / "ema" / "weights.safetensors")
    for where in ("plain.safetensors", "wrapped.ckpt", "folder"):
        task = ClassificationTask(
            "deit_tiny",
            {"name": "mhla", "blocks": 2},
            OPTIONS,
            num_classes=4,
            init_from=str(tmp_path / where),
        )
        assert task.warm_start is None
        task.configure_model()
        assert task.backbone is not None
        assert all(torch.equal(v, state[k]) for k, v in task.backbone.state_dict().items())
        assert task.warm_start is not None
        assert set(task.warm_start.copied) == set(state)


def test_warm_start_says_what_was_copied_new_and_left(tmp_path: Path) -> None:
    softmax = make("softmax")
    assert softmax.backbone is not None
    target = make({"name": "mhla", "blocks": 2})
    assert target.backbone is not None
    state = {**softmax.backbone.state_dict(), "head.weight": torch.zeros(9, 12)}
    report = load_matching(target.backbone, state, tmp_path)
    assert "blocks.0.attn.proj.weight" in report.copied
    assert "blocks.0.attn.attention.mixing.weight" in report.fresh
    assert any(name.startswith("head.weight (9, 12) for (4, 12)") for name in report.left)
    assert set(report.copied).isdisjoint(report.fresh)
    assert re.search(r"\d+ tensors copied; \d+ new here .*; \d+ left over", str(report))
    with refused("init_from"):
        load_matching(target.backbone, {"other": torch.zeros(1)}, tmp_path)


def test_warm_start_unpickles_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for name in ("evil.pt", "text.pt"):
        with refused("init_from") as error:
            read_weights(str(tmp_path / name))
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()


def test_train_only_freezes_the_rest() -> None:
    task = make(train_only=[r"mixing\.weight$", "^head"])
    assert task.backbone is not None
    trained = {name for name, p in task.backbone.named_parameters() if p.requires_grad}
    assert trained == {
        "blocks.0.attn.attention.mixing.weight",
        "blocks.1.attn.attention.mixing.weight",
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("attention", [*ATTENTION, "[softmax, mhla, linear]"])
def test_every_operator_trains(recipe: Path, tmp_path: Path, attention: str) -> None:
    arguments = [
        "run",
        str(recipe),
        "--run-id",
        "a",
        "--trainer.max_steps",
        "2",
        "--model.attention",
        attention,
        "--model.loss.mixup",
        "0.2",
    ]
    assert (
        main([*arguments, "--trainer.precision", "bf16-mixed", "--model.checkpoint_activations", "blocks"])
        == 0
    )
    losses = read_metrics(tmp_path / "runs" / "a" / "metrics.jsonl")["train/loss"]
    assert len(losses) == 2
    assert all(0 < value < 10 for _, value in losses)


def test_golden_losses(recipe: Path, tmp_path: Path) -> None:
    """Ten steps from a fixed seed. A change that moves these numbers changes training: say so when you
    write the file anew.
    """
    assert main(["run", str(recipe), "--run-id", "golden", "--trainer.max_steps", "10"]) == 0
    losses = [
        value for _, value in read_metrics(tmp_path / "runs" / "golden" / "metrics.jsonl")["train/loss"]
    ]
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())["train/loss"], rel=2e-4)
