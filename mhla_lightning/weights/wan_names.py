"""Names of Wan2.1's tensors in three libraries, and ours.

The libraries are Wan itself with the MHLA authors' additions (SPEC 6.8), diffusers'
WanTransformer3DModel, and this one. Inside a block, under `blocks.i.`; outside of blocks Wan's names are
ours:

ours                      Wan, MHLA authors          diffusers
attn.qkv                  self_attn.{q,k,v}          attn1.to_{q,k,v}
attn.attention.mixing     self_attn.block_attn.conv  attn1.mixing
cross_attn.{q,k,v,o}      cross_attn.{q,k,v,o}       attn2.to_{q,k,v}, attn2.to_out.0

Names in no table (a convolution `cpe`, a second norm) stay as they are in every direction.
"""

from __future__ import annotations

import re

from torch import Tensor

from mhla_lightning.errors import UserError
from mhla_lightning.weights.block_names import State, join_qkv, module_of, rename, split_qkv
from mhla_lightning.weights.files import strip_wrappers

RELEASE_LAYOUTS = {150: (3, 5, 10)}
"""Blocks of a mixing matrix -> their layout; 105 blocks of the paper may be (7, 3, 5), (3, 5, 7), ..."""

# ours -> (Wan, diffusers); attn.q, attn.k and attn.v are the three parts of our attn.qkv
_BLOCK = {
    "modulation": ("modulation", "scale_shift_table"),
    "norm3": ("norm3", "norm2"),
    "attn.q": ("self_attn.q", "attn1.to_q"),
    "attn.k": ("self_attn.k", "attn1.to_k"),
    "attn.v": ("self_attn.v", "attn1.to_v"),
    "attn.q_norm": ("self_attn.norm_q", "attn1.norm_q"),
    "attn.k_norm": ("self_attn.norm_k", "attn1.norm_k"),
    "attn.proj": ("self_attn.o", "attn1.to_out.0"),
    "attn.attention.mixing": ("self_attn.block_attn.conv", "attn1.mixing"),
    "attn.out_norm": ("self_attn.g_norm", "attn1.norm_out"),
    "attn.gate": ("self_attn.g", "attn1.to_gate"),
    "attn.lepe.conv": ("self_attn.lepe", "attn1.lepe"),
    "cross_attn.q": ("cross_attn.q", "attn2.to_q"),
    "cross_attn.k": ("cross_attn.k", "attn2.to_k"),
    "cross_attn.v": ("cross_attn.v", "attn2.to_v"),
    "cross_attn.norm_q": ("cross_attn.norm_q", "attn2.norm_q"),
    "cross_attn.norm_k": ("cross_attn.norm_k", "attn2.norm_k"),
    "cross_attn.o": ("cross_attn.o", "attn2.to_out.0"),
    "ffn.0": ("ffn.0", "ffn.net.0.proj"),
    "ffn.2": ("ffn.2", "ffn.net.2"),
}
_TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_ADDED = ("attn.attention.mixing", "attn.out_norm", "attn.gate", "attn.lepe.conv")

_TO_WAN = {f"*.{ours}": f"*.{wan}" for ours, (wan, _) in _BLOCK.items()}
_TO_DIFFUSERS = {f"*.{ours}": f"*.{theirs}" for ours, (_, theirs) in _BLOCK.items()} | _TOP
_FROM_WAN = {
    **{f"*.{wan}": f"*.{ours}" for ours, (wan, _) in _BLOCK.items()},
    **{f"*.{theirs}": f"*.{ours}" for ours, (_, theirs) in _BLOCK.items()},
    **{theirs: ours for ours, theirs in _TOP.items()},
    "*.attn1.to_qkv": "*.attn.qkv",  # diffusers after fuse_projections()
}


def from_wan(state: State) -> dict[str, Tensor]:
    """Return tensors of Wan2.1 under our names; our own state stays as it is.

    Args:
        state: by the names of Wan, of the MHLA authors or of diffusers; prefixes `module.`, `model.` and
            `_orig_mod.` are allowed. A mixing matrix is (M, M) or (M, M, 1, 1, ...).

    Returns:
        Every tensor. q, k and v of a self-attention layer are joined, (3 dim, dim) and (3 dim,). A mixing
        matrix is (M, M). All others are the same objects.

    Raises:
        UserError: a name that occurs twice, or a layer with some of q, k, v only.
    """
    found: dict[str, Tensor] = {}
    for given, value in state.items():
        name = rename(strip_wrappers(given), _FROM_WAN)
        if name in found:
            raise UserError("state", f"the checkpoint holds {name} twice; the second is called {given}")
        found[name] = _square(value) if name.endswith(".mixing.weight") else value
    return join_qkv(found)


def to_wan(state: State) -> dict[str, Tensor]:
    """Return our tensors by Wan's names and those that the MHLA authors add.

    q, k and v are views of ours; a mixing matrix is (M, M, 1, 1).
    """
    renamed = {rename(name, _TO_WAN): value for name, value in split_qkv(state).items()}
    return {
        name: _as_conv(value) if name.endswith(".block_attn.conv.weight") else value
        for name, value in renamed.items()
    }


def to_diffusers(state: State) -> dict[str, Tensor]:
    """Return our tensors by the names of diffusers' WanTransformer3DModel.

    Tensors that it lacks (:func:`added`) get a name beside the others of their layer.
    """
    return {rename(name, _TO_DIFFUSERS): value for name, value in split_qkv(state).items()}


def added(name: str) -> bool:
    """Return whether a tensor of ours, by our name, does not exist in Wan2.1 itself."""
    block = re.fullmatch(r"blocks\.\d+\.(.+)", name)
    if block is None:
        return module_of(name) not in _TOP
    module = re.sub(r"^attn\.qkv$", "attn.q", module_of(block[1]))
    return module not in _BLOCK or module in _ADDED


def needed(depth: int) -> list[str]:
    """Return our names of all tensors of a Wan2.1 with `depth` layers."""
    modules = [*_TOP, *(f"blocks.{i}.{name}" for i in range(depth) for name in _BLOCK if name not in _ADDED)]
    leaves = {
        "modulation": ("",),
        "q_norm": (".weight",),
        "k_norm": (".weight",),
        "norm_q": (".weight",),
        "norm_k": (".weight",),
    }
    names = [
        module + leaf
        for module in modules
        for leaf in leaves.get(module.rpartition(".")[2], (".weight", ".bias"))
    ]
    return list(dict.fromkeys(re.sub(r"\.attn\.[qkv]\.", ".attn.qkv.", name) for name in names))


def _square(mixing: Tensor) -> Tensor:
    """Return a mixing matrix as (M, M).

    The release stores it as a 1x1 convolution, (M, M, 1, 1), in older files with more ones.
    """
    return mixing.flatten(1) if mixing.dim() > 3 and mixing[0].numel() == mixing.shape[1] else mixing


def _as_conv(mixing: Tensor) -> Tensor:
    """Return a mixing matrix as a 1x1 convolution.

    Matrices of single heads, which the release does not know, stay (heads, M, M).
    """
    return mixing[..., None, None] if mixing.dim() == 2 else mixing
