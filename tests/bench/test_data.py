"""`mhla bench data`: what is measured and how it is reported; never how fast it was."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path

import pytest
import torch

from mhla_lightning.bench.data_samples import TokenFiles, write_images, write_tokens
from mhla_lightning.bench.data_speed import (
    LoaderPlan,
    decoder_loop,
    make_case,
    memmap_loop,
    own_stream,
    take_turns,
    webdataset_pipeline,
)
from mhla_lightning.cli.main import main
from mhla_lightning.data.loader import shut_down
from mhla_lightning.data.modules.images import ImageDataModule
from mhla_lightning.data.modules.options import OrderConfig
from mhla_lightning.data.modules.tokens import TokenDataModule
from mhla_lightning.data.stream import Batch
from mhla_lightning.errors import DataError

PLAN = LoaderPlan(batch_size=4, batches=4, workers=0, turns=5)
IMAGES = 32


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("bench") / "images", IMAGES, 32)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenFiles:
    return write_tokens(tmp_path_factory.mktemp("bench") / "tokens", 40, 24)


def _images_module(path: Path) -> ImageDataModule:
    return ImageDataModule(str(path), 4, image_size=16, order=OrderConfig(seed=0))


def _same(batches: Sequence[Batch], others: Sequence[Batch], names: Sequence[str]) -> bool:
    return all(
        torch.equal(batch[name], other[name])
        for batch, other in zip(batches, others, strict=True)
        for name in names
    )


def test_made_images_are_spread_over_shards(images: Path) -> None:
    index = _images_module(images).index()
    assert index.samples == IMAGES
    assert 8 <= len(index.shards) <= 24


def test_the_decoder_makes_the_batches_of_the_stream(images: Path) -> None:
    module = _images_module(images)
    kind = module.kind(module.index())
    streams = own_stream(module.corpus, kind, PLAN), decoder_loop(module.corpus, kind, PLAN)
    own, bare = (list(islice(stream, PLAN.steps * (PLAN.turns + 1))) for stream in streams)
    assert [batch["key"] for batch in own] == [batch["key"] for batch in bare]
    assert _same(own, bare, ["image", "label", "index", "epoch"])


def test_webdataset_reads_every_sample_once_an_epoch_in_full_batches(images: Path) -> None:
    module = _images_module(images)
    names = [shard.name for shard in module.index().shards]
    plan = LoaderPlan(batch_size=4, batches=2 * IMAGES // 4, workers=1, turns=5)
    case = make_case(
        "images",
        "webdataset",
        plan,
        webdataset_pipeline(images / "train", names, module.kind(module.index()), plan),
    )
    batches = list(case.loader)
    shut_down(case.loader)
    keys = [key for batch in batches for key in batch["key"]]
    assert {len(batch["key"]) for batch in batches} == {4}
    for epoch in (keys[:IMAGES], keys[IMAGES:]):
        assert len(set(epoch)) == IMAGES
    assert batches[0]["image"].shape == (4, 3, 16, 16)


def test_memmap_reads_the_rows_of_the_stream(tokens: TokenFiles) -> None:
    module = TokenDataModule(str(tokens.split.parent), 4, order=OrderConfig(seed=0))
    streams = (
        own_stream(module.corpus, module.kind(module.index()), PLAN),
        memmap_loop(module.corpus, PLAN, tokens),
    )
    own, mapped = (list(islice(stream, PLAN.steps * (PLAN.turns + 1))) for stream in streams)
    assert _same(own, mapped, ["tokens", "documents"])
    assert any(batch["documents"].any() for batch in own)


def test_a_turn_goes_on_where_the_last_one_ended() -> None:
    plan = LoaderPlan(batch_size=2, batches=3, workers=0, turns=5)
    made: list[int] = []

    def stream() -> Iterator[Batch]:
        for number in count():
            made.append(number)
            yield {"index": torch.tensor([number, number])}

    case = make_case("x", "y", plan, stream())
    take_turns([case], lambda: None)
    assert made == list(range(3 * 6)), "and nothing is made ahead"
    assert (len(case.rates), case.read) == (5, 2 * 3 * 6)


def test_a_bad_sample_is_told(images: Path) -> None:
    module = _images_module(images)
    loop = decoder_loop(module.corpus, module.kind(module.index()), PLAN)
    loop.samples[loop.places[0][0].index].update(cls=b"x")
    with pytest.raises(DataError, match=r"cannot be decoded \(cls is b'x'"):
        next(iter(loop))


TINY = [
    "bench",
    "data",
    "--samples",
    "16",
    "--batch",
    "4",
    "--rows",
    "32",
    "--length",
    "16",
    "--image-size",
    "16",
    "--workers",
    "1",
    "--turns",
    "5",
]


def test_the_command_writes_rows_and_ratios(shards: Path, tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    assert main([*TINY, "--path", str(shards), "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    cases = [
        (subject, case)
        for subject in ("images, DeiT", "images, crop")
        for case in ("stream", "decoder", "webdataset")
    ]
    assert [(row["subject"], row["case"]) for row in result["rows"]] == [
        *cases,
        ("tokens", "stream"),
        ("tokens", "memmap"),
    ]
    for row in result["rows"]:
        samples = 32 if row["subject"] == "tokens" else 16
        assert (row["turns"], row["samples_a_turn"], row["samples_read"]) == (5, samples, 6 * samples)
        assert 0 < row["slowest"] <= row["samples_per_second"] <= row["fastest"]
    ratios = ("stream_over_decoder", "stream_over_webdataset", "tokens_over_memmap")
    assert all(result["summary"][key] > 0 for key in ratios)
    assert {"torch", "webdataset", "numpy"} <= result["versions"].keys()
    assert "1 workers" in result["machine"]


MISTAKES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "turns": (lambda _: ["--turns", "2"], "--turns"),
    "samples": (lambda _: ["--samples", "15"], "--samples"),
    "rows": (lambda _: ["--rows", "7"], "--rows"),
    "no folder": (lambda _: ["--path", "/no/such"], "--path"),
    "few shards": (
        lambda images: ["--path", str(images), "--workers", "40", "--samples", "9999", "--rows", "9999"],
        "--workers",
    ),
    "json": (lambda _: ["--json", "/no/such/x.json"], "--json"),
}


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told(
    images: Path, capsys: pytest.CaptureFixture[str], arguments: Callable[[Path], list[str]], sentence: str
) -> None:
    assert main([*TINY, *arguments(images)]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_bench_resume_reports_time_and_memory(tmp_path: Path, workers: str) -> None:
    """That the first batch is the right one is checked by the measurement itself."""
    target = tmp_path / "resume.json"
    assert (
        main(
            [
                "bench",
                "resume",
                "--shards",
                "30",
                "--samples",
                "20",
                "--turns",
                "2",
                "--workers",
                workers,
                "--json",
                str(target),
            ]
        )
        == 0
    )
    result = json.loads(target.read_text())
    assert [(row["samples"], row["shards"], row["position"]) for row in result["rows"]] == [
        (600, 30, 540)
    ] * 2
    assert all(row["seconds"] > 0 for row in result["rows"])
    assert all((row["worker_bytes"] > 0) is (workers == "2") for row in result["rows"])
