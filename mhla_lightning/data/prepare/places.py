"""The splits at a path that a user types: of a data folder, or a split folder itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mhla_lightning.data.index import INDEX_NAME, SPLITS
from mhla_lightning.data.stores import LocalStore, Store, open_store
from mhla_lightning.errors import DataError, UserError, unknown_name


def find_splits(path: str, wanted: Sequence[str] | None = None) -> dict[str, Store]:
    """Stores of the splits at `path`, by name, in the order train, val, test. A local folder without an index
    counts when it holds tar files.

    path: a folder or an address, of a data set (train/, val/, test/) or of one split. wanted: names; None
        takes all that are there.
    Raises DataError when there are none, or not the wanted ones; UserError for an address or a name that is
    none.
    """
    for name in wanted or ():
        if name not in SPLITS:
            raise UserError(unknown_name("split", name, SPLITS))
    whole = open_store(path)
    if isinstance(whole, LocalStore) and not Path(whole.address(".")).is_dir():
        raise DataError(f"there is no folder {path}")
    if _is_split(whole):
        name = (
            Path(whole.address(".")).absolute().name
            if isinstance(whole, LocalStore)
            else path.rstrip("/").rpartition("/")[2]
        )
        if wanted:
            raise UserError(f"{path} is one split; leave --split out, or name the folder above it")
        return {name: whole}
    stores = {
        name: open_store(f"{path.rstrip('/')}/{name}") for name in SPLITS if not wanted or name in wanted
    }
    found = {name: store for name, store in stores.items() if _is_split(store)}
    missing = [name for name in wanted or () if name not in found]
    if missing or not found:
        raise DataError(
            f"{whole.url} holds no {' or '.join(missing or SPLITS)} split with an {INDEX_NAME}: see "
            "'mhla data pack' and 'mhla data index'"
        )
    return found


def tar_files(folder: Path) -> list[Path]:
    """The shards in a local folder, by name."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def _is_split(store: Store) -> bool:
    if store.size(INDEX_NAME) is not None:
        return True
    return isinstance(store, LocalStore) and bool(tar_files(Path(store.address("."))))
