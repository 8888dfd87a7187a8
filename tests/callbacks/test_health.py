"""Steps that would spoil a run: left out bit for bit under every strategy, counted, named; too many of
them, or too little memory, end it.
"""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from mhla_lightning.cli.main import main
from mhla_lightning.runs.folder import complete_checkpoints, read_metrics
from mhla_lightning.tasks.base import Task
from tests.helpers.faults import LAYER
from tests.helpers.images import TINY_RECIPE
from tests.helpers.ranks import Nursery

STEPS = 26
BAD = {
    4: "layer",
    6: "gradient",
    24: "leap",
}  # of the steps of `left_out`; the guard against leaps acts from the 20th step taken
WHOLE = "{stage3_param_persistence_threshold: 0}"
STRATEGIES = {
    "ddp": ["--trainer.strategy", "ddp"],
    "zero2": ["--trainer.strategy", "zero2"],
    "zero3": ["--trainer.strategy", "zero3", "--trainer.strategy.zero_optimization", WHOLE],
    "zero1": ["--trainer.strategy", "zero1"],
    "zero3_small_weights_whole": ["--trainer.strategy", "zero3"],
    "zero2_offload": ["--trainer.strategy", "zero2_offload"],
    "zero3_offload": ["--trainer.strategy", "zero3_offload", "--trainer.strategy.zero_optimization", WHOLE],
    "zero2_bf16": ["--trainer.strategy", "zero2", "--trainer.precision", "bf16-true"],
    "zero3_bf16": [
        "--trainer.strategy",
        "zero3",
        "--trainer.strategy.zero_optimization",
        WHOLE,
        "--trainer.precision",
        "bf16-true",
    ],
}
IN_CI = ("zero2",)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A folder with the tiny recipe."""
    folder = tmp_path_factory.mktemp("health")
    (folder / "tiny.yaml").write_text(TINY_RECIPE.replace("PATH", str(shards)))
    return folder


def fault(kind: str, steps: list[int], rank: int) -> dict[str, Any]:
    return {
        "class_path": "tests.helpers.faults.Fault",
        "init_args": {"kind": kind, "steps": steps, "rank": rank},
    }


def arguments(place: Path, name: str, faults: list[dict[str, Any]], *extra: str) -> list[str]:
    average = {"class_path": "mhla_lightning.callbacks.EMA", "init_args": {"decay": 0.9}}
    callbacks = [average, *faults, {"class_path": "tests.helpers.faults.Digests"}]
    run = [
        "run",
        str(place / "tiny.yaml"),
        "--runs",
        str(place / "runs"),
        "--run-id",
        name,
        "--trainer.callbacks",
        json.dumps(callbacks),
    ]
    return [*run, "--trainer.val_check_interval", "100", "--model.schedule.warmup_steps", "30", *extra]


def spoiled(place: Path, name: str, last_rank: int, *extra: str) -> list[str]:
    """A run in which the steps BAD go wrong, some on the last rank only."""
    faults = [fault("layer", [4], last_rank), fault("gradient", [6], 0), fault("leap", [24], last_rank)]
    return arguments(
        place, name, faults, "--trainer.max_steps", str(STEPS), "--health.spike_factor", "5", *extra
    )


def digests(run: Path, rank: int) -> dict[int, dict[str, Any]]:
    return {
        line["step"]: line
        for line in map(json.loads, (run / f"digest-rank-{rank}.jsonl").read_text().splitlines())
    }


def check_left_out(run: Path, ranks: int) -> None:
    for rank in range(ranks):
        held = digests(run, rank)
        for step in range(2, STEPS + 1):
            same = {
                what: held[step][what] == held[step - 1][what] for what in ("state", "average", "updates")
            }
            assert set(same.values()) == {step in BAD}, f"rank {rank}, step {step}: {same}"
        assert held[STEPS]["updates"] == STEPS - len(BAD)
    series = read_metrics(run / "metrics.jsonl")
    counts = dict(series["train/skipped_steps"])
    assert [counts[step] for step in (3, 4, 5, 6, 23, 24, STEPS)] == [0, 1, 1, 2, 2, 3, 3]
    assert [step for step, loss in series["train/loss"] if not math.isfinite(loss)] == [4]
    assert [step for step, norm in series["train/grad_norm"] if not math.isfinite(norm)] == list(BAD)
    rates = [rate for _, rate in series["train/lr"]]
    assert all(later > earlier for earlier, later in zip(rates, rates[1:], strict=False)), (
        "the schedule goes on"
    )


def test_steps_are_left_out_on_one_device(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(spoiled(place, "one", 0)) == 0
    out = capsys.readouterr().out
    run = place / "runs" / "one"
    check_left_out(run, 1)
    assert "step 4 is left out: the loss of step 4 is not finite" in out
    assert "step 6 is left out: the loss of step 6 is finite, but a gradient is not finite" in out
    assert "times the median before it" in out
    assert {path.name for path in (run / "not_finite").iterdir()} == {
        "step-00000004-rank-0.json",
        "step-00000006-rank-0.json",
    }
    (leap,) = (run / "spikes").iterdir()
    assert len(json.loads(leap.read_text())["batches"][0]["keys"]) == 16
    state = json.loads((complete_checkpoints(run)[-1] / "state.json").read_text())
    assert state["consumed"] == STEPS * 16


def test_clipping_takes_the_norm_that_is_known_already(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(name: str, clip: str) -> list[float]:
        assert (
            main(arguments(place, name, [], "--trainer.max_steps", "4", "--trainer.gradient_clip_val", clip))
            == 0
        )
        return [loss for _, loss in read_metrics(place / "runs" / name / "metrics.jsonl")["train/loss"]]

    with monkeypatch.context() as patched:
        patched.setattr(Task, "configure_gradient_clipping", pl.LightningModule.configure_gradient_clipping)
        lightnings, loose = losses("clipped-by-lightning", "1e-3"), losses("not-clipped", "1e9")
    monkeypatch.setattr(Task, "clip_gradients", None)  # must not be called
    assert losses("clipped", "1e-3") == pytest.approx(lightnings, rel=1e-6)
    assert lightnings != pytest.approx(loose, rel=1e-6)


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=() if name in IN_CI else pytest.mark.slow) for name in STRATEGIES]
)
@pytest.mark.slow
def test_steps_are_left_out_alike_on_all_ranks(nursery: Nursery, place: Path, strategy: str) -> None:
    """Two processes, two micro batches a step, each fault in one micro batch of one rank."""
    extra = ["--trainer.devices", "2", "--data.micro_batch_size", "4", *STRATEGIES[strategy]]
    nursery.run(2, spoiled(place, strategy, 1, *extra), place)
    run = place / "runs" / strategy
    check_left_out(run, 2)
    named = {
        path.name: json.loads(path.read_text())["batches"][0]["keys"]
        for path in (run / "not_finite").iterdir()
    }
    assert {name: len(keys) for name, keys in named.items()} == {
        "step-00000004-rank-1.json": 4,
        "step-00000006-rank-0.json": 8,
        "step-00000006-rank-1.json": 8,
    }
    assert len(list((run / "spikes").iterdir())) == 2
    if (place / "runs" / "ddp").exists() and "bf16" not in strategy:
        series, expected = (
            read_metrics(place / "runs" / name / "metrics.jsonl") for name in (strategy, "ddp")
        )
        assert dict(series["train/loss"]) == pytest.approx(
            dict(expected["train/loss"]), abs=1e-4, nan_ok=True
        )
        norms, others = (
            {step: norm for step, norm in one["train/grad_norm"] if step not in BAD}
            for one in (series, expected)
        )
        assert norms == pytest.approx(others, rel=1e-3)


@pytest.mark.parametrize("strategy", ["zero3", "ddp", "zero1", "zero2"])
@pytest.mark.parametrize("kind", ["layer", "gradient"])
@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_and_name_the_layer(
    nursery: Nursery, place: Path, strategy: str, kind: str
) -> None:
    """Checkpoints at 2 and 4; of the one at 4 no loss has shown that its weights are good. A step left out
    is never saved.
    """
    name = f"stopped-{strategy}-{kind}"
    extra = [
        "--trainer.devices",
        "2",
        "--data.micro_batch_size",
        "4",
        *STRATEGIES[strategy],
        "--health.max_skipped",
        "2",
    ]
    extra += ["--checkpoint.every_n_steps", "2", "--checkpoint.keep_last", "9"]
    ranks = nursery.start(2, arguments(place, name, [fault(kind, list(range(5, 99)), 1)], *extra), place)
    assert ranks.wait() == [2, 2], ranks.output()
    errors = [
        [line for line in log.read_text().splitlines() if line.startswith("error: ")] for log in ranks.logs
    ]
    assert errors[0] == errors[1]
    (said,) = errors[0]
    assert "step 7 is " in said
    assert "3 steps in a row were left out (--health.max_skipped is 2)" in said
    # An infinite gradient first passes the layer that follows. At stage 3 DeepSpeed puts a function of its
    # own between the two, and the layer itself is the first to see it.
    layer = LAYER if kind == "layer" or strategy == "zero3" else "backbone.blocks.1.mlp.act"
    assert f" {layer} (rank 1)" in said
    assert said.index("step-00000004") < said.index("step-00000002"), "the last checkpoint, then a good one"
    run = place / "runs" / name
    assert [path.name for path in complete_checkpoints(run)] == ["step-00000002", "step-00000004"]
    # A loss accuses its own rank's samples, a gradient those of all ranks, the first rank's first.
    accused = run / "not_finite" / f"step-00000007-rank-{1 if kind == 'layer' else 0}.json"
    assert json.loads(accused.read_text())["batches"][0]["keys"][0] in said
    assert "Traceback" not in ranks.output()


@pytest.mark.slow
def test_the_first_stops_where_none_may_be_left_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(place, "none", [fault("layer", [2], 0)], "--health.max_skipped", "0")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f" {LAYER}; there is no checkpoint yet" in said
    assert (
        main(
            arguments(
                place,
                "leap",
                [fault("leap", [22], 0)],
                "--health.max_skipped",
                "0",
                "--health.spike_factor",
                "5",
            )
        )
        == 0
    ), "not before step 20"
    more = ["--health.max_skipped", "0", "--health.spike_factor", "5", "--trainer.max_steps", "24"]
    assert main(arguments(place, "leapt", [fault("leap", [22], 0)], *more)) == 2
    leapt = capsys.readouterr().err
    assert "the loss of step 22 is " in leapt, "not that of step 3: the median is of 20 steps"
    assert "--health.spike_factor is 5.0" in leapt


@pytest.mark.slow
def test_a_resumed_run_counts_on_and_judges_alike(place: Path) -> None:
    """The median's losses and the count are in the checkpoint."""
    extra = ["--health.spike_factor", "5", "--checkpoint.every_n_steps", "12"]
    faults = [fault("layer", [3], 0), fault("leap", [23], 0)]
    assert main(arguments(place, "whole", faults, "--trainer.max_steps", "24", *extra)) == 0
    assert main(arguments(place, "parts", faults, "--trainer.max_steps", "12", *extra)) == 0
    assert (
        main(arguments(place, "parts", faults, "--trainer.max_steps", "24", "--accept-changes", *extra)) == 0
    )
    series = [
        read_metrics(place / "runs" / name / "metrics.jsonl")["train/skipped_steps"]
        for name in ("whole", "parts")
    ]
    assert series[0] == series[1]
    assert series[0][-1] == (24, 2)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--health.max_skipped", "-1"], "--health.max_skipped: -1"),
        (["--health.spike_factor", "1"], "--health.spike_factor: 1.0"),
        (["--health.max_skiped", "1"], "did you mean 'max_skipped'?"),
    ],
    ids=["negative", "factor", "unknown"],
)
def test_settings_that_cannot_be(
    place: Path, capsys: pytest.CaptureFixture[str], extra: list[str], says: str
) -> None:
    assert main(arguments(place, "bad", [], *extra)) == 2
    assert says in capsys.readouterr().err


def test_too_little_memory_is_one_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(place, "memory", [fault("memory", [3], 0)], "--data.micro_batch_size", "8")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert (
        "out of memory after step 2 with --data.micro_batch_size 8 (--data.batch_size 16 = 1 rank x 8 x "
        "2 accumulated), 16 tokens a sample" in said
    )
    assert "4,824 parameters under auto, --model.checkpoint_activations none" in said
    assert "data.micro_batch_size 4" in said
    assert "DefaultCPUAllocator: can't allocate memory" in said


def test_where_something_else_starts_the_ranks_each_says_what_it_knows(nursery: Nursery, place: Path) -> None:
    """As under torchrun and srun: rank 0 has not started the other and cannot see how it ended. Ordinary
    commands: test_ranks_end.py.
    """
    for kind, code in (("kill", -signal.SIGKILL), ("exception", 1)):
        began = time.monotonic()
        ranks = nursery.start(
            2,
            arguments(
                place, f"lost-{kind}", [fault(kind, [3], 1)], "--trainer.devices", "2", *STRATEGIES["ddp"]
            ),
            place,
        )
        assert ranks.wait() == [1, code]
        assert time.monotonic() - began < 60
        own, other = (log.read_text() for log in ranks.logs)
        assert (
            own.strip().splitlines()[-1]
            == "error: rank 0 of 2 has lost another rank, whose own error is the cause"
        )
        assert "Traceback" not in own
        assert ("on rank 1 of 2, process" in other) == (kind == "exception")
