"""The scripts in examples/: a plain Trainer trains, resumes, loads and predicts."""

from __future__ import annotations

import io
import runpy
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from mhla_lightning.arguments.plain import restored_arguments
from mhla_lightning.attention import MixingMatrix
from mhla_lightning.callbacks import EMA
from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.diffusion.drawing import draw_samples
from mhla_lightning.tasks import Task
from mhla_lightning.tasks.diffusion import DiffusionTask, PredictSettings
from tests.helpers.images import write_images
from tests.helpers.language_runs import write_text
from tests.helpers.video_runs import write_clips

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS: dict[str, tuple[Callable[[Path], Path], dict[str, tuple[int, ...]]]] = {
    "classify_images": (write_images, {"logits": (20, 4), "probabilities": (20, 4)}),
    "continue_text": (write_text, {"prompt": (6, 16), "continuation": (6, 16)}),
    "draw_images": (write_images, {"sample": (20, 3, 16, 16), "images": (20, 16, 16, 3)}),
    "draw_videos": (write_clips, {"sample": (2, 3, 8, 16, 16), "videos": (2, 8, 16, 16, 3)}),
}
SAMPLING = PredictSettings(sampler="euler", steps=2)
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small runs


def lines_of_code(path: Path) -> int:
    """Lines that hold more than comments and the docstring."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    words = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    _, *others = [word for word in words if word.type not in {*skipped, tokenize.ENDMARKER}]
    return len({word.start[0] for word in others})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "classify_images")) for name in SCRIPTS]
)
def test_a_script_trains_resumes_loads_and_predicts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 20, must show 1."""
    write, shapes = SCRIPTS[name]
    script, shards = EXAMPLES / f"{name}.py", write(tmp_path)
    assert lines_of_code(script) <= 12
    monkeypatch.setattr(DiffusionTask, "sampling", SAMPLING)
    monkeypatch.setattr(sys, "argv", [script.name, str(shards)])
    monkeypatch.chdir(tmp_path)
    pl.seed_everything(0, verbose=False)
    made = runpy.run_path(str(script))
    task, data, longer = made["task"], made["data"], made["longer"]

    mixing = [part.weight for part in task.modules() if isinstance(part, MixingMatrix)]
    assert mixing
    assert all(0 <= float(weight.min()) <= float(weight.max()) <= 1 for weight in mixing)
    saved = torch.load(longer.checkpoint_callback.best_model_path, weights_only=True)
    assert all(torch.equal(value, saved["state_dict"][key]) for key, value in task.state_dict().items())
    for key, shape in shapes.items():
        parts = [part[key] for part in made["predictions"]]
        assert (sum(map(len, parts)), *parts[0].shape[1:]) == shape, key
    check_forward(task, data, made["predictions"][0])

    assert float(longer.callback_metrics["val_ema/loss"]) == unbroken(task, data)
    again = ShardDataModule.load_from_checkpoint(longer.checkpoint_callback.best_model_path)
    assert type(again) is type(data)
    assert again.hparams == data.hparams
    assert again.state_dict() == saved[type(data).__name__]


def unbroken(task: Task, data: ShardDataModule) -> float:
    """Return the last val_ema/loss of a new run of the same task that nothing stops."""
    pl.seed_everything(0, verbose=False)
    new = type(task)(**restored_arguments(type(task), task.hparams, {}))
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = pl.Trainer(max_epochs=2, callbacks=[EMA(0.9)], **quiet)
    trainer.fit(new, data)
    return float(trainer.callback_metrics["val_ema/loss"])


def check_forward(task: Task, data: ShardDataModule, found: dict[str, Any]) -> None:
    """The first prediction is what the model's own forward gives."""
    batch: dict[str, Any] = next(iter(data.val_dataloader()))
    data.teardown("validate")
    real = batch["weight"] > 0
    assert found["key"] == [key for key, kept in zip(batch["key"], real.tolist(), strict=True) if kept]
    with torch.no_grad():
        if "logits" in found:
            logits = task.eval()(batch["image"])[real]
            torch.testing.assert_close(found["logits"], logits)
            torch.testing.assert_close(found["probabilities"], logits.softmax(-1))
        elif "continuation" in found:
            check_continuation(task, found)
        else:
            check_drawn(task, batch, real, found["sample"])


def check_continuation(task: Task, found: dict[str, Any]) -> None:
    """Each token is the likeliest after the tokens before it."""
    tokens = torch.cat([found["prompt"], found["continuation"]], 1)
    real = torch.cat([found["read"], torch.ones_like(found["continuation"], dtype=torch.bool)], 1)
    likeliest = task(tokens, real).argmax(-1)
    first = found["prompt"].shape[1]
    assert torch.equal(likeliest[:, first - 1 : -1], found["continuation"])


def check_drawn(task: Any, batch: dict[str, Any], real: Tensor, sample: Tensor) -> None:
    """The sample is drawn with the task's forward, from the noise of its index."""
    condition = task.condition(batch, torch.zeros_like(real))[real]
    keys = [(0, "sample", index) for index in batch["index"][real].tolist()]
    drawn = draw_samples(task, condition, task.empty_condition(), task.clean(batch).shape[1:], keys, SAMPLING)
    torch.testing.assert_close(drawn, sample)
