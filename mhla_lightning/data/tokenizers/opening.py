"""Tokenizers by the name that a user gives, or that an index holds."""

from __future__ import annotations

import logging
import re
from contextlib import closing
from pathlib import Path

from mhla_lightning.data.index import ShardIndex
from mhla_lightning.data.stores import Remote, open_store
from mhla_lightning.data.tokenizers.base import ByteTokenizer, Tokenizer
from mhla_lightning.data.tokenizers.fast import CONFIG_NAME, FILE_NAME, FastTokenizer
from mhla_lightning.errors import DataError, UserError, missing_extra

MAX_FILE_BYTES = 2**28
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_log = logging.getLogger(__name__)


def open_tokenizer(spec: str) -> Tokenizer:
    """Open a tokenizer, without unpickling and without running others' code.

    spec: bytes, a tokenizer.json, a folder that holds one, or a name on the Hugging Face hub such as gpt2. Of
    a name, tokenizer.json and tokenizer_config.json are fetched. Raises UserError.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / FILE_NAME
    if path.is_file():
        beside = path.with_name(CONFIG_NAME)
        return FastTokenizer(_read(path), FILE_NAME, str(path), _read(beside) if beside.is_file() else None)
    if (
        path.name.endswith(".json")
        or Path(spec).is_dir()
        or not _HUB_NAME.fullmatch(spec)
        or spec.startswith(".")
    ):
        raise UserError(
            "tokenizer",
            f"{path} does not exist; give bytes, a tokenizer.json, a folder that holds one, or a Hugging "
            "Face "
            "name such as gpt2",
        )
    return _from_hub(spec)


def tokenizer_of(folder: str | Path, index: ShardIndex, remote: Remote | None = None) -> Tokenizer:
    """Open the tokenizer that made the shards below `folder`.

    folder: folder or address that holds train/ and, except for bytes, tokenizer.json. Raises DataError when
    the index names no tokenizer, the file is missing, or its content differs from the index.
    """
    if index.tokenizer is None:
        raise DataError(
            str(folder),
            "its index names no tokenizer: index it again with 'mhla data index --tokenizer NAME'",
        )
    if index.tokenizer == "bytes":
        return ByteTokenizer()
    store = open_store(folder, remote)
    contents = {}
    with closing(store):
        for name in (FILE_NAME, CONFIG_NAME):
            size = store.size(name)
            if size is not None and size <= MAX_FILE_BYTES:
                contents[name] = store.read(name, 0, size)
    if FILE_NAME not in contents:
        raise DataError(
            store.address(FILE_NAME),
            f"the file is missing, and the tokens were made with {index.tokenizer}: put its tokenizer.json "
            "beside train/",
        )
    label, _, identity = index.tokenizer.partition(" sha256:")
    found = FastTokenizer(contents[FILE_NAME], label, store.address(FILE_NAME), contents.get(CONFIG_NAME))
    if identity and found.name != index.tokenizer:
        raise DataError(
            store.address(FILE_NAME),
            f"it is {found.name}, and the tokens were made with {index.tokenizer}: replace it by that one",
        )
    return found


def find_tokenizer(folder: str | Path, index: ShardIndex, remote: Remote | None = None) -> Tokenizer | None:
    """Do tokenizer_of, or return None and log the reason when it cannot be opened."""
    try:
        return tokenizer_of(folder, index, remote)
    except UserError as error:
        _log.warning("without a tokenizer: %s", error)
        return None


def same_tokenizer(one: str | None, other: str | None) -> bool:
    """Return whether two names in an index mean the same tokenizer, by its content."""
    return one == other or (
        one is not None
        and other is not None
        and " sha256:" in one
        and one.partition(" ")[2] == other.partition(" ")[2]
    )


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(
                str(path), f"it has {path.stat().st_size} bytes; a tokenizer has at most {MAX_FILE_BYTES}"
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError(str(path), f"it cannot be read ({error.strerror})") from error


def _from_hub(name: str) -> Tokenizer:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(None, missing_extra("tokenizers", "language", f"the tokenizer {name}")) from error
    try:
        content = Path(huggingface_hub.hf_hub_download(name, FILE_NAME)).read_bytes()
    except Exception as error:  # noqa: BLE001  of three packages' errors
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            "tokenizer",
            f"{name} is no file here, and its tokenizer.json could not be fetched from the Hugging Face hub "
            f"({reason}): give bytes or a file, or check the name and the network",
        ) from error
    try:
        config = Path(huggingface_hub.hf_hub_download(name, CONFIG_NAME)).read_bytes()
    except Exception:  # noqa: BLE001  few tokenizers need it, and not all have one
        config = None
    return FastTokenizer(content, name, f"{name}/{FILE_NAME}", config)
