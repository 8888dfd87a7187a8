"""The Protocol between strategies and callbacks, and the strategies that it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import strategies
from lightning.pytorch.strategies import StrategyRegistry

from mhla_lightning.cli.main import main
from mhla_lightning.runs.whole_strategies import holds_whole
from mhla_lightning.strategies.config import WHOLE, ZERO
from mhla_lightning.strategies.local import WholeWeights
from mhla_lightning.strategies.sharding import (
    Sharding,
    WholeSharding,
    names_by_group,
    sharding_of,
)
from tests.helpers.errors import refused

SPLIT = [
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "SingleDeviceXLAStrategy",
    "XLAStrategy",
]


@pytest.mark.parametrize("name", ["DDPStrategy", "SingleDeviceStrategy"])
def test_every_rank_holds_whole_weights(name: str) -> None:
    strategy = getattr(strategies, name)()
    sharding = sharding_of(strategy)
    assert isinstance(sharding, WholeSharding)
    assert isinstance(sharding.local_weights, WholeWeights)
    assert not sharding.guards_steps
    assert not sharding.skipped_step()
    assert sharding.gradient_norm() is None
    assert sharding.run_forward(lambda: 3) == 3


@pytest.mark.parametrize("name", SPLIT)
def test_a_strategy_that_splits_in_its_own_way_is_refused(name: str) -> None:
    kind = getattr(strategies, name)
    with refused("trainer.strategy") as caught:
        sharding_of(object.__new__(kind))
    assert f"'{name}'" in caught.value.reason


def test_the_names_and_the_classes_of_lightning_are_judged_alike() -> None:
    """A strategy that a later Lightning registers is neither allowed nor refused by accident."""
    registered = {
        name: StrategyRegistry[name]["strategy"] for name in StrategyRegistry.available_strategies()
    }
    assert {name for name in WHOLE if name != "auto"} <= set(registered)
    ours = {name for name, kind in registered.items() if not isinstance(kind, type)}
    assert ours == set(ZERO), "of Lightning's own, each is a class"
    for name, kind in ((name, registered[name]) for name in registered.keys() - ours):
        assert name not in WHOLE or holds_whole(kind), name
        assert holds_whole(kind) == (name in WHOLE or name.startswith("ddp_")), name


def test_a_strategy_of_another_package_may_implement_the_protocol() -> None:
    class Own(strategies.FSDPStrategy):
        guards_steps = False
        local_weights = WholeWeights()

        def run_forward(self, function: Any) -> Any:
            return function()

        def gradient_norm(self) -> None:
            return None

        def skipped_step(self) -> bool:
            return False

        def group_names(self) -> list[list[str]]:
            return []

    own = object.__new__(Own)
    assert isinstance(own, Sharding)
    assert sharding_of(own) is own


def test_names_by_group() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False))
    groups: list[dict[str, Any]] = [{"params": [module[1].weight]}, {"params": list(module[0].parameters())}]
    assert names_by_group(torch.optim.SGD(groups, lr=0.1), module) == [["1.weight"], ["0.weight", "0.bias"]]
    strategy: Any = SimpleNamespace(optimizers=[torch.optim.SGD(groups, lr=0.1)], lightning_module=module)
    assert WholeSharding(strategy).group_names() == [["1.weight"], ["0.weight", "0.bias"]]


@pytest.mark.parametrize(
    "given",
    [
        "fsdp",
        "fsdp_native",
        "xla",
        "deepspeed_stage_3",
        "{class_path: lightning.pytorch.strategies.FSDPStrategy}",
    ],
)
def test_the_command_refuses_before_data_is_read(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    missing = ["--data.path", str(tmp_path / "no data")]
    assert main(["run", str(recipe), "--trainer.strategy", given, *missing]) == 2
    error = capsys.readouterr().err
    assert "--trainer.strategy: " in error
    assert error.count("\n") == 1
    assert "single_device, zero1" in error
    assert not (tmp_path / "runs").exists()


def test_a_class_of_another_package_is_refused_before_data_is_read(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "{class_path: tests.strategies.test_sharding.OwnFSDP}"
    assert main(["run", str(recipe), "--trainer.strategy", given, "--data.path", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "--trainer.strategy: " in error
    assert "'OwnFSDP'" in error


class OwnFSDP(strategies.FSDPStrategy):
    """A sharding strategy that no list of names has."""

    def __init__(self) -> None:
        super().__init__()


def test_the_check_by_name_imports_neither_lightning_nor_torch() -> None:
    code = (
        "import sys\n"
        "from mhla_lightning.strategies.config import check_strategy\n"
        "check_strategy({'strategy': 'zero2'})\n"
        "print([name for name in ('lightning', 'torch', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
