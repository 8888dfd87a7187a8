"""Every kind of file that the project writes, and the ways in which a disk damages one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# How a file may look after a power cut or on a failing disk.
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) * 2 // 3],
    "empty": lambda data: b"",
    "zero tail": lambda data: data[: len(data) * 2 // 3] + bytes(len(data) - len(data) * 2 // 3),
    "garbage tail": lambda data: data + b"\xff\x00{\x9c]\n\xfe",
}


@dataclass(frozen=True)
class Written:
    """One kind of file.

    Args:
        pattern: regular expression of its path below the folder of its command.
        readers: commands that read it, by the names of the test; empty where only people do.
        refuses: readers that may end with a sentence and exit code 2; the others must give their result.
    """

    pattern: str
    readers: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()


_RUN = r"runs/[^/]+"
_STEP = rf"{_RUN}/checkpoints/step-\d+"
_DATA = ("verify", "preview", "train")
_SAMPLES = rf"{_RUN}/(images|videos)/step-\d+-[0-9a-f]+"
WRITTEN: tuple[Written, ...] = (
    # The folder of a run
    Written(rf"{_RUN}/lock", ("status", "run")),
    Written(rf"{_RUN}/recipe\.yaml", ("status", "run", "generate", "export")),
    Written(rf"{_RUN}/environment\.json", ("status", "run")),
    Written(rf"{_RUN}/classes\.json", ("sample", "export")),  # also tests/inference/test_predict.py
    Written(rf"{_RUN}/progress\.json", ("status", "run")),
    Written(rf"{_RUN}/metrics\.jsonl", ("status", "run", "curves")),
    Written(rf"{_RUN}/summary\.json", ("status", "run")),
    Written(rf"{_RUN}/samples/rank-\d+\.jsonl", ("run",)),
    Written(rf"{_RUN}/tensorboard/events\..+", ("run",)),
    Written(rf"{_RUN}/tensorboard/hparams\.yaml", ("run",)),
    Written(rf"{_RUN}/(not_finite|spikes)/step-\d+-rank-\d+\.json"),
    Written(rf"{_RUN}/\.rank-\d+-error", ("run",)),
    Written(rf"{_RUN}/tokenizer_name\.json", ("run", "generate"), ("generate",)),
    Written(rf"{_RUN}/tokenizer(_config)?\.json", ("run", "generate"), ("generate",)),
    Written(rf"{_RUN}/eval-[a-z]+-[0-9a-f]+\.json", ("kept",)),
    # Checkpoints: where one is damaged, the one before it is used
    Written(
        rf"{_STEP}/trainer\.ckpt", ("status", "run", "generate", "export", "validate", "warm"), ("warm",)
    ),
    Written(rf"{_STEP}/state\.json", ("status", "run", "generate", "export", "validate")),
    Written(rf"{_STEP}/recipe\.yaml", ("run", "generate")),
    Written(rf"{_STEP}/ema/weights\.safetensors", ("run", "generate", "validate", "warm"), ("warm",)),
    Written(rf"{_STEP}/(shards|ema)/rank-[\w-]+\.safetensors", ()),  # tests/strategies/test_zero.py
    Written(rf"{_STEP}/rng/rank-\d+\.safetensors", ("run", "generate")),
    Written(rf"{_STEP}/COMPLETE", ("status", "run", "generate")),
    Written(rf"{_RUN}/checkpoints/damaged-step-\d+/.+"),
    # Jobs of SLURM
    Written(rf"{_RUN}/job\.json", ("status",)),
    Written(rf"{_RUN}/slurm/attempts", ("status",)),
    Written(rf"{_RUN}/slurm/cancelled", ("status",)),
    Written(rf"{_RUN}/slurm/recipe\.yaml", ("resume",), ("resume",)),
    Written(rf"{_RUN}/slurm/(train\.sbatch|job\.log|rank-\d+\.log)"),
    Written(rf"{_RUN}/slurm/code/.+"),
    # Samples of diffusion runs
    Written(rf"{_SAMPLES}/settings\.json", ("sample",)),
    Written(rf"{_SAMPLES}/parts/\d+\.npy", ("sample",)),
    Written(rf"{_SAMPLES}/samples\.(npz|json)", ("sample",)),
    Written(rf"{_SAMPLES}/(grid|sheet)\.png", ("sample",)),
    Written(rf"{_SAMPLES}/\d+-[a-z0-9-]+\.mp4", ("sample",)),
    Written(rf"{_SAMPLES}/text/[0-9a-f]+\.npy", ("sample",)),
    # Comparisons
    Written(r"runs/compare-[0-9a-f]+/(table\.json|curves\.png|[^/]+\.log)"),
    Written(r"runs/compare-[0-9a-f]+/lock"),
    Written(r"runs/compare-[0-9a-f]+/[^/]+/.+"),  # runs: all kinds above
    # Data sets: a damaged one is refused by name, or its samples are left out
    Written(r"(.+/)?(train|val)/index\.json", _DATA, _DATA),
    Written(r"(.+/)?(train|val)/[\w-]+\.tar", _DATA, _DATA),
    Written(r"(.+/)?(train|val)/[\w-]+\.tar\.offsets\.npy", _DATA, _DATA),
    Written(r"(.+/)?empty_text\.npy"),  # tests/data/test_damage.py
    Written(r"data/tokenizer(_config)?\.json", ("train",), ("train",)),
    # Work on a data set that can be continued
    Written(r"\.[^/]+\.packing/(lock|holder\.json)", ("continue",)),
    Written(r"\.[^/]+\.packing/plan\.json(\.new)?", ("continue",)),
    Written(r"\.[^/]+\.packing/latents\.json", ("continue",)),
    Written(r"\.[^/]+\.packing/probes\.jsonl", ("continue",)),
    Written(r"\.[^/]+\.packing/parts/.+", ("continue",)),
    Written(r"\.[^/]+\.packing/(entries|tallies)/.+\.json", ("continue",)),
    Written(r"\.[^/]+\.packing/data/.+\.tar", ("continue",)),
    Written(r"\.[^/]+\.packing/data/.+\.offsets\.npy", ("continue",)),
    Written(r"\.[^/]+\.packing/data/(.+/)?[\w-]+\.(json|npy)", ("continue",)),
    Written(r"\.[^/]+\.packing/tokens/\d+(\.documents)?\.npy", ("continue",)),
    Written(r"\.[^/]+\.packing/tokens/\d+\.json", ("continue",)),
    Written(r"\.[^/]+\.packing/tokens/(tokenizer|tokenizer_config)\.json", ("continue",)),
    Written(r"\.[^/]+\.packing/tokens/((train|val)\.(starts|lengths|rows)|firsts)\.npy", ("continue",)),
    Written(r"\.[^/]+\.packing/features/.+\.npy", ("continue",)),
    # Shards fetched from elsewhere: tests/data/test_cache.py
    Written(r"cache/.+"),
    # What a command writes for people and other programs; other commands read weights alone
    Written(r"out/[\w-]+\.(json|png|txt)"),
    Written(r"out/exported/(config\.json|.+\.safetensors)", ("import",), ("import",)),
)


def entry_of(path: str) -> Written | None:
    """Return the first entry whose pattern is this path's; None where the list has none."""
    return next((one for one in WRITTEN if re.fullmatch(one.pattern, path)), None)


def damage(file: Path, how: str) -> None:
    """Damage a file in its place."""
    file.write_bytes(DAMAGES[how](file.read_bytes()))
