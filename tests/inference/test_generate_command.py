"""`mhla generate` and `mhla eval lm` on small trained runs."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mhla_lightning.cli.main import main
from mhla_lightning.inference.loading import find_language_run, load_model
from mhla_lightning.inference.text import Sampling, generate
from tests.helpers.errors import refused
from tests.helpers.lm_tasks import local_tasks

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "—",
    "naïve",
    "dogs",
    "ran",
    "to",
    "their",
    "own",
    "house",
    "by",
    "the",
    "sea",
]
RECIPE = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 8
  val_check_interval: 8
  log_every_n_steps: 4
  callbacks: CALLBACKS
model:
  class_path: mhla_lightning.tasks.LanguageTask
  init_args:
    backbone: lm_tiny
    attention: ATTENTION
    backbone_options: {vocab_size: 320, context: 64, embed_dim: 32, depth: 2, intermediate: 64}
    optimizer: {lr: 1.0e-2}
    schedule: {warmup_steps: 2}
data:
  class_path: mhla_lightning.data.TokenDataModule
  init_args:
    {path: PATH, source: SOURCE, tokenizer: TOKENIZER, length: 64, batch_size: 8, num_workers: 0, val: 0.2}
checkpoint: {every_n_steps: 4, keep_last: 2}
"""
EMA = "[{class_path: mhla_lightning.callbacks.EMA, init_args: {decay: 0.5}}]"
MHLA = "{name: mhla, chunk_size: 8, max_chunks: 32}"


def train(root: Path, name: str, attention: str, callbacks: str, tokenizer: str) -> None:
    """Train a run `name` in root/runs and delete its data."""
    data = root / f"data-{name}"
    recipe = root / f"{name}.yaml"
    values = {
        "CALLBACKS": callbacks,
        "ATTENTION": attention,
        "PATH": str(data),
        "SOURCE": str(root / "texts"),
        "TOKENIZER": tokenizer,
    }
    text = RECIPE
    for key, value in values.items():
        text = text.replace(key, value)
    recipe.write_text(text)
    assert main(["run", str(recipe), "--run-id", name, "--runs", str(root / "runs")]) == 0
    shutil.rmtree(data)


def small_bpe(texts: Path, path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(file) for file in sorted(texts.iterdir())], trainer)
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte model with MHLA and an average, and a BPE model with softmax and no average."""
    root = tmp_path_factory.mktemp("language")
    (root / "texts").mkdir()
    for number in range(30):
        words = [WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(60)]
        (root / "texts" / f"{number}.txt").write_text(" ".join(words), encoding="utf-8")
    before = Path.cwd()
    (root / "empty").mkdir()
    os.chdir(root / "empty")
    try:
        train(root, "bytes", MHLA, EMA, "bytes")
        pytest.importorskip("tokenizers")
        small_bpe(root / "texts", root / "bpe.json")
        train(root, "bpe", "softmax", "[]", str(root / "bpe.json"))
        (root / "bpe.json").unlink()
    finally:
        os.chdir(before)
    return root / "runs"


@pytest.fixture
def runs(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MHLA_RUNS", str(trained))
    monkeypatch.chdir(tmp_path)
    return trained


def test_a_run_keeps_its_tokenizer(runs: Path) -> None:
    assert json.loads((runs / "bytes" / "tokenizer_name.json").read_text()) == {"format": 1, "name": "bytes"}
    assert json.loads((runs / "bpe" / "tokenizer_name.json").read_text())["name"].startswith(
        "tokenizer.json sha256:"
    )
    assert find_language_run("bytes").tokenizer.vocabulary == 257
    assert find_language_run("bpe").tokenizer.vocabulary == 300
    assert find_language_run(str(runs / "bpe")).tokenizer.encode("the cat") == find_language_run(
        "bpe"
    ).tokenizer.encode("the cat")


ALONE = """
import json, sys
sys.modules["mhla_lightning"] = None  # an import of ours fails
from transformers import AutoModelForCausalLM, pipeline

found = []
for name in ("bytes", "bpe"):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    found.append(type(model).__module__.partition(".")[0])
    continued = pipeline("text-generation", model=name, trust_remote_code=True, batch_size=4)
    options = {"max_new_tokens": 25, "do_sample": False, "return_full_text": False}
    found.append([row[0]["generated_text"] for row in continued(sys.argv[1:], **options)])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_transformers_alone_generates_the_same_text_from_an_export(runs: Path, tmp_path: Path) -> None:
    """The folder holds the model's code: the process that opens it cannot import this package."""
    pytest.importorskip("transformers")
    prompts = ["the cat", "a", "naïve dogs by the sea", "<|endoftext|>x"]
    Path("prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    options = ["--greedy", "--max-new-tokens", "25", "--json", "o.json"]
    expected: list[object] = []
    for name in ("bytes", "bpe"):
        assert main(["export", name, "--to", name, "--format", "hf"]) == 0
        assert {path.name for path in Path(name).iterdir()} == {
            "README.md",
            "code",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert f"run {name} step-00000008" in Path(name, "README.md").read_text()
        assert main(["generate", name, "--prompts", "prompts.txt", *options]) == 0
        texts = [row["text"] for row in json.loads(Path("o.json").read_text())["rows"]]
        assert any(texts)
        expected += ["transformers_modules", texts]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ALONE, *prompts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_an_export_for_transformers_brings_the_tokenizer(runs: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import mhla_lightning.hf  # noqa: F401  our classes, not the copies in the folder

    for name in ("bpe", "bytes"):
        assert main(["export", name, "--to", name, "--format", "hf"]) == 0
        model, tokenizer = (
            kind.from_pretrained(name)
            for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
        )
        ours = find_language_run(name)
        for text in ("the cat sat", "naïve — <|endoftext|> x", " two  spaces\n"):
            ids = tokenizer(text).input_ids
            assert ids == ours.tokenizer.encode(text)
            assert tokenizer.decode(ids) == ours.tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id == model.config.eos_token_id == ours.tokenizer.end
        assert tokenizer.pad_token_id == ours.tokenizer.end
        prompt = torch.tensor([ours.tokenizer.encode("the cat")])
        with torch.no_grad():
            assert torch.equal(model(prompt).logits, load_model(ours)(prompt))


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_one_prompt_is_continued_as_by_the_engine(
    name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    options = [
        "--temperature",
        "0.9",
        "--top-k",
        "50",
        "--top-p",
        "0.99",
        "--seed",
        "3",
        "--max-new-tokens",
        "40",
    ]
    assert main(["generate", name, "--prompt", "the naïve", *options, "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    found = find_language_run(name)
    steps = generate(
        load_model(found),
        [found.tokenizer.encode("the naïve")],
        Sampling(0.9, 50, 0.99, seed=3),
        40,
        end=found.tokenizer.end,
        vocabulary=found.tokenizer.vocabulary,
    )
    tokens = [step.tokens[0] for step in steps]
    expected = found.tokenizer.bytes_of(tokens).decode(errors="replace")
    assert out == f"the naïve{expected}\n"
    average = "averaged" if name == "bytes" else "raw"
    assert err.count("\n") == 1
    assert f"{len(tokens)} tokens, " in err
    assert f"{average} weights of {name} step-00000008" in err
    result = json.loads(file.read_text())
    (row,) = result["rows"]
    assert (row["prompt"], row["text"], row["tokens"]) == ("the naïve", expected, len(tokens))
    assert result["summary"]["state_bytes"] > 0
    assert result["summary"]["tokens_per_second"] > 0


def test_many_prompts_of_a_file_are_continued_as_each_alone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["the cat", "a", "by the sea — on"]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "id": 1}) + "\n" for prompt in prompts)
    )
    options = ["--max-new-tokens", "25", "--seed", "1"]
    together = {}
    for file in ("p.txt", "p.jsonl"):
        assert (
            main(["generate", "bytes", "--prompts", file, "--batch-size", "2", *options, "--json", "o.json"])
            == 0
        )
        out = capsys.readouterr().out
        together[file] = [row["text"] for row in json.loads(Path("o.json").read_text())["rows"]]
        for number, (prompt, text) in enumerate(zip(prompts, together[file], strict=True), 1):
            assert f"[{number}/3] {prompt}{text}\n" in out
    assert together["p.txt"] == together["p.jsonl"]
    for prompt, text in zip(prompts, together["p.txt"], strict=True):
        assert main(["generate", "bytes", "--prompt", prompt, *options]) == 0
        assert capsys.readouterr().out == f"{prompt}{text}\n"


@pytest.mark.usefixtures("forked")
def test_progress_on_a_terminal_leaves_stdout_alone(runs: Path) -> None:
    terminal, stderr = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "mhla_lightning",
        "generate",
        "bytes",
        "--prompt",
        "a",
        "--prompt",
        "b",
        "--max-new-tokens",
        "3",
        "--greedy",
    ]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment) as process:
        out, _ = process.communicate(timeout=100)
    os.close(stderr)
    shown = os.read(terminal, 2**16).decode()
    os.close(terminal)
    assert process.returncode == 0, shown
    assert b"[1/2] a" in out
    assert b"[2/2] b" in out
    assert "0 of 2 prompts" in shown
    assert "tokens/s, state " in shown
    assert "[1/2] a" not in shown


def test_stop_no_prompt_and_checkpoint(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["generate", "bytes", "--prompt", "the", "--seed", "2", "--max-new-tokens", "60"]
    assert main(base) == 0
    free = capsys.readouterr().out.removesuffix("\n").removeprefix("the")
    stop = free[3:5]
    assert main([*base, "--stop", stop, "--stop", "never in it"]) == 0
    assert capsys.readouterr().out == f"the{free[: free.index(stop)]}\n"
    assert main(["generate", "bytes", "--max-new-tokens", "5"]) == 0, "starts from the end of a document"
    capsys.readouterr()
    folder = runs / "bytes" / "checkpoints" / "step-00000004"
    for ckpt in ("4", str(folder)):
        assert main([*base, "--ckpt", ckpt]) == 0
        assert "weights of bytes step-00000004" in capsys.readouterr().err


def test_average_raw_weights_and_dtype(runs: Path) -> None:
    folder = runs / "bytes" / "checkpoints" / "step-00000008"
    average = load_file(folder / "ema" / "weights.safetensors")
    raw = torch.load(folder / "trainer.ckpt", weights_only=True)["state_dict"]
    loaded = load_model(find_language_run("bytes")).state_dict()
    assert all(torch.equal(value, average[name]) for name, value in loaded.items())
    loaded = load_model(find_language_run("bytes", ema=False), dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value, raw[f"backbone.{name}"].bfloat16()) for name, value in loaded.items())
    assert not torch.equal(average["embeddings.weight"], raw["backbone.embeddings.weight"])
    assert not load_model(find_language_run("bpe")).training


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere"]),
        (["bytes", "--greedy", "--temperature", "1"], ["--greedy: ", "--temperature"]),
        (["bytes", "--top-p", "0"], ["--top-p: 0.0"]),
        (["bytes", "--top-k", "0"], ["--top-k: 0"]),
        (["bytes", "--temperature", "0"], ["--temperature: 0.0"]),
        (["bytes", "--max-new-tokens", "0"], ["--max-new-tokens: 0"]),
        (["bytes", "--batch-size", "0"], ["--batch-size: 0"]),
        (["bytes", "--stop", ""], ["--stop: "]),
        (["bytes", "--ckpt", "7"], ["--ckpt: 7", "bytes: 4, 8"]),
        (["bytes", "--prompts", "none.txt"], ["--prompts: none.txt", "No such file"]),
        (["bytes", "--prompts", "bad.jsonl"], ["--prompts: prompt 2 of bad.jsonl", "JSON"]),
        (["bytes", "--prompts", "empty.txt"], ["--prompts: empty.txt"]),
        (["bytes", "--prompt", "\udcff"], ["--prompt: prompt 1", "UTF-8"]),
        (["bytes", "--device", "nonsense"], ["--device: nonsense"]),
        (["bytes", "--json", "no/such/folder.json"], ["--json", "no/such"]),
        (["bytes", "--tokenizer", "missing.json"], ["missing.json"]),
        (["bytes", "--max-new-tokens", "9999"], ["max_chunks"]),
        (["bytes", "--no-ema", "--ckpt", "CUT"], ["CUT: ", "trainer.ckpt"]),
    ],
)
def test_mistakes_give_one_line_before_weights_are_loaded(
    runs: Path,
    tmp_path: Path,
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "empty.txt").write_text("\n")
    shutil.copytree(runs / "bytes" / "checkpoints" / "step-00000008", tmp_path / "CUT")
    (tmp_path / "CUT" / "trainer.ckpt").unlink()
    monkeypatch.setattr("mhla_lightning.inference.loading.load_model", refuse_to_load)
    assert main(["generate", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert all(word in error for word in words), error
    assert "\n" not in error


def refuse_to_load(*args: object) -> None:
    raise AssertionError("weights were loaded before the mistake was found")


def test_runs_that_cannot_generate(
    runs: Path,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs of images, without checkpoint or tokenizer, or whose parts do not fit."""
    monkeypatch.setenv("MHLA_RUNS", str(tmp_path / "runs"))
    assert main(["run", str(recipe), "--run-id", "images", "--trainer.max_steps", "4"]) == 0
    for name in ("young", "mute", "other"):
        shutil.copytree(runs / "bytes", tmp_path / "runs" / name)
    shutil.rmtree(tmp_path / "runs" / "young" / "checkpoints")
    (tmp_path / "runs" / "mute" / "tokenizer_name.json").unlink()
    text = (tmp_path / "runs" / "other" / "recipe.yaml").read_text()
    assert "depth: 2" in text
    (tmp_path / "runs" / "other" / "recipe.yaml").write_text(text.replace("depth: 2", "depth: 3"))
    for arguments, words in (
        (["images"], ["images: ", "ClassificationTask", "LanguageTask"]),
        (["young"], ["young: "]),
        (["mute"], ["--tokenizer: ", "mute"]),
        (["other"], [str(tmp_path / "runs" / "other" / "checkpoints")]),
    ):
        capsys.readouterr()
        assert main(["generate", *arguments, "--prompt", "a"]) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in words), error
    assert main(["generate", "mute", "--prompt", "a", "--tokenizer", "bytes", "--max-new-tokens", "2"]) == 0
    (tmp_path / "runs" / "mute" / "recipe.yaml").write_text(
        text.replace("vocab_size: 320", "vocab_size: 200")
    )
    with refused("tokenizer"):
        find_language_run("mute", tokenizer="bytes")


@pytest.mark.usefixtures("forked")
def test_text_streams_and_ctrl_c_ends_it_cleanly(runs: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mhla_lightning",
        "generate",
        "bpe",
        "--prompt",
        "the cat",
        "--max-new-tokens",
        "1000000",
        "--json",
        "o.json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        first = b""
        while len(first) < 40 and (
            more := process.stdout.read(40)
        ):  # arrives while a million tokens are still to come
            first += more
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    out = (first + rest).decode()
    assert "Traceback" not in err.decode()
    assert "tokens/s, state " in err.decode()
    (row,) = json.loads(Path("o.json").read_text())["rows"]
    assert row["finished"] == "interrupted"
    assert out.endswith("\n")
    assert f"the cat{row['text']}".startswith(out.removesuffix("\n")), (
        "the signal may come between taking a token and printing it"
    )


def test_to_hf_is_the_run(runs: Path) -> None:
    pytest.importorskip("transformers")
    from mhla_lightning.integrations.from_run import to_hf

    found = find_language_run("bytes")
    model: Any = to_hf("bytes")
    tokens = torch.tensor([found.tokenizer.encode("the cat sat")])
    torch.testing.assert_close(model(tokens).logits, load_model(find_language_run("bytes"))(tokens))
    assert model.config.eos_token_id == found.tokenizer.end
    expected = [
        step.tokens[0]
        for step in generate(model.model, tokens.tolist(), Sampling(greedy=True), 30, end=found.tokenizer.end)
    ]
    assert (
        model.generate(tokens, max_new_tokens=30, do_sample=False)[0, tokens.shape[1] :].tolist() == expected
    )


@pytest.mark.slow
def test_eval_of_local_tasks(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is the extra 'lm_eval'")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = str(local_tasks(tmp_path / "tasks"))
    base = ["eval", "lm", "bytes", "--include", folder]
    assert (
        main(
            [
                *base,
                "--tasks",
                "local_choice,local_rolling",
                "--json",
                "r.json",
                "--limit",
                "2",
                "--batch-size",
                "2",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    result = json.loads(Path("r.json").read_text())
    rows = {row["task"]: row for row in result["rows"]}
    assert rows["local_choice"]["samples"] == 2
    assert 0 < rows["local_rolling"]["bits_per_byte"] < 8.5
    assert f"{rows['local_rolling']['bits_per_byte']:.4f}" in out
    assert result["summary"]["max_length"] == 64
    monkeypatch.setattr("mhla_lightning.inference.loading.load_model", refuse_to_load)
    for arguments, words in (
        (["--tasks", "wikitex"], "--tasks: unknown task 'wikitex'"),
        (["--tasks", ","], "--tasks: "),
        (["--tasks", "local_choice", "--limit", "0"], "--limit: 0"),
        (["--tasks", "local_choice", "--num-fewshot", "-1"], "--num-fewshot: -1"),
        (["--tasks", "local_choice", "--max-length", "1"], "--max-length: 1"),
        (["--tasks", "local_choice", "--max-length", "500"], "max_chunks"),
    ):
        assert main([*base, *arguments]) == 2
        assert words in capsys.readouterr().err
    assert main(["eval", "lm", "bytes", "--tasks", "wikitext", "--include", "nowhere"]) == 2
    assert "--include: nowhere" in capsys.readouterr().err


def test_eval_without_the_harness_names_the_extra(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mhla_lightning.evaluation.lm_harness", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "lm", "bytes", "--tasks", "wikitext"]) == 2
    assert (
        capsys.readouterr().err
        == "error: mhla eval lm needs the package 'lm_eval': pip install 'mhla-lightning[lm_eval]'\n"
    )


def test_both_verbs_are_listed_and_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom mhla_lightning.cli.main import main\ntry:\n    main(['--help'])\nfinally:\n    "
        "print('torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.endswith("False\n")
    assert "  generate " in found.stdout
    assert "  eval " in found.stdout


def test_text_longer_than_the_mixing_matrix_needs_an_extrapolation(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [
        "generate",
        "bytes",
        "--prompt",
        "the cat",
        "--max-new-tokens",
        "300",
        "--greedy",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert main(long) == 2
    assert "256" in capsys.readouterr().err  # the tokens that the matrix allows
    assert main([*long, "--extrapolation", "shift"]) == 0
    summary = json.loads((tmp_path / "out.json").read_text())["summary"]
    assert summary["tokens"] > 249  # past the matrix
    capsys.readouterr()
    assert main(["generate", "bpe", "--prompt", "the cat", "--extrapolation", "shift"]) == 2
    assert "--extrapolation: 'shift'" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_the_run_s_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "bpe", "--prompt", "a", "--max-new-tokens", "1", "--tokenizer", "bytes"]) == 2
    error = capsys.readouterr().err
    assert "--tokenizer: bytes" in error
    assert "bpe" in error
    assert (
        main(["generate", "bpe", "--prompt", "a", "--max-new-tokens", "1", "--tokenizer", str(runs / "bpe")])
        == 0
    )
