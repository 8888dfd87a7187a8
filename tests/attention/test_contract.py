"""`mhla test-operator`: our operators, the example and operators that break a rule, each found and named."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mhla_lightning.attention import ATTENTION, CAUSAL_ATTENTION, Attention, Context, Softmax
from mhla_lightning.attention.base import State
from mhla_lightning.attention.baselines.causal_linear import CausalLinear, LinearState
from mhla_lightning.attention.baselines.causal_softmax import CausalSoftmax
from mhla_lightning.attention.contract import BIDIRECTIONAL, CAUSAL, Subject, check_contract
from mhla_lightning.cli.main import main
from mhla_lightning.errors import UserError
from tests.helpers.language_models import CUDA_ONLY

EXAMPLE = Path(__file__).parents[2] / "examples" / "power_operator.py"
LEAK = """
import torch
from mhla_lightning.attention import CAUSAL_ATTENTION

class Leaky(CAUSAL_ATTENTION["softmax"]):
    def attend(self, q, k, v, context):
        ahead = torch.cat([v[:, 1:], v[:, :1]], 1)  # off by one: a token reads the next one
        return super().attend(q, k, v, context) + 1e-3 * ahead
"""


@pytest.fixture
def clean() -> Iterator[None]:
    """The registry of operators without what an example registers."""
    yield
    ATTENTION.pop("power", None)
    sys.modules.pop("power_operator", None)


def results_of(kind: type[Attention], compiled: bool = False) -> dict[str, str]:
    found = check_contract(Subject(kind, kind.example), without=() if compiled else ("compile",))
    return {one.check: one.result for one in found}


OURS = [*ATTENTION.values(), *(kind for name, kind in CAUSAL_ATTENTION.items() if name not in CUDA_ONLY)]


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_our_operators_keep_the_contract(kind: type[Attention]) -> None:
    # Compiling takes seconds; test_attention.py and test_causal_attention.py compile.
    results = check_contract(Subject(kind, kind.example), without=("compile",))
    found = [one for one in results if one.result != "holds"]
    gives_none = ["dense"] if kind.__name__ in ("CausalLinear", "CausalMHLA") else []
    assert [one.check for one in found] == gives_none, found


class SeesTheFuture(CausalSoftmax):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return super().attend(q, k, v, context) + 1e-3 * v.flip(1)


class ForgetsPositions(Softmax):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return super().attend(q, k, v, Context(mask=context.mask))


class CountsPadding(Softmax):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return super().attend(q, k, v, Context(rotary=context.rotary))


class MixesSamples(Softmax):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return super().attend(q, k, v, context) + v.mean(0, keepdim=True)


class CutsGradients(Softmax):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return super().attend(q.detach(), k, v, context)


class WrongReference(Softmax):
    def dense(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return super().dense(2 * q, k, v, context)


class WrongCount(Softmax):
    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        return super().flops(tokens, heads, dim_k, dim_v) // 2


class ForgetsTheDtype(Softmax):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        out = super().attend(q, k, v, context)
        return out.float() if out.dtype == torch.bfloat16 else out


class DropsAChannel(Softmax):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return super().attend(q, k, v, context)[..., 1:]


class BreaksTheGraph(Softmax):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return super().attend(q, k, v, context) * (1 if float(q.sum()) == 1e9 else 1.0)


class SeesOtherDocuments(CausalSoftmax):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        return super().attend(q, k, v, Context(rotary=context.rotary, mask=context.mask))


class StepsOtherwise(CausalLinear):
    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, context: Context
    ) -> tuple[Tensor, State]:
        out, state = super().attend_step(q, k, v, state, context)
        return out * 1.001, state


class Unordered(LinearState):
    def reorder(self, indices: Tensor) -> Unordered:
        return Unordered(self.total[: len(indices)].repeat(2, 1, 1, 1)[: len(indices)], None)


class ForgetsTheOrder(CausalLinear):
    def attend_prefill(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, State]:
        out, state = super().attend_prefill(q, k, v, context)
        assert isinstance(state, LinearState)
        return out, Unordered(state.total, state.norm)


BROKEN: dict[type[Attention], str] = {
    SeesTheFuture: "causality",
    ForgetsPositions: "rotary",
    CountsPadding: "padding",
    MixesSamples: "samples",
    CutsGradients: "gradients",
    WrongReference: "dense",
    WrongCount: "FLOPs",
    ForgetsTheDtype: "bf16",
    DropsAChannel: "shape",
    ForgetsTheOrder: "reorder",
    BreaksTheGraph: "compile",
    SeesOtherDocuments: "packing",
    StepsOtherwise: "streaming",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_rule_is_found_and_named(kind: type[Attention]) -> None:
    found = results_of(kind, compiled=kind is BreaksTheGraph)
    assert found[BROKEN[kind]] == "broken", found


def test_every_check_has_an_operator_that_breaks_it() -> None:
    assert {*BIDIRECTIONAL, *CAUSAL} == set(BROKEN.values())


def test_a_refusal_breaks_no_rule() -> None:
    class NoPadding(Softmax):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
            if context.mask is not None:
                raise UserError("mask", "it takes no padding")
            return super().attend(q, k, v, context)

    found = results_of(NoPadding)
    assert found.pop("padding") == "refused"
    assert set(found.values()) == {"holds"}


@pytest.mark.usefixtures("clean")
def test_the_example_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLE.read_text().split("class Power")[1].split("    def dense")[0].splitlines()) <= 25
    before = list(sys.path)
    assert main(["test-operator", str(EXAMPLE), "--json", str(tmp_path / "rows.json")]) == 0
    assert sys.path == before
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["check"] for row in rows} == set(BIDIRECTIONAL)
    assert {row["result"] for row in rows} == {"holds"}
    shown = capsys.readouterr().out
    assert "power_operator.Power (bidirectional, {'power': 3.0})" in shown


def test_a_constructor_without_the_sizes_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bare.py"
    path.write_text(
        "from mhla_lightning.attention import CausalAttention\n\n\n"
        "class Bare(CausalAttention):\n"
        "    def __init__(self): super().__init__()\n"
        "    def attend(self, q, k, v, context): return v\n"
        "    def flops(self, tokens, heads, dim_k, dim_v): return 0\n"
    )
    assert main(["test-operator", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "its constructor takes heads, dim_k, dim_v and grid as keywords" in said


def test_a_causal_leak_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "leaky_operator.py").write_text(LEAK)
    assert main(["test-operator", f"{tmp_path}/leaky_operator.py:Leaky"]) == 1
    said = capsys.readouterr()
    assert "breaks 'causality': a causal leak: token 6 sees token 7, which comes later" in said.err
    assert "broken" in said.out


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["mlha"], "OPERATOR: unknown attention (and no class or file.py) 'mlha'"),
        (["no/such.py"], "OPERATOR: the file no/such.py does not exist"),
        (["no_such_module.Operator"], "OPERATOR: 'no_such_module' cannot be imported"),
        (["mhla_lightning.attention.Softmx"], "OPERATOR: unknown operator 'Softmx'"),
        (["torch.nn.Linear"], "OPERATOR: unknown operator 'Linear'"),
        (["softmax", "--options", "[3]"], "--options: [3] is no mapping"),
        (["softmax", "--import", "no_such_module"], "'no_such_module' cannot be imported"),
    ],
)
def test_a_wrong_name_is_refused(words: list[str], key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test-operator", *words]) == 2
    assert key in capsys.readouterr().err
