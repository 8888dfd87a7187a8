"""Work on a data set that a power cut has damaged: the same command ends with the same bytes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.data.index import read_index
from mhla_lightning.data.prepare import replacing
from mhla_lightning.data.prepare.latents.captions import CaptionFeatures
from mhla_lightning.data.prepare.parallel import Interrupted
from mhla_lightning.data.prepare.text.tokenize import TextOptions, tokenize
from tests.helpers.written_files import DAMAGES, WRITTEN, damage, entry_of

OPTIONS = TextOptions(length=32, val_length=64, val=6, shards=2)
WORK = [one for one in WRITTEN if "continue" in one.readers]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text`, its shards in `whole`, and the work on the same shards, stopped just before its end."""
    root = tmp_path_factory.mktemp("stopped")
    (root / "text").mkdir()
    words = ["the", "cat", "sat", "on", "a", "mat"]
    for number in range(30):
        chosen = np.random.default_rng(number).choice(words, 10 + number % 7)
        (root / "text" / f"{number:02d}.txt").write_text(" ".join(chosen))
    tokenize([str(root / "text")], root / "whole", OPTIONS, workers=1)

    def stop(*_: object) -> None:
        raise Interrupted("here", "the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replacing, "_move", stop)
        with pytest.raises(Interrupted):
            tokenize([str(root / "text")], root / "cut", OPTIONS, workers=1)
    return root


def test_every_file_of_the_work_is_in_the_list(stopped: Path) -> None:
    found = [path for path in (stopped / ".cut.packing").rglob("*") if path.is_file()]
    kinds = {entry_of(str(path.relative_to(stopped))) for path in found}
    assert None not in kinds
    assert len(kinds) >= 7


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("pattern", [one.pattern for one in WORK])
def test_damaged_work_goes_on(stopped: Path, tmp_path: Path, pattern: str, how: str) -> None:
    found = [path for path in stopped.rglob("*") if re.fullmatch(pattern, str(path.relative_to(stopped)))]
    if not found:
        pytest.skip("tokenize writes no such file")
    shutil.copytree(stopped / ".cut.packing", tmp_path / ".cut.packing")
    broken = tmp_path / max(found).relative_to(stopped)
    damage(broken, how)
    tokenize([str(stopped / "text")], tmp_path / "cut", OPTIONS, workers=1)
    assert not (tmp_path / ".cut.packing").exists()
    same = [
        (tmp_path / "cut" / path.relative_to(stopped / "whole")).read_bytes() == path.read_bytes()
        for path in (stopped / "whole").rglob("*")
        if path.is_file()
    ]
    if broken.suffix == ".tar" and how == "zero tail":  # of its size: only its hash tells, which takes long
        assert main(["data", "verify", str(tmp_path / "cut"), "--workers", "1"]) == 2 or all(same)
        return
    assert all(same)
    assert read_index(tmp_path / "cut" / "train").hash == read_index(stopped / "whole" / "train").hash


@pytest.mark.parametrize("how", ["truncated", "empty"])
def test_a_damaged_caption_is_encoded_again(tmp_path: Path, how: str) -> None:
    kept = CaptionFeatures(tmp_path)
    assert not kept.holds("a cat")
    kept.write("a cat", np.ones((3, 4), np.float16))
    assert kept.holds("a cat")
    damage(kept.path("a cat"), how)
    assert not kept.holds("a cat")
