"""What transformers' own model and generation tests ask of a model, without their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers", reason="transformers is the extra 'language'")

from mhla_lightning.hf import MHLAForCausalLM, MHLALanguageConfig, wrap
from tests.helpers.errors import refused
from tests.helpers.language_models import VOCABULARY, prompts, tiny_model

GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return wrap(tiny_model("mhla"), "mhla")


def small(depth: int = 2) -> MHLALanguageConfig:
    return MHLALanguageConfig(
        attention="mhla", vocab_size=VOCABULARY, context=64, embed_dim=32, depth=depth, intermediate=64
    )


@pytest.mark.parametrize(
    "mask",
    [[[1, 1, 1, 1, 1, 0, 0], [1] * 7], [[1, 0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1, 1]]],
    ids=["padded on the right", "holes"],
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_any_padding_of_a_prompt_generates_as_the_prompt_alone(
    model: Any, mask: list[list[int]], use_cache: bool
) -> None:
    ids, real = torch.tensor(prompts(7, 7)), torch.tensor(mask)
    found = model.generate(ids, attention_mask=real, pad_token_id=0, use_cache=use_cache, **GREEDY)
    for row, row_mask, text in zip(ids, real.bool(), found, strict=True):
        alone = row[row_mask][None]
        assert torch.equal(model.generate(alone, **GREEDY)[0, alone.shape[1] :], text[7:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_kept_logits_are_columns_and_minus_one_the_last_real_tokens(model: Any, use_cache: bool) -> None:
    ids, mask = torch.tensor(prompts(7, 7)), torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=use_cache).logits
        kept = {
            keep: model(ids, attention_mask=mask, use_cache=use_cache, logits_to_keep=keep).logits
            for keep in (1, 2, -1)
        }
    torch.testing.assert_close(kept[1], whole[:, -1:])
    torch.testing.assert_close(kept[2], whole[:, -2:])
    torch.testing.assert_close(kept[-1][:, 0], torch.stack([whole[0, 3], whole[1, 6]]))


def test_a_model_made_on_meta_initialises_itself() -> None:
    with torch.device("meta"):
        model: Any = MHLAForCausalLM(small())
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.fill_(torch.nan)
    model.init_weights()
    fresh = MHLAForCausalLM(small()).state_dict()
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name
        if "mixing" in name or "norm" in name:
            assert torch.equal(value, fresh[name]), name
        else:
            assert value.std().item() == pytest.approx(fresh[name].std().item(), rel=0.3), name


def test_missing_weights_are_listed_where_that_is_asked_for(tmp_path: Path) -> None:
    model: Any = MHLAForCausalLM(small(1))
    model.save_pretrained(tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with refused("MixingMatrix"):
        MHLAForCausalLM.from_pretrained(tmp_path)
    opened, found = MHLAForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(found["missing_keys"]) == set(model.state_dict())
    assert all(weight.isfinite().all() for weight in opened.parameters())


def test_attention_matrices_are_refused(model: Any) -> None:
    ids = torch.tensor(prompts(5))
    with refused("output_attentions"):
        model(ids, output_attentions=True)
    with refused("output_attentions"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, **GREEDY)
    assert model(ids, output_attentions=False).logits.shape == (1, 5, VOCABULARY)


def test_every_second_layer_can_be_recomputed() -> None:
    plain: Any = MHLAForCausalLM(small(4)).train()
    saving: Any = MHLAForCausalLM(small(4)).train()
    saving.load_state_dict(plain.state_dict())
    saving.activation_checkpointing_enable(every_n_layers=2)
    layers = saving.model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, False, True, False]
    runs = [0] * len(layers)

    def count(number: int) -> None:
        runs[number] += 1

    for number, layer in enumerate(layers):
        layer.attn_norm.register_forward_hook(lambda *_, number=number: count(number))
    ids = torch.tensor(prompts(6))
    for model in (plain, saving):
        model(ids, labels=ids).loss.backward()
    assert runs == [2, 1, 2, 1]
    for ours, theirs in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_layers_can_be_on_the_disk_and_what_steps_need_cannot(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    whole: Any = MHLAForCausalLM(small()).eval()
    whole.save_pretrained(tmp_path)
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
    options: dict[str, Any] = {"offload_folder": tmp_path / "offload"}
    disk = MHLAForCausalLM.from_pretrained(
        tmp_path, device_map={"model.embeddings": "cpu", **layers}, **options
    )
    assert {weight.device.type for weight in disk.parameters()} == {"cpu", "meta"}
    ids = torch.tensor(prompts(12))
    assert torch.equal(disk(ids).logits, whole(ids).logits)
    assert torch.equal(disk.generate(ids, **GREEDY), whole.generate(ids, **GREEDY))
    with refused("device_map"):  # the tied output reads the embeddings
        MHLAForCausalLM.from_pretrained(
            tmp_path, device_map={"model.embeddings": "disk", **layers}, **options
        )
