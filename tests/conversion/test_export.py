"""`mhla export`: folders that diffusers and Wan2.1's own code open."""

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
from mhla_lightning.config.recipes import read_yaml
from mhla_lightning.conversion.export import TrainedModel, plan_export, write
from mhla_lightning.weights.wan_names import added, from_wan, to_diffusers, to_wan
from tests.helpers.errors import refused
from tests.helpers.wan_checkpoints import (
    ALL_OPTIONS,
    CHANNELS,
    DEPTH,
    HEADS,
    LAYOUT,
    OPTIONS,
    TEXT,
    hybrid_wan,
    opened,
    plain_wan,
)

FILE = "diffusion_pytorch_model.safetensors"
MHLA = {"name": "mhla", "blocks": list(LAYOUT), "gate": True}


@pytest.fixture
def hybrid(tmp_path: Path) -> Path:
    """Import a checkpoint with every key by `mhla import wan`."""
    save_file(hybrid_wan(), tmp_path / "wan.safetensors")
    layout = ["--layout", *map(str, LAYOUT), "--backbone-options", json.dumps(OPTIONS)]
    assert (
        main(
            [
                "import",
                "wan",
                str(tmp_path / "wan.safetensors"),
                "--out",
                str(tmp_path / "ours.safetensors"),
                *layout,
            ]
        )
        == 0
    )
    return tmp_path / "ours.safetensors"


def random_model(attention: Any, **options: Any) -> Any:
    """Build a model with random weights; a fresh model's output is zero."""
    torch.manual_seed(0)
    model = build_backbone("wan_1_3b", attention=attention, **{**ALL_OPTIONS, **options}).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.2
    return model


def trained(model: torch.nn.Module, attention: Any, **options: Any) -> TrainedModel:
    return TrainedModel(
        model.state_dict(), "wan_1_3b", attention, {**ALL_OPTIONS, **options}, "a test's model"
    )


def some_input() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, CHANNELS, 4, 4, 6), torch.tensor([3, 870]), torch.randn(2, 6, TEXT)


def test_diffusers_computes_what_ours_does(tmp_path: Path) -> None:
    ours = random_model("softmax")
    export = plan_export(trained(ours, "softmax"))
    write(export, tmp_path / "out")
    theirs = opened(tmp_path / "out", strict=True)
    x, t, text = some_input()
    with torch.no_grad():
        out = ours(x, t, text)
        torch.testing.assert_close(theirs(x, t, text).sample, out, rtol=1e-5, atol=1e-5)
    assert out.std() > 0.1
    assert export.added == []


@pytest.mark.parametrize("format", ["wan", "diffusers"])
def test_import_and_export_are_bit_equal(hybrid: Path, format: str) -> None:
    out = hybrid.parent / "out"
    assert main(["export", str(hybrid), "--to", str(out), "--format", format]) == 0
    state, written = hybrid_wan(), load_file(out / FILE)
    wanted = state if format == "wan" else to_diffusers(from_wan(state))
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    again = hybrid.parent / "again.safetensors"
    assert (
        main(["import", "wan", str(out), "--out", str(again)]) == 0
    )  # layout, heads and sizes come out of config.json
    first, second = load_file(hybrid), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_folder_describes_its_content(hybrid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = hybrid.parent / "out", hybrid.parent / "report.json"
    assert main(["export", str(hybrid), "--to", str(out), "--json", str(report)]) == 0
    facts = json.loads((out / "config.json").read_text())["_mhla_lightning"]
    names = to_diffusers({name: value for name, value in from_wan(hybrid_wan()).items() if added(name)})
    assert (
        set(facts["added"])
        == set(names)
        == {name for name in load_file(out / FILE) if name not in to_diffusers(from_wan(plain_wan()))}
    )
    assert facts["layers"] == ["softmax", "mhla", "mhla"]
    assert (facts["backbone"], facts["attention"][1]["blocks"]) == ("wan_1_3b", list(LAYOUT))
    result = json.loads(report.read_text())
    assert sum(row["parameters"] for row in result["rows"]) == sum(
        value.numel() for value in hybrid_wan().values()
    )
    assert "layers 1, 2 are no softmax attention" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["config.json", FILE]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # both have the same permissions


def test_diffusers_opens_a_hybrid_by_its_shared_layers(hybrid: Path) -> None:
    assert main(["export", str(hybrid), "--to", str(hybrid.parent / "out")]) == 0
    theirs = opened(hybrid.parent / "out", strict=False)
    facts = json.loads((hybrid.parent / "out" / "config.json").read_text())["_mhla_lightning"]
    assert load_file(hybrid.parent / "out" / FILE).keys() == theirs.state_dict().keys() | set(facts["added"])
    shared = to_diffusers(from_wan(plain_wan()))
    state = hybrid_wan()
    assert theirs.state_dict().keys() == shared.keys()
    assert torch.equal(
        theirs.state_dict()["blocks.2.attn1.to_k.weight"], state["blocks.2.self_attn.k.weight"]
    )


def test_wans_own_config(hybrid: Path) -> None:
    out = hybrid.parent / "out"
    assert main(["export", str(hybrid), "--to", str(out), "--format", "wan"]) == 0
    config = json.loads((out / "config.json").read_text())
    found = [config[key] for key in ("_class_name", "dim", "num_heads", "num_layers", "in_dim", "text_len")]
    assert found == ["WanModel", 24, HEADS, DEPTH, CHANNELS, 6]


def test_tensors_that_wan_lacks_are_written_beside_its_own(tmp_path: Path) -> None:
    """Linear attention, a position convolution after the block, one mixing matrix per head."""
    entries = ["linear", {**MHLA, "pos_conv": "cpe3", "mix_per_head": True}, "softmax"]
    ours = random_model(entries)
    for format in ("wan", "diffusers"):
        export = plan_export(trained(ours, entries), format)
        write(export, tmp_path / format)
        back = from_wan(load_file(tmp_path / format / FILE))
        assert back.keys() == ours.state_dict().keys()
        assert all(torch.equal(back[name], value) for name, value in ours.state_dict().items())
        assert export.config["_mhla_lightning"]["layers"] == ["linear", "mhla", "softmax"]


CONVOLVED: list[Any] = [
    {"name": "mhla", "blocks": [4, 1, 3], "pos_conv": "cpe3", "normalizer": "block"},
    {"name": "softmax", "pos_conv": "cpe3"},
    MHLA,
]


def again(source: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Return status and report of `mhla import wan` with --layout 2 2 3."""
    report = source.parent / "again.json"
    out = ["--out", str(source.parent / "again.safetensors"), "--json", str(report)]
    status = main(["import", "wan", str(source), *out, "--layout", *map(str, LAYOUT), *arguments])
    return status, json.loads(report.read_text()) if status == 0 else {}


@pytest.mark.parametrize("format", ["wan", "diffusers"])
def test_another_layout_keeps_the_rest_of_our_own_attention(tmp_path: Path, format: str) -> None:
    """12 blocks can be 4 x 1 x 3 or 2 x 2 x 3: mixing matrices are resampled, all else stays the same."""
    ours = random_model(CONVOLVED)
    write(plan_export(trained(ours, CONVOLVED), format), tmp_path / "out")
    status, report = again(tmp_path / "out")
    assert (status, report["created"], report["left"]) == (0, [], [])
    assert report["model"]["attention"] == [{**CONVOLVED[0], "blocks": list(LAYOUT)}, *CONVOLVED[1:]]
    written = load_file(tmp_path / "again.safetensors")
    assert written.keys() == ours.state_dict().keys()
    resampled = set(report["resampled"])
    assert resampled == {"blocks.0.attn.attention.mixing.weight"}  # the layout of the others stays
    for name, value in ours.state_dict().items():
        assert torch.equal(written[name], value) == (name not in resampled), name


@pytest.mark.parametrize(
    "entry", ["mhla", {"name": "mhla", "block_size": [1, 2, 1]}], ids=["a name", "block_size"]
)
def test_a_layout_replaces_other_options_for_blocks(tmp_path: Path, entry: Any) -> None:
    options = {"blocks": [4, 1, 3]}
    ours = random_model(entry, **options)
    write(plan_export(trained(ours, entry, **options)), tmp_path / "out")
    assert len(ours.state_dict()["blocks.0.attn.attention.mixing.weight"]) == 12
    status, report = again(tmp_path / "out")
    assert (status, report["created"], report["left"]) == (0, [], [])
    assert report["model"]["attention"] == {"name": "mhla", "blocks": list(LAYOUT)}


def test_a_layout_must_fit_our_own_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, entry in {"other": {**MHLA, "blocks": [2, 2, 2]}, "none": "softmax"}.items():
        write(plan_export(trained(random_model(entry), entry)), tmp_path / name)
        assert again(tmp_path / name)[0] == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "--layout: 2 x 2 x 3 is 12 blocks" in first
    assert "mixes 8" in first
    assert "--layout: " in second


def test_weights_without_config_are_imported_whole(tmp_path: Path) -> None:
    """The file has our names and no description of the layers, as ema/weights.safetensors."""
    ours = random_model(CONVOLVED)
    save_file(ours.state_dict(), tmp_path / "weights.safetensors")
    status, report = again(tmp_path / "weights.safetensors", "--backbone-options", json.dumps(OPTIONS))
    assert (status, report["created"], report["left"]) == (0, [], [])
    assert [entry["pos_conv"] for entry in report["model"]["attention"]] == ["cpe3", "cpe3", "none"]
    assert load_file(tmp_path / "again.safetensors").keys() == ours.state_dict().keys()


@pytest.mark.parametrize("heads", ["3", "7"])
def test_heads_of_our_own_export_are_not_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], heads: str
) -> None:
    write(plan_export(trained(random_model("softmax"), "softmax")), tmp_path / "out")
    arguments = ["import", "wan", str(tmp_path / "out"), "--out", str(tmp_path / "again.safetensors")]
    assert main([*arguments, "--heads", heads]) == 2
    error = capsys.readouterr().err
    assert f"--heads: {heads} " in error
    assert f"config.json of {tmp_path / 'out'}, with {HEADS} heads" in error
    assert main([*arguments, "--heads", str(HEADS)]) == 0


def test_the_tensors_may_be_smaller(tmp_path: Path) -> None:
    ours = random_model("softmax")
    write(plan_export(trained(ours, "softmax"), "wan"), tmp_path / "out", torch.bfloat16)
    written, whole = load_file(tmp_path / "out" / FILE), to_wan(ours.state_dict())
    assert all(torch.equal(value, whole[name].bfloat16()) for name, value in written.items())


def finished(recipe: Path) -> Path:
    assert main(["run", str(recipe)]) == 0
    (run,) = Path("runs").iterdir()
    return run


@pytest.mark.slow
def test_a_run_of_another_family_is_written_under_our_names(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Averaged or raw weights of a classifier run; a recipe starts from the folder of any format."""
    run = finished(recipe)
    plain = ["--format", "plain"]
    for name, arguments in {"averaged": [], "raw": ["--no-ema"], "earlier": ["--ckpt", "8"]}.items():
        assert main(["export", run.name, "--to", name, *plain, *arguments]) == 0
    assert main(["export", run.name, "--to", "of-timm"]) == 0
    average = load_file(run / "checkpoints" / "step-00000012" / "ema" / "weights.safetensors")
    averaged, raw, earlier = (
        load_file(Path(name) / "model.safetensors") for name in ("averaged", "raw", "earlier")
    )
    assert averaged.keys() == average.keys()
    assert all(torch.equal(averaged[name], average[name]) for name in average)
    state = torch.load(run / "checkpoints" / "step-00000012" / "trainer.ckpt", weights_only=True)[
        "state_dict"
    ]
    assert all(torch.equal(raw[name], state[f"backbone.{name}"]) for name in average)
    assert any(not torch.equal(averaged[name], other[name]) for name in average for other in (raw, earlier))
    config = json.loads(Path("averaged/config.json").read_text())
    model = build_backbone(config["backbone"], attention=config["attention"], **config["backbone_options"])
    model.load_state_dict(averaged)
    arguments = read_yaml(run / "recipe.yaml")["model"]["init_args"]
    assert config["attention"] == arguments["attention"]
    assert (
        main(
            [
                "run",
                str(recipe),
                "--run-id",
                "warm",
                "--model.init_from",
                "of-timm",
                "--trainer.max_steps",
                "1",
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert main(["export", run.name, "--to", "wan", "--format", "diffusers"]) == 2
    assert "valid: timm, plain" in capsys.readouterr().err
    assert not Path("wan").exists()


def test_weights_of_another_backbone_are_refused() -> None:
    ours = random_model("softmax")
    with refused("a test's model") as error:
        plan_export(trained(ours, MHLA))
    assert "blocks.0.attn.gate.bias" in str(error.value)


def test_a_model_without_tensors_of_wan_is_refused() -> None:
    entry = {"name": "softmax", "qk_norm": False}
    with refused("a test's model") as error:
        plan_export(trained(random_model(entry), entry))
    assert "blocks.0.attn.q_norm.weight" in str(error.value)
    assert plan_export(trained(random_model(entry), entry), "plain").file == "model.safetensors"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone"], "gone"),
        (["notes.txt"], "notes.txt: "),
        (["foreign.safetensors"], "foreign.safetensors: "),
        (["torn.safetensors"], "torn.safetensors: "),
        (["empty"], "empty"),
        (
            ["ours.safetensors", "--ckpt", "3"],
            "RUN: ours.safetensors is no run, and --ckpt, --ema and --no-ema",
        ),
        (["ours.safetensors", "--format", "wann"], "did you mean 'wan'"),
        (["ours.safetensors", "--to", "full"], "--to: full"),
        (["ours.safetensors", "--to", "notes.txt"], "--to: notes.txt"),
        (["ours.safetensors", "--to", "nowhere/out"], "--to: nowhere/out"),
        (["ours.safetensors", "--json", "nowhere/report.json"], "--json"),
    ],
    ids=str,
)
def test_mistakes_give_one_line(
    hybrid: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(hybrid.parent)
    save_file(plain_wan(), "foreign.safetensors")
    Path("torn.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    Path("notes.txt").write_text("notes")
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/a").touch()
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    to = [] if "--to" in arguments else ["--to", "out"]
    assert main(["export", *arguments, *to]) == 2
    sentence = capsys.readouterr().err
    assert words in sentence
    assert sentence.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
