"""`mhla data latents --text-encoder`: images with captions to latents and features."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mhla_lightning.cli.main import main
from mhla_lightning.data import LatentDataModule
from mhla_lightning.data.encoders.text_encoders import load_text_encoder
from mhla_lightning.data.encoders.vaes import load_vae
from mhla_lightning.data.index import VAE, TextEncoding
from mhla_lightning.data.prepare.indexing import Facts, index_shards
from mhla_lightning.data.prepare.latents.captioned import CaptionOptions
from mhla_lightning.data.prepare.latents.make import LatentOptions, make_latents
from mhla_lightning.data.prepare.parallel import Interrupted
from mhla_lightning.data.prepare.preview import preview
from mhla_lightning.data.prepare.verify import verify
from mhla_lightning.errors import DataError, UserError
from tests.helpers.data_modules import build
from tests.helpers.errors import refused
from tests.helpers.ranks import Nursery
from tests.helpers.shards import array, content, samples
from tests.helpers.vaes import CAPTIONS, SIZE, save_captioned, save_dc, save_gemma2

pytest.importorskip("diffusers")

WORDS = "words:8"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dc, an autoencoder of DC-AE; photos, ten images with captions beside them."""
    root = tmp_path_factory.mktemp("captions")
    save_dc(root / "dc")
    save_captioned(root / "photos")
    return root


def options(root: Path, text: Mapping[str, Any] | None = None, **others: Any) -> LatentOptions:
    captions: dict[str, Any] = {"text_encoder": WORDS, "tokens": 20, **(text or {})}
    chosen: dict[str, Any] = {"vae": str(root / "dc"), "size": SIZE, "batch_size": 4, "device": "cpu"}
    chosen |= {"val": 2, "shards": 2, "text": CaptionOptions(**captions)}
    return LatentOptions(**chosen | others)


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format="PNG")
    return buffer.getvalue()


# What is written


@torch.no_grad()
def test_a_folder_of_images_and_captions(root: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    steps: list[tuple[str, int, int]] = []
    report = make_latents(
        root / "photos",
        tmp_path / "out",
        options(root),
        on_progress=lambda *step: steps.append(step),
        on_note=notes.append,
    )
    assert ("captions", 4, 4) in steps, "three captions and the empty one, each once"
    assert notes == [f"captions: NAME.txt beside each image of {root / 'photos'}"]
    assert {name: index.samples for name, index in report.indices.items()} == {"train": 8, "val": 2}
    vae, encoder = load_vae(str(root / "dc")), load_text_encoder(TextEncoding(WORDS, 20, 8))
    seen = set()
    for split in ("train", "val"):
        for sample in samples(tmp_path / "out" / split):
            name = sample["__key__"].partition("-")[2].removeprefix("more-")
            seen.add(name)
            (path,) = (root / "photos").rglob(f"{name}.png")
            pixels = torch.from_numpy(np.asarray(Image.open(path)).astype(np.float32) / 127.5 - 1)
            latent = vae.encode(pixels.permute(2, 0, 1)[None]).mean[0]
            np.testing.assert_allclose(array(sample, "latent"), latent, atol=1e-5)
            caption = sample["txt"].decode()
            assert caption == CAPTIONS[int(name) % 3], "a sample keeps its caption, to be looked at"
            assert np.array_equal(array(sample, "text"), encoder.encode([caption])[0].half().numpy())
            assert "flipped.npy" not in sample, "a mirrored image would make `left` wrong"
            assert "cls" not in sample
    assert len(seen) == 10
    empty = (tmp_path / "out" / "empty_text.npy").read_bytes()
    text = TextEncoding(WORDS, 20, 8, encoder.encoding.sha256, hashlib.sha256(empty).hexdigest())
    assert report.indices["train"].text == text
    assert verify(str(tmp_path / "out")).found == 0
    shown = preview(str(tmp_path / "out"))
    assert (shown.kind, shown.shown, shown.unusable) == ("latents", 8, 0)


@pytest.mark.slow  # transformers, and a text encoder that is opened four times
def test_training_takes_it_with_the_stored_empty_text(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    gemma = save_gemma2(tmp_path / "gemma")
    text = {"text_encoder": gemma, "tokens": 24, "instruction": "sana"}
    make_latents(root / "photos", tmp_path / "out", options(root, text, flip=True))
    known = load_text_encoder(gemma, instruction="sana").encoding
    vae = VAE(str(root / "dc"), 0.4, 0.0, (8, 4, 4))
    gone = TextEncoding(str(tmp_path / "gone"), 24, 24, known.sha256, instruction="sana")
    data = build(
        LatentDataModule, vae=vae, path=str(tmp_path / "out"), batch_size=4, num_workers=0, text_encoder=gone
    )
    data.check(1)
    batch = next(iter(data.train_dataloader()))
    assert (batch["latent"].shape, batch["text"].shape) == ((4, 8, 4, 4), (4, 24, 24))
    exact = load_text_encoder(TextEncoding(gemma, 24, 24)).encode([""])[0]
    assert torch.equal(data.null_text()[: len(exact)], exact.half().float())
    plain = TextEncoding(gemma, 24, 24)
    other = build(
        LatentDataModule, vae=vae, path=str(tmp_path / "out"), batch_size=4, num_workers=0, text_encoder=plain
    )
    with pytest.raises(DataError, match="instruction sana"):
        other.check(1)


def test_a_list_of_captions(root: Path, tmp_path: Path) -> None:
    """captions.jsonl of the folder comes before NAME.txt; a file elsewhere is named."""
    photos = save_captioned(tmp_path / "photos")
    files = sorted(photos.rglob("*.png"))
    rows = [{"file": str(path.relative_to(photos)), "caption": f"image {path.stem}"} for path in files]
    (photos / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make_latents(photos, tmp_path / "out", options(root))
    for sample in samples(tmp_path / "out" / "train"):
        assert sample["txt"].decode() == f"image {sample['__key__'].rpartition('-')[2]}"
    rows = [{"file": path.name, "long": "x"} for path in files]
    (tmp_path / "others.json").write_text(json.dumps(rows))
    text = {"file": tmp_path / "others.json", "key": "long"}
    report = make_latents(photos, tmp_path / "named", options(root, text))
    assert {sample["txt"] for sample in samples(tmp_path / "named" / "val")} == {b"x"}
    assert report.indices["val"].samples == 2


def test_packed_shards_of_others(root: Path, tmp_path: Path) -> None:
    """Captions are the member txt, or a key of the member json; labels are not needed."""
    first = {"a.png": png(0), "a.txt": b"a cat", "b.png": png(1), "b.json": b'{"caption": "a dog", "w": 1}'}
    second = {"c.png": png(2), "c.txt": b"no", "c.json": b'{"caption": "yes", "long": "two birds"}'}
    second |= {"d.png": png(3), "d.json": b'{"caption": null, "long": "a red cat"}'}
    write_tar(tmp_path / "shards" / "train" / "0.tar", first)
    write_tar(tmp_path / "shards" / "train" / "1.tar", second)
    with refused(str(tmp_path / "shards" / "train" / "0.tar"), DataError) as error:
        index_shards(str(tmp_path / "shards"))
    assert "captioned" in str(error.value)
    indices = index_shards(str(tmp_path / "shards"), Facts(captioned=True))
    assert (indices["train"].kind, indices["train"].classes) == ("images", ())
    assert preview(str(tmp_path / "shards")).unusable == 0
    assert verify(str(tmp_path / "shards")).found == 0
    with refused("train sample d", DataError):
        make_latents(tmp_path / "shards", tmp_path / "out", options(root, val=None))
    report = make_latents(
        tmp_path / "shards", tmp_path / "out", options(root, {"uncaptioned": "skip"}, val=None)
    )
    assert [sample["txt"] for sample in samples(tmp_path / "out" / "train")] == [b"a cat", b"a dog", b"no"]
    assert [(split, name) for split, name, _ in report.uncaptioned] == [("train", "d")]
    named = options(root, {"uncaptioned": "skip", "key": "long"}, val=None)
    make_latents(tmp_path / "shards", tmp_path / "long", named)
    assert [sample["txt"] for sample in samples(tmp_path / "long" / "train")] == [b"two birds", b"a red cat"]
    with refused("val"):
        make_latents(tmp_path / "shards", tmp_path / "other", options(root))
    with refused("captions"):
        make_latents(tmp_path / "shards", tmp_path / "other", options(root, {"file": "x.jsonl"}, val=None))


def test_images_without_a_caption_are_skipped_and_counted(root: Path, tmp_path: Path) -> None:
    photos = save_captioned(tmp_path / "photos")
    (photos / "001.txt").unlink()
    (photos / "002.txt").write_text(" \n")
    (photos / "metadata.csv").write_text("file,caption\n001.png,a cat\n")
    with refused("train sample 001", DataError) as error:
        make_latents(photos, tmp_path / "out", options(root))
    assert "metadata.csv is not read" in str(error.value)
    notes: list[str] = []
    report = make_latents(
        photos, tmp_path / "out", options(root, {"uncaptioned": "skip"}), on_note=notes.append
    )
    assert sum(index.samples for index in report.indices.values()) == 8
    assert [name for _, name, _ in report.uncaptioned] == ["001", "002"]
    assert notes[1].startswith("2 of 10 images have no caption and are left out; the first is 001 of train")


def test_long_captions_are_cut_and_counted(root: Path, tmp_path: Path) -> None:
    """They are found before the first caption is encoded."""
    with refused("sample 001 of train", DataError) as error:
        make_latents(root / "photos", tmp_path / "out", options(root, {"tokens": 3}))
    assert "has 5 tokens, and 1 of 3 captions have more than the 3 tokens" in str(error.value)
    notes: list[str] = []
    text = {"tokens": 3, "long_captions": "cut"}
    make_latents(root / "photos", tmp_path / "out", options(root, text), on_note=notes.append)
    assert notes[-1] == (
        "1 of 3 captions have more than the 3 tokens that words:8 takes, and are cut; the first is of 001 of "
        "train, with 5"
    )
    whole = load_text_encoder(TextEncoding(WORDS, 20, 8)).encode(["a dog at the left"])[0]
    cut = [array(one, "text") for one in samples(tmp_path / "out" / "train") if b"dog" in one["txt"]]
    assert all(np.array_equal(rows, whole[:3].half().numpy()) for rows in cut)
    assert cut


def test_a_damaged_image_is_skipped_and_counted(root: Path, tmp_path: Path) -> None:
    photos = save_captioned(tmp_path / "photos")
    (photos / "001.png").write_bytes(b"no image")
    report = make_latents(photos, tmp_path / "out", options(root, max_skipped_share=0.2))
    assert [name for _, name, _ in report.skipped] == ["001"]
    with refused("max_skipped_share", Interrupted):
        make_latents(photos, tmp_path / "strict", options(root))


def test_splits_are_folders(root: Path, tmp_path: Path) -> None:
    save_captioned(tmp_path / "photos" / "train", 6)
    save_captioned(tmp_path / "photos" / "val", 3)
    report = make_latents(tmp_path / "photos", tmp_path / "out", options(root, val=None))
    assert {name: index.samples for name, index in report.indices.items()} == {"train": 6, "val": 3}
    (tmp_path / "photos" / "train").rename(tmp_path / "photos" / "training")
    with refused(str(tmp_path / "photos" / "training"), DataError):
        make_latents(tmp_path / "photos", tmp_path / "other", options(root))


@pytest.mark.slow
def test_killed_and_continued_gives_the_same_bits(root: Path, tmp_path: Path, nursery: Nursery) -> None:
    """Three processes, one of them killed: two more go on and write the bytes of one."""
    photos = save_captioned(tmp_path / "photos", 40)
    make_latents(photos, tmp_path / "whole", options(root, shards=6))
    command = ["data", "latents", str(photos), str(tmp_path / "out"), "--vae", str(root / "dc")]
    command += ["--text-encoder", WORDS, "--tokens", "20", "--size", str(SIZE), "--batch-size", "4"]
    command += ["--val", "2", "--shards", "6", "--device", "cpu"]
    hidden = tmp_path / ".out.packing"
    nursery.start(1, command, root).kill_when(lambda: bool(list(hidden.glob("entries/*/*.json"))))
    assert not (tmp_path / "out").exists()
    notes: list[str] = []
    make_latents(photos, tmp_path / "out", options(root, shards=6, device="cpu,cpu"), on_note=notes.append)
    assert any("were finished before and are kept" in note for note in notes)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


# The command, and mistakes


def _command(root: Path, source: Path, out: Path, *more: str) -> list[str]:
    command = ["data", "latents", str(source), str(out), "--vae", str(root / "dc"), "--size", str(SIZE)]
    return [*command, "--device", "cpu", *more]


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = save_captioned(tmp_path / "photos", 6)
    (photos / "001.txt").unlink()
    more = ["--text-encoder", WORDS, "--tokens", "20", "--uncaptioned", "skip", "--val", "1"]
    more += ["--name", "dc-ae", "--json", str(tmp_path / "t.json")]
    assert main(_command(root, photos, tmp_path / "out", *more)) == 0
    shown = capsys.readouterr().out
    assert "1 of 6 images have no caption and are left out" in shown
    assert "data.vae: {name: dc-ae, scale: 0.4, shift: 0, shape: [8, 4, 4]}" in shown
    assert "data.text_encoder: {name: 'words:8', tokens: 20, channels: 8}" in shown
    summary = json.loads((tmp_path / "t.json").read_text())["summary"]
    assert summary["images"] == 5
    assert [one["sample"] for one in summary["uncaptioned"]] == ["001"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--tokens", "3"], "--tokens: "),
        (["--instruction", "sana"], "--instruction: "),
        (["--uncaptioned", "skip"], "--uncaptioned: "),
        (["--text-encoder", WORDS, "--uncaptioned", "drop"], "--uncaptioned: "),
        (["--text-encoder", WORDS, "--tokens", "0"], "--tokens: "),
        (["--text-encoder", WORDS, "--long-captions", "drop"], "--long-captions: "),
        (["--long-captions", "cut"], "--long-captions: "),
        (["--text-encoder", WORDS, "--tokens", "2"], "sample "),
        (["--text-encoder", WORDS, "--instruction", "sana"], "instruction: "),
        (["--text-encoder", WORDS, "--captions", "captions.csv"], "--captions: "),
        (["--text-encoder", WORDS, "--caption-key", "long"], "--caption-key: "),
        (["--text-encoder", "words:no"], "words:no"),
    ],
    ids=str,
)
def test_mistakes_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert main(_command(root, root / "photos", tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize(
    ("rows", "fact"),
    [
        ('{"file_name": "000.png", "text": "a cat"}', "its keys are file_name, text"),
        ('{"file": "000.png", "caption": 3}', "caption is no text"),
        ('["000.png"]', "its keys are none"),
        ("000.png a cat", "line 1 is no JSON"),
        ('{"file": "a.png", "caption": "b"}\n{"file": "./a.png", "caption": "c"}', "second caption"),
    ],
)
def test_other_forms_of_lists_are_refused(root: Path, tmp_path: Path, rows: str, fact: str) -> None:
    (tmp_path / "list.jsonl").write_text(rows)
    with refused(str(tmp_path / "list.jsonl"), DataError) as error:
        make_latents(root / "photos", tmp_path / "out", options(root, {"file": tmp_path / "list.jsonl"}))
    assert fact in str(error.value)


@pytest.mark.parametrize(
    "member",
    [b"[1]", b'{"caption": ["a", "b"]}', b"{", b"\xff\xfe\x00"],
    ids=["a list", "many captions", "no JSON", "no text"],
)
def test_other_forms_of_members_are_refused(root: Path, tmp_path: Path, member: bytes) -> None:
    write_tar(tmp_path / "shards" / "train" / "0.tar", {"a.png": png(0), "a.json": member})
    index_shards(str(tmp_path / "shards"), Facts(captioned=True))
    with refused("train sample a", DataError):
        make_latents(tmp_path / "shards", tmp_path / "out", options(root, val=None))
    assert not (tmp_path / ".out.packing").exists()


def test_sources_that_are_none(root: Path, tmp_path: Path) -> None:
    with refused("source", UserError):
        make_latents(tmp_path / "none", tmp_path / "out", options(root))
    (tmp_path / "empty").mkdir()
    with refused(str(tmp_path / "empty"), DataError):
        make_latents(tmp_path / "empty", tmp_path / "out", options(root))
    with refused("kind"):
        Facts("latents", captioned=True)
    with refused("classes"):
        Facts(classes=("a",), captioned=True)
