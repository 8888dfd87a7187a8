"""An attention entry: what stands behind `model.attention` in a recipe (a name, a mapping, or a list of
these cycled over the layers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mhla_lightning.attention.base import Attention, CausalAttention
from mhla_lightning.attention.baselines.causal_fla import GatedDeltaNet, GatedLinearAttention, Mamba2
from mhla_lightning.attention.baselines.causal_linear import CausalLinear
from mhla_lightning.attention.baselines.causal_softmax import CausalSoftmax
from mhla_lightning.attention.baselines.linear import Linear
from mhla_lightning.attention.baselines.softmax import Softmax
from mhla_lightning.attention.mhla import MHLA, CausalMHLA
from mhla_lightning.errors import UserError, unknown_name

ATTENTION: dict[str, type[Attention]] = {
    "softmax": Softmax,
    "linear": Linear,
    "mhla": MHLA,
}

CAUSAL_ATTENTION: dict[str, type[CausalAttention]] = {
    "softmax": CausalSoftmax,
    "linear": CausalLinear,
    "mhla": CausalMHLA,
    "gla": GatedLinearAttention,
    "gated_deltanet": GatedDeltaNet,
    "mamba2": Mamba2,
}
"""The operators of language models, under the same names where they are the causal form of the same idea;
the last three on CUDA only.
"""

Entry = str | Mapping[str, Any]
Presets = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""preset -> operator -> option -> value; one table per model family."""


@dataclass(frozen=True)
class LayerAttention:
    """One layer's entry after presets: the operator, its options, and the options of the layer around it."""

    name: str
    operator: dict[str, Any]
    layer: dict[str, Any]


def operators(causal: bool) -> dict[str, type[Attention]]:
    """The table of causal or of bidirectional operators."""
    return cast(dict[str, type[Attention]], CAUSAL_ATTENTION if causal else ATTENTION)


def register_attention(name: str, operator: type[Attention]) -> None:
    """Adds an operator under a new name, to the table of its kind.

    Raises:
        UserError: the name is taken.
    """
    table = operators(operator.causal)
    if name in table:
        raise UserError(f"attention '{name}' is already registered by {table[name].__module__}")
    table[name] = operator


def lookup_attention(name: object, causal: bool = False) -> type[Attention]:
    """The operator class of a name; the error lists the names."""
    table = operators(causal)
    if not isinstance(name, str) or name not in table:
        raise UserError(unknown_name("causal attention" if causal else "attention", name, table))
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
    """Builds one operator from a name or a mapping of ``name`` and the operator's own options; a causal one
    is a :class:`CausalAttention`.

    Raises:
        UserError: unknown name or option, or options that do not fit the grid.
    """
    spec = resolve_layer(entry, presets={}, layer_options=(), causal=causal)
    operator: Callable[..., Attention] = lookup_attention(spec.name, causal)
    return operator(heads=heads, dim_k=dim_k, dim_v=dim_v, grid=grid, **spec.operator)


def resolve_layers(
    entry: Entry | Sequence[Entry],
    depth: int,
    presets: Presets,
    layer_options: Iterable[str],
    causal: bool = False,
) -> list[LayerAttention]:
    """One resolved entry a layer; a list is cycled over `depth` layers (`[softmax, mhla, mhla]` is the
    paper's hybrid).
    """
    entries = [entry] if isinstance(entry, (str, Mapping)) else list(entry)
    if not entries:
        raise UserError(
            "attention is an empty list; give at least one of: " + ", ".join(sorted(operators(causal)))
        )
    options = tuple(layer_options)
    resolved = [resolve_layer(e, presets, options, causal) for e in entries]
    return [resolved[i % len(resolved)] for i in range(depth)]


def resolve_layer(
    entry: Entry, presets: Presets, layer_options: Iterable[str], causal: bool = False
) -> LayerAttention:
    """Fills one entry from its preset (`paper` when not named) and splits it into operator and layer options.

    Raises:
        UserError: unknown attention, preset or key; the sentence lists the valid ones.
    """
    given = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = given.pop("name", None)
    if name is None:
        raise UserError(
            f"an attention mapping needs the key 'name' ({', '.join(sorted(operators(causal)))}), "
            f"got {sorted(given)}"
        )
    operator_keys, layer_keys = lookup_attention(name, causal).options(), tuple(layer_options)
    preset = given.pop("preset", "paper")
    if presets and preset not in presets:
        raise UserError(unknown_name("attention preset", preset, presets))
    for key in given:
        if key not in (*operator_keys, *layer_keys):
            raise UserError(
                unknown_name(
                    "option", key, ("name", "preset", *operator_keys, *layer_keys), of=f"attention '{name}'"
                )
            )
    defaults = dict(presets.get(preset, {}).get(name, {}))
    if (
        "blocks" in given or "block_size" in given
    ):  # the two name one thing: what is given replaces the preset's
        defaults.pop("blocks", None)
        defaults.pop("block_size", None)
    options = {**defaults, **given}
    return LayerAttention(
        name,
        operator={k: v for k, v in options.items() if k in operator_keys},
        layer={k: v for k, v in options.items() if k in layer_keys},
    )
