"""ZeRO-3 with optimizer state and weights on a disk, two real ranks (CPU, DeepSpeed's own libaio): the
numbers of memory, saved and resumed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mhla_lightning.cli.main import main
from mhla_lightning.runs.folder import complete_checkpoints
from mhla_lightning.strategies.config import zero_config
from mhla_lightning.strategies.zero.nvme import disk
from mhla_lightning.strategies.zero.nvme.disk import check_disk, remove_swapped, swap_folder
from mhla_lightning.weights.rank_files import WEIGHT, RankFileReader
from tests.helpers.errors import refused
from tests.helpers.images import TINY_RECIPE
from tests.helpers.ranks import Nursery
from tests.helpers.zero_runs import STRATEGIES, Runs, assert_close_curves, curves, end_of, nvme

WIDE = TINY_RECIPE.replace("embed_dim: 12", "embed_dim: 384").replace(
    "log_every_n_steps: 1", "log_every_n_steps: 1, gradient_clip_val: 0.5"
)
"""DeepSpeed leaves less than 1 MiB in memory: a matrix must be larger on each of two ranks."""


@pytest.fixture(scope="module")
def runs(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Runs:
    if not disk._reads_and_writes():
        pytest.skip("libaio-dev is not installed")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    AsyncIOBuilder().load()  # compiles for up to 10 minutes on 2 cores, once a machine; ranks get 4
    folder = tmp_path_factory.mktemp("disk")
    (folder / "swap").mkdir()
    recipe = folder / "wide.yaml"
    one_group = WIDE.replace(
        "optimizer: {lr: 2.0e-3}", "optimizer: {lr: 2.0e-4, eps: 1.0e-2, weight_decay: 0}"
    )  # with the mixing matrices in it
    one_group = one_group.replace("keep_last: 2", "keep_last: 9")
    # what goes up is projected in every step
    at_the_border = "{name: mhla, blocks: 2, mix_init: const, mix_init_options: {value: 1.0}}"
    recipe.write_text(
        one_group.replace("{name: mhla, blocks: 2}", at_the_border)
        .replace("PATH", str(shards))
        .replace("keep_last: 2", "keep_last: 9")
    )
    return Runs(nursery, folder, recipe)


def in_memory(*, groups: int = 10**6) -> str:
    return (
        f"{{name: zero3_offload, zero_optimization: {{stage3_param_persistence_threshold: 0, "
        f"sub_group_size: {groups}}}}}"
    )


def assert_equal_ends(got: Path, expected: Path) -> None:
    ours, theirs = end_of(got), end_of(expected)
    assert ours.names() == theirs.names()
    for name in ours.names():
        assert ours.kinds(name) == theirs.kinds(name)
        assert ours.scalars(name) == theirs.scalars(name)
        assert all(
            torch.equal(ours.whole(name, kind), theirs.whole(name, kind))
            for kind in (WEIGHT, *ours.kinds(name))
        ), name


@pytest.fixture(scope="module")
def trained(runs: Runs) -> Path:
    return runs.train("nvme", nvme(runs.root), 2)


@pytest.mark.slow
def test_the_disk_changes_no_bit(runs: Runs, trained: Path) -> None:
    expected = runs.train("in-memory", in_memory(), 2)
    assert_close_curves(trained, runs.of("zero3"), tolerance=1e-5)
    assert curves(trained) == curves(expected)
    assert_equal_ends(trained, expected)
    averages = [RankFileReader(complete_checkpoints(run)[-1] / "ema") for run in (trained, expected)]
    assert all(torch.equal(averages[0].whole(name), averages[1].whole(name)) for name in averages[1].names())
    mixing = [
        end_of(trained).whole(name) for name in end_of(trained).names() if name.endswith("mixing.weight")
    ]
    assert len(mixing) == 2
    assert all((values == 1).any() and values.min() >= 0 and values.max() <= 1 for values in mixing), (
        "nothing was projected: the test shows nothing"
    )


@pytest.mark.slow
def test_what_is_on_the_disk_is_saved_file_by_file_and_removed_at_the_end(runs: Runs, trained: Path) -> None:
    for rank in range(2):
        files = sorted((complete_checkpoints(trained)[-1] / "shards").glob(f"rank-{rank:05d}-*"))
        assert len(files) > 1
        assert max(file.stat().st_size for file in files) < 0.7 * sum(file.stat().st_size for file in files)
    assert not list((runs.root / "swap").iterdir())


@pytest.mark.slow
def test_killed_on_the_way_it_goes_on_bit_for_bit(runs: Runs, trained: Path) -> None:
    place = [
        "--runs",
        str(runs.root),
        "--run-id",
        "killed",
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        nvme(runs.root),
    ]
    ranks = runs.nursery.start(2, ["run", str(runs.recipe), *place], runs.root)
    while not complete_checkpoints(runs.root / "killed"):
        assert not ranks.poll(), ranks.output()
        time.sleep(0.05)
    (swapped,) = (runs.root / "swap").iterdir()
    assert {path.parent.parent.name for path in swapped.rglob("*.swp")} == {"optimizer", "float32params"}, (
        "weights and masters are on the disk"
    )
    ranks.kill()
    ranks.wait()
    runs.nursery.run(2, ["run", str(runs.recipe), *place], runs.root)
    assert curves(runs.root / "killed") == curves(trained)
    assert_equal_ends(runs.root / "killed", trained)
    assert not list((runs.root / "swap").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "ranks"),
    [("nvme", "nvme", 1), ("nvme", "zero2", 2), ("zero3", "nvme", 2), ("nvme", "half", 2)],
)
def test_it_goes_on_with_other_ranks_and_strategies(
    runs: Runs, trained: Path, before: str, after: str, ranks: int
) -> None:
    start = trained if before == "nvme" else runs.of(before)
    runs.broken_off(start, f"{before}-{after}-{ranks}")
    strategy = {**STRATEGIES, "nvme": nvme(runs.root), "half": nvme(runs.root, weights="cpu")}[after]
    assert_close_curves(runs.train(f"{before}-{after}-{ranks}", strategy, ranks), trained, tolerance=1e-5)


@pytest.mark.slow
def test_frozen_weights_and_bf16(runs: Runs, trained: Path) -> None:
    """Frozen ones have no master: they are read from the disk by themselves."""
    start = str(complete_checkpoints(trained)[-1] / "ema")
    warm = [
        "--model.init_from",
        start,
        "--model.train_only",
        '["mixing", "norm", "attn", "head"]',
        "--trainer.precision",
        "bf16-mixed",
    ]
    runs.train("warm-memory", in_memory(), 2, *warm)
    runs.train("warm-nvme", nvme(runs.root), 2, *warm)
    assert curves(runs.root / "warm-nvme") == curves(runs.root / "warm-memory")
    assert_equal_ends(runs.root / "warm-nvme", runs.root / "warm-memory")
    assert not end_of(runs.root / "warm-nvme").kinds("backbone.blocks.0.mlp.fc1.weight")
    runs.broken_off(runs.root / "warm-nvme", "warm-again")
    assert curves(runs.train("warm-again", nvme(runs.root), 2, *warm)) == curves(runs.root / "warm-nvme")


@pytest.mark.slow
def test_copies_are_written_beside_the_training_and_validated(runs: Runs, trained: Path) -> None:
    run = runs.train("beside", nvme(runs.root, groups=10**9), 2, "--checkpoint.asynchronous", "true")
    assert_close_curves(run, trained, tolerance=1e-5)
    place = ["--mode", "validate", "--ckpt", str(run), "--trainer.devices", "2"]
    place += ["--trainer.strategy", "zero3_nvme"]  # whose folder is not there: validation needs none
    output = runs.nursery.run(2, ["run", str(runs.recipe), *place], runs.root)
    assert f"│ val/loss     │ {dict(curves(run)['val/loss'])[12]:.4f}" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "says"), [("buffer_size", 1000, "589824"), ("max_in_cpu", 9, "only 0 is allowed")]
)
def test_limits_of_deepspeed_are_named(runs: Runs, key: str, value: int, says: str) -> None:
    place = [
        "--runs",
        str(runs.root),
        "--run-id",
        "small",
        "--trainer.strategy",
        nvme(runs.root, more=f", {key}: {value}"),
    ]
    ranks = runs.nursery.start(1, ["run", str(runs.recipe), *place], runs.root)
    assert ranks.wait() == [2]
    output = ranks.output()
    assert f"offload_param.{key}: {value} is set" in output
    assert says in output


def _zero(path: Path) -> dict[str, Any]:
    return {
        "offload_optimizer": {"device": "nvme", "nvme_path": str(path)},
        "offload_param": {"device": "cpu"},
    }


def test_a_disk_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_disk(zero_config("zero3_offload")["zero_optimization"])
    key = "trainer.strategy.zero_optimization.offload_optimizer.nvme_path"
    with refused(key):
        check_disk(_zero(tmp_path / "nowhere"))
    with refused(key):
        check_disk(_zero(Path("/proc/self")))
    with refused(key):
        check_disk({"offload_optimizer": {"device": "nvme"}})
    monkeypatch.setattr(disk, "_reads_and_writes", lambda: False)
    with refused("trainer.strategy"):
        check_disk(_zero(tmp_path))


def test_mhla_run_says_so_before_anything_is_built(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(recipe), "--trainer.strategy", "zero3_nvme"]) == 2
    error = capsys.readouterr().err
    assert "--trainer.strategy.zero_optimization.offload_optimizer.nvme_path: " in error
    assert "/local_nvme" in error
    assert error.count("\n") == 1


def test_runs_share_a_disk_and_ranks_clean_up_after_themselves(tmp_path: Path) -> None:
    folder = swap_folder(tmp_path, Path("runs/one"))
    assert folder == swap_folder(str(tmp_path), Path("runs/one").absolute())
    assert folder != swap_folder(tmp_path, Path("elsewhere/one"))
    for rank in range(2):
        own = folder / "zero_stage_3" / "optimizer" / f"rank{rank}"
        own.mkdir(parents=True)
        (own / "0.tensor.swp").touch()
    remove_swapped(folder, 0)
    assert [path.name for path in folder.rglob("rank*")] == ["rank1"]
    remove_swapped(folder, 1)
    assert not folder.exists()
    assert tmp_path.exists()
