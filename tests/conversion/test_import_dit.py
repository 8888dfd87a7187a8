"""`mhla import dit`: DiT checkpoints of other projects, with every tensor accounted for."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import Tensor, nn

from mhla_lightning.backbones import build_backbone
from mhla_lightning.cli import import_
from mhla_lightning.cli.main import main
from mhla_lightning.conversion.foreign import FAMILIES
from mhla_lightning.errors import UserError
from mhla_lightning.weights.files import read_tensors
from mhla_lightning.weights.warm_start import load_matching, read_weights

DIM, DEPTH, HEADS, CLASSES = 24, 3, 3, 5
OPTIONS: dict[str, Any] = {
    "input_size": 8,
    "embed_dim": DIM,
    "depth": DEPTH,
    "num_heads": HEADS,
    "num_classes": CLASSES,
}
NEW_IN_MHLA = {
    "attn.attention.mixing.weight",
    "attn.gate.weight",
    "attn.gate.bias",
    "cpe.depthwise.conv.weight",
    "cpe.depthwise.conv.bias",
}


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, DIM), nn.SiLU(), nn.Linear(DIM, DIM))

    def forward(self, t: Tensor) -> Tensor:
        frequency = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        return self.mlp(torch.cat([torch.cos(t[:, None] * frequency), torch.sin(t[:, None] * frequency)], 1))


class Labels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(CLASSES + 1, DIM)


class PublicBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = Attention(DIM, num_heads=HEADS, qkv_bias=True)
        self.mlp = Mlp(DIM, 4 * DIM, act_layer=lambda: nn.GELU(approximate="tanh"))  # type: ignore[arg-type]
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 6 * DIM))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        parts = [part[:, None] for part in self.adaLN_modulation(c).chunk(6, 1)]
        x = x + parts[2] * self.attn(self.norm1(x) * (1 + parts[1]) + parts[0])
        return x + parts[5] * self.mlp(self.norm2(x) * (1 + parts[4]) + parts[3])


class PublicHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(DIM, 2 * 2 * 8)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 2 * DIM))


class PublicDiT(nn.Module):
    """The public DiT built from timm's parts with its names, independent of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = PatchEmbed(8, 2, 4, DIM)
        self.t_embedder, self.y_embedder = Embedder(), Labels()
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, DIM), requires_grad=False)
        self.blocks = nn.ModuleList(PublicBlock() for _ in range(DEPTH))
        self.final_layer = PublicHead()
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, 2)
        out = self.final_layer.linear(self.final_layer.norm_final(tokens) * (1 + scale) + shift)
        return torch.einsum("nhwpqc->nchpwq", out.reshape(len(x), 4, 4, 2, 2, 8)).reshape(len(x), 8, 8, 8)


@pytest.fixture
def public() -> PublicDiT:
    return PublicDiT().eval()


def training_checkpoint(model: nn.Module, path: Path) -> Path:
    """Write a checkpoint like the public DiT's train.py.

    The raw weights differ from the average, and the arguments are a Namespace.
    """
    raw = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    content = {
        "model": raw,
        "ema": model.state_dict(),
        "opt": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(model="DiT-S/2"),
    }
    torch.save(content, path)
    return path


def run_import(source: Path, out: Path, *arguments: str, options: dict[str, Any] | None = None) -> int:
    given = json.dumps(OPTIONS if options is None else options)
    return main(
        [
            "import",
            "dit",
            str(source),
            "--out",
            str(out),
            "--backbone",
            "dit_s2",
            "--backbone-options",
            given,
            *arguments,
        ]
    )


def ours(path: Path, attention: Any = "softmax", **options: Any) -> Any:
    model = build_backbone("dit_s2", attention=attention, **{**OPTIONS, **options})
    model.load_state_dict(load_file(path))
    return model.eval()


def some_input() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        torch.tensor([3, 870]),
        torch.tensor([0, CLASSES]),
    )


@pytest.mark.parametrize("form", ["bare", "ema", "wrapped", "safetensors"])
def test_an_imported_dit_computes_what_the_public_one_does(
    public: PublicDiT, tmp_path: Path, form: str
) -> None:
    source = tmp_path / ("public.safetensors" if form == "safetensors" else "public.pt")
    if form == "ema":
        training_checkpoint(public, source)
    elif form == "safetensors":
        save_file(public.state_dict(), source)
    else:
        torch.save(
            {
                ("module." if form == "wrapped" else "") + name: value
                for name, value in public.state_dict().items()
            },
            source,
        )
    assert run_import(source, tmp_path / "ours.safetensors") == 0
    torch.testing.assert_close(
        ours(tmp_path / "ours.safetensors")(*some_input()), public(*some_input()), rtol=1e-5, atol=1e-5
    )


def test_every_tensor_is_accounted_for(public: PublicDiT, tmp_path: Path) -> None:
    source, out, report = tmp_path / "public.pt", tmp_path / "ours.safetensors", tmp_path / "report.json"
    torch.save({**public.state_dict(), "step": torch.tensor(400_000)}, source)
    assert run_import(source, out, "--attention", "mhla", "--json", str(report)) == 0
    result = json.loads(report.read_text())
    written = load_file(out)
    assert set(result["copied"]) == set(public.state_dict())
    assert set(result["created"]) == {f"blocks.{i}.{name}" for i in range(DEPTH) for name in NEW_IN_MHLA}
    assert result["left"] == ["step"]
    assert set(result["copied"]) | set(result["created"]) == set(written)
    rows = {(row["state"], row["name"]): row for row in result["rows"]}
    assert rows["copied", "blocks.*.attn.qkv.weight"]["tensors"] == DEPTH
    assert rows["created", "blocks.*.attn.gate.weight"]["parameters"] == DEPTH * DIM * DIM
    assert sum(row["parameters"] for row in result["rows"] if row["state"] != "left") == sum(
        value.numel() for value in written.values()
    )


def test_tensors_of_mhla_keep_their_initialisation(public: PublicDiT, tmp_path: Path) -> None:
    torch.save(public.state_dict(), tmp_path / "public.pt")
    for name in ("a", "b"):
        assert (
            run_import(
                tmp_path / "public.pt",
                tmp_path / f"{name}.safetensors",
                "--attention",
                "{name: mhla, blocks: 2}",
            )
            == 0
        )
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)  # the same command, the same file
    fresh = build_backbone("dit_s2", attention={"name": "mhla", "blocks": 2}, **OPTIONS).state_dict()
    assert torch.equal(
        first["blocks.1.attn.attention.mixing.weight"], fresh["blocks.1.attn.attention.mixing.weight"]
    )
    assert not first["blocks.1.cpe.depthwise.conv.weight"].any()
    assert first["blocks.1.attn.gate.weight"].any()
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["format"], header["backbone"], json.loads(header["attention"])) == (
        "1",
        "dit_s2",
        {"name": "mhla", "blocks": 2},
    )


def release_state(public: PublicDiT, dwconv: bool) -> dict[str, Tensor]:
    """Return tensors with the names and shapes of the MHLA authors (SPEC 4.2)."""
    generator = torch.Generator().manual_seed(2)
    state = {}
    for name, value in public.state_dict().items():
        state[name.replace("attn.qkv.", "attn.to_qkv.").replace("attn.proj.", "attn.to_out.0.")] = value
    for i in range(DEPTH):
        shapes = {
            "attn.norm.weight": (DIM,),
            "attn.norm.bias": (DIM,),
            "attn.lepe.weight": (DIM, 1, 3, 3),
            "attn.lepe.bias": (DIM,),
        }
        shapes["attn.piece_attn.conv.weight"] = (4, 4, 1, 1)
        if dwconv:
            shapes |= {"dw_conv.weight": (DIM, 1, 3, 3), "dw_conv.bias": (DIM,)}
        state |= {
            f"blocks.{i}.{name}": torch.rand(shape, generator=generator) for name, shape in shapes.items()
        }
    return state


@pytest.mark.parametrize("dwconv", [False, True])
def test_the_attention_of_the_authors_checkpoint_is_found(
    public: PublicDiT, tmp_path: Path, dwconv: bool
) -> None:
    state = release_state(public, dwconv)
    torch.save(state, tmp_path / "release.pt")
    report = tmp_path / "report.json"
    assert run_import(tmp_path / "release.pt", tmp_path / "ours.safetensors", "--json", str(report)) == 0
    result = json.loads(report.read_text())
    assert (result["created"], result["left"], len(result["copied"])) == ([], [], len(state))
    model = ours(
        tmp_path / "ours.safetensors", {"name": "mhla", "preset": "release", "blocks": 2}, dwconv=dwconv
    )
    assert torch.equal(
        model.blocks[1].attn.attention.mixing.weight,
        state["blocks.1.attn.piece_attn.conv.weight"][:, :, 0, 0],
    )
    assert torch.equal(model.blocks[2].attn.lepe.conv.weight, state["blocks.2.attn.lepe.weight"])
    assert torch.equal(model.blocks[0].attn.proj.weight, state["blocks.0.attn.to_out.0.weight"])
    if dwconv:
        assert torch.equal(model.blocks[2].dw_conv.conv.weight, state["blocks.2.dw_conv.weight"])


def test_tensors_that_the_target_lacks_are_listed_as_left_over(public: PublicDiT, tmp_path: Path) -> None:
    """MHLA weights in a softmax model: the table lists the mixing matrices as left over."""
    torch.save(release_state(public, dwconv=False), tmp_path / "release.pt")
    report = tmp_path / "report.json"
    assert (
        run_import(
            tmp_path / "release.pt",
            tmp_path / "ours.safetensors",
            "--attention",
            "softmax",
            "--json",
            str(report),
        )
        == 0
    )
    left = json.loads(report.read_text())["left"]
    assert len(left) == 5 * DEPTH
    assert "blocks.2.attn.attention.mixing.weight" in left


def test_another_resolution_takes_its_own_positions(public: PublicDiT, tmp_path: Path) -> None:
    """Positions are a formula: a 256 px checkpoint starts a 512 px model."""
    torch.save(public.state_dict(), tmp_path / "public.pt")
    larger = {**OPTIONS, "input_size": 16}
    assert (
        run_import(
            tmp_path / "public.pt",
            tmp_path / "ours.safetensors",
            "--json",
            str(tmp_path / "r.json"),
            options=larger,
        )
        == 0
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["created"], result["left"]) == (["pos_embed"], ["pos_embed"])
    fresh = build_backbone("dit_s2", attention="softmax", **larger)
    assert torch.equal(load_file(tmp_path / "ours.safetensors")["pos_embed"], fresh.state_dict()["pos_embed"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embed_dim": 48}, ["x_embedder.proj.bias is (24,)", "needs (48,)"]),
        ({"num_classes": 7}, ["y_embedder.embedding_table.weight is (6, 24)", "needs (8, 24)"]),
        ({"patch_size": 4}, ["x_embedder.proj.weight is (24, 4, 2, 2)", "needs (24, 4, 4, 4)"]),
        ({"depth": 2}, ["blocks.2.", "has no place in dit_s2"]),
        ({"depth": 4}, ["it has no blocks.3.", "dit_s2 needs one of"]),
        ({"learn_sigma": False}, ["final_layer.linear.weight is (32, 24)", "needs (16, 24)"]),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_size_is_refused(
    public: PublicDiT,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    words: list[str],
) -> None:
    torch.save(public.state_dict(), tmp_path / "public.pt")
    assert (
        run_import(tmp_path / "public.pt", tmp_path / "ours.safetensors", options={**OPTIONS, **options}) == 2
    )
    sentence = capsys.readouterr().err
    assert "public.pt: " in sentence
    for word in words:
        assert word in sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["public.pt"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "gone.pt"}, "PATH: gone.pt"),
        ({"out": "ours.pt"}, "--out: ours.pt"),
        ({"out": "nowhere/ours.safetensors"}, "--out: nowhere/ours.safetensors"),
        ({"more": ["--attention", "[softmax"]}, "--attention: [softmax"),
        ({"more": ["--attention", "sofmax"]}, "did you mean 'softmax'"),
        ({"more": ["--backbone", "dit_s3"]}, "'dit_s3'"),
        ({"more": ["--backbone-options", "8"]}, "--backbone-options: 8"),
        ({"more": ["--json", "nowhere/report.json"]}, "--json"),
    ],
    ids=str,
)
def test_mistakes_are_refused(
    public: PublicDiT,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(public.state_dict(), "public.pt")
    source, out = Path(change.get("source", "public.pt")), Path(change.get("out", "ours.safetensors"))
    assert run_import(source, out, *change.get("more", [])) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["public.pt"]


def test_the_file_that_is_read_is_never_written(
    public: PublicDiT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "public.safetensors"
    save_file(public.state_dict(), path)
    before = path.read_bytes()
    assert run_import(path, path) == 2
    assert f"--out: {path}" in capsys.readouterr().err
    assert path.read_bytes() == before


class Dangerous:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("unpickled"),)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Dangerous()}, "bad.pt")
    Path("text.pt").write_text("no checkpoint")
    torch.save([1, 2], "list.pt")
    for name in ("bad.pt", "text.pt", "list.pt"):
        with pytest.raises(UserError) as error:
            read_tensors(Path(name), "path")
        assert name in str(error.value)
    assert not Path("unpickled").exists()


def test_a_mixing_matrix_of_other_blocks_is_resampled(public: PublicDiT, tmp_path: Path) -> None:
    """The release's blocks are a square: 2 x 2 of them become 4 x 1."""
    state = release_state(public, dwconv=False)
    torch.save(state, tmp_path / "release.pt")
    out, report = tmp_path / "ours.safetensors", tmp_path / "report.json"
    attention = "{name: mhla, preset: release, block_size: null, blocks: [4, 1]}"
    assert run_import(tmp_path / "release.pt", out, "--attention", attention, "--json", str(report)) == 0
    name = "blocks.1.attn.attention.mixing.weight"
    told = json.loads(report.read_text())
    assert name in told["resampled"]
    assert name not in told["copied"]
    # Rows at 1/8, 3/8, 5/8 and 7/8 between those at 1/4 and 3/4; the one column between the two.
    line = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    weights = torch.kron(line, torch.tensor([[0.5, 0.5]]))
    mixing = state["blocks.1.attn.piece_attn.conv.weight"][:, :, 0, 0]
    torch.testing.assert_close(load_file(out)[name], weights @ mixing @ weights.T)


def test_the_weights_of_a_training_checkpoint_can_be_chosen(
    public: PublicDiT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = training_checkpoint(public, tmp_path / "training.pt"), tmp_path / "ours.safetensors"
    name = "final_layer.linear.bias"
    assert run_import(path, out) == 0
    assert "'ema', not 'model'" in capsys.readouterr().out
    assert torch.equal(load_file(out)[name], public.state_dict()[name])
    assert run_import(path, out, "--weights", "model") == 0
    assert not load_file(out)[name].any()
    assert run_import(path, out, "--weights", "opt") == 2
    assert "--weights" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_not_imported(
    public: PublicDiT, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    state = {name: tensor.clone() for name, tensor in public.state_dict().items()}
    state["blocks.1.mlp.fc1.weight"][0, 0] = value
    torch.save(state, tmp_path / "public.pt")
    assert run_import(tmp_path / "public.pt", tmp_path / "ours.safetensors") == 2
    assert "blocks.1.mlp.fc1.weight" in capsys.readouterr().err
    assert not (tmp_path / "ours.safetensors").exists()


def test_init_from_takes_the_written_file_and_the_foreign_one(public: PublicDiT, tmp_path: Path) -> None:
    torch.save(public.state_dict(), tmp_path / "public.pt")
    assert run_import(tmp_path / "public.pt", tmp_path / "ours.safetensors") == 0
    training_checkpoint(public, tmp_path / "training.pt")
    for name in ("public.pt", "ours.safetensors", "training.pt"):
        model: Any = build_backbone("dit_s2", attention="softmax", **OPTIONS)
        path, state = read_weights(str(tmp_path / name))
        report = load_matching(model, model.adapt_state_dict(state), path)
        assert (report.fresh, report.left) == ([], [])
        torch.testing.assert_close(model.eval()(*some_input()), public(*some_input()), rtol=1e-5, atol=1e-5)


def test_init_from_refuses_weights_of_another_width(public: PublicDiT) -> None:
    """Otherwise a few tensors would be copied and the rest ignored without a word."""
    model: Any = build_backbone("dit_s2", attention="softmax", **{**OPTIONS, "embed_dim": 48})
    with pytest.raises(UserError) as error:
        model.adapt_state_dict(public.state_dict())
    assert "x_embedder.proj.bias" in str(error.value)


def test_the_command_knows_every_family() -> None:
    assert import_._KINDS.keys() == {*FAMILIES, "timm"}  # which timm itself opens
