"""Where shards lie: a local folder, http(s)://, s3:// or gs://, with or without a cache on this machine.
No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mhla_lightning.data.stores.addresses import parse
from mhla_lightning.data.stores.base import Store
from mhla_lightning.data.stores.cache import CachedStore
from mhla_lightning.data.stores.local import LocalStore
from mhla_lightning.data.stores.settings import Remote

__all__ = ["CachedStore", "LocalStore", "Remote", "Store", "open_store", "with_cache"]


def open_store(url: str | Path, remote: Remote | None = None) -> Store:
    """The store for a folder's address: a local path, file://, http(s)://, s3:// or gs://. remote: None is
    Remote().

    Opens no connection. Raises UserError for any other address, and when the package that a protocol needs is
    not installed.
    """
    address = parse(str(url))
    if address.protocol == "file":
        return LocalStore(address.parts.path)
    from mhla_lightning.data.stores.remote import (
        RemoteStore,
    )  # brings aiohttp, which a local run does not need

    return RemoteStore(str(url), remote or Remote())


def with_cache(store: Store, files: Mapping[str, tuple[str, int]], remote: Remote) -> Store:
    """`store` behind a cache when remote.cache_dir is set, else `store` itself; also for a local store (a
    network file system behind a local disk).

    files: shard name -> (sha256, bytes) from the index.
    """
    folder = remote.cache_folder()
    return store if folder is None else CachedStore(store, files, folder, remote.cache_limit, remote.patience)
