"""Offer the language model as a model of transformers.

After `import mhla_lightning.hf` the model works with AutoModelForCausalLM, generate, Trainer and PEFT. The
cache of `generate` is our state, of constant size except for softmax layers. An exported folder holds this
file and what it imports, for processes without this package (`conversion/formats/bundle.py`).

Underscored names below are transformers' extension points for custom models, as of version 5.23:
`_is_stateful`, `_no_split_modules`, `_supports_default_dynamic_cache`, `_init_weights` and
`_is_hf_initialized`. None of them has a public form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhla_lightning.attention import CausalSelfAttention, MixingMatrix, resolve_layers
from mhla_lightning.attention.norm import RMSNorm
from mhla_lightning.backbones.causal_lm import (
    CausalLM,
    CausalLMOptions,
    DecoderLayer,
    ModelState,
    presets_for,
)
from mhla_lightning.errors import UserError, missing_extra
from mhla_lightning.finite import check_finite
from mhla_lightning.integrations.batches import (
    LAST_REAL,
    documents_of,
    ends_real,
    kept_columns,
    real_tokens,
)

try:
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils import can_return_tuple
except ImportError as error:
    raise UserError(None, missing_extra("transformers", "language", "mhla_lightning.hf")) from error


class MHLALanguageConfig(PreTrainedConfig):
    """The arguments of a CausalLM (`backbones/causal_lm.py`) as a config of transformers.

    The usual names of other models work, too. `num_attention_heads` is a key of the attention entry; setting
    it writes it there.
    """

    model_type = "mhla_language"
    attribute_map = {
        "hidden_size": "embed_dim",
        "n_embd": "embed_dim",
        "d_model": "embed_dim",
        "num_hidden_layers": "depth",
        "n_layer": "depth",
        "num_layers": "depth",
        "max_position_embeddings": "context",
        "n_positions": "context",
        "n_ctx": "context",
        "intermediate_size": "intermediate",
        "n_inner": "intermediate",
        "num_heads": "num_attention_heads",
        "n_head": "num_attention_heads",
        "rms_norm_eps": "norm_eps",
        "rope_theta": "rope_base",
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    attention: str | dict[str, Any] | list[Any] = "mhla"
    vocab_size: int = 32000
    context: int = 2048
    embed_dim: int = 1024
    depth: int = 24
    intermediate: int | None = None
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    dropout: float = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def num_attention_heads(self) -> int:
        """Query heads; of the first layer, where layers differ."""
        return self._layer_option("heads") or 4

    @num_attention_heads.setter
    def num_attention_heads(self, heads: int) -> None:
        entries = [self.attention] if isinstance(self.attention, (str, Mapping)) else self.attention
        changed = [{**({"name": e} if isinstance(e, str) else e), "heads": heads} for e in entries]
        self.attention = changed[0] if isinstance(self.attention, (str, Mapping)) else changed

    @property
    def num_key_value_heads(self) -> int:
        """Heads of k and v; of the first layer, where layers differ."""
        return self._layer_option("kv_heads") or self.num_attention_heads

    def _layer_option(self, key: str) -> int | None:
        options = CausalSelfAttention.layer_options()
        layer = resolve_layers(self.attention, 1, presets_for(self.embed_dim), options, causal=True)[0].layer
        return cast("int | None", layer.get(key))

    def build(self) -> CausalLM:
        """Build the model with fresh weights.

        Raises:
            UserError: sizes or an attention entry that do not fit.
        """
        options = CausalLMOptions(
            vocab_size=self.vocab_size,
            context=self.context,
            embed_dim=self.embed_dim,
            depth=self.depth,
            intermediate=self.intermediate,
            tie_embeddings=self.tie_word_embeddings,
            rope_base=self.rope_base,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
        )
        return CausalLM(self.attention, options)


class StateCache:
    """Our state in the place of transformers' cache of keys and values.

    Args:
        state: after the tokens so far.
        tokens: columns of input_ids that it has seen, padding included.
    """

    is_compileable = False

    def __init__(self, state: ModelState, tokens: int) -> None:
        self.state, self.tokens = state, tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the sequences `beam_idx`, for beam search."""
        self.state = self.state.reorder(beam_idx)


class RecomputedLayer(GradientCheckpointingLayer, DecoderLayer):
    """A DecoderLayer whose forward transformers can run again in the backward."""


class MHLAForCausalLM(PreTrainedModel, GenerationMixin):
    """CausalLM with the interface of transformers.

    A prompt may be padded on either side; after the prompt every token is real. Assisted generation needs a
    cache that can be cut. Ours cannot, and transformers refuses stateful models.

    Args:
        config: see :class:`MHLALanguageConfig`.
        backbone: a built model that fits the config and is used as it is; None builds one.
    """

    config_class = MHLALanguageConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True  # makes `generate` refuse assisted generation, which would cut the cache
    _no_split_modules = ["RecomputedLayer"]  # layers that device_map="auto" keeps on one device

    def __init__(self, config: MHLALanguageConfig, backbone: CausalLM | None = None) -> None:
        super().__init__(config)
        self.model = config.build() if backbone is None else backbone
        for layer in self.model.layers:
            layer.__class__ = RecomputedLayer  # the same layer, with transformers' way to recompute it
        # post_init would initialise the model again. On meta, from_pretrained fills the weights later and
        # must find those that its file lacks.
        if not self.model.head_weight.is_meta:
            _mark_initialised(self)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """Open a folder or hub model as transformers does, and check its weights.

        Args:
            arguments, options: as of transformers' own method.
            output_loading_info: return the missing names beside the model, and refuse none.

        Raises:
            UserError: a weight is not finite or an operator lacks it, or the device map offloads weights that
                the model needs at hand.
        """
        model, found = super().from_pretrained(*arguments, output_loading_info=True, **options)
        if arguments and arguments[0] is not None and not output_loading_info:
            _check_complete(model, found["missing_keys"])
        _check_offloaded(model)
        check_finite(dict(model.named_parameters()), str(arguments[0] if arguments else cls.__name__))
        return (model, found) if output_loading_info else model

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Tell `generate` not to make a DynamicCache: the first forward makes a StateCache."""
        return False

    def initialize_weights(self) -> None:
        """Give weights that have no values yet those of a new CausalLM.

        transformers calls this after `to_empty` and for what a checkpoint lacks.
        """
        if _initialised(self):
            return
        own = dict(self.model.named_parameters())
        lacking = {name: weight for name, weight in own.items() if not _initialised(weight)}
        fresh = dict(self.config.build().named_parameters()) if lacking else {}
        for name, weight in lacking.items():
            weight.data.copy_(fresh[name])
        _mark_initialised(self)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise new embeddings; transformers calls this for `resize_token_embeddings`."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embeddings = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.lm_head = cast(nn.Linear, new_embeddings)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: StateCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the next forward of `generate`, as transformers does.

        transformers counts positions from the last column of a prompt, also where that is padding. There the
        model counts itself, and the first logits are those of the last real token.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            cast(Any, input_ids),
            next_sequence_length,
            cast(Any, past_key_values),
            cast(Any, attention_mask),
            cast(Any, inputs_embeds),
            is_first_iteration,
            **kwargs,
        )
        if real_tokens(attention_mask) is not None:
            if not is_first_iteration:
                inputs.pop("position_ids", None)
            elif past_key_values is None:
                inputs["logits_to_keep"] = LAST_REAL
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Return logits, the loss of `labels` and the cache.

        Args:
            input_ids: (batch, tokens); with a cache, the new tokens only.
            attention_mask: (batch, tokens), 1 for real tokens; with a cache, of all tokens or of the new
                ones.
            position_ids: (batch, tokens), which count real tokens from 0. Where they begin at 0 again inside
                a row without padding, a new document begins. None counts them here.
            past_key_values: cache of an earlier call, which this one updates in place; None starts a new
                text.
            inputs_embeds: (batch, tokens, embed_dim), in the place of `input_ids`.
            labels: (batch, tokens), shifted here; -100 is ignored. None computes no loss.
            use_cache: return the cache; None takes the config's value, and False in training.
            output_hidden_states: return the input of every layer, and that of the output layer; None takes
                the config's value.
            logits_to_keep: number of last columns whose logits are returned, or the columns' numbers; 0 means
                all, and -1 the last real token of each row.
            output_attentions: is refused, because a linear layer has no attention matrix.

        `return_dict=False` returns a tuple.

        Raises:
            UserError: padding or labels together with a cache; a cache of another kind; wrong positions;
                both or neither of `input_ids` and `inputs_embeds`; attention matrices.
        """
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise UserError(
                "output_attentions",
                "found True, but linear layers compute no attention matrix; leave it out",
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("input_ids", "give exactly one of `input_ids` and `inputs_embeds`")
        tokens = cast(Tensor, input_ids if inputs_embeds is None else inputs_embeds)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        cache, mask = past_key_values, real_tokens(attention_mask)
        if cache is not None:
            _check_continuation(tokens, cache, mask, labels)
            documents_of(position_ids, tokens, None, cache.state.positions)
            logits = kept_columns(self._continue(tokens, cache, hidden), logits_to_keep, mask)
        else:
            documents = documents_of(position_ids, tokens, mask)
            if not use_cache:
                features = self.model.features(tokens, mask, documents, hidden=hidden)
                logits = F.linear(kept_columns(features, logits_to_keep, mask), self.model.head_weight)
            elif documents is not None:
                raise UserError(
                    "position_ids", "begin documents, and a cache follows one; set `use_cache=False`"
                )
            else:
                logits, cache = self._begin(tokens, mask, logits_to_keep, hidden)
        loss = (
            None
            if labels is None
            else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=cast(Any, logits),
            past_key_values=cast(Any, cache),
            hidden_states=cast(Any, None if hidden is None else tuple(hidden)),
        )

    def _begin(
        self, tokens: Tensor, mask: Tensor | None, keep: int | Tensor, hidden: list[Tensor] | None
    ) -> tuple[Tensor, StateCache]:
        """Return the logits of a prompt and a new cache."""
        one = isinstance(keep, int) and (keep == LAST_REAL or (keep == 1 and ends_real(mask)))
        last = one and hidden is None
        logits, state = self.model.prefill(tokens, mask, all_logits=not last, hidden=hidden)
        logits = logits[:, None] if last else kept_columns(logits, keep, mask)
        return logits, StateCache(state, tokens.shape[1])

    def _continue(self, tokens: Tensor, cache: StateCache, hidden: list[Tensor] | None) -> Tensor:
        """Return the logits of more tokens, and take them up in the cache."""
        logits: list[Tensor] = []
        columns: list[list[Tensor] | None] = []
        for column in tokens.unbind(1):
            columns.append(None if hidden is None else [])
            row, cache.state = self.model.step(column, cache.state, columns[-1])
            logits.append(row)
        cache.tokens += tokens.shape[1]
        if hidden is not None:
            hidden += [torch.cat(layer, 1) for layer in zip(*cast(list[list[Tensor]], columns), strict=True)]
        return torch.stack(logits, 1)


def _initialised(part: nn.Module | Tensor) -> bool:
    """Return whether a module or weight has its values, as transformers marks it."""
    return bool(getattr(part, "_is_hf_initialized", False))


def _mark_initialised(model: nn.Module) -> None:
    """Mark all modules, so that transformers initialises none of them again."""
    for module in model.modules():
        cast(Any, module)._is_hf_initialized = True


def _check_complete(model: nn.Module, missing: Iterable[str]) -> None:
    """Refuse a checkpoint that lacks weights which no other model has.

    Raises:
        UserError: a missing weight of a mixing matrix, a convolution or a decay.
    """
    for name in sorted(missing):
        module = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, (nn.Linear, nn.Embedding, RMSNorm)):
            raise UserError(
                type(module).__name__,
                f"the checkpoint lacks weights of this module ({name}); take a complete one",
            )


def _check_offloaded(model: MHLAForCausalLM) -> None:
    """Refuse offloaded weights that are read outside of their module's forward.

    accelerate brings weights there for a forward alone; elsewhere they would be whatever is in memory.

    Raises:
        UserError: such a weight is offloaded.
    """
    by_forward = (nn.Linear, nn.Embedding, RMSNorm, MixingMatrix)
    for name, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            at_hand = weight is model.model.head_weight or not isinstance(module, by_forward)
            if weight.is_meta and at_hand:
                raise UserError(
                    "device_map", f"offloads {name}, which every step needs at hand; map it to a device"
                )


def _check_continuation(
    tokens: Tensor, cache: StateCache, mask: Tensor | None, labels: Tensor | None
) -> None:
    """Refuse what a cache cannot be continued with.

    Raises:
        UserError: another kind of cache, padding or labels.
    """
    if not isinstance(cache, StateCache):
        raise UserError(
            "past_key_values",
            f"found a {type(cache).__name__}; this model's cache is a StateCache, which a call with "
            "`use_cache=True` and no `past_key_values` returns",
        )
    if mask is not None and not mask[:, -tokens.shape[1] :].all():
        raise UserError(
            "attention_mask", "pads tokens after the prompt; with `past_key_values` every token must be real"
        )
    if labels is not None:
        raise UserError("labels", "need the whole text in one call, without `past_key_values`")


def language_config(
    backbone: CausalLM, attention: str | Mapping[str, Any] | Sequence[Any], end: int | None = None
) -> MHLALanguageConfig:
    """Return the config of a CausalLM.

    Args:
        backbone: any CausalLM, with or without weights.
        attention: the entry it was built from.
        end: id of the end-of-document token, used for eos and for padding; None means none.
    """
    layer = cast(Any, backbone.layers[0])
    return MHLALanguageConfig(
        attention=cast(Any, attention),  # from YAML: plain dicts and lists
        vocab_size=backbone.vocab_size,
        context=backbone.grid[0],
        embed_dim=backbone.embed_dim,
        depth=len(backbone.layers),
        intermediate=layer.mlp.gate_proj.out_features,
        rope_base=backbone.rope_base,
        norm_eps=cast(float, backbone.norm.eps),
        dropout=layer.dropout.p,
        tie_word_embeddings=backbone.lm_head is None,
        pad_token_id=end,
        eos_token_id=end,
    )


def wrap(
    backbone: CausalLM, attention: str | Mapping[str, Any] | Sequence[Any], end: int | None = None
) -> MHLAForCausalLM:
    """Wrap a built CausalLM as a model of transformers that shares its weights.

    Args:
        backbone: any CausalLM, with or without weights.
        attention: the entry it was built from.
        end: id of the end-of-document token, used for eos and for padding; None means none.
    """
    return MHLAForCausalLM(language_config(backbone, attention, end), backbone).train(backbone.training)
