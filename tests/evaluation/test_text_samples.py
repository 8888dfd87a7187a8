"""`mhla eval samples` on text-to-image runs: agreement of what and where, its interval, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.data.index import TextEncoding
from mhla_lightning.data.modules.captioned_images import CaptionedImageDataModule
from mhla_lightning.diffusion.drawing import draw_samples
from mhla_lightning.evaluation.networks import open_network
from mhla_lightning.evaluation.sample_options import SampleOptions
from mhla_lightning.evaluation.samples import interval
from mhla_lightning.evaluation.text_samples import agreements, check_text_samples
from mhla_lightning.inference.diffusion.text_images import TextDrawing, find_text_image_run
from mhla_lightning.inference.rebuilding import load_backbone
from mhla_lightning.runs.classes import keep_classes
from tests.helpers.captioned_images import CLASSES, write_captioned, write_recipe
from tests.helpers.data_modules import build
from tests.helpers.diffusion_models import train
from tests.helpers.errors import refused

JUDGE = """
model.num_classes: 4
model.backbone_options.img_size: 8
model.backbone_options.widths: [4, 8, 12]
model.optimizer.lr: 0.01
model.schedule.warmup_steps: 0
trainer.max_steps: 40
trainer.val_check_interval: 40
checkpoint.every_n_steps: 40
data.image_size: 8
data.batch_size: 8
"""


@pytest.mark.parametrize(
    ("share", "images", "low", "high"),
    [  # Newcombe 1998, Table I, method 3
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0.0, 20, 0.0, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
        (1.0, 20, 0.8389, 1.0),
    ],
)
def test_the_interval_is_wilsons(share: float, images: int, low: float, high: float) -> None:
    assert interval(share, images) == pytest.approx((low, high), abs=5e-5)


def test_what_and_where_are_counted_apart() -> None:
    wanted, seen = np.array([0, 1, 2, 3, 0]), np.array([0, 0, 0, 3, 3])
    found = agreements(wanted, seen, CLASSES)
    assert found == {"agreement": 2 / 5, "what": 3 / 5, "where": 3 / 5}
    assert agreements(wanted, seen, ("7", "8 in the box", "9", "10")) == {"agreement": 2 / 5}


@pytest.mark.parametrize(
    ("key", "classes", "n"), [("classifier", CLASSES[::-1], 8), ("n", CLASSES, 9), ("eval", None, 8)]
)
def test_another_judge_or_too_few_captions_are_refused(
    key: str, classes: tuple[str, ...] | None, n: int, tmp_path: Path
) -> None:
    data: Any = SimpleNamespace()
    if classes is not None:
        keep_classes(tmp_path, classes)
        data = build(
            CaptionedImageDataModule,
            path=str(write_captioned(tmp_path / "shards")),
            text_encoder=TextEncoding("words:8", 6, 8),
        )
    judge: Any = SimpleNamespace(
        run=SimpleNamespace(path=tmp_path), task=SimpleNamespace(num_classes=len(CLASSES))
    )
    with refused(key):
        check_text_samples(SampleOptions("judge", n), data, judge)
    if classes is not None:
        keep_classes(tmp_path, CLASSES)
        check_text_samples(SampleOptions("judge", 8), data, judge)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs `judge` and `texts`; `shards` beside it has their data."""
    root = tmp_path_factory.mktemp("text-samples")
    shards = write_captioned(root / "shards")
    options = [f"--{line.replace(': ', '=')}" for line in JUDGE.strip().splitlines()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MHLA_RUNS", str(root / "runs"))
        train(Path("classification/convnet_mnist_cpu"), "judge", f"--data.path={shards}", *options)
        train(write_recipe(root / "texts.yaml", shards), "texts")
    return root / "runs"


@pytest.fixture
def here(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MHLA_RUNS", str(runs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow  # a run and its judge
def test_samples_of_held_out_captions_end_to_end(
    here: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = ["--n", "6", "--steps", "2", "--batch-size", "4", "--guidance", "2", "--seed", "3"]
    command = ["eval", "samples", "texts", "--classifier", "judge", *draw, "--device", "cpu"]
    assert main([*command, "--json", "out.json"]) == 0
    shown = capsys.readouterr().out
    written = json.loads(Path("out.json").read_text())
    (numbers,) = written["rows"]
    assert list(numbers)[:5] == ["run", "agreement", "what", "where", "real_agreement"]
    assert list(numbers)[5:] == ["fd", "sfd", "class_score", "precision", "recall", "images_per_second"]
    assert written["intervals"] == {
        name: list(interval(numbers[name], 6)) for name in ("agreement", "what", "where")
    }
    assert f"{written['intervals']['what'][0]:.4f} to" in shown

    found = find_text_image_run("texts")
    data, network = found.data, open_network("judge")
    assert isinstance(data, CaptionedImageDataModule)
    asked = data.captions()[:6]
    drawing = TextDrawing(seed=3, sampler="euler", steps=2)
    task = load_backbone(found.task, found.weights, "cpu")
    one = draw_samples(
        task,
        data.encode_text([asked[5][0]]),
        data.null_text(),
        task.sample_shape,
        [(3, "sample", 5)],
        TextDrawing(seed=3, sampler="euler", steps=2, guidance=type(drawing.guidance)(2.0)),
    )
    assert main(["sample", "texts", "--prompts", "asked.txt"]) == 2, "no such file"
    Path("asked.txt").write_text("".join(f"{caption}\n" for caption, _ in asked))
    out = ["--out", "drawn", "--sampler", "euler", "--device", "cpu"]
    assert main(["sample", "texts", "--prompts", "asked.txt", *out, *draw[2:]]) == 0
    images = np.concatenate([np.load(part) for part in sorted(Path("drawn/parts").glob("*.npy"))])
    np.testing.assert_array_equal(images[5], data.to_images(one)[0].numpy())
    seen = network(images).probabilities.argmax(1)
    wanted = np.array([label for _, label in asked])
    assert agreements(wanted, seen, CLASSES) == {name: numbers[name] for name in written["intervals"]}
    assert main([*command, "--json", "again.json"]) == 0
    assert "measured before" in capsys.readouterr().out
    assert json.loads(Path("again.json").read_text()) == written


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused(
    here: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "samples", "texts", "--classifier", "judge", "--steps", "2"]
    assert main([*command, "--n", "9"]) == 2
    assert "n: 9 is too large" in capsys.readouterr().err
    assert main([*command, "--n", "4", "--sampler", "ddim"]) == 2
    assert "'ddim'" in capsys.readouterr().err
    evaluation = "samples: {classifier: judge, n: 9}"
    over = ["--over", "model.attention=[linear]", "--eval", evaluation]
    assert main(["compare", str(runs.parent / "texts.yaml"), *over]) == 2
    assert "n: row 'linear': 9 is too large" in capsys.readouterr().err
