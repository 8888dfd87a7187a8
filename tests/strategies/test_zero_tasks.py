"""All four tasks under ZeRO on two real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhla_lightning.config.recipes import RECIPES
from mhla_lightning.runs.folder import read_metrics
from tests.helpers.ranks import Nursery
from tests.helpers.tiny_tasks import write_recipes
from tests.helpers.zero_runs import STRATEGIES, ZERO3

LOSSES = ("train/loss", "val/loss", "val_ema/loss")
GRIDS = "init_args: {grids: 2, first: 2, classes: [0], per_class: 1, sampler: ddpm, steps: 2}"
CLIPS = "init_args: {sheets: 2, first: 2, steps: 2}"
SAMPLES = {  # every rank must draw during training, or stage 3 waits without end
    "image_dit": f"{{class_path: mhla_lightning.callbacks.SampleGrids, {GRIDS}}}",
    "video_dit": f"{{class_path: mhla_lightning.callbacks.SampleClips, {CLIPS}}}",
}
EMA = "{class_path: mhla_lightning.callbacks.EMA, init_args: {decay: 0.9}}"


def losses(
    nursery: Nursery, recipe: str, root: Path, strategy: str, *overrides: str
) -> dict[str, list[float]]:
    run = [
        "run",
        recipe,
        "--runs",
        str(root),
        "--run-id",
        strategy.strip("{").split(",")[0].replace("name: ", ""),
        *overrides,
    ]
    nursery.run(2, [*run, "--trainer.devices", "2", "--trainer.strategy", strategy], root)
    series = read_metrics(root / run[5] / "metrics.jsonl")
    return {tag: [value for _, value in series[tag]] for tag in LOSSES if tag in series}


@pytest.mark.parametrize("task", ["language", "image_dit", "video_dit"])
@pytest.mark.slow
def test_stage_3_follows_ddp(nursery: Nursery, task: str, tmp_path: Path) -> None:
    recipe = str(write_recipes(tmp_path, [task])[task])
    short = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "4"]
    if task in SAMPLES:
        short += ["--trainer.callbacks", f"[{EMA}, {SAMPLES[task]}]"]
    ddp, zero = (losses(nursery, recipe, tmp_path, strategy, *short) for strategy in ("ddp", ZERO3))
    assert len(ddp["train/loss"]) == 4
    for tag in LOSSES:
        assert zero[tag] == pytest.approx(ddp[tag], abs=1e-5), tag


@pytest.mark.slow  # two runs of two ranks
def test_a_text_that_mhla_reads_follows_ddp_at_stage_3(nursery: Nursery, tmp_path: Path) -> None:
    """The learning rate throws mixing weights out of their range, so that a missing projection would show."""
    recipe = str(write_recipes(tmp_path, ["video_dit"])["video_dit"])
    short = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "4"]
    short += ["--model.backbone_options.cross_attention", "mhla", "--model.optimizer.lr", "0.05"]
    short += ["--trainer.callbacks", f"[{EMA}]"]
    ddp, zero = (losses(nursery, recipe, tmp_path, strategy, *short) for strategy in ("ddp", ZERO3))
    assert len(ddp["train/loss"]) == 4
    for tag in LOSSES:
        assert zero[tag] == pytest.approx(ddp[tag], rel=1e-4), tag


COMPILED = ["--model.compile.what", "blocks", "--model.compile.backend", "aot_eager"]


@pytest.mark.parametrize(
    ("task", "kept"), [("language", "attention"), ("image_dit", "blocks"), ("video_dit", "none")]
)
@pytest.mark.slow
def test_stage_3_follows_ddp_compiled(nursery: Nursery, task: str, kept: str, tmp_path: Path) -> None:
    recipe = str(write_recipes(tmp_path, [task])[task])
    short = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "4"]
    if task in SAMPLES:
        short += ["--trainer.callbacks", f"[{EMA}, {SAMPLES[task]}]"]
    ddp = losses(nursery, recipe, tmp_path, "ddp", *short)
    compiled = losses(
        nursery, recipe, tmp_path, ZERO3, *short, *COMPILED, "--model.checkpoint_activations", kept
    )
    assert len(ddp["train/loss"]) == 4
    for tag in LOSSES:
        assert compiled[tag] == pytest.approx(ddp[tag], abs=1e-5), tag


CPU_RECIPES = {
    "classification": "classification/deit_tiny_mhla_mnist_cpu",
    "language": "language/lm_tiny_mhla_stdlib_cpu",
    "image_dit": "image_dit/dit_tiny_mhla_mnist_cpu",
    "video_dit": "video_dit/wan_tiny_mhla_clips_cpu",
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("task", CPU_RECIPES)
def test_the_cpu_recipes_follow_ddp(
    nursery: Nursery, task: str, precision: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert (RECIPES / f"{CPU_RECIPES[task]}.yaml").is_file()
    root = tmp_path_factory.mktemp(f"{task}-{precision}")
    short = [
        "--trainer.max_steps",
        "20",
        "--trainer.log_every_n_steps",
        "1",
        "--trainer.limit_val_batches",
        "1",
        "--trainer.precision",
        precision,
    ]
    curves = {
        name: losses(nursery, CPU_RECIPES[task], root, STRATEGIES[name], *short)
        for name in ("ddp", "zero1", "zero2", "zero3")
    }
    for name in ("zero1", "zero2", "zero3"):
        for tag, expected in curves["ddp"].items():
            near = (
                pytest.approx(expected, abs=1e-4)
                if precision == "32-true"
                else pytest.approx(expected, rel=0.02)
            )
            assert curves[name][tag] == near, (name, tag)


@pytest.mark.slow
def test_the_language_recipe_at_stages_1_and_2_is_that_of_ddp_bit_for_bit(
    nursery: Nursery, tmp_path: Path
) -> None:
    """Clipped in every step; a rounding of 1e-7 in the norm is one of 1e-4 in the loss after 20 steps."""
    short = [
        "--trainer.max_steps",
        "20",
        "--trainer.log_every_n_steps",
        "1",
        "--trainer.limit_val_batches",
        "1",
    ]
    ddp, *others = (
        losses(nursery, CPU_RECIPES["language"], tmp_path, name, *short) for name in ("ddp", "zero1", "zero2")
    )
    assert len(ddp["train/loss"]) == 20
    assert others == [ddp, ddp]
