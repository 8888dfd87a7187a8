"""`mhla data latents`: what is written, against diffusers itself."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mhla_lightning.cli.main import main
from mhla_lightning.data import LatentDataModule
from mhla_lightning.data.encoders.vaes import decode_latents, load_vae
from mhla_lightning.data.index import VAE, ShardIndex, read_index
from mhla_lightning.data.kinds.latents import Latents
from mhla_lightning.data.members import RawSample
from mhla_lightning.data.modules.options import ReadingConfig
from mhla_lightning.data.prepare.latents.images import crop
from mhla_lightning.data.prepare.latents.make import LatentOptions, make_latents
from mhla_lightning.data.prepare.pack import PackOptions, pack
from mhla_lightning.data.prepare.samples import Sample
from mhla_lightning.data.prepare.verify import verify
from mhla_lightning.data.prepare.writer import write_split
from tests.helpers.ranks import Nursery
from tests.helpers.shards import array, content, samples
from tests.helpers.vaes import FACTOR, SIZE, save_dc, save_images, save_kl

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kl and dc, autoencoders; source, images of several sizes; packed, the same as shards."""
    root = tmp_path_factory.mktemp("latents")
    save_kl(root / "kl")
    save_dc(root / "dc")
    save_images(root / "source", train=24, val=8, size=(SIZE + 5, SIZE))
    pack(root / "source", root / "packed", PackOptions(shards=3))
    return root


def options(root: Path, vae: str = "kl", **others: object) -> LatentOptions:
    chosen: dict[str, Any] = {"vae": str(root / vae), "size": SIZE, "batch_size": 4, "device": "cpu"}
    return LatentOptions(**chosen | others)


def pixels(sample: RawSample) -> torch.Tensor:
    """An image of `root` as DiT prepares it: its middle columns, in [-1, 1]. (1, 3, SIZE, SIZE)."""
    image = np.asarray(Image.open(io.BytesIO(sample["png"])).convert("RGB")).astype(np.float32)
    left = (image.shape[1] - SIZE) // 2
    return torch.from_numpy(image[:, left : left + SIZE] / 127.5 - 1).permute(2, 0, 1)[None]


def diffusers_model(folder: Path) -> Any:
    import diffusers

    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder, low_cpu_mem_usage=False)


# What is written


@torch.no_grad()
@pytest.mark.parametrize("vae", ["kl", "dc"])
def test_latents_are_those_of_diffusers(root: Path, tmp_path: Path, vae: str) -> None:
    report = make_latents(root / "packed", tmp_path / "out", options(root, vae))
    model = diffusers_model(root / vae)
    loaded = load_vae(str(root / vae))
    for split in ("train", "val"):
        images, latents = samples(root / "packed" / split), samples(tmp_path / "out" / split)
        assert len(images) == len(latents) == report.indices[split].samples
        for image, latent in zip(images, latents, strict=True):
            assert latent["cls"] == image["cls"], "splits and order are kept"
            assert latent["__key__"] == image["__key__"]
            for name, seen in (("latent", pixels(image)), ("flipped", pixels(image).flip(-1))):
                if vae == "kl":
                    posterior = model.encode(seen).latent_dist
                    np.testing.assert_allclose(array(latent, name), posterior.mean[0], atol=1e-5)
                    logvar = array(latent, "logvar" if name == "latent" else "flipped_logvar")
                    np.testing.assert_allclose(logvar, posterior.logvar[0], atol=1e-5)
                    direct = posterior.mean
                else:
                    assert "logvar.npy" not in latent
                    direct = model.encode(seen).latent
                    np.testing.assert_allclose(array(latent, name), direct[0], atol=1e-5)
                used = (torch.from_numpy(array(latent, name))[None] - loaded.shift) * loaded.scale
                torch.testing.assert_close(
                    loaded.decode(used), model.decode(direct).sample, atol=1e-5, rtol=1e-5
                )
    vaes = [index.vae for index in report.indices.values()]
    shape = (4 if vae == "kl" else 8, SIZE // FACTOR, SIZE // FACTOR)
    for found in vaes:
        assert found is not None
        assert (found.name, found.shape, found.model, found.sha256) == (
            str(root / vae),
            shape,
            loaded.kind,
            loaded.sha256,
        )
        assert (found.scale, found.shift) == ((0.5, 0.25) if vae == "kl" else (0.4, 0.0))
        assert (found.moments, found.flipped) == (vae == "kl", True)
    assert verify(str(tmp_path / "out")).found == 0
    assert report.skipped == []


def adm_center_crop(pil_image: Image.Image, image_size: int) -> np.ndarray:
    """openai/guided-diffusion, image_datasets.py, center_crop_arr."""
    while min(*pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize(tuple(x // 2 for x in pil_image.size), resample=Image.Resampling.BOX)  # type: ignore[arg-type]
    scale = image_size / min(*pil_image.size)
    width, height = (round(x * scale) for x in pil_image.size)
    pil_image = pil_image.resize((width, height), resample=Image.Resampling.BICUBIC)
    arr = np.array(pil_image)
    crop_y = (arr.shape[0] - image_size) // 2
    crop_x = (arr.shape[1] - image_size) // 2
    return arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size]


@pytest.mark.parametrize("size", [(16, 16), (21, 16), (16, 37), (100, 70), (7, 9), (33, 64)], ids=str)
def test_crop_is_adms(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    assert crop(image, 16).shape == (16, 16, 3)
    assert np.array_equal(crop(image, 16), adm_center_crop(image, 16))


@pytest.mark.parametrize(
    ("vae", "moments"),
    [("kl", None), ("kl", False), ("dc", None)],
    ids=["moments", "samples", "deterministic"],
)
def test_statistics_are_those_of_what_training_sees(
    root: Path, tmp_path: Path, vae: str, moments: bool | None
) -> None:
    found = (
        make_latents(root / "packed", tmp_path / "out", options(root, vae, moments=moments))
        .indices["train"]
        .vae
    )
    assert found is not None
    stored = samples(tmp_path / "out" / "train")
    both = np.stack([array(sample, name) for sample in stored for name in ("latent", "flipped")]).astype(
        np.float64
    )
    used = (both - found.shift) * found.scale
    np.testing.assert_allclose(found.mean, used.mean(axis=(0, 2, 3)), rtol=1e-6)
    if moments is False or vae == "dc":
        np.testing.assert_allclose(found.std, used.std(axis=(0, 2, 3)), rtol=1e-6)
    kind = Latents(found, 2)
    drawn = torch.stack([kind.train(sample, epoch)["latent"] for epoch in range(100) for sample in stored])
    assert found.moments == (vae == "kl" and moments is None)
    np.testing.assert_allclose(found.mean, drawn.mean(dim=(0, 2, 3)), atol=0.02)
    np.testing.assert_allclose(found.std, drawn.std(dim=(0, 2, 3)), rtol=0.02)


def test_bf16_is_stored_without_further_loss(root: Path, tmp_path: Path) -> None:
    make_latents(root / "packed", tmp_path / "out", options(root, dtype="bf16"))
    model = load_vae(str(root / "kl"), dtype=torch.bfloat16)
    images, latents = samples(root / "packed" / "val"), samples(tmp_path / "out" / "val")
    exact = load_vae(str(root / "kl"))
    for number in range(0, 8, 2):  # val/ has four shards, and no batch spans two
        together = torch.cat([pixels(image) for image in images[number : number + 2]])
        found = np.stack([array(sample, "latent") for sample in latents[number : number + 2]])
        assert found.dtype == np.float16
        assert np.array_equal(found.astype(np.float32), model.encode(together).mean.numpy())
        np.testing.assert_allclose(found, exact.encode(together).mean, atol=0.05)


def test_samples_are_drawn_by_image(root: Path, tmp_path: Path) -> None:
    """One draw of each image and of its mirror image, by (seed, split, index): not of the batch, nor of
    torch's generator.
    """
    torch.manual_seed(1)
    made: dict[str, dict[str, Any]] = {
        "first": {},
        "batch": {"batch_size": 7},
        "seed": {"seed": 1},
        "again": {},
    }
    for name, others in made.items():
        make_latents(root / "packed", tmp_path / name, options(root, moments=False, **others))
    make_latents(root / "packed", tmp_path / "moments", options(root))
    assert content(tmp_path / "first") == content(tmp_path / "again")
    rows = {name: samples(tmp_path / name / "train") for name in ("first", "batch", "seed", "moments")}
    noise = []
    for first, batch, seed, moments in zip(*rows.values(), strict=True):
        assert {"latent.npy", "flipped.npy"} == {name for name in first if name.endswith(".npy")}
        for name, logvar in (("latent", "logvar"), ("flipped", "flipped_logvar")):
            np.testing.assert_allclose(array(first, name), array(batch, name), atol=1e-4)
            assert np.abs(array(first, name) - array(seed, name)).max() > 1e-3
            noise.append((array(first, name) - array(moments, name)) / np.exp(0.5 * array(moments, logvar)))
    drawn = np.stack(noise)
    assert len(np.unique(drawn.round(4), axis=0)) == len(drawn)
    assert abs(drawn.mean()) < 0.1
    assert abs(drawn.std() - 1) < 0.1


def test_no_flip_and_another_scale(root: Path, tmp_path: Path) -> None:
    index = make_latents(
        root / "packed", tmp_path / "out", options(root, flip=False, scale=2.0, shift=-1.0, name="mine")
    ).indices["train"]
    assert index.vae is not None
    assert (index.vae.name, index.vae.flipped, index.vae.scale, index.vae.shift) == ("mine", False, 2.0, -1.0)
    sample = samples(tmp_path / "out" / "train")[0]
    assert {"latent.npy", "logvar.npy", "cls"} == {name for name in sample if not name.startswith("__")}
    np.testing.assert_allclose(
        Latents(index.vae, 2).evaluate(sample)["latent"], (array(sample, "latent") + 1) * 2
    )


def test_what_is_not_packed_is_encoded_too(root: Path, tmp_path: Path) -> None:
    """A folder of classes gives the latents that packing it first gives; json is carried over."""
    report = make_latents(root / "source", tmp_path / "out", options(root, shards=3))
    packed = make_latents(root / "packed", tmp_path / "other", options(root, shards=3))
    assert {name: index.hash for name, index in report.indices.items()} == {
        name: index.hash for name, index in packed.indices.items()
    }
    image = samples(root / "packed" / "train")[0]
    written = [Sample("x", {"cls": b"1", "png": image["png"], "json": b'{"a": 1}'})]
    for split in ("train", "val"):
        (tmp_path / "json").mkdir(exist_ok=True)
        write_split(tmp_path / "json" / split, ShardIndex("images", (), ("a", "b")), written)
    make_latents(tmp_path / "json", tmp_path / "with", options(root))
    assert samples(tmp_path / "with" / "train")[0]["json"] == b'{"a": 1}'


# However it was made


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(root: Path, tmp_path: Path) -> None:
    alone, steps = make_latents(root / "packed", tmp_path / "alone", options(root, shards=5)), []
    make_latents(
        root / "packed",
        tmp_path / "two",
        options(root, shards=5, device="cpu,cpu"),
        on_progress=lambda *step: steps.append(step),
    )
    assert alone.samples == 32
    assert content(tmp_path / "alone") == content(tmp_path / "two")
    assert {("train", 24, 24), ("val", 8, 8)} <= set(steps)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "two"]


@pytest.mark.slow
def test_killed_and_continued_gives_the_same_bytes(root: Path, tmp_path: Path, nursery: Nursery) -> None:
    save_images(tmp_path / "many", train=60, val=4, size=(160, 160))
    make_latents(tmp_path / "many", tmp_path / "alone", options(root, shards=20))
    command = ["data", "latents", str(tmp_path / "many"), str(tmp_path / "out"), "--vae", str(root / "kl")]
    command += [
        "--size",
        str(SIZE),
        "--batch-size",
        "4",
        "--shards",
        "20",
        "--device",
        "cpu",
        "--workers",
        "1",
    ]
    entries = tmp_path / ".out.packing" / "entries" / "train"
    nursery.start(1, command, root).kill_when(lambda: len(list(entries.glob("*.json"))) >= 3)
    assert not (tmp_path / "out").exists()
    kept = len(list(entries.glob("*.json")))
    notes: list[str] = []
    report = make_latents(tmp_path / "many", tmp_path / "out", options(root, shards=20), on_note=notes.append)
    assert notes == [f"{kept} of 24 shards were finished before and are kept"]
    assert 0 < report.samples < 64
    assert content(tmp_path / "out") == content(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "many", "out"]


def test_command_and_training(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.json"
    words = [
        "--vae",
        str(root / "kl"),
        "--size",
        str(SIZE),
        "--device",
        "cpu",
        "--name",
        "tiny",
        "--json",
        str(table),
        "--workers",
        "2",
    ]
    assert main(["data", "latents", str(root / "packed"), str(tmp_path / "out"), *words]) == 0
    found = json.loads(table.read_text())
    assert [(row["split"], row["kind"], row["samples"]) for row in found["rows"]] == [
        ("train", "latents", 24),
        ("val", "latents", 8),
    ]
    assert found["summary"]["skipped"] == []
    assert found["summary"]["vae"]["train"]["std"] == list(read_index(tmp_path / "out" / "train").vae.std)  # type: ignore[union-attr]
    assert "data.vae: {name: tiny, scale: 0.5, shift: 0.25, shape: [4, 4, 4]}" in capsys.readouterr().out
    vae = VAE("tiny", 0.5, 0.25, (4, 4, 4))
    module = LatentDataModule(vae, str(tmp_path / "out"), batch_size=8, reading=ReadingConfig(num_workers=0))
    module.check(1)
    batch = next(iter(module.train_dataloader()))
    assert batch["latent"].shape == (8, 4, 4, 4)
    assert decode_latents(load_vae(str(root / "kl")), batch["latent"]).shape == (8, SIZE, SIZE, 3)
