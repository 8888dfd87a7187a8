"""Tensors on disk: names, shapes and types are known at once.

A tensor is read only when it is asked for.
"""

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
"""Names of torch's types in the header of a .safetensors file."""


class Stored(Mapping[str, Tensor]):
    """Tensors by name, each read anew at every access.

    A caller that takes one after the other holds one at a time.

    Args:
        outline: the same names with tensors on the meta device.
        read: returns the tensor of a name.
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
        """Return some of the tensors under other names, in the order of `names`.

        Args:
            names: new name -> name here.
        """
        return Stored({new: self.outline[name] for new, name in names.items()}, lambda new: self[names[new]])

    def within(self, prefix: str) -> Stored:
        """Return the tensors whose name begins with `prefix`, without that prefix."""
        return self.renamed({name.removeprefix(prefix): name for name in self if name.startswith(prefix)})


def as_stored(tensors: Mapping[str, Tensor]) -> Stored:
    """Return tensors in memory, or mapped from a file, as :class:`Stored`."""
    return (
        tensors
        if isinstance(tensors, Stored)
        else Stored({name: value.to("meta") for name, value in tensors.items()}, tensors.__getitem__)
    )


def outline_of(part: Any) -> Tensor:
    """Return a tensor on the meta device for a slice of safetensors' `get_slice`."""
    return torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")


def open_safetensors(file: Path, key: str) -> Stored:
    """Return the tensors of a .safetensors file.

    Args:
        file: the file.
        key: the argument that names the file, for errors.

    Raises:
        UserError: a damaged file.
    """
    try:
        opened = safe_open(file, "pt")
        # safe_open returns no mapping: iterating over it fails
        outline = {name: outline_of(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(key, f"{file} is damaged or no .safetensors file ({error})") from error
    return Stored(outline, opened.get_tensor)
