"""Text to features: words without a download, and umT5 against transformers itself."""

from __future__ import annotations

import html
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mhla_lightning.data.encoders.instructions import instruction_text
from mhla_lightning.data.encoders.text_encoders import TextEncoding, clean, load_text_encoder, pad_rows
from mhla_lightning.data.modules.text import TextConditioned
from tests.helpers.errors import refused
from tests.helpers.vaes import save_gemma2, save_kl, save_umt5

WORDS = TextEncoding("words:64", 12, 64)
CAT = [-1.1309932, 0.9060153, 1.0947771]


class Prompts(TextConditioned):
    """A data module as far as text goes."""

    def __init__(self, encoding: TextEncoding | None) -> None:
        self.text_encoder = encoding


@pytest.fixture(scope="module")
def umt5(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("transformers")
    return save_umt5(tmp_path_factory.mktemp("text") / "umt5")


# Words


def test_a_word_is_the_same_row_wherever_it_stands() -> None:
    encoder = load_text_encoder(WORDS)
    one, two = encoder.encode(["A red CAT, running.", "cat"])
    assert one.shape == (4, 64)
    assert one.dtype == torch.float32
    assert torch.equal(one[2], two[0])
    assert torch.equal(one, load_text_encoder("words:64").encode(["a  red cat running"])[0])
    assert not torch.equal(one[0], one[1])


def test_the_rows_of_words_are_unit_gaussians() -> None:
    (rows,) = load_text_encoder(TextEncoding("words:64", 2000, 64)).encode(
        [" ".join(f"w{number}" for number in range(2000))]
    )
    assert abs(float(rows.mean())) < 0.01
    assert abs(float(rows.std()) - 1) < 0.01
    similarity = torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(rows).T
    assert float((similarity - torch.eye(2000)).abs().max()) < 0.75, "no two words alike"


def test_the_vectors_of_words_never_change() -> None:
    """A data set's features are told by this encoder's sha256: another vector needs another one."""
    (rows,) = load_text_encoder("words:3").encode(["cat"])
    torch.testing.assert_close(rows, torch.tensor([CAT]), atol=1e-6, rtol=0)


def test_a_text_without_words_is_one_row_of_its_own() -> None:
    empty, blank, marks, word = load_text_encoder(WORDS).encode(["", " \n", "?!", "a"])
    assert empty.shape == (1, 64)
    assert torch.equal(empty, blank)
    assert torch.equal(empty, marks)
    assert not torch.equal(empty, word)


@pytest.mark.parametrize("name", ["words:0", "words:", "words:x", "words:123456"])
def test_words_need_a_number_of_channels(name: str) -> None:
    with refused("text_encoder"):
        load_text_encoder(name)


# umT5


@torch.no_grad()
def test_umt5_is_that_of_transformers(umt5: str) -> None:
    """Alone and unpadded it gives what transformers gives for a padded batch with a mask, which is what
    diffusers' Wan pipeline cuts rows from.
    """
    from transformers import AutoTokenizer, UMT5EncoderModel

    texts = ["a red cat", "", "dogs run over the hill"]
    found = load_text_encoder(TextEncoding(umt5, 32, 24)).encode(texts)
    tokens = AutoTokenizer.from_pretrained(umt5)(
        texts, padding="max_length", max_length=32, return_tensors="pt"
    )
    model: Any = UMT5EncoderModel.from_pretrained(umt5)
    direct = model.eval()(tokens.input_ids, tokens.attention_mask).last_hidden_state
    few = AutoTokenizer.from_pretrained(umt5)(texts[2], truncation=True, max_length=6, return_tensors="pt")
    encoder = load_text_encoder(TextEncoding(umt5, 6, 24))
    cut = model.eval()(few.input_ids).last_hidden_state[0]
    torch.testing.assert_close(encoder.encode(texts[2:], cut=True)[0], cut, atol=1e-5, rtol=1e-5)
    assert encoder.length(texts[2]) == len(texts[2]) + 1
    for rows, its, mask in zip(found, direct, tokens.attention_mask, strict=True):
        assert len(rows) == int(mask.sum())
        torch.testing.assert_close(rows, its[: len(rows)], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gemma2_is_that_of_sana_s_pipeline(tmp_path: Path) -> None:
    """Alone and unpadded it gives the rows that the pipeline's mask keeps."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import AutoTokenizer, Gemma2Model

    folder = save_gemma2(tmp_path / "sana")
    texts = ["A red cat", "", "dogs run over the hill"]
    encoder = load_text_encoder(TextEncoding(folder, 32, 24))
    pipeline = diffusers.SanaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(f"{folder}/tokenizer"),
        text_encoder=Gemma2Model.from_pretrained(f"{folder}/text_encoder").eval(),
        vae=None,
        transformer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    direct, kept, _, _ = pipeline.encode_prompt(
        texts, do_classifier_free_guidance=False, max_sequence_length=32
    )
    for rows, its, mask in zip(encoder.encode(texts), direct, kept, strict=True):
        assert len(rows) == int(mask.sum())
        torch.testing.assert_close(rows, its[: len(rows)], atol=1e-5, rtol=1e-5)
    assert encoder.encoding.sha256 != load_text_encoder(save_gemma2(tmp_path / "other", 1)).encoding.sha256
    with refused("texts"):
        load_text_encoder(TextEncoding(folder, 5, 24)).encode(["a red cat"])


@torch.no_grad()
def test_an_instruction_is_read_as_sana_s_pipeline_reads_it(tmp_path: Path) -> None:
    """The rows that the pipeline selects: the first, then from the instruction's last token on."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import AutoTokenizer, Gemma2Model

    folder = save_gemma2(tmp_path / "sana")
    plain = TextEncoding(folder, 32, 24)
    encoder = load_text_encoder(replace(plain, instruction="sana"))
    pipeline = diffusers.SanaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(f"{folder}/tokenizer"),
        text_encoder=Gemma2Model.from_pretrained(f"{folder}/text_encoder").eval(),
        vae=None,
        transformer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    texts = ["A red cat", "dogs run over the hill"]
    instruction = instruction_text("sana").split("\n")
    direct, kept, none, none_kept = pipeline.encode_prompt(
        texts, max_sequence_length=32, complex_human_instruction=instruction
    )
    for rows, its, mask in zip(encoder.encode(texts), direct, kept, strict=True):
        assert len(rows) == int(mask.sum())
        torch.testing.assert_close(rows, its[: len(rows)], atol=1e-5, rtol=1e-5)
    (empty,) = encoder.encode([""])
    torch.testing.assert_close(empty, none[0, : int(none_kept[0].sum())], atol=1e-5, rtol=1e-5)
    assert not torch.equal(encoder.encode(texts)[0][2:4], load_text_encoder(plain).encode(texts)[0][1:3])
    assert encoder.encoding.sha256 != load_text_encoder(plain).encoding.sha256
    assert load_text_encoder(folder, instruction="sana").encoding == replace(encoder.encoding, tokens=300)
    few = load_text_encoder(TextEncoding(folder, 6, 24, instruction="sana"))
    short, kept, _, _ = pipeline.encode_prompt(
        texts, False, max_sequence_length=6, complex_human_instruction=instruction
    )
    for text, rows, its in zip(texts, few.encode(texts, cut=True), short, strict=True):
        torch.testing.assert_close(rows, its, atol=1e-5, rtol=1e-5)
        assert few.length(text) == encoder.length(text) == len(encoder.encode([text])[0]) > 6
    with refused("text_encoder.instruction"):
        load_text_encoder(replace(plain, instruction="polite"))
    with refused("texts"):
        load_text_encoder(TextEncoding(folder, 5, 24, instruction="sana")).encode(["a red cat"])


def test_other_encoders_read_no_instruction(umt5: str) -> None:
    for name in (umt5, "words:8"):
        with refused("text_encoder.instruction"):
            load_text_encoder(name, instruction="sana")


def test_an_encoding_without_an_instruction_has_the_facts_of_earlier_versions() -> None:
    """Settings of stopped jobs and names of kept features are made of them."""
    assert list(WORDS.facts()) == ["name", "tokens", "channels", "sha256", "empty"]
    assert replace(WORDS, instruction="sana").facts()["instruction"] == "sana"
    assert not WORDS.fits(replace(WORDS, instruction="sana"))


def test_features_do_not_depend_on_what_else_is_encoded(umt5: str) -> None:
    encoder = load_text_encoder(TextEncoding(umt5, 40, 24))
    together = encoder.encode(["a", "a much longer text", "a"])
    assert torch.equal(together[0], encoder.encode(["a"])[0])
    assert torch.equal(together[0], together[2])


def test_the_identity_is_of_weights_and_vocabulary(umt5: str, tmp_path: Path) -> None:
    known = load_text_encoder(umt5).encoding
    assert (known.channels, known.tokens) == (24, 512)
    assert load_text_encoder(umt5, dtype=torch.bfloat16).encoding == known
    in_pipeline = load_text_encoder(save_umt5(tmp_path / "pipeline", pipeline=True)).encoding
    assert in_pipeline.sha256 == known.sha256
    assert load_text_encoder(save_umt5(tmp_path / "other", seed=1)).encoding.sha256 != known.sha256
    assert (
        load_text_encoder(save_umt5(tmp_path / "heads", num_heads=2, d_kv=12)).encoding.sha256 != known.sha256
    )
    with refused("text_encoder.sha256"):
        load_text_encoder(TextEncoding(umt5, 8, 24, "ab" * 32))
    assert load_text_encoder("words:64").encoding.sha256 != load_text_encoder("words:65").encoding.sha256


def test_loading_leaves_the_random_generator_alone(umt5: str) -> None:
    before = torch.random.get_rng_state()
    load_text_encoder(umt5)
    assert torch.equal(before, torch.random.get_rng_state())


# Mistakes


@pytest.mark.parametrize("name", ["words:8", "umt5"])
def test_a_text_that_is_too_long_is_told(umt5: str, name: str) -> None:
    encoding = TextEncoding(name, 5, 8) if name == "words:8" else TextEncoding(umt5, 5, 24)
    encoder = load_text_encoder(encoding)
    longest = "a b c d e" if name == "words:8" else "abcd"
    assert len(encoder.encode([longest])[0]) == 5
    with refused("texts"):
        encoder.encode([f"{longest} x"])
    with refused("texts") as error:
        encoder.encode(["zz " * 1000])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300, "a long text is cut"


def test_other_models_and_damage_are_told(umt5: str, tmp_path: Path) -> None:
    with refused("text_encoder"):
        load_text_encoder(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with refused("text_encoder"):
        load_text_encoder(str(tmp_path / "empty"))
    shutil.copytree(umt5, tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with refused("text_encoder"):
        load_text_encoder(str(tmp_path / "bert"))
    shutil.copytree(umt5, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with refused("text_encoder"):
        load_text_encoder(str(tmp_path / "pickled"))
    shutil.copytree(umt5, tmp_path / "deeper")
    (tmp_path / "deeper" / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with refused("text_encoder"):
        load_text_encoder(str(tmp_path / "deeper"))
    shutil.copytree(umt5, tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    (tmp_path / "mute" / "tokenizer_config.json").unlink()
    with refused("text_encoder"):
        load_text_encoder(str(tmp_path / "mute"))
    with refused("text_encoder"):
        load_text_encoder(save_kl(tmp_path / "kl"))
    with refused("text_encoder.channels"):
        load_text_encoder(TextEncoding(umt5, 8, 25))


@pytest.mark.parametrize(("tokens", "channels"), [(0, 4), (4, 0), (-1, 4)])
def test_sizes_are_positive(tokens: int, channels: int) -> None:
    with refused("text_encoder.tokens" if tokens < 1 else "text_encoder.channels"):
        TextEncoding("words:4", tokens, channels)


# Prompts


def test_white_space_and_entities_are_cleaned_as_in_wan() -> None:
    """Against diffusers' pipeline, whose cleaning this is (without ftfy)."""
    wan = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    for text in ("  a\tb\n\nc ", "fish &amp;amp; chips", "&lt;b&gt;", "caf\u00e9\u00a0x\u3000y", ""):
        assert clean(text) == wan.whitespace_clean(html.unescape(html.unescape(text)))


def test_prompts_are_padded_by_zeros(umt5: str) -> None:
    for encoding in (WORDS, TextEncoding(umt5, 12, 24)):
        module = Prompts(encoding)
        found = module.encode_text(["a cat", "a", "a cat"])
        assert found.shape == (3, 12, encoding.channels)
        assert found.dtype == torch.float32
        assert torch.equal(found[0], found[2])
        rows = load_text_encoder(encoding).encode(["a cat"])[0]
        assert torch.equal(found[0, : len(rows)], rows)
        assert not found[0, len(rows) :].any()
        assert torch.equal(module.null_text(), pad_rows(load_text_encoder(encoding).encode([""]), 12)[0])
        assert module.null_text().any(), "the empty text has a row of its own"
        assert module.encode_text([]).shape == (0, 12, encoding.channels)


def test_prompts_are_encoded_once(umt5: str, tmp_path: Path) -> None:
    folder = shutil.copytree(umt5, tmp_path / "moved")
    module = Prompts(TextEncoding(str(folder), 12, 24))
    first = module.encode_text(["a", "b"])
    shutil.rmtree(folder)
    assert torch.equal(module.encode_text(["b", "a"]), first.flip(0))


def test_without_an_encoder_there_are_no_prompts() -> None:
    with refused("text_encoder"):
        Prompts(None).encode_text(["a"])
