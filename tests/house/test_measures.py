"""Every bound of `make house` holds, and every detector finds a planted case."""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest

from tests.house import names, prose
from tests.house.report import ROWS, main
from tests.house.source import Finding


@pytest.mark.parametrize("row", ROWS)
def test_the_bound_holds(row: str) -> None:
    measure = ROWS[row]()
    shown = "\n".join(map(str, measure.findings[:40]))
    assert measure.holds, f"{row}: {measure.value:g}, at most {measure.bound:g}\n{shown}"


def test_the_command_fails_when_a_bound_is_exceeded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["report"])
    monkeypatch.setattr("tests.house.prose.readme_lines", lambda: 151)
    monkeypatch.setattr("tests.house.report.ROWS", {"lines of the README": ROWS["lines of the README"]})
    assert main() == 1
    assert "151   at most 150   <-- too many" in capsys.readouterr().out
    monkeypatch.setattr("tests.house.prose.readme_lines", lambda: 150)
    assert main() == 0


def found(detector: Callable[..., list[Finding]], code: str, path: str = "callbacks/planted.py") -> list[str]:
    return [finding.text for finding in detector({path: ast.parse(code)})]


@pytest.mark.parametrize(
    "code",
    [
        "from torch.utils._pytree import tree_map",
        "from torch.utils import _pytree",
        "import torch._dynamo",
        "def f(trainer):\n    return trainer._results",
        "def f(trainer):\n    trainer._results = 1",
        "def f(x):\n    return getattr(x, '_ds_tensor', None)",
        "from operator import attrgetter\nread = attrgetter('strategy._launcher')",
        "import torch\ntorch.nn.Module.forward = print",
        "from lightning.pytorch import Trainer\nTrainer.fit = print",
        "import torch\nsetattr(torch.nn.Module, 'forward', print)",
        "import pl\nclass Bar(pl.Bar):\n    def _describe(self):\n        return 1",
        "import pl\nclass Bar(pl.Bar):\n    def _go(self):\n        super()._go()\nBar()._go()",
        "import torch\ndef _C(): ...\nx = torch._C",
    ],
)
def test_a_private_or_patched_name_is_found(code: str) -> None:
    assert found(names.private_uses, code)


@pytest.mark.parametrize(
    "code",
    [
        "class A:\n    def _own(self): ...\n    def go(self):\n        self._own()",
        "import pl\nclass Bar(pl.Bar):\n    def _own(self): ...\n    def go(self):\n        self._own()",
        "from collections import namedtuple\nprint(namedtuple('A', 'b')(1)._asdict())",
        "import torch\ntorch.backends.cudnn.benchmark = True",
        "import torch\nx = torch.ones(1)\nx.grad = None",
    ],
)
def test_own_names_and_settings_do_not_count(code: str) -> None:
    assert not found(names.private_uses, code)


@pytest.mark.parametrize(
    "code",
    [
        "def f(trainer):\n    return getattr(trainer.strategy, 'local_weights', None)",
        "def f(pl_module):\n    return hasattr(pl_module, 'gradient_norm')",
        "def f(pl_module):\n    pl_module.gradient_norm = 1",
    ],
)
def test_a_protocol_by_string_is_found(code: str) -> None:
    assert found(names.by_string, code)


def test_too_many_parameters_are_found() -> None:
    ten = ", ".join(f"x{n}" for n in range(10))
    assert not found(names.parameters, f"class A:\n    def f(self, {ten}): ...")
    assert found(names.parameters, f"class A:\n    def f(self, {ten}, *, y): ...")
    assert found(names.parameters, f"async def f({ten}, y): ...")
    assert not found(names.parameters, f"@triton.jit\ndef f({ten}, y): ...")


def test_two_classes_of_one_name_are_found() -> None:
    two = {"a.py": ast.parse("class Plan: ..."), "b.py": ast.parse("def f():\n    class Plan: ...")}
    (finding,) = names.homonyms(two)
    assert str(finding) == "a.py:1 class Plan also in b.py"


@pytest.mark.parametrize("docstring", ["Return " + "x" * 90 + ".", "Return this\n    and that."])
def test_a_long_first_line_is_found(docstring: str) -> None:
    assert found(prose.headings, f'def f():\n    """{docstring}"""')


def test_a_long_sentence_is_found() -> None:
    assert found(prose.long_sentences, f'def f():\n    """Return this.\n\n    {"word " * 25}end."""')
    assert not found(prose.long_sentences, f'def f():\n    """Return this.\n\n    {"word " * 24}end."""')


@pytest.mark.parametrize("text", ["Memory is one sentence.", "A run is gone on from.", "Whoever asks"])
def test_a_phrase_to_decode_is_found(text: str) -> None:
    assert prose.BANNED.search(text)
