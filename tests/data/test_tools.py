"""mhla data verify, index and preview, on shards of every kind, whole and damaged."""

import functools
import http.server
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter

from mhla_lightning.cli.main import main
from mhla_lightning.data.index import VAE, ShardIndex, offsets_path, read_index, write_index
from mhla_lightning.data.prepare.indexing import Facts, index_shards
from mhla_lightning.data.prepare.preview import preview
from mhla_lightning.data.prepare.samples import image_sample, latent_sample, token_samples
from mhla_lightning.data.prepare.shards import describe_shard
from mhla_lightning.data.prepare.verify import verify
from mhla_lightning.data.prepare.writer import write_split
from mhla_lightning.errors import DataError, UserError
from tests.helpers.errors import refused

IMAGES = ShardIndex("images", (), ("cat", "dog"))
LABELLED = ShardIndex("latents", (), ("0", "1"), vae=VAE("tiny", 0.5, 0.1, (4, 3, 2)))
WITH_TEXT = ShardIndex("video_latents", (), vae=VAE("tiny", 0.5, 0.1, (4, 5, 3, 2)))
TOKENS = ShardIndex("tokens", (), tokenizer="bytes", length=8)
LINE = b"one two three! \xc3\xa4h\n"
KINDS = {"images": IMAGES, "latents": LABELLED, "video_latents": WITH_TEXT, "tokens": TOKENS}


def _png(value: int, size: tuple[int, int] = (24, 12)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 255 - value)).save(buffer, format="PNG")
    return buffer.getvalue()


def _write(folder: Path, header: ShardIndex) -> None:
    """20 samples in several shards."""
    if header.kind == "images":
        samples = [image_sample(header, f"n{n}", _png(10 * n), n % 2) for n in range(20)]
    elif header.kind == "tokens":
        rows = np.resize(np.frombuffer(LINE, np.uint8), (20, 8))
        samples = list(token_samples(header, [(rows, np.cumsum(rows == 10, axis=1))], 256, member_bytes=48))
    else:
        rng = np.random.default_rng(0)
        assert header.vae is not None
        condition = [
            {"label": n % 2} if header.classes else {"text": np.zeros((3, 6), np.float32)} for n in range(20)
        ]
        samples = [
            latent_sample(header, f"n{n}", rng.normal(size=header.vae.shape), **condition[n])
            for n in range(20)
        ]
    write_split(folder, header, samples, shard_bytes=6_000)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KIND/train and KIND/val of every kind."""
    root = tmp_path_factory.mktemp("whole")
    for name, header in KINDS.items():
        (root / name).mkdir()
        for split in ("train", "val"):
            _write(root / name / split, header)
    return root


@pytest.fixture
def data(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A copy of a data set, to be damaged; it is also the working folder."""
    monkeypatch.chdir(tmp_path)

    def copy(kind: str) -> Path:
        shutil.copytree(whole / kind, tmp_path / kind)
        return tmp_path / kind

    return copy


def _rewrite(
    split: Path, number: int, change: Callable[[dict[str, bytes]], object], told: bool = True
) -> None:
    """Change the members (by name) of a shard. told: whether index and offsets are made to agree."""
    index = read_index(split)
    path = split / index.shards[number].name
    with tarfile.open(path) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    change(members)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if told:
        entry, offsets = describe_shard(path, index.kind)
        np.save(offsets_path(split, path.name), offsets)
        shards = tuple(entry if place == number else shard for place, shard in enumerate(index.shards))
        write_index(
            split, ShardIndex(index.kind, shards, index.classes, index.tokenizer, index.vae, index.length)
        )


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _edit_index(split: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((split / "index.json").read_text())
    change(content)
    (split / "index.json").write_text(json.dumps(content))


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def _put(split: Path, number: int, extension: str, content: bytes, place: int = 0) -> None:
    """Replace a member of the sample at `place` of a shard."""
    _rewrite(
        split, number, lambda m: m.update({[name for name in m if name.endswith(extension)][place]: content})
    )


def _same_key(split: Path) -> None:
    """The first sample of shard 1 gets the key of the first sample of shard 0."""
    with tarfile.open(split / read_index(split).shards[0].name) as tar:
        key = tar.getnames()[0].partition(".")[0]

    def change(members: dict[str, bytes]) -> None:
        first = next(iter(members)).partition(".")[0]
        renamed = {name.replace(first, key): content for name, content in members.items()}
        members.clear()
        members |= renamed

    _rewrite(split, 1, change)


def _apart(split: Path) -> None:
    """The first member of the first sample moves to the end of the shard."""
    _rewrite(split, 0, lambda m: m.update({name: m.pop(name) for name in list(m)[:1]}), told=False)


SHARD, SECOND = "train/train-000000.tar", "train/train-000001.tar"
NAN, FALLING = (
    _npy(np.full((4, 3, 2), np.nan, np.float16)),
    _npy(np.array([[0, 0, 0, 1, 1, 0, 0, 0]] * 3, np.uint16)),
)
# Kind, damage, (file, a fact of its problem) in order, number of samples that cannot be used.
DAMAGES: dict[str, tuple[str, Callable[[Path], object], list[tuple[str, str]], int]] = {
    "missing shard": (
        "images",
        lambda s: (s / "train-000001.tar").unlink(),
        [(SECOND, "missing")],
        3,
    ),
    "flipped header": (
        "images",
        lambda s: _flip(s / "train-000000.tar", 150),
        [(SHARD, "sha256"), (SHARD, "tar file"), (SHARD, "no tar header")],
        1,
    ),
    "cut in a member": (
        "images",
        lambda s: _cut(s / "train-000000.tar", 2600),
        [
            (SHARD, "2600 bytes"),
            (SHARD, "tar file"),
            (SHARD, "cut"),
            (SHARD, "cut"),
        ],
        2,
    ),
    "cut between samples": (
        "images",
        lambda s: _cut(s / "train-000000.tar", 4096),
        [(SHARD, "4096 bytes"), (SHARD, "2 samples")],
        1,
    ),
    "a sample too many in the index": (
        "images",
        lambda s: _edit_index(s, lambda c: c["shards"][0].update(samples=4)),
        [
            ("train/index.json", "21"),
            (SHARD + ".offsets.npy", "int64 (4,)"),
            (SHARD, "holds 3 samples"),
        ],
        1,
    ),
    "wrong offsets": (
        "images",
        lambda s: np.save(s / "train-000000.tar.offsets.npy", np.array([0, 1024, 4096, 6144])),
        [(SHARD + ".offsets.npy", "byte 1024")],
        0,
    ),
    "missing offsets": (
        "tokens",
        lambda s: (s / "train-000000.tar.offsets.npy").unlink(),
        [(SHARD + ".offsets.npy", "missing")],
        0,
    ),
    "no image": (
        "images",
        lambda s: _put(s, 0, "png", b"\x89PNG\r\n\x1a\nnothing"),
        [(SHARD, "image")],
        1,
    ),
    "label": (
        "images",
        lambda s: _put(s, 0, "cls", b"7"),
        [(SHARD, "b'7'")],
        1,
    ),
    "key in two shards": ("images", _same_key, [(SECOND, "train/train-000000.tar")], 0),
    "members apart": (
        "images",
        _apart,
        [(SHARD, ""), (SHARD, "members"), *[(SHARD, "inside the sample")] * 3],
        3,
    ),
    "NaN": (
        "latents",
        lambda s: _put(s, 0, "latent.npy", NAN),
        [(SHARD, "latent.npy")],
        1,
    ),
    "latent of another shape": (
        "latents",
        lambda s: _put(s, 0, "latent.npy", NAN[:-2], 1),
        [(SHARD, "latent.npy")],
        1,
    ),
    "pickled": (
        "video_latents",
        lambda s: _put(s, 0, "text.npy", b"\x80\x04N."),
        [(SHARD, "text.npy")],
        1,
    ),
    "falling documents": (
        "tokens",
        lambda s: _put(s, 0, "documents.npy", FALLING),
        [(SHARD, "document")] * 3,
        3,
    ),
    "other classes in val": (
        "images",
        lambda s: _edit_index(s.parent / "val", lambda c: c["classes"].append("cow")),
        [("val/index.json", "classes")],
        0,
    ),
    "no index": (
        "images",
        lambda s: (s / "index.json").unlink(),
        [("train/index.json", "")],
        0,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_data_are_clean(whole: Path, kind: str) -> None:
    report = verify(str(whole / kind))
    assert (report.problems, report.found, report.samples, report.unusable) == ([], 0, 40, 0)
    assert verify(str(whole / kind), ["val"]).samples == verify(str(whole / kind / "val")).samples == 20


@pytest.mark.parametrize(("kind", "damage", "problems", "unusable"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found(
    data: Callable, kind: str, damage: Callable, problems: list[tuple[str, str]], unusable: int
) -> None:
    path = data(kind)
    damage(path / "train")
    report = verify(str(path))
    found = [(problem.file, problem.problem) for problem in report.problems]
    assert [file for file, _ in found] == [file for file, _ in problems], found
    for (_, text), (_, fact) in zip(found, problems, strict=True):
        assert fact in text
        assert "\n" not in text
    assert (report.found, report.unusable) == (len(problems), unusable)


@pytest.mark.slow
def test_one_problem_does_not_hide_the_others(data: Callable) -> None:
    path = data("images")
    _edit_index(path / "train", lambda c: c.update(hash="0"))
    _flip(path / "train" / "train-000002.tar", 700)
    _put(path / "val", 1, "cls", b"x")
    _put(path / "val", 1, "png", b"x", place=1)
    (path / "val" / "val-000002.tar").unlink()
    expected = [
        "train/index.json",
        "train/train-000002.tar",
        "val/val-000001.tar",
        "val/val-000001.tar",
        "val/val-000002.tar",
    ]
    one, two = verify(str(path), workers=1), verify(str(path), workers=2)
    assert [problem.file for problem in one.problems if "decoded" not in problem.problem] == expected
    assert one == two, "a report does not depend on the number of workers"


@pytest.fixture
def served(whole: Path) -> Iterator[str]:
    """An http server for the data sets."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(whole))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_are_verified_and_shown(served: str) -> None:
    assert verify(f"{served}/latents").found == 0
    assert verify(f"{served}/tokens/val").samples == 20
    found = preview(f"{served}/images", "val")
    assert (found.shown, found.unusable) == (20, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_for_shards_of_others(data: Callable, kind: str) -> None:
    path, header = data(kind), KINDS[kind]
    made = {file.relative_to(path): file.read_bytes() for file in path.rglob("*.*")}
    for file in [*path.rglob("index.json"), *path.rglob("*.npy")]:
        file.unlink()
    index_shards(str(path), Facts(classes=header.classes or None, vae=header.vae, tokenizer=header.tokenizer))
    assert {file.relative_to(path): file.read_bytes() for file in path.rglob("*.*")} == made


def test_token_shards_of_webdatasets_own_writer(tmp_path: Path) -> None:
    """It sorts members by name, documents first, and puts a header before each header."""
    rows, documents = np.arange(16, dtype=np.uint16).reshape(2, 8), np.zeros((2, 8), np.uint32)
    _tar(
        tmp_path / "a.tar",
        *(
            {"__key__": key, "tokens.npy": _npy(rows + n), "documents.npy": _npy(documents)}
            for n, key in enumerate("ab")
        ),
    )
    index_shards(str(tmp_path), Facts(tokenizer="gpt2"))
    assert verify(str(tmp_path)).found == 0
    found = preview(str(tmp_path), count=3).texts
    assert found[2] == "row 2: 8 tokens of 1 documents\n  document 0 (8 tokens): 1 2 3 4 5 6 7 8"


def test_a_new_index_keeps_facts_that_shards_do_not_hold(data: Callable) -> None:
    for kind in KINDS:
        path = data(kind)
        old = read_index(path / "train")
        with refused(str(path / "train" / "index.json")):
            index_shards(str(path))
        (path / "train" / old.shards[-1].name).unlink()
        assert index_shards(str(path / "train"), overwrite=True)["train"] == ShardIndex(
            kind, old.shards[:-1], old.classes, old.tokenizer, old.vae, old.length
        )
        assert verify(str(path)).found == 0
        assert len(list((path / "train").glob("*.npy"))) == len(old.shards) - 1


@pytest.mark.slow
def test_classes_are_counted_over_all_splits(data: Callable) -> None:
    path = data("images")
    _put(path / "val", 0, "cls", b"4")
    for file in path.rglob("index.json"):
        file.unlink()
    assert {index.classes for index in index_shards(str(path), workers=2).values()} == {
        ("0", "1", "2", "3", "4")
    }
    with refused("classes"):
        index_shards(str(path), Facts(classes=("a", "b")), overwrite=True)


def _tar(path: Path, *samples: dict) -> Path:
    with open(path, "wb") as file, TarWriter(file, encoder=False, compress=False) as tar:
        for sample in samples:
            tar.write(sample)
    return path


def _link(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)


def _named(path: Path, name: str) -> None:
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo(name))


ONE = {"__key__": "a", "png": _png(1), "cls": b"0"}
ROWS = _npy(np.zeros((2, 8), np.uint16))
UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tar files": (lambda p: None, ""),
    "json labels": (
        lambda p: _tar(p / "a.tar", {"__key__": "a", "png": _png(1), "json": b'{"label": 1}'}),
        "/a.tar",
    ),
    "json label later": (
        lambda p: _tar(p / "a.tar", ONE, {"__key__": "b", "png": _png(1), "json": b"{}"}),
        "/a.tar",
    ),
    "unknown members": (
        lambda p: _tar(p / "a.tar", {"__key__": "a", "mp3": b"1"}),
        "/a.tar",
    ),
    "label no number": (
        lambda p: _tar(p / "a.tar", ONE, ONE | {"__key__": "b", "cls": b"cat"}),
        "/a.tar",
    ),
    "two kinds": (
        lambda p: (_tar(p / "a.tar", ONE), _write_tokens(p / "b.tar", 8)),
        "/b.tar",
    ),
    "two lengths": (
        lambda p: (_write_tokens(p / "a.tar", 8), _write_tokens(p / "b.tar", 4)),
        "/b.tar",
    ),
    "other documents": (
        lambda p: _tar(p / "a.tar", {"__key__": "a", "documents.npy": ROWS, "tokens.npy": NAN}),
        "/a.tar",
    ),
    "key twice": (
        lambda p: (_tar(p / "a.tar", ONE), _tar(p / "b.tar", ONE)),
        "/b.tar",
    ),
    "latents without vae": (
        lambda p: _tar(p / "a.tar", {"__key__": "a", "latent.npy": NAN, "cls": b"0"}),
        "vae",
    ),
    "link": (lambda p: _link(p / "a.tar"), "/a.tar"),
    "path that leads out": (lambda p: _named(p / "a.tar", "../a.png"), "/a.tar"),
    "absolute path": (lambda p: _named(p / "a.tar", "/a.png"), "/a.tar"),
    "empty": (lambda p: _tar(p / "a.tar"), "/a.tar"),
    "no tar": (lambda p: (p / "a.tar").write_bytes(b"x" * 3000), "/a.tar"),
    "compressed": (lambda p: (p / "a.tar.gz").write_bytes(b"x"), "/a.tar.gz"),
    "odd name": (lambda p: _tar(p / "a:b.tar", ONE), "/index.json"),
}


def _write_tokens(path: Path, length: int) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in ("tokens", "documents"):
            info = tarfile.TarInfo(f"{path.stem}.{name}.npy")
            content = _npy(np.zeros((2, length), np.uint16))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(("make", "file"), UNUSABLE.values(), ids=UNUSABLE)
def test_shards_that_cannot_be_indexed(tmp_path: Path, make: Callable, file: str) -> None:
    make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        index_shards(str(tmp_path))
    if file == "/index.json":  # it was written into a hidden folder
        assert str(error.value).startswith(str(tmp_path))
        assert "a:b.tar" in str(error.value)
    else:
        key = file if file == "vae" else f"{tmp_path}{file}"
        assert str(error.value).startswith(key)
        assert isinstance(error.value, DataError) == (file not in ("vae", "/a.tar.gz"))
    assert sorted(tmp_path.iterdir()) == before, "nothing is written unless all can be"


def test_mistakes_about_paths(whole: Path, tmp_path: Path) -> None:
    with refused("http://127.0.0.1:1/x"):
        index_shards("http://127.0.0.1:1/x")
    with refused(str(tmp_path / "nowhere"), DataError):
        verify(str(tmp_path / "nowhere"))
    with refused(str(whole / "images"), DataError):
        verify(str(whole / "images"), ["test"])
    with refused("split"):
        preview(str(whole / "images" / "train"), "val")
    with refused("count"):
        preview(str(whole / "images"), count=0)


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_preview_shows_the_images(data: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    path = data("images")
    assert main(["data", "preview", str(path), "--n", "4"]) == 0
    assert capsys.readouterr().out.strip() == "images-train.png: 4 of 20 samples of train"
    sheet = _pixels(path.parent / "images-train.png")
    assert [sheet[70, 60].tolist(), sheet[70, 60 + 134].tolist()] == [[0, 0, 255], [50, 0, 205]], (
        "samples 0 and 5 of 20"
    )
    assert (sheet[136:150, 6:60] < 100).any(), "with a caption below"
    _put(path / "train", 0, "png", b"nothing")
    assert main(["data", "preview", str(path / "train"), "--n", "4", "--to", "other.png"]) == 0
    assert "other.png: 4 of 20 samples of train; 1 cannot be decoded" in capsys.readouterr().out
    assert (
        preview(str(path), seed=1, count=4).png
        == preview(str(path), seed=1, count=4).png
        != preview(str(path), seed=2, count=4).png
    )


@pytest.mark.parametrize(("kind", "width"), [("latents", 128), ("video_latents", 3 * 128)])
def test_a_preview_of_latents(whole: Path, kind: str, width: int) -> None:
    found = preview(str(whole / kind), count=1)
    assert found.png is not None
    with Image.open(io.BytesIO(found.png)) as sheet:
        assert sheet.size == (width + 12, 156)
        assert len(np.unique(np.asarray(sheet.crop((6, 6, width, 130))).reshape(-1, 3), axis=0)) > 6, (
            "channels become colours"
        )


def test_tokens_are_spelled(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "preview", str(whole / "tokens"), "--n", "3"]) == 0
    shown = capsys.readouterr().out
    assert "row 0: 8 tokens of 1 documents\n  document 0 (8 tokens): one two \n" in shown
    assert "row 2: 8 tokens of 2 documents\n  document 0 (2 tokens): h" not in shown
    assert main(["data", "preview", str(whole / "tokens"), "--n", "1", "--to", "/dev/null/x.txt"]) == 2
    assert "error: --to: " in capsys.readouterr().err


def test_commands(
    data: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = data("images")
    assert main(["data", "verify", "images", "--workers", "1"]) == 0
    assert "no problem found: 40 samples" in capsys.readouterr().out
    _put(path / "val", 1, "cls", b"7")
    assert main(["data", "verify", "images", "--workers", "1", "--json", "problems.json"]) == 2
    shown = capsys.readouterr().out
    assert "1 problem found: 1 of 40 samples looked at cannot be decoded" in shown
    assert "val/val-000001.tar" in shown
    table = json.loads(Path("problems.json").read_text())
    assert table["rows"][0]["sample"].startswith("00000003-n3")
    assert table["summary"] == {"problems": 1, "samples": 40, "unusable": 1, "shards": 14}
    Path("names.txt").write_text("a\nb\nc\nd\ne\nf\ng\nh\n")
    command = ["data", "index", "images", "--classes", "names.txt", "--overwrite", "--workers", "1"]
    assert main([*command, "--json", "table.json"]) == 0
    assert [row["classes"] for row in json.loads(Path("table.json").read_text())["rows"]] == [8, 8]
    assert main(["data", "verify", "images", "--workers", "1"]) == 0
    capsys.readouterr()
    assert main([*command, "--vae-name", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: --vae-scale: ")
