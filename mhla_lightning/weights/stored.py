"""Tensors on disk: names, shapes and types are known at once, and a tensor is read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mhla_lightning.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What the header of a .safetensors file calls the types of torch."""


class Stored(Mapping[str, Tensor]):
    """Tensors by name, each read anew whenever it is asked for: who looks at one after the other holds one at
    a time.

    Args:
        outline: the same names with tensors on the meta device.
        read: gives the tensor of a name.
    """

    def __init__(self, outline: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        self.outline, self._read = dict(outline), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.outline:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline)

    def __len__(self) -> int:
        return len(self.outline)

    def renamed(self, names: Mapping[str, str]) -> Stored:
        """Some of the tensors under other names, in their order; `names` leads from the new name to the
        one here.
        """
        return Stored({new: self.outline[name] for new, name in names.items()}, lambda new: self[names[new]])

    def within(self, prefix: str) -> Stored:
        """Those whose name begins with `prefix`, without it."""
        return self.renamed({name.removeprefix(prefix): name for name in self if name.startswith(prefix)})


def as_stored(tensors: Mapping[str, Tensor]) -> Stored:
    """Tensors that are at hand already: in memory, or mapped from a file."""
    return (
        tensors
        if isinstance(tensors, Stored)
        else Stored({name: value.to("meta") for name, value in tensors.items()}, tensors.__getitem__)
    )


def outline_of(part: Any) -> Tensor:
    """On the meta device, what safetensors' `get_slice` speaks of."""
    return torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")


def open_safetensors(file: Path, what: str) -> Stored:
    """The tensors of a .safetensors file.

    Args:
        what: names the file for the error: a key, or words.

    Raises:
        UserError: a damaged file.
    """
    try:
        opened = safe_open(file, "pt")
        # no mapping
        outline = {name: outline_of(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{what} {file} is damaged or no .safetensors file ({error})") from error
    return Stored(outline, opened.get_tensor)
