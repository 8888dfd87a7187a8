"""Renaming of tensors by tables, and the joined q, k and v of our attention layers.

In a table `*` stands for the block that a tensor belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mhla_lightning.errors import UserError

State = Mapping[str, Tensor]

_QKV = ("q", "k", "v")


def module_of(name: str) -> str:
    """Return a tensor's name without `.weight` or `.bias`."""
    return re.sub(r"\.(weight|bias)$", "", name)


def rename(name: str, table: Mapping[str, str], source: str = "blocks", target: str = "blocks") -> str:
    """Rename a tensor's module; the block's number and the last part (weight, bias) stay.

    Args:
        name: of the tensor.
        table: module of a block (`*.attn.q`) or outside of blocks -> its new name.
        source, target: what the blocks are called before and after.
    """
    block = re.match(rf"{source}(\.\d+)(?=\.)", name)
    generic = "*" + name[block.end() :] if block else name
    module = module_of(generic)
    renamed = table.get(module, module) + generic[len(module) :]
    return target + block[1] + renamed.removeprefix("*") if block else renamed


def join_qkv(state: State) -> dict[str, Tensor]:
    """Join attn.q, attn.k and attn.v of every block to attn.qkv.

    Raises:
        UserError: a layer with some of q, k, v only, or one with attn.qkv too.
    """
    joined: dict[str, Tensor] = {}
    for name, value in state.items():
        part = re.fullmatch(r"(blocks\.\d+\.attn\.)([qkv])\.(weight|bias)", name)
        if part is None:
            joined[name] = value
            continue
        whole = f"{part[1]}qkv.{part[3]}"
        parts = [state.get(f"{part[1]}{letter}.{part[3]}") for letter in _QKV]
        present = [tensor for tensor in parts if tensor is not None]
        shapes = [tuple(tensor.shape) for tensor in present]
        if len(present) < len(parts) or len(set(shapes)) > 1:
            found = ", ".join(
                f"{letter} {tuple(tensor.shape)}"
                for letter, tensor in zip(_QKV, parts, strict=True)
                if tensor is not None
            )
            raise UserError(
                "state", f"{whole} is q, k and v of one size, joined; the checkpoint holds only {found}"
            )
        if whole in state:
            raise UserError("state", f"the checkpoint holds {whole} twice; the second is called {name}")
        if whole not in joined:
            joined[whole] = torch.cat(present)
    return joined


def split_qkv(state: State) -> dict[str, Tensor]:
    """Split attn.qkv of every block into attn.q, attn.k and attn.v, which are views."""
    split: dict[str, Tensor] = {}
    for name, value in state.items():
        whole = re.fullmatch(r"(blocks\.\d+\.attn\.)qkv\.(weight|bias)", name)
        if whole is None:
            split[name] = value
        else:
            split |= {
                f"{whole[1]}{letter}.{whole[2]}": part
                for letter, part in zip(_QKV, value.chunk(3), strict=True)
            }
    return split
