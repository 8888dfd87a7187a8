"""The language model inside transformers: loss, generate, beam search, files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

pytest.importorskip("transformers", reason="transformers is the extra 'language'")
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from mhla_lightning.hf import MHLAForCausalLM, MHLALanguageConfig, wrap
from mhla_lightning.inference.text import Sampling, generate
from tests.helpers.errors import refused
from tests.helpers.language_models import ENTRIES, VOCABULARY, entry_id, prompts, tiny_model

END = 0
every_operator = pytest.mark.parametrize("entry", ENTRIES, ids=entry_id)


def wrapped(entry: Any) -> Any:
    """A MHLAForCausalLM; the types that transformers gives `generate` fit no model."""
    return wrap(tiny_model(entry), entry, END)


def ours(model: Any, given: list[list[int]], new: int) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in given]
    for step in generate(model.model, given, Sampling(greedy=True), new, end=END):
        for prompt, token in zip(step.prompts, step.tokens, strict=True):
            tokens[prompt].append(token)
    return tokens


def padded(given: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, padded on the left."""
    longest = max(map(len, given))
    ids = torch.tensor([[END] * (longest - len(prompt)) + prompt for prompt in given])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in given])
    return ids, mask


@every_operator
def test_greedy_generation_of_a_padded_batch_is_our_own(entry: Any) -> None:
    model, given = wrapped(entry), prompts(4, 13, 9)
    ids, mask = padded(given)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=60, do_sample=False)[:, ids.shape[1] :]
    for row, expected, prompt in zip(found.tolist(), ours(model, given, 60), given, strict=True):
        assert len(set(expected)) > 1
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {END}
        (alone,) = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[
            :, len(prompt) :
        ].tolist()
        assert alone == expected


@every_operator
def test_beam_search_reorders_the_state(entry: Any) -> None:
    model, (ids, mask) = wrapped(entry), padded(prompts(3, 6))
    options = {
        "attention_mask": mask,
        "max_new_tokens": 24,
        "do_sample": False,
        "num_beams": 4,
        "num_return_sequences": 4,
    }
    found = model.generate(ids, **options)
    assert torch.equal(found, model.generate(ids, **options, use_cache=False))
    assert len({tuple(row) for row in found.tolist()}) == 8


def test_sampling_and_steps_from_a_cache_of_the_users() -> None:
    model = wrapped("mhla")
    (tokens,) = prompts(20)
    ids = torch.tensor([tokens])
    torch.manual_seed(0)
    assert model.generate(ids, max_new_tokens=5, do_sample=True, top_k=5).shape == (1, 25)
    with torch.no_grad():
        whole = model(ids, use_cache=False)
        assert whole.past_key_values is None
        first = model(ids[:, :12], use_cache=True)
        rest = model(ids[:, 12:], past_key_values=first.past_key_values, attention_mask=torch.ones_like(ids))
        last = model(ids, use_cache=True, logits_to_keep=1)
        some = model(ids, use_cache=False, logits_to_keep=3)
    assert rest.past_key_values.get_seq_length() == 20
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole.logits)
    torch.testing.assert_close(last.logits, whole.logits[:, -1:])
    torch.testing.assert_close(some.logits, whole.logits[:, -3:])


@every_operator
def test_a_cache_is_updated_in_place_as_those_of_transformers(entry: Any) -> None:
    model = wrapped(entry)
    ids = torch.tensor(prompts(30))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = model(ids[:, :20], use_cache=True).past_key_values
        rows = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 30)]
    torch.testing.assert_close(torch.cat(rows, 1), whole[:, 20:])
    assert cache.get_seq_length() == 30


def test_loss_of_labels_and_its_gradient() -> None:
    model = wrapped("linear").train()
    ids = torch.tensor(prompts(11, 11))
    labels = ids.clone()
    labels[0, :6] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(
        output.loss, expected, check_dtype=False
    )  # transformers computes it in float32
    assert output.past_key_values is None
    output.loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    assert isinstance(model(ids, return_dict=False), tuple)


@every_operator
@pytest.mark.parametrize("tied", [True, False])
def test_files_round_trip_through_the_auto_classes(entry: Any, tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MHLALanguageConfig(
        attention=entry,
        vocab_size=VOCABULARY,
        context=64,
        embed_dim=32,
        depth=2,
        intermediate=64,
        tie_word_embeddings=tied,
        eos_token_id=END,
    )
    model: Any = MHLAForCausalLM(config).eval()
    assert (model.get_output_embeddings() is None) == tied
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MHLAForCausalLM
    assert not loaded.training
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    assert loaded.config.hidden_size == 32
    assert loaded.config.eos_token_id == END
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    ids = torch.tensor(prompts(30))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@every_operator
def test_embeddings_hidden_states_and_some_columns(entry: Any) -> None:
    model = wrapped(entry)
    ids = torch.tensor(prompts(12, 12)).long()
    embedded = model.get_input_embeddings()(ids)
    with torch.no_grad():
        whole = model(ids, use_cache=False, output_hidden_states=True)
        assert torch.equal(model(inputs_embeds=embedded, use_cache=False).logits, whole.logits)
        some = model(ids, use_cache=False, logits_to_keep=torch.tensor([3, 7])).logits
        first = model(ids[:, :8], use_cache=True, output_hidden_states=True)
        rest = model(ids[:, 8:], past_key_values=first.past_key_values, output_hidden_states=True)
        head = F.linear(whole.hidden_states[-1], model.model.head_weight)
        last = model(ids, use_cache=True, logits_to_keep=1, output_hidden_states=True)
    torch.testing.assert_close(some, whole.logits[:, [3, 7]])
    torch.testing.assert_close(head, whole.logits)
    assert torch.equal(whole.hidden_states[0], embedded)
    assert len(whole.hidden_states) == model.config.num_hidden_layers + 1
    for expected, start, end, once in zip(
        whole.hidden_states, first.hidden_states, rest.hidden_states, last.hidden_states, strict=True
    ):
        torch.testing.assert_close(torch.cat([start, end], 1), expected)
        torch.testing.assert_close(once, expected)


def test_generation_from_embeddings_and_with_hidden_states() -> None:
    model = wrapped("mhla")
    ids = torch.tensor(prompts(9))
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)[:, 9:]
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embedded, **options), expected)
    found = model.generate(ids, **options, output_hidden_states=True, return_dict_in_generate=True)
    assert [states[1].shape[1] for states in found.hidden_states] == [9, 1, 1, 1, 1, 1]


@every_operator
def test_positions_begin_documents_or_are_those_of_the_tokens(entry: Any) -> None:
    model = wrapped(entry)
    ids = torch.tensor(prompts(12))
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        packed = model(ids, position_ids=places, use_cache=False).logits
        alone = [model(part, use_cache=False).logits for part in (ids[:, :5], ids[:, 5:])]
        counted = model(ids, position_ids=torch.arange(12)[None], use_cache=True)
        step = model(ids[:, :1], past_key_values=counted.past_key_values, position_ids=torch.tensor([[12]]))
    torch.testing.assert_close(packed, torch.cat(alone, 1))
    assert step.past_key_values.get_seq_length() == 13
    for wrong, more in (
        (places + 1, {}),
        (places, {"use_cache": True}),
        (torch.tensor([[9]]), {"past_key_values": counted.past_key_values}),
        (places[:, :5], {}),
    ):
        with refused("position_ids"):
            model(ids[:, : wrong.shape[1]] if wrong.shape[1] == 1 else ids, position_ids=wrong, **more)
    with refused("input_ids"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with refused("input_ids"):
        model()


def test_gradient_checkpointing_changes_no_gradient() -> None:
    plain, saving = wrapped("mhla").train(), wrapped("mhla").train()
    saving.activation_checkpointing_enable()
    assert saving.is_activation_checkpointing
    ids = torch.tensor(prompts(12))
    for model in (plain, saving):
        model(ids, labels=ids).loss.backward()
    for ours, theirs in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    saving.activation_checkpointing_disable()
    assert not saving.is_activation_checkpointing


def test_usual_names_of_the_config() -> None:
    config = MHLALanguageConfig(
        hidden_size=32, n_layer=2, n_positions=64, num_attention_heads=2, rms_norm_eps=1e-5, vocab_size=50
    )
    assert (config.embed_dim, config.depth, config.context, config.norm_eps) == (32, 2, 64, 1e-5)
    assert config.attention == {"name": "mhla", "heads": 2}
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 2)
    model: Any = MHLAForCausalLM(config)
    assert {layer.attn.heads for layer in model.model.layers} == {2}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.init_weights()  # a built model is initialised; as for any loaded one, nothing is drawn again
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    mixed: Any = MHLALanguageConfig(attention=["mhla", {"name": "softmax", "kv_heads": 1}], embed_dim=256)
    mixed.num_heads = 8
    assert [entry["heads"] for entry in mixed.attention] == [8, 8]
    assert MHLALanguageConfig(attention="softmax", embed_dim=256).num_attention_heads == 4


def test_files_without_a_mixing_matrix_are_refused(tmp_path: Path) -> None:
    wrapped("mhla").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    left = {name: value for name, value in state.items() if "mixing" not in name}
    assert len(left) < len(state)
    save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with refused("MixingMatrix"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_fresh_model_keeps_the_initialisation_of_a_language_model() -> None:
    model: Any = MHLAForCausalLM(
        MHLALanguageConfig(
            attention="mhla", vocab_size=VOCABULARY, context=64, embed_dim=64, depth=1, intermediate=64
        )
    )
    mixing = model.state_dict()["model.layers.0.attn.attention.mixing.weight"]
    local = torch.tensor([1e-3, 1 / 3, 2 / 3, 1.0, 0.0])  # causal_local: 1 - distance / 3, at least 1e-3
    torch.testing.assert_close(mixing[3, :5], local / local.sum())
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_embeddings_can_grow() -> None:
    model = wrapped("softmax")
    model.resize_token_embeddings(VOCABULARY + 3)
    assert model(torch.tensor([[1, VOCABULARY + 2]])).logits.shape == (1, 2, VOCABULARY + 3)


def test_padding_behind_a_cache_and_labels_with_one_are_refused() -> None:
    model = wrapped("linear")
    ids = torch.tensor(prompts(4))
    cache = model(ids, use_cache=True).past_key_values
    with refused("attention_mask"):
        model(ids[:, :1], past_key_values=cache, attention_mask=torch.tensor([[1, 1, 1, 1, 0]]))
    with refused("labels"):
        model(ids, past_key_values=cache, labels=ids)
    with refused("past_key_values"):
        model(ids[:, :1], past_key_values=DynamicCache())


def test_assisted_generation_is_refused_by_transformers() -> None:
    model = wrapped("linear")
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(torch.tensor(prompts(4)), assistant_model=wrapped("linear"), max_new_tokens=4)


@pytest.mark.slow
def test_without_transformers_the_import_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\ntry:\n    import mhla_lightning.hf\nexcept "
        "Exception as error:\n    print(error)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert (
        found.stdout
        == "mhla_lightning.hf needs the package 'transformers': pip install 'mhla-lightning[language]'\n"
    )
