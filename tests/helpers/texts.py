"""Corpora for tests of text, and their rows read back as a run reads them."""

from itertools import islice
from pathlib import Path

import numpy as np

from mhla_lightning.data.modules.options import ReadingConfig
from mhla_lightning.data.modules.tokens import TokenDataModule


def texts_of_all_lengths(count: int, longest: int, seed: int = 0) -> list[str]:
    """Documents of all lengths up to `longest` characters, some of several bytes each."""
    rng = np.random.default_rng(seed)
    letters = np.array([*"abcdefghij \n", "é", "€", "🙂"])
    return ["".join(rng.choice(letters, size)) for size in rng.integers(1, longest, count)]


def text_folder(root: Path, texts: list[str]) -> Path:
    root.mkdir(parents=True)
    for number, text in enumerate(texts):
        (root / f"{number:04d}.txt").write_bytes(text.encode())
    return root


def read_rows(
    folder: Path, split: str, length: int, val_length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """All rows of a split as a run reads them: tokens and documents, (rows, length)."""
    data = TokenDataModule(str(folder), 1, reading=ReadingConfig(num_workers=0))
    data.check(1)
    batches = list(data.val_dataloader() if split == "val" else islice(data.train_dataloader(), data.samples))
    found = tuple(
        np.concatenate([batch[name].numpy() for batch in batches if batch["weight"][0] > 0])
        for name in ("tokens", "documents")
    )
    assert (
        found[0].shape
        == found[1].shape
        == (data.index(split).samples, val_length if split == "val" and val_length else length)
    )
    return found[0], found[1]


def documents_of(tokens: np.ndarray, documents: np.ndarray) -> list[tuple[int, ...]]:
    """The documents of all rows. Their numbers in a row are 0, 1, 2, ... and then -1, where the token is
    0.
    """
    pieces = []
    for row, owners in zip(tokens, documents, strict=True):
        text = int((owners >= 0).sum())
        assert (owners[text:] == -1).all()
        assert (row[text:] == 0).all()
        numbers = owners[:text]
        assert numbers[0] == 0
        assert set(np.diff(numbers)) <= {0, 1}
        pieces += [tuple(row[:text][numbers == number].tolist()) for number in range(int(numbers[-1]) + 1)]
    return pieces
