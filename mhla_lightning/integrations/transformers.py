"""The language model as a model of transformers: `import mhla_lightning.hf`, then AutoModelForCausalLM,
generate, Trainer and PEFT know it.

The cache that `generate` hands around is our state: of constant size but for softmax layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mhla_lightning.attention.norm import RMSNorm
from mhla_lightning.backbones import CausalLM, CausalLMOptions, ModelState
from mhla_lightning.errors import UserError, missing_extra

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise UserError(missing_extra("transformers", "language", "mhla_lightning.hf")) from error

if TYPE_CHECKING:
    pass


class MHLALanguageConfig(PreTrainedConfig):
    """What a CausalLM is built from; the fields are its arguments (`backbones/causal_lm.py`)."""

    model_type = "mhla_language"
    attribute_map = {
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
        "max_position_embeddings": "context",
        "intermediate_size": "intermediate",
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

    def build(self) -> CausalLM:
        """The model, with fresh weights. Raises UserError for sizes or an attention entry that do not fit."""
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
    """Our state in the place of transformers' key-value cache, which holds tensors that grow along the
    tokens.

    Args:
        state: behind the tokens so far.
        tokens: columns of input_ids that it has seen, padding included.
    """

    is_compileable = False

    def __init__(self, state: ModelState, tokens: int) -> None:
        self.state, self.tokens = state, tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: the sequences `beam_idx` go on."""
        self.state = self.state.reorder(beam_idx)


class MHLAForCausalLM(PreTrainedModel, GenerationMixin):
    """CausalLM behind the interface of transformers.

    Padding may stand left or right of a prompt; after the prompt every token is real. Assisted generation
    needs a cache that can be cut, and ours
    cannot: transformers refuses it for stateful models.

    Args:
        config: see :class:`MHLALanguageConfig`.
        backbone: a built model that fits the config, taken as it is; None builds one.
    """

    config_class = MHLALanguageConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True
    _no_split_modules = ["DecoderLayer"]

    def __init__(self, config: MHLALanguageConfig, backbone: CausalLM | None = None) -> None:
        super().__init__(config)
        self.model = config.build() if backbone is None else backbone
        if (
            not self.model.head_weight.is_meta
        ):  # from_pretrained builds on meta, and what its file lacks is not initialised
            for module in self.model.modules():
                cast(Any, module)._is_hf_initialized = True
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Called for new embeddings (`resize_token_embeddings`) and for weights that a checkpoint lacks; a
        CausalLM has initialised itself.
        """
        if isinstance(module, (nn.Linear, nn.Embedding, RMSNorm)):
            super()._init_weights(module)
        elif not all(
            getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters(recurse=False)
        ):
            raise UserError(
                f"the checkpoint lacks weights of {type(module).__name__}, and this model cannot go "
                "without them"
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embeddings = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.lm_head = cast(nn.Linear, new_embeddings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, the loss of `labels` (shifted here; -100 counts nowhere) and the cache.

        Args:
            input_ids: (batch, tokens); behind a cache the new ones.
            attention_mask: (batch, tokens), 1 = real token; behind a cache of all tokens or of the new ones.
            past_key_values: what an earlier call gave.
            labels: (batch, tokens).
            use_cache: return the cache; None is the config's, and never while training.
            logits_to_keep: logits of the last so many columns; 0 is all.

        Raises:
            UserError: padding behind a cache, labels with one.
        """
        keep = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        mask = _padding(attention_mask)
        cache = past_key_values
        if cache is not None:
            if mask is not None and not mask[:, -input_ids.shape[1] :].all():
                raise UserError(
                    "attention_mask pads tokens behind a cache; after the prompt every token must be real"
                )
            if labels is not None:
                raise UserError("labels need the whole text in one call, without past_key_values")
            logits, cache = self._continue(input_ids, cache)
        elif use_cache:
            last = logits_to_keep == 1
            logits, state = self.model.prefill(input_ids, mask=mask, all_logits=not last)
            logits, cache = logits[:, None] if last else logits, StateCache(state, input_ids.shape[1])
        else:
            logits = self.model(input_ids, mask=mask)
        loss = (
            None
            if labels is None
            else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        )
        output = CausalLMOutputWithPast(loss=loss, logits=logits[:, keep], past_key_values=cast(Any, cache))
        return output if return_dict is not False else output.to_tuple()

    def _continue(self, input_ids: Tensor, cache: StateCache) -> tuple[Tensor, StateCache]:
        logits, state = [], cache.state
        for tokens in input_ids.unbind(1):
            row, state = self.model.step(tokens, state)
            logits.append(row)
        return torch.stack(logits, 1), StateCache(state, cache.tokens + input_ids.shape[1])


def _padding(attention_mask: Tensor | None) -> Tensor | None:
    """The bool mask of real tokens; None where all are."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()


def language_config(
    backbone: CausalLM, attention: str | Mapping[str, Any] | Sequence[Any], end: int | None = None
) -> MHLALanguageConfig:
    """What a CausalLM was built from.

    Args:
        backbone: any CausalLM, with or without weights.
        attention: the entry it was built from.
        end: the id that ends a document: eos and padding.
    """
    layer = cast(Any, backbone.layers[0])
    return MHLALanguageConfig(
        attention=cast(Any, attention),  # mappings and sequences of YAML: plain dicts and lists
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
    """A built CausalLM as a model of transformers, which shares its weights. Arguments as of
    :func:`language_config`.
    """
    return MHLAForCausalLM(language_config(backbone, attention, end), backbone).train(backbone.training)


AutoConfig.register(MHLALanguageConfig.model_type, MHLALanguageConfig)
AutoModelForCausalLM.register(MHLALanguageConfig, MHLAForCausalLM)
