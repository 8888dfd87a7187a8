"""`mhla import wan`: checkpoints of Wan2.1 and of the MHLA authors, with every tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mhla_lightning.attention import MHLA
from mhla_lightning.backbones import BACKBONES, VideoDiT, build_backbone
from mhla_lightning.cli.main import main
from mhla_lightning.conversion.export import TrainedModel, plan_export
from mhla_lightning.conversion.wan import cycle
from mhla_lightning.errors import UserError
from mhla_lightning.weights.files import read_tensors
from mhla_lightning.weights.wan_names import added, from_wan, needed, to_diffusers, to_wan
from tests.helpers.errors import refused
from tests.helpers.oracles import ORACLES
from tests.helpers.wan_checkpoints import (
    ALL_OPTIONS,
    CHANNELS,
    DEPTH,
    HEADS,
    LAYOUT,
    OPTIONS,
    TEXT,
    hybrid_wan,
    plain_wan,
    theirs,
)

NEW = {"attn.attention.mixing.weight", "attn.out_norm.weight"}


def run_import(source: Path, out: Path, *arguments: str, options: dict[str, Any] | None = None) -> int:
    given = json.dumps(OPTIONS if options is None else options)
    return main(["import", "wan", str(source), "--out", str(out), "--backbone-options", given, *arguments])


def imported(
    source: Path, *arguments: str, options: dict[str, Any] | None = None
) -> tuple[dict[str, Any], VideoDiT]:
    """Return the report, and the model of its `model` section with the written weights."""
    out, report = source.parent / "ours.safetensors", source.parent / "report.json"
    assert run_import(source, out, "--json", str(report), *arguments, options=options) == 0
    result = json.loads(report.read_text())
    model = build_backbone(
        result["model"]["backbone"],
        attention=result["model"]["attention"],
        **result["model"]["backbone_options"],
    )
    model.load_state_dict(load_file(out))
    assert isinstance(model, VideoDiT)
    return result, model.eval()


def some_input() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, CHANNELS, 4, 4, 6, generator=generator),
        torch.tensor([3, 870]),
        torch.randn(2, 6, TEXT, generator=generator),
    )


@pytest.mark.parametrize("name", ["plain", "hybrid"])
def test_names_go_there_and_back(name: str) -> None:
    state = plain_wan() if name == "plain" else hybrid_wan()
    ours = from_wan(state)
    for renamed in (to_wan(ours), to_wan(from_wan(to_diffusers(ours)))):
        assert renamed.keys() == state.keys()
        assert all(torch.equal(renamed[key], state[key]) for key in state)
    assert from_wan(ours).keys() == ours.keys()
    assert sum(value.numel() for value in ours.values()) == sum(value.numel() for value in state.values())
    assert {key for key in ours if not added(key)} == set(needed(DEPTH)) == set(from_wan(plain_wan()))
    build_backbone("wan_1_3b", attention="softmax", **ALL_OPTIONS).load_state_dict(
        {key: ours[key] for key in needed(DEPTH)}
    )


def test_diffusers_names_are_diffusers_names() -> None:
    own = theirs().state_dict()
    renamed = to_diffusers(from_wan(plain_wan()))
    assert {name: value.shape for name, value in renamed.items()} == {
        name: value.shape for name, value in own.items()
    }


@pytest.mark.parametrize("ones", [0, 2, 3, 4])
def test_a_mixing_matrix_may_be_a_convolution(ones: int) -> None:
    matrix = torch.rand(5, 5)
    found = from_wan({"module.blocks.0.self_attn.block_attn.conv.weight": matrix.reshape(5, 5, *[1] * ones)})
    assert torch.equal(found["blocks.0.attn.attention.mixing.weight"], matrix)


def test_matrices_of_single_heads_stay_apart() -> None:
    state = {"blocks.0.attn.attention.mixing.weight": torch.rand(2, 5, 5)}
    assert torch.equal(
        from_wan(to_wan(state))["blocks.0.attn.attention.mixing.weight"], next(iter(state.values()))
    )


@pytest.mark.parametrize(
    "form", ["safetensors", "pt", "state_dict", "wrapped", "folder", "sharded", "diffusers"]
)
def test_every_form_of_a_checkpoint_gives_the_same_weights(tmp_path: Path, form: str) -> None:
    state = plain_wan()
    source = tmp_path / "model"
    source.mkdir()
    if form in ("pt", "state_dict", "wrapped"):
        named = (
            {f"module.model.{name}": value for name, value in state.items()} if form == "wrapped" else state
        )
        source = source / "model.pt"
        torch.save({"state_dict": named, "step": 7} if form == "state_dict" else named, source)
    elif form == "sharded":
        names = list(state)
        parts = {f"model-{i}.safetensors": {name: state[name] for name in names[i::2]} for i in range(2)}
        for file, part in parts.items():
            save_file(part, source / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        tensors = (
            {name: value.clone() for name, value in to_diffusers(from_wan(state)).items()}
            if form == "diffusers"
            else state
        )
        save_file(tensors, source / "diffusion_pytorch_model.safetensors")
        source = source if form == "folder" else source / "diffusion_pytorch_model.safetensors"
    out = tmp_path / "ours.safetensors"
    assert run_import(source, out, "--heads", str(HEADS)) == 0
    written, wanted = load_file(out), from_wan(state)
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)


def test_an_imported_wan_computes_what_diffusers_does(tmp_path: Path) -> None:
    """The number of heads comes from config.json, since the tensors do not show it."""
    public = theirs()
    public.save_pretrained(tmp_path / "wan")
    out = tmp_path / "ours.safetensors"
    assert run_import(tmp_path / "wan", out) == 0
    model = build_backbone("wan_1_3b", attention="softmax", **ALL_OPTIONS).eval()
    model.load_state_dict(load_file(out))
    x, t, text = some_input()
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, text), public(x, t, text).sample, rtol=1e-5, atol=1e-5)


def test_the_architecture_of_a_full_checkpoint_is_found(tmp_path: Path) -> None:
    state = hybrid_wan()
    save_file(state, tmp_path / "wan.safetensors")
    result, model = imported(tmp_path / "wan.safetensors", "--layout", *map(str, LAYOUT))
    assert (result["created"], result["left"]) == ([], [])
    softmax, mhla, gated = result["model"]["attention"]
    assert softmax == "softmax"
    assert (mhla["blocks"], mhla["gate"], mhla["pos_conv"], mhla["mix_clamp"], mhla["normalizer"]) == (
        list(LAYOUT),
        False,
        "none",
        None,
        "none",
    )
    assert (gated["blocks"], gated["gate"], gated["pos_conv"], gated["out_norm"]) == (
        list(LAYOUT),
        True,
        "lepe3",
        True,
    )
    back = to_wan(model.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert sum(row["parameters"] for row in result["rows"]) == sum(value.numel() for value in state.values())


def test_mixing_values_are_never_clamped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = hybrid_wan()
    mixing = state["blocks.1.self_attn.block_attn.conv.weight"][:, :, 0, 0]
    save_file(state, tmp_path / "wan.safetensors")
    _, model = imported(tmp_path / "wan.safetensors", "--layout", *map(str, LAYOUT))
    assert mixing.min() < 0
    assert mixing.max() > 1
    operator: Any = model.blocks[1]
    assert isinstance(operator.attn.attention, MHLA)
    operator.attn.attention.mixing.project_()
    assert torch.equal(operator.attn.attention.mixing.weight, mixing)
    said = capsys.readouterr().out
    assert "training leaves them so only where mix_clamp is null" in said
    section = yaml.safe_load(said[said.index("model:") : said.index("mixing values")])["model"]["init_args"]
    assert section["attention"][1]["mix_clamp"] is None
    assert section["init_from"] == str(tmp_path / "ours.safetensors")


def test_an_imported_release_computes_the_same(tmp_path: Path) -> None:
    """The oracle has the release's own names; 150 blocks are known to be 3 x 5 x 10."""
    with np.load(ORACLES / "wan_full_tiny_hybrid.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    save_file(
        {name.removeprefix("param."): value for name, value in arrays.items() if name.startswith("param.")},
        tmp_path / "wan.safetensors",
    )
    result, model = imported(
        tmp_path / "wan.safetensors", options={"input_size": [3, 10, 20], "text_length": 6}
    )
    assert [
        entry if isinstance(entry, str) else entry["blocks"] for entry in result["model"]["attention"]
    ] == ["softmax", [3, 5, 10]]
    assert result["created"] == result["left"] == []
    short = torch.cat([arrays["in.ctx1"], torch.zeros(2, TEXT)])
    with torch.no_grad():
        out = model(arrays["in.latents"], arrays["in.t"], torch.stack([arrays["in.ctx0"], short]))
    torch.testing.assert_close(out, arrays["out.y"], rtol=1e-5, atol=1e-5)


def test_tensors_of_mhla_are_listed_as_new(tmp_path: Path) -> None:
    save_file(plain_wan(), tmp_path / "wan.safetensors")
    arguments = (
        "--heads",
        str(HEADS),
        "--attention",
        "[softmax, {name: mhla, gate: true}, mhla]",
        "--layout",
        *map(str, LAYOUT),
    )
    result, model = imported(tmp_path / "wan.safetensors", *arguments)
    gate = {"blocks.1.attn.gate.weight", "blocks.1.attn.gate.bias"}
    assert set(result["created"]) == gate | {f"blocks.{i}.{name}" for i in (1, 2) for name in NEW}
    assert result["left"] == []
    assert set(result["copied"]) == set(from_wan(plain_wan()))
    assert len({tuple(entry["blocks"]) for entry in result["model"]["attention"][1:]}) == 1
    assert model.blocks[1].get_submodule("attn.attention.mixing").weight.shape == (12, 12)


def test_a_text_that_mhla_reads_starts_from_the_softmax_of_the_file(tmp_path: Path) -> None:
    save_file(plain_wan(), tmp_path / "wan.safetensors")
    options = OPTIONS | {"cross_attention": {"name": "mhla", "blocks": [1, 2, 2], "context_blocks": 2}}
    result, model = imported(tmp_path / "wan.safetensors", "--heads", str(HEADS), options=options)
    layers = len(model.blocks)
    assert result["created"] == [f"blocks.{i}.cross_attn.mixing.weight" for i in range(layers)]
    assert result["left"] == []
    model(*some_input())
    trained = TrainedModel(
        model.state_dict(),
        "wan_1_3b",
        result["model"]["attention"],
        result["model"]["backbone_options"],
        "it",
    )
    for name in ("diffusers", "wan"):
        with refused("format"):
            plan_export(trained, name)
    assert plan_export(trained, "plain").added == []


def test_tensors_that_softmax_lacks_are_listed_as_left_over(tmp_path: Path) -> None:
    save_file(hybrid_wan(), tmp_path / "wan.safetensors")
    result, _ = imported(tmp_path / "wan.safetensors", "--attention", "softmax")
    assert set(result["left"]) == {name for name in from_wan(hybrid_wan()) if added(name)}


def test_the_public_sizes_are_found_by_their_width() -> None:
    """Uses the names and shapes of both sizes only, since the checkpoints have gigabytes."""
    for name, dim, heads, depth in (("wan_1_3b", 1536, 12, 30), ("wan_14b", 5120, 40, 40)):
        with torch.device("meta"):
            model: Any = BACKBONES[name](attention="softmax")
        assert (model.embed_dim, model.blocks[0].attn.heads, len(model.blocks)) == (dim, heads, depth)


def test_hybrids_are_the_shortest_list() -> None:
    mhla = {"name": "mhla"}
    assert cycle(["softmax"] * 4) == "softmax"
    assert cycle([mhla]) == mhla
    assert cycle(["softmax", mhla, mhla] * 10) == ["softmax", mhla, mhla]
    assert cycle(["softmax", mhla, mhla, "softmax"]) == ["softmax", mhla, mhla]
    assert cycle([mhla, mhla, "softmax", mhla]) == [mhla, mhla, "softmax"]
    assert cycle([mhla, mhla, mhla, "softmax"]) == [mhla, mhla, mhla, "softmax"]


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in hybrid_wan().items() if key != name}


def changed(name: str, *shape: int) -> dict[str, Tensor]:
    return {**hybrid_wan(), name: torch.zeros(shape)}


MISTAKES: dict[str, tuple[dict[str, Tensor], list[str], list[str]]] = {
    "105 blocks": (hybrid_wan(105), [], ["--layout: ", "105 blocks in layer 1", "7 3 5"]),
    "another layout": (
        hybrid_wan(),
        ["--layout", "2", "2", "2"],
        ["--layout: 2 x 2 x 2 is 8 blocks", "layer 1", "mixes 12"],
    ),
    "layout without mhla": (
        plain_wan(),
        ["--heads", "2", "--layout", "2", "2", "3"],
        ["--layout: ", "--attention"],
    ),
    "unknown heads": (plain_wan(), [], ["--heads: "]),
    "other heads": (
        hybrid_wan(),
        ["--heads", "3", "--layout", "2", "2", "3"],
        ["--heads: 3", "the norms of", "2 heads"],
    ),
    "another size": (
        plain_wan(),
        ["--backbone", "wan_1_3b"],
        ["another size", "patch_embedding", "(24,", "needs (1536,"],
    ),
    "missing": (
        without("blocks.2.norm3.bias"),
        ["--layout", "2", "2", "3"],
        ["another size", "it has no blocks.2.norm3.bias"],
    ),
    "missing part": (
        without("blocks.0.self_attn.k.weight"),
        [],
        ["blocks.0.attn.qkv.weight is q, k and v", "q (24, 24), v (24, 24)"],
    ),
    "missing block": (
        {n: v for n, v in hybrid_wan().items() if ".1." not in n[6:10]},
        [],
        ["it has blocks.2 and no blocks.1"],
    ),
    "unknown": (
        changed("img_emb.proj.0.weight", 3),
        ["--layout", "2", "2", "3"],
        ["img_emb.proj.0.weight (3,) has no place in wan_1_3b"],
    ),
    "unknown in a block": (
        changed("blocks.0.cross_attn.k_img.bias", 24),
        ["--layout", "2", "2", "3"],
        ["blocks.0.cross_attn.k_img.bias"],
    ),
    "image to video": (
        changed("patch_embedding.weight", 24, 9, 1, 2, 2),
        [],
        ["9 channels", "4"],
    ),
    "twice": (changed("module.patch_embedding.bias", 24), [], ["twice"]),
    "no Wan": (
        {"encoder.weight": torch.zeros(2)},
        [],
        ["Wan2.1", "patch_embedding.weight", "encoder.weight"],
    ),
    "odd heads": (plain_wan(), ["--heads", "5"], ["--heads: 5", "24 channels"]),
    "two numbers of heads": (
        plain_wan(),
        ["--heads", "2", "--backbone-options", '{"num_heads": 4}'],
        ["--heads: 2", "--backbone-options", "num_heads: 4"],
    ),
    "another family": (
        plain_wan(),
        ["--backbone", "dit_s2"],
        ["--backbone: ", "dit_s2", "wan_1_3b, wan_14b, wan_tiny"],
    ),
    "layout below 1": (hybrid_wan(), ["--layout", "0", "2", "3"], ["--layout: 0"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_checkpoint_gives_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    state, arguments, words = MISTAKES[mistake]
    if mistake == "twice":
        torch.save(state, tmp_path / "wan.pt")
    else:
        save_file(state, tmp_path / "wan.safetensors")
    (source,) = tmp_path.iterdir()
    status = run_import(
        source, tmp_path / "ours.safetensors", *arguments, options={} if mistake == "another size" else None
    )
    sentence = capsys.readouterr().err
    assert (status, sentence.count("\n")) == (2, 1), sentence
    for word in words:
        assert word in sentence
    if "--layout" not in words[0] and mistake not in (
        "layout below 1",
        "another family",
        "two numbers of heads",
    ):
        assert source.name in sentence
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("name", ["words.txt", "fake.pt"])
@pytest.mark.parametrize(
    "content",
    [
        b"hello\n",
        b"nothing",
        b"",
        b"a plain sentence",
        b"\x80\x02",
        b"(",
        b".",
        b"PK\x03\x04",
        b"q",
        bytes(range(256)),
    ],
    ids=str,
)
def test_a_file_that_is_no_checkpoint_gives_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    """torch's unpickler reads letters as instructions and fails in many ways."""
    (tmp_path / name).write_bytes(content)
    assert run_import(tmp_path / name, tmp_path / "ours.safetensors") == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1, sentence
    assert name in sentence


@pytest.mark.parametrize("named", [[], ["--backbone", "wan_1_3b"]], ids=["sizes found", "backbone named"])
def test_heads_are_those_of_config_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], named: list[str]
) -> None:
    theirs().save_pretrained(tmp_path / "wan")
    options = ALL_OPTIONS if named else OPTIONS
    assert (
        run_import(
            tmp_path / "wan",
            tmp_path / "ours.safetensors",
            "--heads",
            "3",
            *named,
            options={**options, "num_heads": 3},
        )
        == 2
    )
    assert "--heads: 3 contradicts the config.json" in capsys.readouterr().err
    assert (
        run_import(
            tmp_path / "wan", tmp_path / "ours.safetensors", "--heads", str(HEADS), *named, options=options
        )
        == 0
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ".safetensors"),
        ({"a.safetensors": b"", "b.safetensors": b""}, "a.safetensors, b.safetensors"),
        ({"m.safetensors.index.json": b"[]"}, "m.safetensors.index.json"),
        (
            {"m.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'},
            "'gone.safetensors'",
        ),
        (
            {"m.safetensors.index.json": b'{"weight_map": {"a": "../wan.safetensors"}}'},
            "'../wan.safetensors'",
        ),
        ({"m.safetensors.index.json": b'{"weight_map": {"a": 3, "b": "c"}}'}, "m.safetensors.index.json"),
        ({"a.safetensors": b"nothing"}, "a.safetensors"),
    ],
    ids=str,
)
def test_a_wrong_folder_is_refused(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    save_file(plain_wan(), tmp_path / "wan.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_tensors(folder, "path")
    assert words in str(raised.value)
    assert str(folder) in str(raised.value)
