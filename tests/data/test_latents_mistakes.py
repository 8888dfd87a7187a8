"""`mhla data latents` and opening VAEs: what is refused, what is skipped, and in which words."""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

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
    return LatentOptions(
        **({"vae": str(root / vae), "size": SIZE, "batch_size": 4, "device": "cpu"} | others)
    )  # type: ignore[arg-type]


# Arguments

OPTIONS = {
    "size": ({"size": 30}, r"--size is 30; the VAE .*/kl needs a multiple of 4, e\.g\. 32$"),
    "small size": ({"size": 1}, r"--size is 1; .* e\.g\. 4$"),
    "no size": ({"size": 0}, "--size is 0; it must be at least 1"),
    "batch": ({"batch_size": 0}, "--batch-size is 0; it must be at least 1"),
    "threads": ({"threads": 0}, "--workers is 0; it must be at least 1"),
    "dtype": ({"dtype": "fp16"}, "unknown --dtype 'fp16'; valid: bf16, fp32"),
    "device": ({"device": "gpu"}, r"--device gpu cannot be used \("),
    "devices of two types": ({"device": "cpu,meta"}, "--device cpu,meta names devices of several types"),
    "moments of DC": (
        {"vae": "dc", "moments": True},
        r"--moments: the VAE .*/dc \(AutoencoderDC\) has no posterior",
    ),
    "scale": ({"scale": 0.0}, "--scale is 0.0; it must be a finite number above 0"),
    "shift": ({"shift": float("inf")}, "--shift is inf"),
    "share": ({"max_skipped_share": 2}, "--max-skipped-share is 2; it must be from 0 to 1"),
    "val": ({"val": 3}, "--val 3 was given, but .* is packed and has its splits"),
    "shards": ({"shards": 0}, "--shards is 0"),
}


@pytest.mark.parametrize(("others", "says"), OPTIONS.values(), ids=OPTIONS)
def test_arguments(root: Path, tmp_path: Path, others: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_latents(root / "packed", tmp_path / "out", options(root, **others))
    assert list(tmp_path.iterdir()) == []


def test_the_command_tells_a_mistake_in_one_sentence(
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
    assert (
        capsys.readouterr().err == f"error: --size is 30; the VAE {root}/kl needs a multiple of 4, e.g. 32\n"
    )


def test_devices() -> None:
    assert find_devices("cpu, cpu") == ("cpu", "cpu")
    if not torch.cuda.is_available():
        assert find_devices() == ("cpu",)
        with pytest.raises(
            UserError, match=r"^--device cuda:0 cannot be used \(.*\): auto, cpu, cuda, or cuda:0,cuda:1$"
        ):
            find_devices("cuda:0")


# Sources


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


SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokens": (_of_kind("tokens"), "holds tokens; images with classes are needed"),
    "latents": (_of_kind("latents"), "holds latents; images with classes are needed"),
    "video": (_clips, "holds clips; images with classes are needed"),
    "text": (lambda root: "mqar", "mqar holds tokens; images with classes are needed"),
    "without classes": (_without_classes, "holds images without classes"),
    "unknown": (lambda root: "mnits", "did you mean 'mnist'"),
    "missing folder": (lambda root: root / "nowhere", "unknown source"),
    "empty folder": (lambda root: root, "has no class folders"),
}


@pytest.mark.parametrize(("make", "says"), SOURCES.values(), ids=SOURCES)
def test_sources(root: Path, tmp_path: Path, make: Callable[[Path], object], says: str) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=says):
        make_latents(str(make(tmp_path / "in")), tmp_path / "out", options(root))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_target_inside_the_source_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"^/.*/packed/out lies inside the source"):
        make_latents(root / "packed", root / "packed" / "out", options(root))


# A target in use


@pytest.mark.parametrize(
    "others",
    [{"vae": "dc"}, {"scale": 0.7}, {"size": 2 * SIZE}, {"flip": False}, {"moments": False}, {"name": "x"}],
    ids=lambda others: str(*others),
)
def test_a_target_of_another_vae_or_settings_is_refused(root: Path, tmp_path: Path, others: dict) -> None:
    make_latents(root / "packed", tmp_path / "out", options(root))
    vae = read_index(tmp_path / "out" / "train").vae
    with pytest.raises(UserError) as caught:
        make_latents(root / "packed", tmp_path / "out", options(root, **others))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/out holds latents of {vae}, and these would be of ")
    assert text.endswith(": choose another folder, or pass --overwrite")
    assert "\n" not in text
    with pytest.raises(UserError, match="out exists and is not empty"):
        make_latents(root / "packed", tmp_path / "out", options(root))
    make_latents(root / "packed", tmp_path / "out", options(root, **others), overwrite=True)
    assert read_index(tmp_path / "out" / "train").vae != vae


def test_what_another_command_began_is_not_thrown_away(root: Path, tmp_path: Path) -> None:
    def stop(split: str, done: int, total: int) -> None:
        if (split, done) == ("train", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_latents(root / "packed", tmp_path / "out", options(root), on_progress=stop)
    entries = list((tmp_path / ".out.packing" / "entries" / "train").iterdir())
    assert entries
    with pytest.raises(
        UserError,
        match=(
            r"out was begun with batch_size 4 instead of 3, dtype fp32 instead of bf16: run that command "
            r"again"
        ),
    ):
        make_latents(root / "packed", tmp_path / "out", options(root, batch_size=3, dtype="bf16"))
    assert list((tmp_path / ".out.packing" / "entries" / "train").iterdir()) == entries
    notes: list[str] = []
    make_latents(root / "packed", tmp_path / "out", options(root, workers=2), on_note=notes.append)
    assert notes == [f"{len(entries)} of {12 + 4} shards were finished before and are kept"]


# Images that give no latent


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
    with pytest.raises(
        Interrupted,
        match=(
            r"^2 of \d+ images \(.*%\) give no latent, more than --max-skipped-share 0.01 allows; the "
            r"last is n90 of train"
        ),
    ):
        make_latents(source, tmp_path / "out", options(root))
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
    weights["quant_conv.bias"].fill_(float("nan"))
    save_file(weights, tmp_path / "kl" / WEIGHTS, metadata={"format": "pt"})
    seen: list[int] = []
    chosen = LatentOptions(str(tmp_path / "kl"), size=SIZE, batch_size=10, device="cpu", shards=1)
    with pytest.raises(
        DataError, match=r"none of the first 100 images of train gives a latent; n99: its latent holds NaN"
    ):
        make_latents(
            source, tmp_path / "out", chosen, on_progress=lambda split, done, total: seen.append(done)
        )
    assert max(seen) == 90
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "kl"]


# Opening a VAE


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


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled weights": (_pickled, "the weights of the VAE .* cannot be read from a safetensors file"),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        "the weights of the VAE .* cannot be read from a safetensors file",
    ),
    "cut weights": (
        lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 50),
        "the weights of the VAE .* cannot be read from a safetensors file",
    ),
    "a weight is missing": (
        _less,
        "are not those of its config.json: 1 are missing or misshaped, e.g. encoder.conv_in.weight",
    ),
    "other sizes": (lambda folder: _config(folder, latent_channels=6), "the weights of the VAE"),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "the folder .* holds no VAE's config.json",
    ),
    "broken config": (
        lambda folder: (folder / "config.json").write_text("{"),
        "the folder .* holds no VAE's config.json",
    ),
    "another class": (
        lambda folder: _config(folder, _class_name="UNet2DModel"),
        "unknown class 'UNet2DModel' of the VAE .*; valid: AutoencoderDC, Au",
    ),
    "no class": (lambda folder: _config(folder, _class_name=None), "unknown class 'None' of the VAE"),
    "channel by channel": (
        lambda folder: _config(folder, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        "normalises every channel by itself",
    ),
}


@pytest.mark.parametrize(("damage", "says"), BROKEN.values(), ids=BROKEN)
def test_vaes_that_cannot_be_opened(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    save_kl(tmp_path / "kl")
    damage(tmp_path / "kl")
    with pytest.raises(UserError, match=says) as caught:
        load_vae(str(tmp_path / "kl"))
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/d-sprung").exists()


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-vae", "no such name"):
        with pytest.raises(
            UserError, match=f"the VAE {name} is no folder here and could not be fetched from the hub"
        ) as caught:
            load_vae(name)
        assert "\n" not in str(caught.value)
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(UserError, match="there is no folder"):
            load_vae(name)


def test_without_diffusers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(
        UserError,
        match=r"^the VAE .*/kl needs the package 'diffusers': pip install 'mhla-lightning\[diffusion\]'$",
    ):
        load_vae(str(root / "kl"))


def test_a_vae_of_other_channels(tmp_path: Path) -> None:
    save_kl(tmp_path / "kl", in_channels=1, out_channels=1)
    with pytest.raises(UserError, match="takes images of 1 channels"):
        load_vae(str(tmp_path / "kl"))


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
    with pytest.raises(UserError, match="no VAE's config.json"):
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
