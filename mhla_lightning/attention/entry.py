"""Attention entries: the value of `model.attention` in a recipe.

An entry is a name, a mapping, or a list of these that is cycled over the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mhla_lightning.arguments.checked import check_arguments
from mhla_lightning.attention.base import Attention, CausalAttention
from mhla_lightning.attention.baselines.causal_deltanet import DeltaNet
from mhla_lightning.attention.baselines.causal_fla import GatedDeltaNet, GatedLinearAttention, Mamba2
from mhla_lightning.attention.baselines.causal_linear import CausalLinear
from mhla_lightning.attention.baselines.causal_softmax import CausalSoftmax
from mhla_lightning.attention.baselines.linear import Linear
from mhla_lightning.attention.baselines.softmax import Softmax
from mhla_lightning.attention.mhla import MHLA, CausalMHLA
from mhla_lightning.errors import UserError, unknown_name
from mhla_lightning.plugins import load_plugins

ATTENTION: dict[str, type[Attention]] = {
    "softmax": Softmax,
    "linear": Linear,
    "mhla": MHLA,
}

CAUSAL_ATTENTION: dict[str, type[CausalAttention]] = {
    "softmax": CausalSoftmax,
    "linear": CausalLinear,
    "mhla": CausalMHLA,
    "deltanet": DeltaNet,
    "gla": GatedLinearAttention,
    "gated_deltanet": GatedDeltaNet,
    "mamba2": Mamba2,
}
"""The operators of language models; the last three run on CUDA only.

A name that both tables have is the causal form of the same idea.
"""

Entry = str | Mapping[str, Any]
Presets = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""preset -> operator -> option -> value; one table per model family."""


@dataclass(frozen=True)
class LayerAttention:
    """The resolved entry of one layer.

    Attributes:
        name: of the operator.
        operator: options of the operator.
        layer: options of the layer around it.
    """

    name: str
    operator: dict[str, Any]
    layer: dict[str, Any]

    @property
    def entry(self) -> dict[str, Any]:
        """The entry as one mapping, for a self-attention layer."""
        return {"name": self.name, **self.operator, **self.layer}


def operators(causal: bool) -> dict[str, type[Attention]]:
    """Return the table of causal or of bidirectional operators."""
    return cast(dict[str, type[Attention]], CAUSAL_ATTENTION if causal else ATTENTION)


def register_attention(name: str, operator: type[Attention]) -> None:
    """Add an operator under a new name to the table of its kind.

    Raises:
        UserError: the name is taken.
    """
    table = operators(operator.causal)
    if name in table:
        raise UserError("name", f"'{name}' is already registered by {table[name].__module__}; take another")
    table[name] = operator


def lookup_attention(name: object, causal: bool = False) -> type[Attention]:
    """Return the operator class of a name, also one that an installed plugin registers.

    Raises:
        UserError: unknown name; lists the valid ones.
    """
    table = operators(causal)
    if isinstance(name, str) and name not in table:
        load_plugins()
    if not isinstance(name, str) or name not in table:
        raise UserError("name", unknown_name("causal attention" if causal else "attention", name, table))
    return table[name]


def build_attention(
    entry: Entry,
    *,
    heads: int,
    dim_k: int,
    dim_v: int,
    grid: Sequence[int] | None = None,
    causal: bool = False,
) -> Attention:
    """Build one operator from an entry.

    Args:
        entry: a name, or a mapping of ``name`` and the operator's own options.
        heads: number of heads.
        dim_k, dim_v: channels per head of q and k, and of v.
        grid: token counts per axis.
        causal: whether to take a :class:`CausalAttention`.

    Raises:
        UserError: unknown name or option, or options that do not fit the grid.
    """
    return build_operator(
        resolve_layer(entry, presets={}, layer_options=(), causal=causal),
        heads=heads,
        dim_k=dim_k,
        dim_v=dim_v,
        grid=grid,
        causal=causal,
    )


def build_operator(
    spec: LayerAttention,
    *,
    heads: int,
    dim_k: int,
    dim_v: int,
    grid: Sequence[int] | None,
    causal: bool,
) -> Attention:
    """Build the operator of a resolved entry; see :func:`build_attention`."""
    kind = lookup_attention(spec.name, causal)
    return construct(kind, spec.operator, heads=heads, dim_k=dim_k, dim_v=dim_v, grid=grid)


def construct(
    kind: type[Attention],
    options: Mapping[str, Any],
    *,
    heads: int,
    dim_k: int,
    dim_v: int,
    grid: Sequence[int] | None,
) -> Attention:
    """Build an operator of a class; its options are those of an entry."""
    if kind.options_type is None:
        check_arguments(kind, options)
        given = dict(options)
    else:
        given = {"options": kind.options_type(**options)}
    operator: Callable[..., Attention] = kind
    return operator(heads=heads, dim_k=dim_k, dim_v=dim_v, grid=grid, **given)


def resolve_layers(
    entry: Entry | Sequence[Entry],
    depth: int,
    presets: Presets,
    layer_options: Iterable[str],
    causal: bool = False,
) -> list[LayerAttention]:
    """Resolve the entry of every layer.

    Args:
        entry: a name, a mapping, or a list that is cycled over the layers; `[softmax, mhla, mhla]` is the
            paper's hybrid.
        depth: number of layers.
        presets: the defaults of the model family.
        layer_options: keys that belong to the layer around the operator.
        causal: whether names are looked up among causal operators.

    Raises:
        UserError: an empty list, or an unknown attention, preset or key.
    """
    entries = [entry] if isinstance(entry, (str, Mapping)) else list(entry)
    if not entries:
        names = ", ".join(sorted(operators(causal)))
        raise UserError("name", f"the list of attentions is empty; give at least one of: {names}")
    options = tuple(layer_options)
    resolved = [resolve_layer(e, presets, options, causal) for e in entries]
    return [resolved[i % len(resolved)] for i in range(depth)]


def resolve_layer(
    entry: Entry, presets: Presets, layer_options: Iterable[str], causal: bool = False
) -> LayerAttention:
    """Complete one entry from its preset, and separate operator options from layer options.

    The preset is `paper` where the entry names none.

    Raises:
        UserError: unknown attention, preset or key; lists the valid ones.
    """
    given = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = given.pop("name", None)
    if name is None:
        names = ", ".join(sorted(operators(causal)))
        raise UserError("name", f"missing in an attention mapping ({names}); found {sorted(given)}")
    operator_keys, layer_keys = lookup_attention(name, causal).options(), tuple(layer_options)
    preset = given.pop("preset", "paper")
    if presets and preset not in presets:
        raise UserError("preset", unknown_name("attention preset", preset, presets))
    valid = (*operator_keys, *layer_keys)
    for key in given:
        if key not in valid:
            reason = unknown_name("option", key, ("name", "preset", *valid), of=f"attention '{name}'")
            raise UserError(str(key), reason)
    defaults = dict(presets.get(preset, {}).get(name, {}))
    if "blocks" in given or "block_size" in given:  # both set the partition: either replaces the preset's
        defaults.pop("blocks", None)
        defaults.pop("block_size", None)
    options = {**defaults, **given}
    return LayerAttention(
        name,
        operator={k: v for k, v in options.items() if k in operator_keys},
        layer={k: v for k, v in options.items() if k in layer_keys},
    )
