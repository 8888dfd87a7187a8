"""Latents in training: flips, draws from the posterior, what a recipe has to say of the VAE, and back to
images.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhla_lightning.data import LatentDataModule
from mhla_lightning.data.index import VAE, ShardIndex, parse_index, read_index, write_index
from mhla_lightning.data.kinds import Latents, kind_of
from mhla_lightning.data.kinds.latents import draw
from mhla_lightning.data.members import RawSample
from mhla_lightning.data.prepare.samples import Sample, npy_bytes
from mhla_lightning.data.prepare.writer import write_split
from mhla_lightning.data.skips import BadSample
from mhla_lightning.data.stream import Batch
from mhla_lightning.errors import DataError, UserError
from tests.helpers.data_modules import build
from tests.helpers.vaes import FACTOR, SIZE, save_kl

MADE = VAE("tiny", 0.5, 0.25, (4, 3, 2), "AutoencoderKL", "ab" * 32, True, True, (0.0,) * 4, (1.0,) * 4)
ASKED = VAE("tiny", 0.5, 0.25, (4, 3, 2))


def _members(number: int, vae: VAE = MADE, **others: np.ndarray) -> dict[str, bytes]:
    """The image's latents lie about 10 * number, its mirror image's about -10 * number - 5."""
    rng = np.random.default_rng(number)
    arrays = {"latent": 10.0 * number + rng.normal(size=vae.shape)}
    if vae.flipped:
        arrays["flipped"] = -10.0 * number - 5 + rng.normal(size=vae.shape)
    if vae.moments:
        arrays |= {
            name: np.full(vae.shape, -4.0)
            for name in ("logvar", "flipped_logvar")
            if name == "logvar" or vae.flipped
        }
    arrays = {name: array.astype(np.float16) for name, array in arrays.items()} | others
    return {f"{name}.npy": npy_bytes(array) for name, array in arrays.items()} | {"cls": b"%d" % (number % 2)}


def _raw(number: int, vae: VAE = MADE, **others: np.ndarray) -> RawSample:
    return {"__key__": f"k{number}", "__url__": "x.tar", "__index__": number} | _members(
        number, vae, **others
    )


def _stored(sample: RawSample, name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(io.BytesIO(sample[f"{name}.npy"])).astype(np.float32))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """32 training and 8 validation samples."""
    for split, count in (("train", 32), ("val", 8)):
        write_split(
            tmp_path / split,
            ShardIndex("latents", (), ("a", "b"), vae=MADE),
            [Sample(f"s{n}", _members(n)) for n in range(count)],
            40_000,
        )
    return tmp_path


def _module(path: Path, **options: object) -> LatentDataModule:
    given = {"vae": ASKED, "path": str(path), "batch_size": 8, "num_workers": 0, "lanes": 4, "window": 4}
    return build(LatentDataModule, **given | options)


def _batches(module: LatentDataModule, count: int) -> list[Batch]:
    return list(islice(module.train_dataloader(), count))


def _by_place(batches: list[Batch]) -> dict[tuple[int, int], torch.Tensor]:
    return {
        (int(epoch), int(index)): latent
        for batch in batches
        for epoch, index, latent in zip(batch["epoch"], batch["index"], batch["latent"], strict=True)
    }


# What is drawn


def test_training_draws_flip_and_posterior_by_sample_and_epoch() -> None:
    kind, other_seed = Latents(MADE, 2, seed=3), Latents(MADE, 2, seed=4)
    sample = _raw(5)
    first = kind.train(sample, 0)["latent"]
    assert torch.equal(first, kind.train(sample, 0)["latent"]), "a function of (seed, epoch, index)"
    drawn = torch.stack([kind.train(sample, epoch)["latent"] for epoch in range(2000)])
    assert len({tuple(latent.flatten().tolist()) for latent in drawn}) == 2000, "every epoch draws anew"
    assert not torch.equal(first, other_seed.train(sample, 0)["latent"])
    raw = drawn / MADE.scale + MADE.shift
    is_flipped = raw.mean(dim=(1, 2, 3)) < 0
    assert 0.45 < is_flipped.float().mean() < 0.55
    for name, rows in (("latent", raw[~is_flipped]), ("flipped", raw[is_flipped])):
        torch.testing.assert_close(
            rows.mean(0), _stored(sample, name), atol=0.03, rtol=0
        )  # 5 standard errors of exp(-4 / 2) / 30
        torch.testing.assert_close(rows.std(0), torch.full(MADE.shape, float(np.exp(-2))), atol=0.02, rtol=0)


def test_the_coin_belongs_to_the_sample_and_not_to_the_batch() -> None:
    """SPEC D10: the official code throws one coin for a whole batch."""
    kind = Latents(MADE, 2, seed=0)
    signs = [
        [bool(kind.train(_raw(number), epoch)["latent"].mean() < 0) for number in range(1, 33)]
        for epoch in range(2)
    ]
    assert all(8 < sum(row) < 24 for row in signs)
    assert signs[0] != signs[1]


def test_validation_takes_the_image_itself_and_the_mean() -> None:
    sample = _raw(7)
    found = Latents(MADE, 2, seed=1).evaluate(sample)
    assert torch.equal(found["latent"], (_stored(sample, "latent") - 0.25) * 0.5)
    assert found["latent"].dtype == torch.float32
    assert found["label"] == 1


@pytest.mark.parametrize(("moments", "flipped"), [(False, True), (True, False), (None, None)], ids=str)
def test_what_is_not_stored_is_not_drawn(moments: bool | None, flipped: bool | None) -> None:
    vae = replace(MADE, moments=moments, flipped=flipped)
    kind, sample = Latents(vae, 2), _raw(5, vae)
    drawn = [kind.train(sample, epoch)["latent"] for epoch in range(50)]
    assert len({float(latent.flatten()[0]) for latent in drawn}) == (50 if moments else 2 if flipped else 1)
    assert any(latent.mean() < 0 for latent in drawn) == bool(flipped)


def test_a_posterior_with_a_wild_variance_is_clamped_as_diffusers_does() -> None:
    zeros = np.zeros((1, 2, 2), np.float32)
    found = [
        draw(zeros, np.full_like(zeros, value), np.random.default_rng(0))
        for value in (-1000.0, -30.0, 20.0, 1000.0)
    ]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[2], found[3])
    assert np.isfinite(found[3]).all()


@pytest.mark.parametrize("name", ["latent", "logvar", "flipped", "flipped_logvar"])
@pytest.mark.parametrize(
    ("array", "says"),
    [(np.full((4, 3, 2), np.nan), "NaN"), (np.zeros((4, 2, 3)), r"\(4, 2, 3\)")],
    ids=["NaN", "shape"],
)
def test_bad_members_are_told_by_their_name(name: str, array: np.ndarray, says: str) -> None:
    with pytest.raises(BadSample, match=rf"^{name}\.npy .*{says}"):
        kind_of(ShardIndex("latents", (), ("a", "b"), vae=MADE)).inspect(_raw(1, MADE, **{name: array}))
    sample = _raw(1)
    del sample[f"{name}.npy"]
    with pytest.raises(BadSample, match=f"no member {name}.npy"):
        kind_of(ShardIndex("latents", (), ("a", "b"), vae=MADE)).inspect(sample)


def test_batches_are_the_same_for_every_batch_size_and_number_of_workers(data: Path) -> None:
    """The same sample in another batch, read by another worker, gives the same latent."""
    alone = _by_place(_batches(_module(data, seed=5), 8))
    module = _module(data, seed=5, batch_size=16, num_workers=2)
    try:
        other = _by_place(_batches(module, 4))
    finally:
        module.teardown("fit")
    assert alone.keys() == other.keys()
    assert {epoch for epoch, _ in alone} == {0, 1}
    assert all(torch.equal(latent, other[place]) for place, latent in alone.items())
    assert all(not torch.equal(alone[0, index], alone[1, index]) for index in range(32))
    again = _by_place(_batches(_module(data, seed=6), 4))
    assert any(not torch.equal(latent, again[place]) for place, latent in alone.items() if place in again)


def test_validation_batches(data: Path) -> None:
    (batch,) = _module(data).val_dataloader()
    assert batch["latent"].shape == (8, 4, 3, 2)
    wanted = torch.stack([(_stored(_raw(n), "latent") - 0.25) * 0.5 for n in range(8)])
    assert torch.equal(batch["latent"], wanted)
    assert batch["label"].tolist() == [0, 1] * 4


DIFFERENT = {
    "name": {"name": "other", "sha256": ""},
    "scale": {"scale": 0.6},
    "shift": {"shift": 0.0},
    "shape": {"shape": (4, 2, 3)},
    "class": {"model": "AutoencoderDC"},
    "weights": {"sha256": "cd" * 32},
    "no moments": {"moments": False},
    "no flips": {"flipped": False},
}


@pytest.mark.parametrize("field", DIFFERENT.values(), ids=DIFFERENT)
def test_another_vae_than_the_recipes_is_refused(data: Path, field: dict) -> None:
    wanted = replace(replace(MADE, mean=(), std=()), **field)
    with pytest.raises(DataError) as caught:
        _module(data, vae=wanted).check(1)
    assert f"{data}/train/index.json" in str(caught.value)
    assert str(MADE) in str(caught.value)
    assert str(wanted) in str(caught.value)
    assert str(wanted) != str(MADE)


@pytest.mark.parametrize(
    "vae", [ASKED, replace(MADE, mean=(), std=()), MADE], ids=["least", "all but statistics", "all"]
)
def test_the_recipes_vae_is_taken(data: Path, vae: VAE) -> None:
    module = _module(data, vae=vae)
    module.check(1)
    assert module.facts()["vae"].shape == (4, 3, 2)


def test_splits_that_are_stored_differently_are_refused(data: Path, tmp_path: Path) -> None:
    index = read_index(data / "val")
    write_index(data / "val", replace(index, vae=replace(MADE, mean=(5.0,) * 4)))
    _module(data).check(1)  # statistics are each split's own
    write_index(data / "val", replace(index, vae=replace(MADE, flipped=None)))
    with pytest.raises(DataError, match=r"val/index.json"):
        _module(data).check(1)
    write_index(data / "val", replace(index, classes=("b", "a")))
    with pytest.raises(DataError, match=r"val/index.json.*classes"):
        _module(data).check(1)


def test_the_index_keeps_what_is_known_of_a_vae(tmp_path: Path) -> None:
    entry = {"name": "a.tar", "samples": 0, "bytes": 0, "sha256": "0" * 64}
    for vae in (MADE, ASKED):
        write_index(tmp_path, ShardIndex("latents", (), ("a",), vae=vae))
        assert read_index(tmp_path).vae == vae
    content = json.loads((tmp_path / "index.json").read_text())
    assert content["format"] == 1
    assert content["vae"] == {"name": "tiny", "scale": 0.5, "shift": 0.25, "shape": [4, 3, 2]}, (
        "as before there was more to say"
    )
    assert entry["samples"] == content["samples"]


@pytest.mark.parametrize(
    "change",
    [
        {"moments": 1},
        {"sha256": 5},
        {"model": ["x"]},
        {"mean": [1.0]},
        {"std": ["a"] * 4},
        {"flipped": "yes"},
    ],
    ids=lambda change: str(*change),
)
def test_a_vae_of_the_wrong_types_is_refused(tmp_path: Path, change: dict) -> None:
    write_index(tmp_path, ShardIndex("latents", (), ("a",), vae=MADE))
    content = json.loads((tmp_path / "index.json").read_text())
    content["vae"] |= change
    with pytest.raises(DataError, match="^here"):
        parse_index(json.dumps(content).encode(), "here")


def test_to_images_decodes_by_the_recipes_vae(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from mhla_lightning.data.encoders.vaes import load_vae

    name = save_kl(tmp_path / "kl")
    vae = VAE(name, 0.3, 0.1, (4, SIZE // FACTOR, SIZE // FACTOR))
    latents = torch.randn(20, *vae.shape, generator=torch.Generator().manual_seed(0))
    module = _module(tmp_path / "nowhere", vae=vae)
    found = module.to_images(latents)
    model: Any = load_vae(name).model
    with torch.no_grad():
        pixels = model.decode(latents / 0.3 + 0.1).sample
    assert found.shape == (20, SIZE, SIZE, 3)
    assert found.dtype == torch.uint8
    wanted = torch.clamp(127.5 * pixels + 128.0, 0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert (found.int() - wanted.int()).abs().max() <= 1
    assert (found == wanted).float().mean() > 0.99
    with pytest.raises(UserError, match="abcd"):
        _module(tmp_path / "nowhere", vae=replace(vae, sha256="abcd")).to_images(latents)
