"""Names of SANA's tensors in diffusers' SanaTransformer2DModel, and ours.

Inside a block, which is `blocks.i` here and `transformer_blocks.i` there:

ours                         diffusers
attn.qkv                     attn1.to_{q,k,v}
attn.attention.mixing        attn1.mixing
cross_attn.{q,k,v,o}         attn2.to_{q,k,v}, attn2.to_out.0
ffn.{inverted,point}         ff.conv_{inverted,point}, as 1 x 1 convolutions
ffn.depthwise.conv           ff.conv_depth

Names in no table stay as they are in either direction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from mhla_lightning.errors import UserError
from mhla_lightning.weights.block_names import State, join_qkv, module_of, rename, split_qkv
from mhla_lightning.weights.files import strip_wrappers

# attn.q, attn.k and attn.v are the three parts of our attn.qkv
_BLOCK = {
    "modulation": "scale_shift_table",
    "attn.q": "attn1.to_q",
    "attn.k": "attn1.to_k",
    "attn.v": "attn1.to_v",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.inverted": "ff.conv_inverted",
    "ffn.depthwise.conv": "ff.conv_depth",
    "ffn.point": "ff.conv_point",
}
_ADDED = {
    "attn.attention.mixing": "attn1.mixing",
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "attn.out_norm": "attn1.norm_out",
    "attn.gate": "attn1.to_gate",
    "attn.lepe.conv": "attn1.lepe",
}
_TOP = {
    "patch_embedding": "patch_embed.proj",
    "text_embedding.0": "caption_projection.linear_1",
    "text_embedding.2": "caption_projection.linear_2",
    "text_norm": "caption_norm",
    "time_embedding.0": "time_embed.emb.timestep_embedder.linear_1",
    "time_embedding.2": "time_embed.emb.timestep_embedder.linear_2",
    "time_projection.1": "time_embed.linear",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_TO_DIFFUSERS = {f"*.{ours}": f"*.{theirs}" for ours, theirs in {**_BLOCK, **_ADDED}.items()} | _TOP
_FROM_DIFFUSERS = {theirs: ours for ours, theirs in _TO_DIFFUSERS.items()}
_POINTWISE = re.compile(r"(ffn\.(inverted|point)|ff\.conv_(inverted|point))\.weight$")
_TABLES = re.compile(r"(^|\.)(modulation|scale_shift_table)$")
_THEIR_BLOCKS = "transformer_blocks"


def from_sana(state: State) -> dict[str, Tensor]:
    """Return tensors of SANA under our names; our own state stays as it is.

    Args:
        state: by the names of diffusers or by ours; prefixes `module.`, `model.` and `_orig_mod.` are
            allowed.

    Returns:
        Every tensor. q, k and v of a self-attention layer are joined, 1 x 1 convolutions are Linears, and
        modulations have a batch axis. No number changes.

    Raises:
        UserError: a name that occurs twice, or a layer with some of q, k, v only.
    """
    found: dict[str, Tensor] = {}
    for given, value in state.items():
        stripped = strip_wrappers(given)
        theirs = stripped.startswith(_THEIR_BLOCKS)
        name = rename(stripped, _FROM_DIFFUSERS, _THEIR_BLOCKS if theirs else "blocks")
        if name in found:
            raise UserError("state", f"the checkpoint holds {name} twice; the second is called {given}")
        if _POINTWISE.search(name) and value.shape[2:] == (1, 1):
            value = value.flatten(1)
        elif _TABLES.search(name) and value.dim() == 2:
            value = value[None]
        found[name] = value
    return join_qkv(found)


def to_diffusers_sana(state: State) -> dict[str, Tensor]:
    """Return our tensors by the names of diffusers' SanaTransformer2DModel.

    Tensors that it lacks (:func:`added_to_sana`) get a name beside the others of their layer. All are views.
    """
    return dict(_theirs(state))


def _theirs(state: State) -> Iterator[tuple[str, Tensor]]:
    for ours, value in split_qkv(state).items():
        name = rename(ours, _TO_DIFFUSERS, target=_THEIR_BLOCKS)
        if _POINTWISE.search(name):
            value = value[..., None, None]
        elif _TABLES.search(name):
            value = value.squeeze(0)
        yield name, value


def added_to_sana(name: str) -> bool:
    """Return whether a tensor of ours, by our name, does not exist in SANA itself."""
    block = re.fullmatch(r"blocks\.\d+\.(.+)", name)
    if block is None:
        return module_of(name) not in _TOP
    return re.sub(r"^attn\.qkv$", "attn.q", module_of(block[1])) not in _BLOCK


def needed_by_sana(depth: int, qkv_bias: bool) -> list[str]:
    """Return our names of all tensors of a SANA.

    Args:
        depth: layers.
        qkv_bias: whether its linear attention has a bias of q, k and v.
    """
    modules = [*_TOP, *(f"blocks.{i}.{name}" for i in range(depth) for name in _BLOCK)]
    names = [name + leaf for name in modules for leaf in _leaves(name, qkv_bias)]
    return list(dict.fromkeys(re.sub(r"\.attn\.[qkv]\.", ".attn.qkv.", name) for name in names))


def _leaves(module: str, qkv_bias: bool) -> tuple[str, ...]:
    """Return the endings of a module's tensors."""
    if module.endswith("modulation"):
        return ("",)
    bare = module == "text_norm" or module.endswith("ffn.point")
    if bare or (re.search(r"\.attn\.[qkv]$", module) and not qkv_bias):
        return (".weight",)
    return (".weight", ".bias")
