"""The streamed .safetensors file, the memory of an export, and DeepSpeed's checkpoints."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mhla_lightning.backbones import build_backbone
from mhla_lightning.cli.main import main
from mhla_lightning.errors import UserError
from mhla_lightning.weights.rank_files import RankFileReader, Stretch, file_name, write_rank_file
from mhla_lightning.weights.stored import as_stored, open_safetensors
from mhla_lightning.weights.streaming import parts_of, write_safetensors
from mhla_lightning.weights.warm_start import read_weights

MIXED = {
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(7).bfloat16(),
    "turned": torch.randn(4, 6).t(),
    "double": torch.randn(2, 1, 3, dtype=torch.float64),
    "nothing": torch.empty(0, 3),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as they are", "bfloat16"])
def test_a_streamed_file_is_one_that_safetensors_reads(tmp_path: Path, dtype: torch.dtype | None) -> None:
    path = tmp_path / "mixed.safetensors"
    write_safetensors(path, parts_of(as_stored(MIXED)), {"format": "pt", "note": "ä"}, dtype)
    found = load_file(path)
    assert found.keys() == MIXED.keys()
    for name, value in MIXED.items():
        wanted = value.to(dtype) if value.is_floating_point() else value
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "ä"}
    entries = header(path)
    assert all(entry["data_offsets"][0] % found[name].itemsize == 0 for name, entry in entries.items())
    stored = open_safetensors(path, "a test's")
    assert {name: (value.shape, value.dtype) for name, value in stored.outline.items()} == {
        n: (v.shape, v.dtype) for n, v in found.items()
    }


def header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    assert end % 8 == 0
    return {name: entry for name, entry in json.loads(content[8:end]).items() if name != "__metadata__"}


def test_one_tensor_is_read_at_a_time_and_a_file_is_never_replaced(tmp_path: Path) -> None:
    read: list[str] = []

    def take(name: str) -> Tensor:
        read.append(name)
        if name == "turned":
            raise RuntimeError("torn")
        return MIXED[name]

    stored = as_stored(MIXED)
    stored._read = take
    with pytest.raises(RuntimeError, match="torn"):
        write_safetensors(tmp_path / "out.safetensors", parts_of(stored), {})
    assert read == ["count", "double", "turned"]  # the largest types first
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.safetensors").write_text("other")
    with pytest.raises(UserError):
        write_safetensors(tmp_path / "out.safetensors", parts_of(as_stored(MIXED)), {})
    assert (tmp_path / "out.safetensors").read_text() == "other"


def deepspeeds(folder: Path) -> Path:
    """Write a folder like a checkpoint of DeepSpeed's; unpickling it creates a file."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder.parent / "owned",))

    (folder / "checkpoint").mkdir(parents=True)
    (folder / "latest").write_text("checkpoint")
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (folder / "checkpoint" / name).write_bytes(pickle.dumps(Evil()))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "theirs", "--to", "out.safetensors"],
        ["import", "dit", "theirs", "--out", "out.safetensors"],
    ],
)
def test_pickles_of_deepspeed_wait_for_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(deepspeeds(tmp_path / "theirs").parent.rglob("*"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "theirs" in error
    assert "--trust-checkpoint" in error
    with pytest.raises(UserError, match=r"`mhla export .*--trust-checkpoint`"):  # the way out is the point
        read_weights("theirs")
    assert sorted(tmp_path.rglob("*")) == before
    assert main([*arguments, "--trust-checkpoint"]) == 2
    sentence = capsys.readouterr().err
    assert "theirs" in sentence
    assert "--trust-checkpoint" not in sentence
    assert sentence.count("\n") == 1
    if arguments[0] == "export":
        for more, words in (
            (["--no-ema"], "RUN: theirs"),
            (["--format", "timm"], "RUN: theirs"),
        ):
            assert main([*arguments, *more]) == 2
            assert words in capsys.readouterr().err


_TRAIN = """
import sys, torch, deepspeed
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
zero = {"stage": int(sys.argv[1]), "stage3_param_persistence_threshold": 0}
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero,
          "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=True)
engine.backward(engine(torch.ones(1, 5)).square().sum())
engine.step()
engine.save_checkpoint("theirs")
with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=sys.argv[1] == "3"):
    torch.save({name: value.detach().clone() for name, value in model.named_parameters()}, "weights.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_trusted_checkpoint_of_deepspeed_becomes_a_plain_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    monkeypatch.chdir(tmp_path)
    place = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29600 + stage),
    }
    environment = {**os.environ, **place, "DS_ACCELERATOR": "cpu"}
    subprocess.run(
        [sys.executable, "-c", _TRAIN, str(stage)],
        env=environment,
        check=True,
        timeout=300,
        capture_output=True,
    )
    assert main(["export", "theirs", "--to", "plain.safetensors", "--trust-checkpoint"]) == 0
    found, wanted = load_file("plain.safetensors"), torch.load("weights.pt", weights_only=True)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


GIGABYTE = 2**30
BIG = {"vocab_size": 32000, "embed_dim": 1024, "depth": 42, "context": 2048}


def big_run(folder: Path, sharded: bool) -> list[str]:
    """Write a run folder with 2 GB of weights; return it and the names of the tensors.

    Each tensor is filled with its place in the list of names.
    """
    model = {"backbone": "lm_340m", "attention": "mhla", "backbone_options": BIG}
    recipe = {
        "model": {"class_path": "mhla_lightning.tasks.LanguageTask", "init_args": model},
        "data": {"class_path": "mhla_lightning.data.TokenDataModule"},
    }
    checkpoint = folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with torch.device("meta"):
        state = build_backbone("lm_340m", attention="mhla", **BIG).state_dict()
    tensors = {
        f"backbone.{name}": torch.full(value.shape, float(number))
        for number, (name, value) in enumerate(state.items())
    }
    torch.save({"global_step": 1, "state_dict": {} if sharded else tensors}, checkpoint / "trainer.ckpt")
    for rank in range(2 if sharded else 0):
        write_rank_file(
            checkpoint / "shards" / file_name(rank, 2),
            [half(name, value, rank) for name, value in tensors.items()],
        )
    (checkpoint / "COMPLETE").touch()
    assert sum(value.nbytes for value in tensors.values()) > 2 * GIGABYTE
    return list(state)


def half(name: str, value: Tensor, rank: int) -> Stretch:
    """Return the part of a tensor that the first or the second of two ranks holds."""
    parts = value.view(-1).tensor_split(2)
    return Stretch(name, tuple(value.shape), rank * len(parts[0]), {"weight": parts[rank].clone()})


def test_a_rank_may_write_several_files_and_all_of_them_are_needed(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0)}
    for rank in range(2):
        for lot, (name, value) in enumerate(tensors.items()):
            write_rank_file(tmp_path / file_name(rank, 2, lot, 2), [half(name, value, rank)])
    reader = RankFileReader(tmp_path)
    assert all(torch.equal(reader.whole(name), value) for name, value in tensors.items())
    (tmp_path / file_name(1, 2, 1, 2)).unlink()
    with pytest.raises(UserError) as error:
        RankFileReader(tmp_path)
    assert str(tmp_path) in str(error.value)
    (tmp_path / file_name(1, 2, 0, 2)).unlink()
    with pytest.raises(UserError) as error:
        RankFileReader(tmp_path)
    assert str(tmp_path) in str(error.value)


def peak_anonymous_bytes(process: subprocess.Popen[bytes]) -> int:
    """Return the peak of a process's anonymous memory, measured until the process ends."""
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max(
            peak,
            *(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")),
            0,
        )
        time.sleep(0.005)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharded", "format"),
    [(False, "plain"), (False, "hf"), (True, "plain")],
    ids=["whole", "whole as hf", "sharded"],
)
def test_two_gigabytes_are_exported_in_less_than_one(tmp_path: Path, sharded: bool, format: str) -> None:
    names = big_run(tmp_path / "runs" / "big", sharded)
    target = tmp_path / ("out.safetensors" if format == "plain" else "out")
    command = [
        sys.executable,
        "-m",
        "mhla_lightning",
        "export",
        "big",
        "--runs",
        str(tmp_path / "runs"),
        "--to",
        str(target),
        "--format",
        format,
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        peak = peak_anonymous_bytes(process)
    assert process.returncode == 0
    print(f"{'sharded' if sharded else 'whole'}, {format}: at most {peak / GIGABYTE:.2f} GiB")
    assert peak < GIGABYTE
    stored = open_safetensors(target if format == "plain" else target / "model.safetensors", "the export")
    prefix = "" if format == "plain" else "model."
    assert set(stored) == {prefix + name for name in names}
    assert all(
        stored[prefix + name].unique().tolist() == [number] for number, name in list(enumerate(names))[::40]
    )
