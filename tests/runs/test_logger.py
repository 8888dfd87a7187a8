"""metrics.jsonl after a kill, and what TensorBoard gets besides the curves."""

from __future__ import annotations

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mhla_lightning.runs.folder import RunFolder, read_metrics
from mhla_lightning.runs.logger import RunLogger, hyperparameters, keep_until
from mhla_lightning.runs.tags import layout


def test_later_and_cut_lines_are_dropped(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    keep_until(metrics, 3)
    assert not metrics.exists()
    lines = [json.dumps({"step": step, "tag": "loss", "value": 0.5}) for step in (1, 3, 4)]
    metrics.write_text("\n".join(lines) + '\n{"step": 2, "ta')
    keep_until(metrics, 3)
    assert metrics.read_text().splitlines() == lines[:2]


RECIPE = {
    "seed_everything": 3,
    "model": {
        "class_path": "a.Task",
        "init_args": {"optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "compile": None},
    },
    "data": {"init_args": {"path": "digits", "batch_size": 8}},
}


def logged(tmp_path: Path, metrics: dict[str, float]) -> tuple[RunFolder, EventAccumulator]:
    run = RunFolder(tmp_path / "run")
    run.create()
    logger = RunLogger(run, recipe=RECIPE)
    logger.start()
    logger.log_metrics(metrics, 4)
    logger.finalize("success")
    logger.finalize("success")  # after the last validation
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    return run, events


def test_event_files_hold_the_recipe_the_first_screen_and_the_hyperparameters(tmp_path: Path) -> None:
    run, events = logged(
        tmp_path, {"train/loss": 2.0, "train/samples_per_second": 9.0, "val/loss": 1.5, "epoch": 0}
    )
    (text,) = events.Tensors("recipe/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "          lr: 0.1" in shown
    assert "compile" not in shown
    screen = events.Tensors("custom_scalars__config__")[-1]
    categories = Layout.FromString(screen.tensor_proto.string_val[0]).category
    assert [one.title for one in categories] == ["Loss", "Speed"]  # of what is logged
    assert [chart.title for chart in categories[1].chart] == ["samples a second"]
    found = {
        tag: HParamsPluginData.FromString(content)
        for tag, content in events.PluginTagToContent("hparams").items()
    }
    start = found["_hparams_/session_start_info"].session_start_info.hparams
    assert start["model.optimizer.lr"].number_value == 0.1
    metrics = found["_hparams_/experiment"].experiment.metric_infos
    assert [one.name.tag for one in metrics] == ["val/loss"]
    assert read_metrics(run.metrics)["val/loss"] == [(4, 1.5)]  # once
    assert [one.value for one in events.Scalars("val/loss")] == [1.5]


def test_a_run_that_has_not_validated_has_no_row_of_hyperparameters(tmp_path: Path) -> None:
    _, events = logged(tmp_path, {"train/loss": 2.0})
    assert "_hparams_/experiment" not in events.Tags()["tensors"]
    assert "hparams" not in str(events.Tags())


def test_hyperparameters_are_named_as_on_the_command_line() -> None:
    assert hyperparameters(RECIPE) == {
        "seed_everything": 3,
        "model.class_path": "a.Task",
        "data.batch_size": 8,
        "model.optimizer.lr": 0.1,
        "model.optimizer.betas": "[0.9, 0.99]",
    }


def test_the_first_screen_waits_for_validation_and_drops_what_stays_empty() -> None:
    assert list(layout(["train/loss"])) == ["Loss", "Quality"]
    assert list(layout(["train/loss", "train/mfu", "val/loss", "val_ema/top1"])) == [
        "Loss",
        "Quality",
        "Speed",
    ]
    assert list(layout(["val/loss", "val/top1"])["Quality"]) == ["accuracy"]
