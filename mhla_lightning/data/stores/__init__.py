"""Folders of shards, local or remote, with or without a cache. No torch."""

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
    """Return the store for a folder's address, without opening a connection.

    Args:
        url: a local path, file://, http(s)://, s3:// or gs://.
        remote: how remote files are fetched; None is Remote().

    Raises UserError for any other address, and when the package of a protocol is not installed.
    """
    address = parse(str(url))
    if address.protocol == "file":
        return LocalStore(address.parts.path)
    # Imports aiohttp, which a local run does not need.
    from mhla_lightning.data.stores.remote import RemoteStore

    return RemoteStore(str(url), remote or Remote())


def with_cache(store: Store, files: Mapping[str, tuple[str, int]], remote: Remote) -> Store:
    """Return `store` behind a cache when remote.cache_dir is set, else `store` itself.

    A cache also serves a local store: a local disk in front of a network file system.

    Args:
        store: of the shards.
        files: shard name -> (sha256, bytes), from the index.
        remote: cache_dir and cache_bytes.
    """
    folder = remote.cache_folder()
    return store if folder is None else CachedStore(store, files, folder, remote.cache_limit, remote.patience)
