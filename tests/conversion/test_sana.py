"""`mhla import sana` and `mhla export --format diffusers`: SANA's weights there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mhla_lightning.backbones import build_backbone
from mhla_lightning.cli.main import main
from mhla_lightning.conversion.export import TrainedModel, plan_export, write
from mhla_lightning.conversion.sana import ratio_of
from mhla_lightning.weights.sana_names import from_sana, to_diffusers_sana
from tests.helpers.errors import refused
from tests.helpers.sana_models import SMALL, build, texts, theirs
from tests.helpers.video_models import awake

FILE = "diffusion_pytorch_model.safetensors"
UNIFORM = {"name": "mhla", "blocks": [2, 3], "mix_init": "uniform"}


@pytest.fixture
def sana(tmp_path: Path) -> Path:
    """Write a folder of diffusers, with the model in `transformer/` as in its pipelines."""
    theirs().save_pretrained(tmp_path / "sana" / "transformer")
    return tmp_path / "sana"


def their_state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "transformer" / FILE)


def change_config(folder: Path, **values: Any) -> None:
    """Change values of config.json; `...` removes a key."""
    path = folder / "transformer" / "config.json"
    changed = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))


def imported(source: Path, *arguments: str) -> tuple[dict[str, Any], Any]:
    """Return the report of an import, and the model of its `model` section with the written weights."""
    out, report = source.parent / "ours.safetensors", source.parent / "report.json"
    assert main(["import", "sana", str(source), "--out", str(out), "--json", str(report), *arguments]) == 0
    result = json.loads(report.read_text())
    chosen = result["model"]
    model = build_backbone(
        chosen["backbone"], attention=chosen["attention"], **chosen.get("backbone_options", {})
    )
    model.load_state_dict(load_file(out))
    return result, model.eval()


def test_every_tensor_of_a_folder_is_taken_bit_for_bit(sana: Path) -> None:
    result, model = imported(sana)
    assert (result["model"]["backbone"], result["model"]["attention"]) == ("sana_600m", "linear")
    assert (result["created"], result["left"], result["resampled"]) == ([], [], [])
    state, written = their_state(sana), to_diffusers_sana(load_file(sana.parent / "ours.safetensors"))
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())
    x, t, text, mask = texts(model)
    wanted = theirs()(x, text, t, encoder_attention_mask=mask, return_dict=False)[0]
    torch.testing.assert_close(model(x, t, text, mask), wanted, rtol=1e-5, atol=1e-6)


def test_mhla_can_begin_as_the_linear_attention_of_the_file(sana: Path) -> None:
    result, model = imported(
        sana, "--attention", json.dumps(UNIFORM), "--backbone-options", "{input_size: [8, 12]}"
    )
    assert result["created"] == [f"blocks.{i}.attn.attention.mixing.weight" for i in range(2)]
    assert result["left"] == []
    x, t, text, mask = texts(model)
    wanted = theirs()(x, text, t, encoder_attention_mask=mask, return_dict=False)[0]
    torch.testing.assert_close(model(x, t, text, mask), wanted, rtol=1e-4, atol=1e-5)


def test_a_text_that_mhla_reads_starts_from_the_softmax_of_the_file(
    sana: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its projections are taken, its mixing is new, one line counts both, and diffusers cannot hold it."""
    options = "{input_size: [8, 12], text_length: 6, cross_attention: {name: mhla, blocks: [2, 3]}}"
    result, model = imported(sana, "--backbone-options", options)
    assert result["created"] == [f"blocks.{i}.cross_attn.mixing.weight" for i in range(2)]
    assert result["left"] == []
    assert " tensors copied, 2 new in ours, 0 left over" in capsys.readouterr().out
    assert model(*texts(model)).shape == (2, 3, 8, 12)
    file = str(sana.parent / "ours.safetensors")
    trained = TrainedModel(
        model.state_dict(), "sana_600m", "linear", result["model"]["backbone_options"], "it"
    )
    with refused("format"):
        plan_export(trained)
    assert main(["export", file, "--to", str(sana.parent / "plain.safetensors")]) == 0
    again = ["import", "sana", str(sana.parent / "plain.safetensors"), "--out", file, "--attention", "linear"]
    again += ["--heads", "3", "--backbone-options", "{cross_heads: 2}"]
    capsys.readouterr()
    assert main(again) == 2  # nothing in the file names the blocks of its mixing
    assert "cross_attn.mixing.weight" in capsys.readouterr().err


def test_the_convolution_is_left_over_where_it_is_dropped(sana: Path) -> None:
    result, _ = imported(sana, "--backbone-options", "{ffn_conv: false}")
    names = [f"blocks.{i}.ffn.depthwise.conv.{leaf}" for i in range(2) for leaf in ("weight", "bias")]
    assert sorted(result["left"]) == sorted(names)


def test_a_file_without_config_needs_its_heads(sana: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = sana / "transformer" / FILE, str(sana.parent / "ours.safetensors")
    lone = sana.parent / FILE
    lone.write_bytes(file.read_bytes())
    arguments = ["import", "sana", str(lone), "--out", out]
    assert main(arguments) == 2
    assert "--heads: " in capsys.readouterr().err
    assert main([*arguments, "--heads", "3"]) == 2
    assert "cross_heads" in capsys.readouterr().err
    _, model = imported(lone, "--heads", "3", "--backbone-options", "{cross_heads: 2}")
    assert (model.blocks[0].attn.heads, model.blocks[0].cross_attn.heads) == (3, 2)


def test_a_config_of_another_model_is_not_believed(sana: Path) -> None:
    change_config(sana, num_layers=5, qk_norm="rms_norm_across_heads")
    _, model = imported(sana, "--heads", "6", "--backbone-options", "{cross_heads: 2}")
    assert model.blocks[0].attn.heads == 6


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"qk_norm": "rms_norm_across_heads"}, ["qk_norm", "SANA-1.5"]),
        ({"guidance_embeds": True}, ["guidance_embeds", "SANA-Sprint"]),
        ({"interpolation_scale": 1.0}, ["interpolation_scale", "2048 pixels"]),
        ({"timestep_scale": 0.001}, ["timestep_scale"]),
        ({"_mhla_lightning": {"backbone": "wan_tiny"}}, ["wan_tiny", "sana_600m, sana_1600m, sana_tiny"]),
        ({"_mhla_lightning": {"backbone": 3}}, ["_mhla_lightning"]),
        ({"num_attention_heads": None}, ["num_attention_heads is None"]),
        ({"num_layers": ...}, ["num_layers is missing"]),
        ({"attention_head_dim": 8.0}, ["attention_head_dim is 8.0"]),
        ({"num_cross_attention_heads": "2"}, ["num_cross_attention_heads is '2'"]),
        ({"sample_size": 10**9}, ["sample_size is 1000000000"]),
    ],
    ids=str,
)
def test_models_that_are_not_this_sana_are_refused(
    sana: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any], words: list[str]
) -> None:
    change_config(sana, **config)
    assert main(["import", "sana", str(sana), "--out", str(sana.parent / "ours.safetensors")]) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert all(word in sentence for word in ["config.json", *words]), sentence
    assert not (sana.parent / "ours.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("other", ["no checkpoint of SANA", "patch_embedding.weight"]),
        ("incomplete", ["incomplete", "blocks.0.ffn.point.weight"]),
        ("part of qkv", ["blocks.1.attn.qkv.weight", "only q (24, 24), v (24, 24)"]),
        ("another size", ["another size", "time_projection.1.weight"]),
        ("one too many", ["blocks.1.attn.extra has no place"]),
        ("not finite", ["text_norm.weight"]),
        ("mixing", ["--attention", "blocks.0.attn.attention.mixing.weight"]),
    ],
)
def test_wrong_tensors_are_refused(
    sana: Path, capsys: pytest.CaptureFixture[str], change: str, words: list[str]
) -> None:
    state = their_state(sana)
    if change == "other":
        state = {"embed.weight": torch.zeros(3, 3)}
    elif change == "incomplete":
        del state["transformer_blocks.0.ff.conv_point.weight"]
    elif change == "part of qkv":
        del state["transformer_blocks.1.attn1.to_k.weight"]
    elif change == "another size":
        state["time_embed.linear.weight"] = torch.zeros(5, 24)
    elif change == "one too many":
        state["transformer_blocks.1.attn1.extra"] = torch.zeros(2)
        words = ["blocks.1.attn1.extra", "has no place"]
    elif change == "not finite":
        state["caption_norm.weight"][3] = float("nan")
    else:
        state["transformer_blocks.0.attn1.mixing.weight"] = torch.zeros(6, 6)
    save_file(state, sana / "transformer" / FILE)
    assert main(["import", "sana", str(sana), "--out", str(sana.parent / "ours.safetensors")]) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--heads", "2"], "--heads: 2 contradicts the config.json"),
        (["--backbone-options", "{cross_heads: 3}"], "cross_heads: 3 contradicts the config.json"),
        (["--heads", "3", "--backbone-options", "{num_heads: 2}"], "--heads: 3 contradicts"),
        (["--backbone", "dit_s2"], "--backbone: the backbone dit_s2 takes no weights of SANA"),
    ],
    ids=str,
)
def test_requests_that_contradict_are_refused(
    sana: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    out = str(sana.parent / "ours.safetensors")
    assert main(["import", "sana", str(sana), "--out", out, *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("hidden", range(1, 200, 7))
def test_the_ratio_of_a_network_gives_its_width(hidden: int) -> None:
    assert all(int(ratio_of(hidden, dim) * dim) == hidden for dim in (7, 24, 1152))


def exported(model: Any, attention: Any, to: Path, **options: Any) -> dict[str, Any]:
    """Write the folder of a model of the small sizes and return its config.json."""
    trained = TrainedModel(model.state_dict(), "sana_600m", attention, {**SMALL, **options}, "a test's model")
    write(plan_export(trained), to)
    return json.loads((to / "config.json").read_text())


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("linear", {}),
        ({"name": "linear", "qkv_bias": True}, {"patch_size": 2, "mlp_ratio": 1.3, "input_size": 8}),
    ],
    ids=["sana", "patches of 2 and biases"],
)
def test_diffusers_opens_an_export_and_computes_the_same(
    tmp_path: Path, attention: Any, options: dict[str, Any]
) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = awake(build(attention=attention, **options))
    exported(model, attention, tmp_path / "out", **options)
    other = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    x, t, text, mask = texts(model)
    wanted = other(x, text, t, encoder_attention_mask=mask, return_dict=False)[0]
    torch.testing.assert_close(model(x, t, text, mask), wanted, rtol=1e-4, atol=1e-5)


def test_a_hybrid_goes_out_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own tensors are beside those of SANA, the command says which layers others compute as linear."""
    attention = ["linear", {"name": "mhla", "blocks": [2, 3], "gate": True, "pos_conv": "lepe3"}]
    model = awake(build(attention=attention))
    config = exported(model, attention, tmp_path / "out")
    facts = config["_mhla_lightning"]
    assert (facts["layers"], facts["computed_as"]) == (["linear", "mhla"], "linear")
    names = ("mixing.weight", "lepe.weight", "lepe.bias", "to_gate.weight", "to_gate.bias")
    assert sorted(facts["added"]) == sorted(f"transformer_blocks.1.attn1.{name}" for name in names)
    result, back = imported(tmp_path / "out")
    assert (result["created"], result["left"]) == ([], [])
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
    capsys.readouterr()
    file = str(tmp_path / "ours.safetensors")
    assert main(["export", file, "--to", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert "layers 1 are no linear attention, but diffusers load" in said
    assert "diffusers.SanaTransformer2DModel.from_pretrained" in said
    assert (tmp_path / "again" / FILE).read_bytes()[-1000:] == (tmp_path / "out" / FILE).read_bytes()[-1000:]


@pytest.mark.parametrize(
    ("attention", "options", "words"),
    [
        ("linear", {"ffn_conv": False}, "blocks.0.ffn.depthwise.conv.weight"),
        (["linear", {"name": "linear", "qkv_bias": True}], {}, "qkv_bias"),
        ("linear", {"patch_size": (2, 1)}, "square patches"),
    ],
    ids=str,
)
def test_a_model_that_sana_cannot_hold_is_refused(
    attention: Any, options: dict[str, Any], words: str
) -> None:
    model = build(attention=attention, **options)
    trained = TrainedModel(model.state_dict(), "sana_600m", attention, {**SMALL, **options}, "this model")
    with refused("this model") as error:
        plan_export(trained)
    assert words in str(error.value)
    assert plan_export(trained, "plain").added == []


def test_names_of_ours_and_of_wrappers_are_taken() -> None:
    state = build(attention="mhla").state_dict()
    wrapped = {f"module.model.{name}": value for name, value in to_diffusers_sana(state).items()}
    for given in (state, wrapped):
        found = from_sana(given)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], value) for name, value in state.items())
    with refused("state") as error:
        from_sana({**state, "patch_embed.proj.bias": torch.zeros(24)})
    assert "patch_embedding.bias twice" in str(error.value)


@pytest.mark.slow  # a text encoder, an autoencoder and a pipeline of diffusers: 10 s of imports
def test_the_pipeline_of_diffusers_draws_with_an_export(tmp_path: Path) -> None:
    """Random small autoencoder and text encoder; the pipeline's own loop gives what our sampler gives."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    config = transformers.Gemma2Config(
        vocab_size=300,
        hidden_size=10,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
    )
    encoder = transformers.Gemma2Model(config).eval()
    model = awake(build(attention="linear", in_channels=4, input_size=16))
    exported(model, "linear", tmp_path / "out", in_channels=4, input_size=16)
    transformer = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    pipeline = diffusers.SanaPipeline(
        tokenizer=None,
        text_encoder=encoder,
        vae=vae.eval(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    _, _, _, mask = texts(model)
    ids = torch.randint(300, (2, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = encoder(ids, attention_mask=mask.long()).last_hidden_state
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    arguments = {
        "prompt_embeds": features,
        "prompt_attention_mask": mask.long(),
        "guidance_scale": 1.0,
        "num_inference_steps": 4,
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "latents": noise,
        "negative_prompt": None,
    }
    latents = pipeline(**arguments, output_type="latent").images
    images = pipeline(**arguments, output_type="pt").images
    assert images.shape == (2, 3, 32, 32)
    assert images.isfinite().all()
    assert images.std() > 0

    x = noise
    sigmas = pipeline.scheduler.sigmas.tolist()
    for now, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        with torch.no_grad():
            x = x + (following - now) * model(x, torch.full((2,), 1000 * now), features, mask)
    torch.testing.assert_close(latents, x, rtol=1e-3, atol=1e-4)
