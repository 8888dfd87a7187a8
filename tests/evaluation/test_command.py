"""`mhla eval fid` and `mhla eval samples` on small trained runs and on files of others."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhla_lightning.cli.main import main
from mhla_lightning.data.modules.images import ImageDataModule
from mhla_lightning.data.modules.options import ReadingConfig
from mhla_lightning.data.transforms import Augmentation
from mhla_lightning.diffusion import Guidance
from mhla_lightning.evaluation.image_metrics import Gaussian, ImageFeatures, frechet_distance, image_metrics
from mhla_lightning.evaluation.images import read_reference, read_shards, validation_images
from mhla_lightning.evaluation.networks import Inception, OwnFeatures, find_classifier, open_network
from mhla_lightning.inference.diffusion.images import Drawing, find_image_run, load_task, sample_images
from tests.helpers.diffusion_models import train, write_recipe
from tests.helpers.errors import refused
from tests.helpers.images import TINY_RECIPE

CLASSIFIER = """
model.num_classes: 4
model.backbone_options.img_size: 8
model.backbone_options.widths: [4, 8, 12]
model.optimizer.lr: 0.01
model.schedule.warmup_steps: 0
trainer.max_steps: 30
trainer.val_check_interval: 10
checkpoint.every_n_steps: 30
data.image_size: 8
data.batch_size: 16
data.augmentation.mean: [0.5, 0.5, 0.5]
data.augmentation.std: [0.3, 0.3, 0.3]
"""
DRAW = ["--n", "20", "--steps", "3", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs `classifier`, `other` (with attention) and `diffusion`."""
    root = tmp_path_factory.mktemp("eval")
    options = [f"--{line.replace(': ', '=')}" for line in CLASSIFIER.strip().splitlines()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MHLA_RUNS", str(root / "runs"))
        train(Path("classification/convnet_mnist_cpu"), "classifier", f"--data.path={shards}", *options)
        (root / "vit.yaml").write_text(TINY_RECIPE.replace("PATH", str(shards)))
        train(root / "vit.yaml", "other")
        train(write_recipe(root / "dit.yaml", shards), "diffusion")
    return root / "runs"


@pytest.fixture
def here(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MHLA_RUNS", str(runs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["classifier", "other"])
@pytest.mark.slow
def test_own_features_are_those_of_validation(name: str, here: Path, shards: Path) -> None:
    """Images as uint8 give the probabilities of the run's own validation batches."""
    found = find_classifier(name)
    network = OwnFeatures(found)
    data = ImageDataModule(
        str(shards),
        image_size=8,
        batch_size=20,
        augmentation=found.data.augmentation,
        reading=ReadingConfig(num_workers=0),
    )
    (batch,) = data.val_dataloader()
    assert found.task.backbone is not None
    with torch.no_grad():
        expected = found.task.backbone(batch["image"]).double().softmax(-1)
    features = network(read_shards(str(shards), (8, 8))[0])
    np.testing.assert_allclose(features.probabilities, expected.numpy(), atol=1e-5)
    assert features.pooled.shape == (20, 12)
    assert features.spatial.shape == (20, {"classifier": 2 * 2 * 7, "other": 4 * 4 * 7}[name])
    assert len(network(pictures(70, size=13)).pooled) == 70


def test_fid_of_shards_and_of_the_same_images_in_a_file(
    here: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, name = read_shards(str(shards), (8, 8))
    assert name == f"{shards} (val)"
    np.savez("ref.npz", arr_0=images)
    np.savez("samples.npz", arr_0=pictures(12), arr_1=np.zeros(12, np.int64))
    rows = []
    for reference in (str(shards), str(shards / "val"), "ref.npz"):
        command = [
            "eval",
            "fid",
            "samples.npz",
            "--reference",
            reference,
            "--features",
            "classifier",
            "--json",
            "out.json",
            "--device",
            "cpu",
        ]
        assert main(command) == 0
        rows.append(json.loads(Path("out.json").read_text())["rows"][0])
    assert rows[0] == rows[1] == rows[2]
    assert list(rows[0]) == ["samples", "fd", "sfd", "class_score", "precision", "recall"]
    network = open_network("classifier")
    one, other = (Gaussian.of(network(found).pooled) for found in (images, pictures(12)))
    assert rows[0]["fd"] == pytest.approx(
        frechet_distance(one.mean, one.covariance, other.mean, other.covariance)
    )
    assert rows[0]["fd"] > 0
    shown = capsys.readouterr().out
    assert "FD on own features" in shown
    assert "FID" not in shown
    assert (
        main(
            [
                "eval",
                "fid",
                "ref.npz",
                "--reference",
                str(shards),
                "--features",
                "classifier",
                "--json",
                "out.json",
            ]
        )
        == 0
    )
    same = json.loads(Path("out.json").read_text())["rows"][0]
    assert same["fd"] == pytest.approx(0, abs=1e-9)
    assert (same["precision"], same["recall"]) == (1, 1)


def test_shards_are_resized_to_the_samples(here: Path, shards: Path) -> None:
    images, _ = read_shards(str(shards), (6, 12))
    assert images.shape == (20, 6, 12, 3)
    plain = Augmentation(crop_pct=1.0, mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7))
    data = ImageDataModule(str(shards), image_size=8, augmentation=plain)
    np.testing.assert_array_equal(validation_images(data), read_shards(str(shards), (8, 8))[0])
    np.testing.assert_array_equal(
        validation_images(data)[0], data.to_images(next(iter(data.val_dataloader()))["image"])[0].numpy()
    )


class Published:
    """A network whose numbers count as published, with the mean colour as its feature."""

    name, published = "means", True

    def __call__(self, images: np.ndarray) -> ImageFeatures:
        pixels = images / 255
        share = pixels.mean((1, 2, 3))[:, None]
        return ImageFeatures(
            pixels.mean((1, 2)),
            pixels[:, 0, :2].reshape(len(images), -1),
            np.concatenate([share, 1 - share], 1),
        )


def test_statistics_of_adms_reference_file_are_used_unchanged(here: Path) -> None:
    """Its statistics are used unchanged; its images give precision and recall."""
    network, real, fake = Published(), pictures(30), pictures(25, seed=1)
    seen = network(real)
    pooled, spatial = Gaussian.of(seen.pooled), Gaussian.of(seen.spatial)
    statistics: dict[str, Any] = {
        "mu": pooled.mean + 1,
        "sigma": pooled.covariance,
        "mu_s": spatial.mean,
        "sigma_s": spatial.covariance,
    }
    np.savez("whole.npz", arr_0=real, **statistics)
    np.savez("statistics.npz", **statistics)
    whole, bare, plain = (
        read_reference(name, network, (8, 8)) for name in ("whole.npz", "statistics.npz", "whole.npz")
    )
    np.testing.assert_array_equal(whole.pooled.mean, pooled.mean + 1)
    found, less = image_metrics(network(fake), whole, True), image_metrics(network(fake), bare, True)
    assert list(found) == ["fid", "sfid", "inception_score", "precision", "recall"]
    assert less == {key: found[key] for key in ("fid", "sfid", "inception_score")}
    assert image_metrics(network(fake), plain, True) == found


def bad_files() -> dict[str, Callable[[Path], Any]]:
    return {
        "text": lambda path: path.write_text("no zip"),
        "empty": lambda path: path.write_bytes(b""),
        "objects": lambda path: np.savez(path, arr_0=np.array([{}], dtype=object), allow_pickle=True),
        "one array": lambda path: path.write_bytes(npy(pictures(2))),
        "floats": lambda path: np.savez(path, arr_0=np.zeros((2, 8, 8, 3))),
        "channels first": lambda path: np.savez(path, arr_0=np.zeros((2, 3, 8, 8), np.uint8)),
        "no images": lambda path: np.savez(path, arr_0=np.zeros((0, 8, 8, 3), np.uint8)),
        "other names": lambda path: np.savez(path, images=pictures(2)),
        "cut": lambda path: path.write_bytes(Path("whole.npz").read_bytes()[:300]),
    }


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", bad_files())
@pytest.mark.parametrize("place", ["samples", "reference"])
def test_bad_files_give_one_line_that_names_them(
    damage: str, place: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("samples", "reference"):
        np.savez(f"{name}.npz", arr_0=pictures(6))
    np.savez("whole.npz", arr_0=pictures(9))
    bad_files()[damage](Path(f"{place}.npz"))
    assert (
        main(["eval", "fid", "samples.npz", "--reference", "reference.npz", "--features", "classifier"]) == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{place}.npz" in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples.npz": "none.npz"}, "none.npz: "),
        ({"REF": "none.npz"}, "none.npz: "),
        ({"REF": "nowhere"}, "nowhere"),
        ({"REF": "."}, "split"),
        ({"REF": "statistics.npz"}, "statistics.npz: holds mu, sigma"),
        ({"classifier": "diffusion"}, "diffusion: trains ImageDiffusionTask"),
        ({"classifier": "nobody"}, "nobody"),
        ({"samples.npz": "three.npz"}, "features_fake: 3 images"),
        ({"samples.npz": "one.npz"}, "features: 1 image"),
    ],
)
def test_mistakes_of_fid(
    change: dict[str, str], words: str, here: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("samples", 6), ("three", 3), ("one", 1)):
        np.savez(f"{name}.npz", arr_0=pictures(count))
    np.savez("statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    command = ["eval", "fid", "samples.npz", "--reference", "REF", "--features", "classifier"]
    changed = [change.get(word, word) for word in command]
    assert main([str(shards) if word == "REF" else word for word in changed]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_inception_without_weights_or_package_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez("samples.npz", arr_0=pictures(6))
    command = ["eval", "fid", "samples.npz", "--reference", "samples.npz"]
    monkeypatch.setenv("TORCH_HOME", str(here / "hub"))
    if importlib.util.find_spec("torch_fidelity") is not None:
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "--features: " in error
        assert str(here / "hub") in error
        assert "download https://github.com/" in error
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    assert main(command) == 2
    assert "needs the package 'torch-fidelity': pip install 'mhla-lightning[eval]'" in capsys.readouterr().err


def test_inception_features_are_laid_out_as_in_adms_graph(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights: checks the layers, their sizes and their order."""
    extractor = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is in the extra 'eval'"
    )
    monkeypatch.setenv("TORCH_HOME", str(here))
    place = here / "hub" / "checkpoints" / extractor.URL_INCEPTION_V3.rpartition("/")[2]
    place.parent.mkdir(parents=True)
    torch.manual_seed(0)
    monkeypatch.setattr(extractor.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.save({"anything": torch.zeros(1)}, place)
    network = Inception()
    images = pictures(3, size=20)
    seen = network(images)
    assert (seen.pooled.shape, seen.spatial.shape, seen.probabilities.shape) == (
        (3, 2048),
        (3, 17 * 17 * 7),
        (3, 1008),
    )
    maps: list[torch.Tensor] = []
    network._network.Mixed_6d.register_forward_hook(lambda module, inputs, output: maps.append(output))
    pooled, logits = network._network(torch.from_numpy(images).permute(0, 3, 1, 2))
    np.testing.assert_allclose(seen.pooled, pooled.numpy(), rtol=1e-5)
    np.testing.assert_allclose(seen.probabilities, logits.double().softmax(1).numpy(), rtol=1e-5)
    torch.testing.assert_close(logits, pooled @ network._network.fc.weight.T)  # without the bias
    np.testing.assert_allclose(
        seen.spatial.reshape(3, 17, 17, 7), maps[0][:, :7].permute(0, 2, 3, 1).numpy(), rtol=1e-5
    )
    place.write_bytes(b"not a checkpoint")
    with refused(str(place)):
        Inception()


@pytest.mark.slow  # test_fid_of_shards goes the same way with smaller numbers
def test_samples_end_to_end(here: Path, runs: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "eval",
        "samples",
        "diffusion",
        "--classifier",
        "classifier",
        "--guidance",
        "2",
        "--seed",
        "3",
        *DRAW,
    ]
    assert main([*command, "--json", "out.json"]) == 0
    assert "measured before" not in capsys.readouterr().out
    numbers = json.loads(Path("out.json").read_text())["rows"][0]
    assert list(numbers) == [
        "run",
        "agreement",
        "fd",
        "sfd",
        "class_score",
        "precision",
        "recall",
        "images_per_second",
    ]

    labels = [n % 4 for n in range(20)]
    found = find_image_run("diffusion")
    images = sample_images(
        found, load_task(found, "cpu"), labels, Drawing(3, steps=3, guidance=Guidance(2.0)), batch_size=8
    )
    network = open_network("classifier")
    seen = network(images)
    assert numbers["agreement"] == (seen.probabilities.argmax(1) == labels).mean()
    expected = image_metrics(seen, read_reference(str(shards), network, (8, 8)), published=False)
    assert {key: numbers[key] for key in expected} == pytest.approx(expected)
    assert numbers["images_per_second"] > 0

    (kept,) = (runs / "diffusion").glob("eval-samples-*.json")
    written = kept.read_bytes()
    assert main([*command, "--json", "again.json"]) == 0
    assert "measured before" in capsys.readouterr().out
    assert json.loads(Path("again.json").read_text())["rows"][0] == numbers
    assert kept.read_bytes() == written
    for further in (["--seed", "4"], ["--no-ema"], ["--classifier", "other"]):
        assert main([*command, *further]) == 0
    assert len(list((runs / "diffusion").glob("eval-samples-*.json"))) == 4
    assert main([*command, "--fresh", "--json", "again.json"]) == 0
    fresh = json.loads(Path("again.json").read_text())["rows"][0]
    assert {**fresh, "images_per_second": 0} == pytest.approx({**numbers, "images_per_second": 0})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n", "3"], "--n: 3"),
        (["--n", "22"], "--n: 22"),
        (["--steps", "0"], "--steps: 0"),
        (["--guidance", "-1"], "--guidance: -1.0"),
        (["--guidance", "nan"], "--guidance: nan"),
        (["--sampler", "euler"], "'ddpm'"),
        (["--classifier", "diffusion"], "--classifier: diffusion: trains ImageDiffusionTask"),
        (["--reference", "nowhere"], "nowhere"),
        (["--json", "nowhere/out.json"], "--json"),
    ],
)
def test_mistakes_of_samples(
    arguments: list[str], words: str, here: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted((runs / "diffusion").iterdir())
    assert main(["eval", "samples", "diffusion", "--classifier", "classifier", *DRAW, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert sorted((runs / "diffusion").iterdir()) == before


def test_only_diffusion_runs_are_sampled(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "samples", "classifier", "--classifier", "classifier", *DRAW]) == 2
    assert "classifier: trains ClassificationTask" in capsys.readouterr().err


def test_help_of_eval_loads_no_torch() -> None:
    command = "try:\n    main(['eval', 'fid', '--help'])\nfinally:\n    print('torch' in sys.modules)"
    code = f"import sys\nfrom mhla_lightning.cli.main import main\n{command}"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.endswith("False\n")
    assert "--reference" in found.stdout


@pytest.mark.slow
def test_compare_shows_the_numbers_of_samples(
    here: Path, shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of a diffusion recipe are judged once; a second call reads numbers and runs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = write_recipe(here / "dit.yaml", shards)
    evaluation = "samples: {classifier: classifier, n: 12, steps: 2, guidance: 2, device: cpu}"
    over = ["--over", "model.attention=[linear, mhla]", "--trainer.max_steps", "4", "--json", "table.json"]
    assert main(["compare", str(recipe), *over, "--eval", evaluation]) == 0
    shown = capsys.readouterr().out
    table = json.loads(Path("table.json").read_text())
    for row in table["rows"]:
        numbers = row["seeds"][0]["eval"]["samples"]
        assert {key: row["mean"][f"samples/{key}"] for key in numbers} == numbers
        assert f"{numbers['fd']:.4f}"[:5] in shown
    assert table["evaluations"]["samples"]["n"] == 12
    assert main(["compare", str(recipe), *over, "--eval", evaluation]) == 0
    assert capsys.readouterr().out.count("(measured before)") == 2
    assert json.loads(Path("table.json").read_text()) == table


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ("samples: {classifier: nobody}", "--eval.samples.classifier: "),
        ("samples: {classifier: diffusion}", "--eval.samples.classifier: diffusion"),
        ("samples: {classifier: classifier, n: 4.5}", "--eval.samples.n: 4.5"),
        ("samples: {classifier: classifier, n: 12, sampler: euler}", "'euler'"),
        ("samples: {classifier: classifier, n: 13}", "13 images"),
    ],
)
def test_compare_refuses_before_training(
    evaluation: str, words: str, here: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(here / "dit.yaml", shards)
    command = ["compare", str(recipe), "--over", "model.attention=[linear]", "--eval", evaluation]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert (
        main(
            [
                "compare",
                "classification/convnet_mnist_cpu",
                "--over",
                "model.optimizer.lr=[1e-3]",
                "--eval",
                "samples: {classifier: other}",
            ]
        )
        == 2
    )
    assert "ClassificationTask" in capsys.readouterr().err
