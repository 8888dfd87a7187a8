"""Writing shards of every kind: what is written is what is read, and what cannot be trained on is refused."""

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mhla_lightning.data.check import check_split
from mhla_lightning.data.index import VAE, ShardIndex, read_index
from mhla_lightning.data.kinds import kind_of
from mhla_lightning.data.prepare.replacing import new_folder
from mhla_lightning.data.prepare.samples import Sample, image_sample, latent_sample, token_samples
from mhla_lightning.data.prepare.writer import write_split
from mhla_lightning.data.split import Split
from mhla_lightning.data.stores import LocalStore
from mhla_lightning.errors import DataError
from tests.helpers.errors import refused

IMAGES = ShardIndex("images", (), ("cat", "dog"))
LABELLED = ShardIndex("latents", (), ("cat", "dog"), vae=VAE("tiny", 0.5, 0.1, (4, 3, 2)))
WITH_TEXT = ShardIndex("video_latents", (), vae=VAE("tiny", 0.5, 0.1, (4, 2, 3, 2)))
TOKENS = ShardIndex("tokens", (), tokenizer="bytes", length=8)
ROWS = np.arange(160).reshape(20, 8)
DOCUMENTS = np.repeat([[0, 0, 0, 1, 1, 4, 4, 4]], 20, axis=0)


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (5, 4), value).save(buffer, format="PNG")
    return buffer.getvalue()


def _latents(header: ShardIndex, count: int) -> Iterator[Sample]:
    assert header.vae is not None
    for number in range(count):
        latent = np.full(header.vae.shape, number, np.float16)
        text = None if header.classes else np.full((3, 6), -number, np.float32)
        yield latent_sample(
            header, f"n.{number}/x", latent, label=number % 2 if header.classes else None, text=text
        )


def _samples(header: ShardIndex) -> Iterator[Sample]:
    if header.kind == "images":
        return (image_sample(header, str(number), _png(number), number % 2) for number in range(20))
    if header.kind == "tokens":
        return token_samples(
            header,
            [(ROWS[:9], DOCUMENTS[:9]), (ROWS[9], DOCUMENTS[9]), (ROWS[10:], DOCUMENTS[10:])],
            256,
            member_bytes=3 * 16,
        )
    return _latents(header, 20)


def _read(folder: Path) -> list:
    """Every sample, decoded as training does, after every check of training."""
    split = Split(read_index(folder), LocalStore(folder))
    check_split(split, "sha256")
    kind = kind_of(split.index)
    return [kind.inspect(sample) for sample in kind.read(split, range(split.samples))]


KINDS = {"images": IMAGES, "latents": LABELLED, "video latents with text": WITH_TEXT, "tokens": TOKENS}


@pytest.mark.parametrize("header", KINDS.values(), ids=KINDS)
def test_the_same_samples_give_the_same_bytes(tmp_path: Path, header: ShardIndex) -> None:
    first, second = (
        write_split(tmp_path / name, header, _samples(header), shard_bytes=8_000) for name in ("train", "val")
    )
    assert [shard.sha256 for shard in first.shards] == [shard.sha256 for shard in second.shards]
    assert len(first.shards) > 1
    assert first == read_index(tmp_path / "train")
    assert (first.samples, first.kind, first.classes, first.vae, first.length) == (
        20,
        header.kind,
        header.classes,
        header.vae,
        header.length,
    )
    with tarfile.open(tmp_path / "train" / "train-000001.tar") as tar:
        members = list(tar)
    assert {(member.mtime, member.uid, member.uname, member.gname, member.mode) for member in members} == {
        (0, 0, "mhla", "mhla", 0o444)
    }
    assert members[0].name.startswith(f"{first.shards[0].samples:08d}-"), (
        "keys are numbered through the split"
    )


def test_images_come_back(tmp_path: Path) -> None:
    write_split(tmp_path / "train", IMAGES, _samples(IMAGES), shard_bytes=8_000)
    assert [(image.getpixel((0, 0)), label) for image, label in _read(tmp_path / "train")] == [
        ((n, n, n), n % 2) for n in range(20)
    ]


@pytest.mark.parametrize("header", [LABELLED, WITH_TEXT], ids=["labels", "text"])
def test_latents_come_back(tmp_path: Path, header: ShardIndex) -> None:
    write_split(tmp_path / "train", header, _samples(header))
    for number, found in enumerate(_read(tmp_path / "train")):
        condition = (
            {"label": number % 2} if header.classes else {"text": np.full((3, 6), -number, np.float32)}
        )
        assert header.vae is not None
        for key, array in ({"latent": np.full(header.vae.shape, number, np.float16)} | condition).items():
            np.testing.assert_array_equal(found[key], array)
        assert found["latent"].dtype == np.float16


def test_token_rows_come_back(tmp_path: Path) -> None:
    index = write_split(tmp_path / "train", TOKENS, _samples(TOKENS), shard_bytes=8_000)
    found = _read(tmp_path / "train")
    np.testing.assert_array_equal([tokens for tokens, _ in found], ROWS)
    np.testing.assert_array_equal([documents for _, documents in found], DOCUMENTS)
    offsets = Split(index, LocalStore(tmp_path / "train")).offsets(0)
    assert len(offsets) == index.shards[0].samples + 1
    assert offsets[:5].tolist() == [0, 0, 0, 2048, 2048], "three rows a member share its first header"


TYPES = {"two bytes": (65_536, 65_535, "uint16"), "four bytes": (65_537, 65_536, "uint32")}


@pytest.mark.parametrize(("vocabulary", "token", "dtype"), TYPES.values(), ids=TYPES)
def test_tokens_take_two_bytes_where_they_fit(
    tmp_path: Path, vocabulary: int, token: int, dtype: str
) -> None:
    row = np.full(8, token, np.int64)
    write_split(tmp_path / "train", TOKENS, token_samples(TOKENS, [(row, np.zeros(8, np.int64))], vocabulary))
    tokens, documents = _read(tmp_path / "train")[0]
    assert (tokens.dtype, documents.dtype, tokens.tolist()) == (dtype, "uint16", row.tolist())


def test_members_hold_eight_megabytes() -> None:
    header = ShardIndex("tokens", (), length=4096)
    rows = np.zeros((1100, 4096), np.uint16)
    samples = list(token_samples(header, [(rows, rows)], 50_257))
    assert [sample.rows for sample in samples] == [1024, 76]
    assert len(samples[0].members["tokens.npy"]) == 2**23 + 128
    assert list(samples[0].members) == ["tokens.npy", "documents.npy"]


def _tokens(**changes: np.ndarray) -> list[Sample]:
    rows = {"tokens": ROWS[0], "documents": DOCUMENTS[0]} | changes
    return list(token_samples(TOKENS, [(ROWS[:4], DOCUMENTS[:4]), (rows["tokens"], rows["documents"])], 256))


def _latent(array: np.ndarray, **condition: object) -> Sample:
    return latent_sample(LABELLED, "x", array, **({"label": 0} | condition))  # type: ignore[arg-type]


GOOD, VIDEO = np.zeros((4, 3, 2), np.float32), np.zeros((4, 2, 3, 2), np.float32)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "gif": (lambda: image_sample(IMAGES, "x", b"GIF89a", 0), "x"),
    "label": (lambda: image_sample(IMAGES, "x", _png(0), 2), "x"),
    "NaN": (lambda: _latent(GOOD * np.nan), "x"),
    "infinite": (lambda: _latent(GOOD + np.inf), "x"),
    "shape": (lambda: _latent(GOOD[:3]), "x"),
    "integers": (lambda: _latent(GOOD.astype(int)), "x"),
    "no label": (lambda: _latent(GOOD, label=None), "x"),
    "text too": (lambda: _latent(GOOD, text=GOOD[0]), "x"),
    "no text": (lambda: latent_sample(WITH_TEXT, "x", VIDEO), "x"),
    "text of three axes": (
        lambda: latent_sample(WITH_TEXT, "x", VIDEO, text=GOOD),
        "x",
    ),
    "NaN in text": (
        lambda: latent_sample(WITH_TEXT, "x", VIDEO, text=GOOD[0] * np.nan),
        "x",
    ),
    "token too large": (
        lambda: _tokens(tokens=ROWS[0] + 250),
        "row 4",
    ),
    "negative token": (lambda: _tokens(tokens=ROWS[0] - 1), "row 4"),
    "short row": (lambda: _tokens(tokens=ROWS[0, :5]), "row 4"),
    "other documents": (lambda: _tokens(documents=DOCUMENTS[:1]), "row 4"),
    "float tokens": (lambda: _tokens(tokens=ROWS[0] + 0.5), "row 4"),
    "falling documents": (
        lambda: _tokens(documents=DOCUMENTS[0, ::-1]),
        "row 4",
    ),
}


@pytest.mark.parametrize(("make", "key"), REFUSED.values(), ids=REFUSED)
def test_refused_samples(make: Callable[[], object], key: str) -> None:
    with refused(key, DataError):
        make()


def _stopped() -> Iterator[Sample]:
    yield from list(_samples(TOKENS))[:2]
    raise KeyboardInterrupt


def test_a_split_appears_with_its_folder_or_not_at_all(tmp_path: Path) -> None:
    with (
        refused(str(tmp_path / ".to.packing" / "data" / "train"), DataError),
        new_folder(tmp_path / "to", overwrite=False) as folder,
    ):
        write_split(folder / "train", TOKENS, [])
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "to", overwrite=False) as folder:
        write_split(folder / "train", TOKENS, _stopped())
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "to", overwrite=False) as folder:
        for split in ("train", "val"):
            write_split(folder / split, TOKENS, _samples(TOKENS))
    assert [path.name for path in tmp_path.iterdir()] == ["to"]
    with (
        refused(str(tmp_path / "to")),
        new_folder(tmp_path / "to", overwrite=False),
    ):
        pass
