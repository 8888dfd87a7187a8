"""`mhla data latents` and opening VAEs: refused arguments and sources, and skipped images."""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mhla_lightning.cli.main import main
from mhla_lightning.data.encoders.vaes import decode_latents, load_vae
from mhla_lightning.data.index import Clip, ShardIndex, read_index, write_index
from mhla_lightning.data.prepare.latents.devices import find_devices
from mhla_lightning.data.prepare.latents.make import LatentOptions, make_latents
from mhla_lightning.data.prepare.pack import PackOptions, pack
from mhla_lightning.data.prepare.parallel import Interrupted
from mhla_lightning.data.prepare.samples import Sample
from mhla_lightning.data.prepare.verify import verify
from mhla_lightning.data.prepare.writer import write_split
from mhla_lightning.errors import DataError, UserError
from tests.helpers.damaged import DataSet
from tests.helpers.errors import refused
from tests.helpers.vaes import SIZE, save_dc, save_images, save_kl

pytest.importorskip("diffusers")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kl and dc, autoencoders; packed, images as shards."""
    root = tmp_path_factory.mktemp("mistakes")
    save_kl(root / "kl")
    save_dc(root / "dc")
    save_images(root / "source", train=12, val=4)
    pack(root / "source", root / "packed", PackOptions(shards=3))
    return root


def options(root: Path, vae: str = "kl", **others: object) -> LatentOptions:
    chosen: dict[str, Any] = {"vae": str(root / vae), "size": SIZE, "batch_size": 4, "device": "cpu"}
    return LatentOptions(**chosen | others)


OPTIONS = {
    # The last argument is the one to blame.
    "size": {"size": 30},
    "small size": {"size": 1},
    "no size": {"size": 0},
    "batch": {"batch_size": 0},
    "workers": {"workers": 0},
    "dtype": {"dtype": "fp16"},
    "device": {"device": "gpu"},
    "devices of two types": {"device": "cpu,meta"},
    "moments of DC": {"vae": "dc", "moments": True},
    "scale": {"scale": 0.0},
    "shift": {"shift": float("inf")},
    "share": {"max_skipped_share": 2},
    "val": {"val": 3},
    "shards": {"shards": 0},
}


@pytest.mark.parametrize("others", OPTIONS.values(), ids=OPTIONS)
def test_arguments(root: Path, tmp_path: Path, others: dict) -> None:
    with refused(list(others)[-1]):
        make_latents(root / "packed", tmp_path / "out", options(root, **others))
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_mistake_on_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "data",
                "latents",
                str(root / "packed"),
                str(tmp_path / "out"),
                "--vae",
                str(root / "kl"),
                "--size",
                "30",
                "--device",
                "cpu",
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert "--size" in error
    assert "e.g. 32" in error, "the nearest size"
    assert error.count("\n") == 1


def test_devices() -> None:
    assert find_devices("cpu, cpu") == ("cpu", "cpu")
    with refused("device"):
        find_devices("meta")
    if not torch.cuda.is_available():
        assert find_devices() == ("cpu",)
        with refused("device"):
            find_devices("cuda:0")


def _without_classes(root: Path) -> Path:
    save_images(root / "images")
    pack(root / "images", root / "packed", PackOptions(shards=1))
    for split in ("train", "val"):
        index = read_index(root / "packed" / split)
        write_index(root / "packed" / split, ShardIndex("images", index.shards))
    return root / "packed"


def _of_kind(kind: str) -> Callable[[Path], Path]:
    return lambda root: DataSet(root / kind, kind).root  # type: ignore[arg-type]


def _clips(root: Path) -> Path:
    write_index(root, ShardIndex("clips", (), clip=Clip(9, 16, 16, 8.0)))
    return root


# FOLDER is the folder of the test.
SOURCES: dict[str, tuple[Callable[[Path], object], str, type[UserError]]] = {
    "tokens": (_of_kind("tokens"), "FOLDER/in/tokens/train/index.json", DataError),
    "latents": (_of_kind("latents"), "FOLDER/in/latents/train/index.json", DataError),
    "video": (_clips, "FOLDER/in/index.json", DataError),
    "text": (lambda root: "mqar", "mqar", DataError),
    "without classes": (_without_classes, "FOLDER/in/packed/train/index.json", DataError),
    "unknown": (lambda root: "mnits", "source", UserError),
    "missing folder": (lambda root: root / "nowhere", "source", UserError),
    "empty folder": (lambda root: root, "FOLDER/in", DataError),
}


@pytest.mark.parametrize(("make", "key", "kind"), SOURCES.values(), ids=SOURCES)
def test_sources(
    root: Path, tmp_path: Path, make: Callable[[Path], object], key: str, kind: type[UserError]
) -> None:
    (tmp_path / "in").mkdir()
    with refused(key.replace("FOLDER", str(tmp_path)), kind):
        make_latents(str(make(tmp_path / "in")), tmp_path / "out", options(root))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_target_inside_the_source_is_refused(root: Path) -> None:
    with refused("to"):
        make_latents(root / "packed", root / "packed" / "out", options(root))


@pytest.mark.parametrize(
    "others",
    [{"vae": "dc"}, {"scale": 0.7}, {"size": 2 * SIZE}, {"flip": False}, {"moments": False}],
    ids=lambda others: str(*others),
)
def test_a_target_of_another_vae_or_settings_is_refused(root: Path, tmp_path: Path, others: dict) -> None:
    make_latents(root / "packed", tmp_path / "out", options(root))
    vae = read_index(tmp_path / "out" / "train").vae
    with refused(str(tmp_path / "out")) as caught:
        make_latents(root / "packed", tmp_path / "out", options(root, **others))
    assert str(vae) in str(caught.value)
    assert "\n" not in str(caught.value)
    with refused(str(tmp_path / "out")):
        make_latents(root / "packed", tmp_path / "out", options(root))
    make_latents(root / "packed", tmp_path / "out", options(root, **others), overwrite=True)
    assert read_index(tmp_path / "out" / "train").vae != vae


def test_work_of_another_command_is_kept(root: Path, tmp_path: Path) -> None:
    def stop(split: str, done: int, total: int) -> None:
        if (split, done) == ("train", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_latents(root / "packed", tmp_path / "out", options(root), on_progress=stop)
    entries = list((tmp_path / ".out.packing" / "entries" / "train").iterdir())
    assert entries
    with refused(str(tmp_path / "out")) as caught:
        make_latents(root / "packed", tmp_path / "out", options(root, batch_size=3, dtype="bf16"))
    assert "batch_size 4 instead of 3, dtype fp32 instead of bf16" in str(caught.value)
    assert list((tmp_path / ".out.packing" / "entries" / "train").iterdir()) == entries
    notes: list[str] = []
    make_latents(root / "packed", tmp_path / "out", options(root, workers=2), on_note=notes.append)
    assert notes == [f"{len(entries)} of {12 + 4} shards were finished before and are kept"]


def _shards(folder: Path, count: int, bad: dict[int, bytes]) -> Path:
    """Shards of `count` images of each split; those in `bad` have other bytes."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split in ("train", "val"):
        images = []
        for number in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(buffer, format="PNG")
            data = bad.get(number, buffer.getvalue()) if split == "train" else buffer.getvalue()
            images.append(Sample(f"n{number}", {"cls": b"0", "png": data}))
        write_split(folder / split, ShardIndex("images", (), ("a",)), images, 20_000)
    return folder


def test_broken_images_are_skipped_and_counted(root: Path, tmp_path: Path) -> None:
    source = _shards(tmp_path / "in", 120, {7: b"\x89PNG\r\n\x1a\n broken", 90: b"GIF"})
    with refused("max_skipped_share", Interrupted) as caught:
        make_latents(source, tmp_path / "out", options(root))
    assert "n90" in str(caught.value)
    assert (tmp_path / ".out.packing" / "entries" / "train").exists(), (
        "finished shards are kept for a larger share"
    )
    report = make_latents(source, tmp_path / "out", options(root, max_skipped_share=0.02))
    assert [(split, name) for split, name, _ in report.skipped] == [("train", "n7"), ("train", "n90")]
    assert "cannot be decoded" in report.skipped[0][2]
    assert (report.indices["train"].samples, report.indices["val"].samples) == (118, 120)
    train = report.indices["train"].vae
    assert train is not None
    assert np.isfinite(train.mean).all()


def _flat(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (value,) * 3).save(buffer, format="PNG")
    return buffer.getvalue()


def _scale_latents(folder: Path, factor: float) -> None:
    weights = load_file(folder / WEIGHTS)
    for name in ("quant_conv.weight", "quant_conv.bias"):
        weights[name][:4] *= factor  # of the mean, not of the log-variance
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def test_latents_that_are_not_finite_are_skipped_by_name(tmp_path: Path) -> None:
    """The VAE's latents are made so large that those of a black image, and of no grey one, are beyond
    float16.
    """
    source = _shards(
        tmp_path / "in", 120, {number: _flat(0 if number == 50 else 240) for number in range(120)}
    )
    vae = load_vae(save_kl(tmp_path / "kl"), dtype=torch.bfloat16)
    grey, black = (
        float(vae.encode(torch.full((1, 3, SIZE, SIZE), value / 127.5 - 1)).mean.abs().max())
        for value in (240, 0)
    )
    assert black > 1.1 * grey, "this VAE does not do for the test"
    _scale_latents(tmp_path / "kl", 65504 / (black * grey) ** 0.5)
    chosen = LatentOptions(
        str(tmp_path / "kl"), size=SIZE, device="cpu", dtype="bf16", flip=False, max_skipped_share=0.5
    )
    report = make_latents(source, tmp_path / "out", chosen)
    assert [name for split, name, _ in report.skipped if split == "train"] == ["n50"]
    assert "holds NaN or values that float16 does not reach" in report.skipped[0][2]
    assert report.indices["train"].samples == 119
    assert verify(str(tmp_path / "out")).found == 0, "nothing that is not finite was written"


def test_a_vae_that_gives_nan_ends_early(tmp_path: Path) -> None:
    source = _shards(tmp_path / "in", 120, {})
    save_kl(tmp_path / "kl")
    weights = load_file(tmp_path / "kl" / WEIGHTS)
    weights["quant_conv.weight"].fill_(3e38)  # a number itself; what it makes is none
    save_file(weights, tmp_path / "kl" / WEIGHTS, metadata={"format": "pt"})
    seen: list[int] = []
    chosen = LatentOptions(str(tmp_path / "kl"), size=SIZE, batch_size=10, device="cpu", shards=1)
    with refused("train", DataError):
        make_latents(
            source, tmp_path / "out", chosen, on_progress=lambda split, done, total: seen.append(done)
        )
    assert max(seen) == 90
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "kl"]


def _config(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in content.items() if value is not None})
    )


class _Trap:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("/tmp/d-sprung"),)


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(_Trap()))


def _less(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["encoder.conv_in.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


# The message names the folder and the fact.
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled weights": (_pickled, "safetensors"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "safetensors"),
    "cut weights": (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 50), "safetensors"),
    "a weight is missing": (_less, "encoder.conv_in.weight"),
    "other sizes": (lambda folder: _config(folder, latent_channels=6), "weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "another class": (lambda folder: _config(folder, _class_name="UNet2DModel"), "AutoencoderDC, Au"),
    "no class": (lambda folder: _config(folder, _class_name=None), "'None'"),
    "channel by channel": (
        lambda folder: _config(folder, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        "channel",
    ),
}


@pytest.mark.parametrize(("damage", "fact"), BROKEN.values(), ids=BROKEN)
def test_vaes_that_cannot_be_opened(tmp_path: Path, damage: Callable[[Path], object], fact: str) -> None:
    save_kl(tmp_path / "kl")
    damage(tmp_path / "kl")
    with pytest.raises(UserError) as caught:
        load_vae(str(tmp_path / "kl"))
    assert str(tmp_path / "kl") in str(caught.value)
    assert fact in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/d-sprung").exists()


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-vae", "no such name"):
        with pytest.raises(UserError) as caught:
            load_vae(name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(UserError) as caught:
            load_vae(name)
        assert f"folder {name}" in str(caught.value)


def test_without_diffusers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError) as caught:
        load_vae(str(root / "kl"))
    assert "mhla-lightning[diffusion]" in str(caught.value)


def test_a_vae_of_other_channels(tmp_path: Path) -> None:
    save_kl(tmp_path / "kl", in_channels=1, out_channels=1)
    with pytest.raises(UserError) as caught:
        load_vae(str(tmp_path / "kl"))
    assert "1 channels" in str(caught.value)


def test_the_identity_of_a_vae(tmp_path: Path) -> None:
    """Of a copy, in other numbers, inside a pipeline's folder: the same. Other weights or another scale:
    another.
    """
    save_kl(tmp_path / "kl")
    save_kl(tmp_path / "pipeline" / "vae")
    state = torch.get_rng_state()
    found = load_vae(str(tmp_path / "kl"))
    assert torch.equal(state, torch.get_rng_state()), "opening one draws nothing from torch's generator"
    assert load_vae(str(tmp_path / "kl"), dtype=torch.bfloat16).sha256 == found.sha256
    assert load_vae(str(tmp_path / "pipeline")).sha256 == found.sha256
    assert load_vae(str(tmp_path / "pipeline"), subfolder="vae").sha256 == found.sha256
    found.model.save_pretrained(tmp_path / "copy")  # type: ignore[operator]
    assert load_vae(str(tmp_path / "copy")).sha256 == found.sha256
    others = [
        save_kl(tmp_path / "seed", seed=1),
        save_kl(tmp_path / "scale", scaling_factor=0.6),
        save_dc(tmp_path / "dc"),
    ]
    assert len({found.sha256, *(load_vae(other).sha256 for other in others)}) == 4
    with pytest.raises(UserError, match=r"config\.json"):
        load_vae(str(tmp_path / "pipeline"), subfolder="unet")


def test_defaults_of_the_configuration(tmp_path: Path, root: Path) -> None:
    save_kl(tmp_path / "old", shift_factor=None, scaling_factor=0.18215)
    found = load_vae(str(tmp_path / "old"))
    assert (found.scale, found.shift, found.factor, found.has_posterior) == (0.18215, 0.0, 4, True)
    assert load_vae(str(tmp_path / "old"), scale=2.0, shift=1.0).scale == 2.0
    dc = load_vae(str(root / "dc"))
    assert (dc.scale, dc.shift, dc.factor, dc.has_posterior) == (0.4, 0.0, 4, False)
    assert dc.latent_shape(64) == (8, 16, 16)
    assert not dc.model.training


def test_pixels_are_clamped(root: Path) -> None:
    vae = load_vae(str(root / "dc"))
    vae.model.get_parameter("decoder.conv_out.weight").data.mul_(100)
    found = decode_latents(vae, 1000 * torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert (int(found.min()), int(found.max())) == (0, 255)
    assert decode_latents(vae, torch.zeros(3, 8, 4, 4)).shape == (3, 16, 16, 3)
