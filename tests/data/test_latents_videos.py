"""`mhla data latents --video`: clips and captions to latents and features, against diffusers and
transformers themselves.
"""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhla_lightning.cli.main import main
from mhla_lightning.data import LatentDataModule
from mhla_lightning.data.corpus import DataSource
from mhla_lightning.data.encoders.text_encoders import load_text_encoder
from mhla_lightning.data.encoders.vaes import decode_videos, load_video_vae
from mhla_lightning.data.index import VAE, Clip, ShardIndex, TextEncoding, read_index, write_index
from mhla_lightning.data.members import RawSample
from mhla_lightning.data.prepare.latents.make_videos import VideoOptions, make_video_latents
from mhla_lightning.data.prepare.samples import Sample, npy_bytes
from mhla_lightning.data.prepare.verify import verify
from mhla_lightning.data.prepare.writer import write_split
from mhla_lightning.errors import DataError, UserError
from tests.helpers.data_modules import build
from tests.helpers.errors import refused
from tests.helpers.ranks import Nursery
from tests.helpers.shards import array, content, samples
from tests.helpers.vaes import save_clips, save_umt5, save_wan

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CLIP = Clip(9, 16, 24, 8.0)
STILL = Clip(1, 24, 16, 8.0)
WORDS = "words:8"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wan and umt5, models; clips; buckets of clips and of images."""
    root = tmp_path_factory.mktemp("videos")
    save_wan(root / "wan")
    save_umt5(root / "umt5")
    save_clips(root / "clips", CLIP, {"train": 10, "val": 4})
    save_clips(root / "buckets" / "9x16x24", CLIP, {"train": 8, "val": 3})
    save_clips(
        root / "buckets" / "1x24x16", STILL, {"train": 12, "val": 5}, captions=("a still", "a red cat")
    )
    return root


def options(root: Path, text: str = WORDS, **others: Any) -> VideoOptions:
    given: dict[str, Any] = {
        "vae": str(root / "wan"),
        "text_encoder": text,
        "tokens": 20,
        "device": "cpu",
        "shards": 3,
    }
    return VideoOptions(**given | others)


def pixels(sample: RawSample) -> torch.Tensor:
    """(1, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(array(sample, "clip").astype(np.float32) / 127.5 - 1).permute(3, 0, 1, 2)[None]


# What is written


@torch.no_grad()
@pytest.mark.parametrize("text", [WORDS, "umt5"])
def test_latents_and_features_are_those_of_the_models(root: Path, tmp_path: Path, text: str) -> None:
    name = text if text == WORDS else str(root / text)
    report = make_video_latents(root / "clips", tmp_path / "out", options(root, name))
    vae, encoder = (
        load_video_vae(str(root / "wan")),
        load_text_encoder(TextEncoding(name, 20, 8 if text == WORDS else 24)),
    )
    for split in ("train", "val"):
        clips, latents = samples(root / "clips" / split), samples(tmp_path / "out" / split)
        assert len(clips) == len(latents) == report.indices[split].samples
        for clip, latent in zip(clips, latents, strict=True):
            assert latent["__key__"] == clip["__key__"], "splits and order are kept"
            np.testing.assert_allclose(array(latent, "latent"), vae.encode(pixels(clip))[0], atol=1e-5)
            features = array(latent, "text")
            assert features.dtype == np.float16
            assert np.array_equal(
                features, encoder.encode([clip["txt"].decode()])[0].numpy().astype(np.float16)
            ), "a text's own rows only"
        index = read_index(tmp_path / "out" / split)
        assert (index.kind, index.clip, index.classes) == ("video_latents", CLIP, ())
        empty = (tmp_path / "out" / "empty_text.npy").read_bytes()
        assert index.text == TextEncoding(
            name, 20, encoder.encoding.channels, encoder.encoding.sha256, hashlib.sha256(empty).hexdigest()
        )
        assert index.vae is not None
        assert (index.vae.name, index.vae.shape, index.vae.sha256) == (
            str(root / "wan"),
            (4, 3, 4, 6),
            vae.sha256,
        )
        assert (index.vae.scale, index.vae.shift) == (1.0, 0.0)
        stored = np.stack([array(sample, "latent") for sample in latents]).astype(np.float64)
        np.testing.assert_allclose(index.vae.mean, stored.mean(axis=(0, 2, 3, 4)), rtol=1e-5)
        np.testing.assert_allclose(index.vae.std, stored.std(axis=(0, 2, 3, 4)), rtol=1e-5)
    assert verify(str(tmp_path / "out")).found == 0


def test_bf16_is_stored_as_float16(root: Path, tmp_path: Path) -> None:
    make_video_latents(root / "clips", tmp_path / "out", options(root, dtype="bf16"))
    vae = load_video_vae(str(root / "wan"), dtype=torch.bfloat16)
    for clip, latent in zip(samples(root / "clips" / "val"), samples(tmp_path / "out" / "val"), strict=True):
        assert array(latent, "latent").dtype == np.float16
        assert np.array_equal(array(latent, "latent"), vae.encode(pixels(clip))[0].numpy().astype(np.float16))


@pytest.mark.slow
def test_buckets_and_processes(root: Path, tmp_path: Path) -> None:
    """Every size by itself, images among them; two processes write the bytes of one, and training takes
    all of it.
    """
    steps: list[tuple[str, int, int]] = []
    report = make_video_latents(
        root / "buckets", tmp_path / "one", options(root), on_progress=lambda *step: steps.append(step)
    )
    make_video_latents(root / "buckets", tmp_path / "two", options(root, device="cpu,cpu"))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert sorted(report.indices) == ["1x24x16/train", "1x24x16/val", "9x16x24/train", "9x16x24/val"]
    assert report.samples == 28
    assert ("captions", 4, 4) in steps, "three captions and the empty one, each once"
    assert ("9x16x24/train", 8, 8) in steps
    shapes = {name: (4, 3, 4, 6) if name == "9x16x24" else (4, 1, 6, 4) for name in ("1x24x16", "9x16x24")}
    vae = VAE(str(root / "wan"), 1.0, 0.0, (4, 3, 4, 6))
    text = TextEncoding(WORDS, 20, 8)
    mix = [DataSource(str(tmp_path / "one" / name)) for name in shapes]
    module = build(
        LatentDataModule,
        vae=vae,
        batch_size=2,
        num_workers=0,
        video=True,
        text_encoder=text,
        mix=mix,
        mix_by="batch",
    )
    module.check(1)
    assert module.facts()["shapes"] == list(shapes.values())
    seen = {tuple(batch["latent"].shape) for batch in islice(module.train_dataloader(), 30)}
    assert seen == {(2, *shape) for shape in shapes.values()}
    assert sum(float(batch["weight"].sum()) for batch in module.val_dataloader()) == 8


def test_latents_can_be_made_anew(root: Path, tmp_path: Path) -> None:
    make_video_latents(root / "buckets", tmp_path / "out", options(root))
    with refused(str(tmp_path / "out")):
        make_video_latents(root / "buckets", tmp_path / "out", options(root))
    save_wan(tmp_path / "other", seed=1)
    with refused(str(tmp_path / "out")):
        make_video_latents(root / "buckets", tmp_path / "out", options(root, vae=str(tmp_path / "other")))
    make_video_latents(root / "buckets", tmp_path / "out", options(root, shards=2), overwrite=True)
    assert len(read_index(tmp_path / "out" / "9x16x24" / "train").shards) == 2
    (tmp_path / "out" / "9x16x24" / "mine.txt").write_text("precious")
    with refused(str(tmp_path / "out")):
        make_video_latents(root / "buckets", tmp_path / "out", options(root), overwrite=True)


@pytest.mark.slow
def test_killed_and_continued_gives_the_same_bits(root: Path, tmp_path: Path, nursery: Nursery) -> None:
    make_video_latents(root / "buckets", tmp_path / "whole", options(root, str(root / "umt5")))
    shown = ["--shards", "3", "--tokens", "20", "--device", "cpu"]
    command = ["data", "latents", "--video", str(root / "buckets"), "--to", str(tmp_path / "out")]
    command += ["--vae", str(root / "wan"), "--text-encoder", str(root / "umt5"), *shown]
    hidden = tmp_path / ".out.packing"
    nursery.start(1, command, root).kill_when(lambda: bool(list(hidden.glob("entries/*/*/*.json"))))
    assert not (tmp_path / "out").exists()
    notes: list[str] = []
    report = make_video_latents(
        root / "buckets", tmp_path / "out", options(root, str(root / "umt5")), on_note=notes.append
    )
    assert any("were finished before and are kept" in note for note in notes)
    assert 0 < report.samples < 28
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not hidden.exists()


# In a data module


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "out"
    make_video_latents(root / "clips", folder, options(root, str(root / "umt5")))
    return folder


def module(root: Path, made: Path, **others: Any) -> LatentDataModule:
    given: dict[str, Any] = {
        "vae": VAE(str(root / "wan"), 1.0, 0.0, (4, 3, 4, 6)),
        "path": str(made),
        "batch_size": 2,
        "num_workers": 0,
        "video": True,
    }
    given["text_encoder"] = TextEncoding(str(root / "umt5"), 20, 24)
    return build(LatentDataModule, **given | others)


def test_a_data_module_encodes_prompts_and_decodes_videos(root: Path, made: Path) -> None:
    data = module(root, made)
    data.check(1)
    batch = next(iter(data.val_dataloader()))
    assert (batch["latent"].shape, batch["text"].shape) == ((2, 4, 3, 4, 6), (2, 20, 24))
    first = samples(made / "val")[0]
    assert torch.equal(batch["latent"][0], torch.from_numpy(array(first, "latent")).float())
    rows = array(first, "text")
    assert np.array_equal(batch["text"][0, : len(rows)].numpy(), rows.astype(np.float32))
    assert not batch["text"][0, len(rows) :].any()
    torch.testing.assert_close(data.encode_text(["a red cat"])[0], batch["text"][0], atol=1e-3, rtol=1e-3)
    videos = data.to_videos(batch["latent"])
    assert torch.equal(videos, decode_videos(load_video_vae(str(root / "wan")), batch["latent"]))
    assert data.sample_shape(13, 16, 32) == (4, 4, 4, 8)
    assert data.frame_rate == 8.0
    with pytest.raises(UserError, match="9 frames of 16x24"):
        data.sample_shape(10, 16, 24)
    assert data.facts() == {
        "kind": "video_latents",
        "vae": data.vae,
        "classes": 0,
        "text": (20, 24),
        "shapes": [(4, 3, 4, 6)],
    }


def test_training_needs_no_text_encoder(root: Path, made: Path) -> None:
    """The empty prompt's features lie beside the splits."""
    text = TextEncoding(str(root / "gone"), 20, 24, load_text_encoder(str(root / "umt5")).encoding.sha256)
    data = module(root, made, text_encoder=text)
    data.check(1)
    next(iter(data.train_dataloader()))
    torch.testing.assert_close(data.null_text(), module(root, made).encode_text(["", "a"])[0])
    exact = load_text_encoder(TextEncoding(str(root / "umt5"), 20, 24)).encode([""])[0]
    assert torch.equal(data.null_text()[: len(exact)], exact.half().float())
    with pytest.raises(UserError, match="folder .*gone"):
        data.encode_text(["a cat"])


def test_damage_to_the_empty_text_is_refused(root: Path, tmp_path: Path) -> None:
    make_video_latents(root / "clips", tmp_path / "out", options(root))
    words = {"text_encoder": TextEncoding(WORDS, 20, 8)}
    np.save(tmp_path / "out" / "empty_text.npy", np.zeros((1, 8), np.float16))
    with pytest.raises(DataError, match=r"empty_text\.npy"):
        module(root, tmp_path / "out", **words).null_text()
    (tmp_path / "out" / "empty_text.npy").unlink()
    with pytest.raises(DataError, match=r"empty_text\.npy"):
        module(root, tmp_path / "out", **words).null_text()


def test_other_features_are_refused(root: Path, made: Path) -> None:
    for text, says in (
        (TextEncoding(WORDS, 20, 24), "words:8"),
        (TextEncoding(str(root / "umt5"), 19, 24), "19 tokens"),
        (TextEncoding(str(root / "umt5"), 20, 24, "ab" * 32), "abababababab"),
    ):
        with pytest.raises(DataError, match=says):
            module(root, made, text_encoder=text).check(1)
    module(root, made, text_encoder=TextEncoding(str(root / "umt5"), 32, 24)).check(1)
    with pytest.raises(UserError, match="text_encoder"):
        module(root, made, text_encoder=None).check(1)
    with pytest.raises(UserError, match="cdcd"):
        module(root, made, vae=VAE(str(root / "wan"), 1.0, 0.0, (4, 3, 4, 6), sha256="cd" * 32)).to_videos(
            torch.zeros(1, 4, 1, 4, 4)
        )


@pytest.mark.parametrize(
    "text",
    [
        [1],
        "x",
        {"name": "w"},
        {"name": "w", "tokens": "9", "channels": 3},
        {"name": "w", "tokens": 0, "channels": 3},
    ],
    ids=str,
)
def test_a_damaged_index_is_refused(root: Path, made: Path, tmp_path: Path, text: object) -> None:
    written = json.loads((made / "val" / "index.json").read_text())
    assert written["text"]["channels"] == 24
    (tmp_path / "index.json").write_text(json.dumps(written | {"text": text}))
    with pytest.raises(DataError, match=r"index\.json"):
        read_index(tmp_path)


def _command(root: Path, out: Path, *more: str, source: str = "clips") -> list[str]:
    return [
        "data",
        "latents",
        "--video",
        str(root / source),
        "--to",
        str(out),
        "--vae",
        str(root / "wan"),
        "--device",
        "cpu",
        *more,
    ]


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--text-encoder", WORDS, "--tokens", "20", "--name", "wan", "--json", str(tmp_path / "t.json")]
    assert main(_command(root, tmp_path / "out", *more)) == 0
    shown = capsys.readouterr().out
    assert "data.vae: {name: wan, scale: 1, shift: 0, shape: [4, 3, 4, 6]}" in shown
    assert "data.text_encoder: {name: 'words:8', tokens: 20, channels: 8}" in shown
    table = json.loads((tmp_path / "t.json").read_text())
    assert [(row["split"], row["kind"], row["samples"]) for row in table["rows"]] == [
        ("train", "video_latents", 10),
        ("val", "video_latents", 4),
    ]
    assert table["summary"]["clips"] == 14


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "--text-encoder: "),
        (["--text-encoder", WORDS, "--size", "64"], "--size: "),
        (["--text-encoder", WORDS, "--samples"], "--samples: "),
        (["--text-encoder", WORDS, "--no-flip"], "--no-flip: "),
        (["--text-encoder", WORDS, "--tokens", "0"], "--tokens: "),
        (["--text-encoder", WORDS, "--tokens", "2"], "sample c0 of train: "),
        (["--text-encoder", "words:no"], "words:no"),
    ],
    ids=str,
)
def test_mistakes_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert main(_command(root, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_the_target_of_the_command_is_given_once(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [
        "data",
        "latents",
        str(root / "clips"),
        str(tmp_path / "a"),
        "--to",
        str(tmp_path / "b"),
        "--vae",
        "x",
    ]
    assert main(both) == 2
    assert "error: OUT: " in capsys.readouterr().err
    assert (
        main(["data", "latents", str(root / "clips"), str(tmp_path / "a"), "--vae", "x", "--tokens", "3"])
        == 2
    )
    assert "error: --tokens: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", ["no caption", "not UTF-8", "a size that does not fit", "images", "nothing"]
)
def test_bad_clips_are_refused(root: Path, tmp_path: Path, damage: str) -> None:
    source, key = tmp_path / "clips", ""
    if damage == "nothing":
        (source).mkdir()
        key = str(source)
    elif damage == "images":
        save_clips(source, CLIP, {"train": 2, "val": 1})
        index = read_index(source / "train")
        write_index(source / "train", ShardIndex("images", index.shards, ("a",)))
        key = str(source / "train" / "index.json")
    elif damage == "a size that does not fit":
        save_clips(source, Clip(8, 16, 24, 8.0), {"train": 2, "val": 1})
        key = str(source / "train" / "index.json")
    else:
        source.mkdir()
        clip = npy_bytes(np.zeros((9, 16, 24, 3), np.uint8))
        members = {"clip.npy": clip} if damage == "no caption" else {"clip.npy": clip, "txt": b"\xff\xfa"}
        write_split(
            source / "train",
            ShardIndex("clips", (), clip=CLIP),
            [Sample("good", {"clip.npy": clip, "txt": b"x"}), Sample("bad", members)],
        )
        key = "train sample bad"
    with refused(key, DataError if damage != "a size that does not fit" else UserError):
        make_video_latents(source, tmp_path / "out", options(root))
    assert not (tmp_path / ".out.packing").exists()


def test_a_damaged_clip_is_skipped_and_counted(root: Path, tmp_path: Path) -> None:
    save_clips(tmp_path / "clips", CLIP, {"train": 6, "val": 2})
    (tmp_path / "whole").mkdir()
    raws = [
        Sample(f"c{n}", {"clip.npy": raw["clip.npy"], "txt": raw["txt"]})
        for n, raw in enumerate(samples(tmp_path / "clips" / "train"))
    ]
    raws[2] = Sample("c2", {"clip.npy": b"damaged", "txt": b"a red cat"})
    write_split(tmp_path / "whole" / "train", ShardIndex("clips", (), clip=CLIP), raws)
    report = make_video_latents(tmp_path / "whole", tmp_path / "out", options(root, max_skipped_share=0.2))
    assert [(split, name) for split, name, _ in report.skipped] == [("train", "c2")]
    assert report.indices["train"].samples == 5
    with pytest.raises(UserError) as error:
        make_video_latents(tmp_path / "whole", tmp_path / "again", options(root))
    assert error.value.key == "max_skipped_share"
    assert "c2" in error.value.reason
