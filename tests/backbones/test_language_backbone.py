"""The language model over every operator of the registry: what it sees, what it remembers, what it counts,
whose weights it takes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.attention import CAUSAL_ATTENTION, CausalSelfAttention, MixingMatrix
from mhla_lightning.backbones import CausalLM, build_backbone
from mhla_lightning.backbones.causal_lm import LANGUAGE_PRESETS
from mhla_lightning.errors import UserError
from tests.helpers.errors import refused
from tests.helpers.language_models import CUDA_ONLY, OPERATORS_ON_CPU
from tests.helpers.marks import every_nth
from tests.helpers.oracles import ORACLES

MHLA: dict[str, Any] = {"name": "mhla", "chunk_size": 8, "max_chunks": 6}
LINEAR: dict[str, Any] = {"name": "linear", "chunk_size": 8}
ENTRIES: dict[str, Any] = {
    "softmax": "softmax",
    "linear": LINEAR,
    "mhla": MHLA,
    "deltanet": {"name": "deltanet", "chunk_size": 8},
    "hybrid": ["softmax", MHLA],
    "shift": MHLA | {"max_chunks": 2, "extrapolation": "shift"},
    "relative, token decay": MHLA | {"mix_form": "relative", "decay": "token", "decay_span": "sequence"},
    "window, conv": MHLA | {"intra": "window", "short_conv": 4},
    "grouped": [{"name": "softmax", "heads": 4, "kv_heads": 2}, LINEAR | {"kv_heads": 1}],
    "no positions": LINEAR | {"rotary": False, "short_conv": 3},
}
every_entry = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
VOCAB, TOKENS = 23, 37


def build(entry: Any, **options: Any) -> CausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "context": 48, "embed_dim": 32, "depth": 2, "intermediate": 24}
    model = build_backbone("lm_tiny", attention=entry, **{**sizes, **options})
    assert isinstance(model, CausalLM)
    for parameter in model.parameters():  # away from the start, where many things are equal
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def text(batch: int = 2, count: int = TOKENS) -> Tensor:
    return torch.randint(0, VOCAB, (batch, count), generator=torch.Generator().manual_seed(1))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=1e-10, atol=1e-10 * float(expected.detach().abs().max())
    )


def test_every_operator_is_covered() -> None:
    def names(entry: Any) -> set[str]:
        return (
            {entry}
            if isinstance(entry, str)
            else {entry["name"]}
            if isinstance(entry, dict)
            else set().union(*map(names, entry))
        )

    assert names(list(ENTRIES.values())) == set(CAUSAL_ATTENTION) - set(CUDA_ONLY)


@every_entry
def test_a_token_moves_nothing_before_it_and_what_is_after(entry: Any) -> None:
    model, tokens = build(entry), text()
    before = model(tokens)
    for t in (0, 8, 20, TOKENS - 1):
        moved = tokens.clone()
        moved[:, t] = (moved[:, t] + 1) % VOCAB
        change = (model(moved) - before).abs().amax(-1)
        assert change[:, :t].sum() == 0
        assert (change[:, t] > 0).all()


@every_entry
def test_packed_and_padded_are_what_each_document_is_alone(entry: Any) -> None:
    model, tokens = build(entry), text()
    documents = torch.tensor([[0] * 1 + [1] * 21 + [2] * 15, [0] * 30 + [-1] * 7])
    packed = model(tokens, mask=documents >= 0, documents=documents)
    unmasked = model(tokens, documents=documents)
    for row, start, stop in ((0, 0, 1), (0, 1, 22), (0, 22, 37), (1, 0, 30)):
        alone = model(tokens[row : row + 1, start:stop])
        assert_close(packed[row : row + 1, start:stop], alone)
        assert_close(unmasked[row : row + 1, start:stop], alone)
    left = torch.arange(TOKENS).expand(2, -1) >= torch.tensor([[6], [0]])
    padded = model(tokens, mask=left)
    assert_close(padded[:1, 6:], model(tokens[:1, 6:]))
    assert_close(padded[1:], model(tokens[1:]))
    assert padded.isfinite().all()


@every_entry
@pytest.mark.parametrize("prompt", every_nth([8, 3, 1, 17], 2))
def test_prefill_and_steps_equal_forward(entry: Any, prompt: int) -> None:
    """Prompts of two lengths in one batch, padded left and right."""
    model, tokens = build(entry), text()
    lengths = (prompt, prompt + 2)
    expected = [model(tokens[row : row + 1]) for row in range(2)]
    for side in ("left", "right"):
        prompts, mask = (
            torch.zeros(2, prompt + 2, dtype=torch.int64),
            torch.zeros(2, prompt + 2, dtype=torch.bool),
        )
        for row, length in enumerate(lengths):
            place = slice(prompt + 2 - length, None) if side == "left" else slice(0, length)
            prompts[row, place], mask[row, place] = tokens[row, :length], True
        logits, state = model.prefill(prompts, mask=mask)
        everywhere, _ = model.prefill(prompts, mask=mask, all_logits=True)
        assert state.positions.tolist() == list(lengths)
        for row, length in enumerate(lengths):
            assert_close(everywhere[row][mask[row]], expected[row][0, :length])
        for t in range(12):
            for row, length in enumerate(lengths):
                assert_close(logits[row], expected[row][0, length - 1 + t])
            logits, state = model.step(
                torch.stack([tokens[row, length + t] for row, length in enumerate(lengths)]), state
            )


@every_entry
def test_state_is_reordered_and_starts_from_nothing(entry: Any) -> None:
    model, tokens = build(entry), text(3, 12)
    expected, state = model(tokens), model.init_state(3)
    order = torch.arange(3)
    for t in range(12):
        if t == 7:
            order = torch.tensor([2, 0])
            larger, state = state.bytes, state.reorder(order)
            assert 0 < state.bytes < larger
            assert len(state.positions) == 2
        logits, state = model.step(tokens[order, t], state)
        assert_close(logits, expected[order, t])
    assert state.positions.tolist() == [12, 12]


def test_the_state_of_linear_attention_does_not_grow_and_that_of_softmax_does() -> None:
    sizes = {}
    for name, entry in (("softmax", "softmax"), ("linear", LINEAR)):
        model = build(entry)
        _, short = model.prefill(text(1, 16))
        _, long = model.prefill(text(1, 48))
        sizes[name] = (short.bytes, long.bytes)
    assert sizes["linear"][0] == sizes["linear"][1]
    assert sizes["softmax"][1] > 2 * sizes["softmax"][0]


@every_entry
def test_gradient_checkpointing_gives_the_same_gradients(entry: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(entry)
        model.set_grad_checkpointing(checkpointing)
        documents = torch.arange(TOKENS).expand(2, -1) // 15
        model(text(), documents=documents).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("entry", "parameters"),
    [
        ("mhla", 341_130_240),
        ({"name": "mhla", "preset": "release"}, 341_130_240),
        ({"name": "mhla", "gate": False}, 315_964_416),
    ],
    ids=str,
)
def test_lm_340m_has_the_released_parameter_counts(entry: Any, parameters: int) -> None:
    """SPEC 5.1."""
    with torch.device("meta"):
        model = build_backbone("lm_340m", attention=entry)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("entry", ["softmax", "linear", ["softmax", "mhla", "mhla"]], ids=str)
def test_baselines_have_as_many_parameters_within_a_thousandth(entry: Any) -> None:
    with torch.device("meta"):
        model = build_backbone("lm_340m", attention=entry)
    assert abs(sum(p.numel() for p in model.parameters()) / 341_130_240 - 1) < 1e-3


@pytest.mark.parametrize("preset", LANGUAGE_PRESETS)
@pytest.mark.parametrize("name", OPERATORS_ON_CPU)
@pytest.mark.parametrize(("backbone", "tokens"), [("lm_tiny", 256), ("lm_tiny", 100), ("lm_340m", 2048)])
def test_flops_are_what_torch_counts(preset: str, name: str, backbone: str, tokens: int) -> None:
    with torch.device("meta"):
        model = build_backbone(backbone, attention={"name": name, "preset": preset}, depth=2)
        assert isinstance(model, CausalLM)
        with FlopCounterMode(display=False) as counter:
            assert model(torch.empty(1, tokens, dtype=torch.int64)).shape == (1, tokens, model.vocab_size)
    assert counter.get_total_flops() == model.flops((tokens,))


def first_layer(model: Any) -> Any:
    return model.layers[0].attn


def test_presets_are_the_papers() -> None:
    with torch.device("meta"):
        layers = [
            first_layer(build_backbone("lm_340m", attention=name, depth=1))
            for name in ("mhla", "softmax", "linear")
        ]
    sizes = [(layer.heads, layer.dim_k, layer.dim_v, layer.g_proj is not None) for layer in layers]
    assert sizes == [(4, 128, 256, True), (16, 64, 64, False), (4, 128, 256, True)]
    assert (layers[0].attention.mixing.blocks, layers[0].attention.chunk_size) == (32, 64)
    heads = {
        dim: first_layer(build_backbone("lm_tiny", attention="softmax", embed_dim=dim, depth=1)).heads
        for dim in (32, 128, 192)
    }
    assert heads == {32: 1, 128: 2, 192: 3}


def test_weights_start_as_in_the_release() -> None:
    model = build_backbone("lm_tiny", attention=MHLA | {"decay": "token"})
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif parameter.ndim == 2 and "mixing" not in name and "decay" not in name:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1), name
    (first, *_) = (m for m in model.modules() if isinstance(m, MixingMatrix))
    torch.testing.assert_close(first.matrix().sum(1), torch.ones(6))
    (layer, *_) = (m for m in model.modules() if isinstance(m, CausalSelfAttention))
    assert layer.decay is not None
    assert layer.decay.weight.abs().sum() == 0
    assert len(set(layer.decay.bias.tolist())) == 4


def test_mixing_matrices_are_not_decayed() -> None:
    model = build(["softmax", MHLA])
    assert model.no_weight_decay() == {"layers.1.attn.attention.mixing.weight"}
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_the_layer_of_the_authors_gives_their_numbers_from_their_weights() -> None:
    case = np.load(ORACLES / "nlp_layer_gated.npz")
    facts = json.loads((ORACLES / "nlp_layer_gated.json").read_text())["constructor"]
    model = build_backbone(
        "lm_tiny",
        attention={"name": "mhla", "preset": "release", "heads": facts["num_heads"]},
        embed_dim=facts["hidden_size"],
        depth=1,
    )
    assert isinstance(model, CausalLM)
    theirs = {
        name.removeprefix("param."): torch.from_numpy(case[name])
        for name in case
        if name.startswith("param.")
    }
    adapted = model.adapt_state_dict({f"model.layers.0.attn.{name}": value for name, value in theirs.items()})
    done = model.load_state_dict(adapted, strict=False)
    assert done.unexpected_keys == []
    assert not any(".attn." in name for name in done.missing_keys)
    attn = model.get_submodule("layers.0.attn")
    # # the release clamps in its forward
    attn.attention.mixing.project_()  # type: ignore[union-attr, operator]
    for tokens in (48, 130):
        places = torch.arange(tokens)[None]
        with torch.no_grad():
            out = attn(torch.from_numpy(case[f"in.x_T{tokens}"]), rotary=model._rotations(places)[attn.dim_k])  # type: ignore[index]
        torch.testing.assert_close(out, torch.from_numpy(case[f"out.y_T{tokens}"]), rtol=1e-4, atol=1e-5)


def test_weights_of_a_llama_of_transformers_fit_a_softmax_model() -> None:
    """Same numbers as LlamaForCausalLM: Transformer++ is the same model under other names."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    ours = build({"name": "softmax", "heads": 4, "kv_heads": 2})
    ours.load_state_dict(
        ours.adapt_state_dict({k: v for k, v in theirs.state_dict().items() if "rotary" not in k})
    )
    with torch.no_grad():
        torch.testing.assert_close(
            ours(text()), theirs(text()).logits, rtol=1e-4, atol=1e-5
        )  # theirs turns in float32


def test_convolutions_of_flash_linear_attention_fit() -> None:
    model = build(LINEAR | {"short_conv": 4})
    own = model.layers[0].attn.convs["q"].weight  # type: ignore[union-attr, index]
    adapted = model.adapt_state_dict(
        {
            "model.layers.0.attn.q_conv1d.weight": torch.zeros(len(own), 1, 4),
            "model.norm.weight": torch.ones(32),
        }
    )
    assert {name: tuple(value.shape) for name, value in adapted.items()} == {
        "layers.0.attn.convs.q.weight": tuple(own.shape),
        "norm.weight": (32,),
    }


def test_an_output_of_its_own() -> None:
    tied, free = build("softmax"), build("softmax", tie_embeddings=False)
    assert tied.head_weight is tied.embeddings.weight
    assert free.lm_head is not None
    assert free.head_weight is free.lm_head.weight
    state = {"lm_head.weight": torch.zeros(VOCAB, 32)}
    assert tied.adapt_state_dict(state) == {}
    assert list(free.adapt_state_dict(state)) == ["lm_head.weight"]
    features = free.features(text())
    torch.testing.assert_close(free(text()), features @ free.lm_head.weight.T)


def test_a_longer_forward_is_the_operators_decision() -> None:
    long = text(1, 60)
    assert build("softmax")(long).shape == (1, 60, VOCAB)
    assert build(LINEAR)(long).shape == (1, 60, VOCAB)
    assert build(ENTRIES["shift"])(long).shape == (1, 60, VOCAB)
    with pytest.raises(UserError):  # the key is the operator's
        build(MHLA)(long)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"attention": "mlha"}, "attention.name"),
        ({"attention": {"name": "mhla", "blocks": 4}}, "attention.blocks"),
        ({"attention": {"name": "mhla", "preset": "papper"}}, "attention.preset"),
        ({"context": 0}, "context"),
        ({"attention": {"name": "softmax", "heads": 3}}, "attention.heads"),
        ({"img_size": 32}, "img_size"),
    ],
    ids=str,
)
def test_wrong_options_are_one_clear_sentence(options: dict[str, Any], key: str) -> None:
    with refused(key) as error:
        build_backbone("lm_tiny", **options)
    assert "\n" not in str(error.value)


def test_mask_and_documents_have_the_shape_of_the_tokens() -> None:
    model = build("softmax")
    with refused("documents"):
        model(text(), documents=torch.zeros(2, 3, dtype=torch.int64))


def test_timm_knows_image_classifiers_only() -> None:
    assert timm.is_model("deit_tiny_mhla")
    assert not any(timm.is_model(f"{name}_mhla") for name in ("lm_340m", "lm_tiny"))
