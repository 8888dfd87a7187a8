"""The splits at a path: of a data folder, or a split folder itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mhla_lightning.data.index import INDEX_NAME, SPLITS
from mhla_lightning.data.stores import LocalStore, Store, open_store
from mhla_lightning.data.stores.addresses import plain_key_advice
from mhla_lightning.errors import DataError, UserError, unknown_name

# The words that people use for a split, and its name here.
_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "test": "test",
    "testing": "test",
}


def split_word(name: str) -> tuple[str, str] | None:
    """Return the last word in a file's name that means a split, and the split.

    >>> split_word("imagenet1k-validation-07.tar")
    ('validation', 'val')
    """
    words = [word for word in re.findall("[A-Za-z]+", name) if word.lower() in _WORDS]
    return (words[-1], _WORDS[words[-1].lower()]) if words else None


def folder_split(name: str) -> str | None:
    """Return the split that the name of a folder means, such as val for Validation, or None."""
    return _WORDS.get(name.lower())


def find_splits(path: str, split: Sequence[str] | None = None) -> dict[str, Store]:
    """Return the stores of the splits at `path`, by name, in the order train, val, test.

    A local folder without an index counts as a split when it holds tar files.

    Args:
        path: a folder or an address, of a data set (train/, val/, test/) or of one split.
        split: names of the splits; None takes all that exist.

    Raises:
        DataError: no split, or one of the named ones is missing.
        UserError: an address or a name that is not valid.
    """
    for name in split or ():
        if name not in SPLITS:
            raise UserError("split", unknown_name("split", name, SPLITS))
    whole = open_store(path)
    if isinstance(whole, LocalStore) and not Path(whole.address(".")).is_dir():
        raise DataError(path, "there is no such folder")
    if _is_split(whole):
        name = (
            Path(whole.address(".")).absolute().name
            if isinstance(whole, LocalStore)
            else path.rstrip("/").rpartition("/")[2]
        )
        if split:
            raise UserError(
                "split", f"{path} is one split already; leave `split` out, or name the folder above it"
            )
        return {name: whole}
    stores = {name: open_store(f"{path.rstrip('/')}/{name}") for name in SPLITS if not split or name in split}
    found = {name: store for name, store in stores.items() if _is_split(store)}
    missing = [name for name in split or () if name not in found]
    if missing or not found:
        raise DataError(
            whole.url,
            f"holds no {' or '.join(missing or SPLITS)} split with an {INDEX_NAME}{plain_key_advice(path)}; "
            "`mhla data pack` and `mhla data index` make them",
        )
    return found


def tar_files(folder: Path) -> list[Path]:
    """Return the shards in a local folder, by name."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def _is_split(store: Store) -> bool:
    if store.size(INDEX_NAME) is not None:
        return True
    return isinstance(store, LocalStore) and bool(tar_files(Path(store.address("."))))
