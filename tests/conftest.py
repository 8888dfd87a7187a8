"""Options and fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

ORACLES = Path(__file__).parent / "oracles"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--oracles", action="append", default=[], help="another folder of oracle cases (NAME.npz + NAME.json), several times if need be")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "oracle" in metafunc.fixturenames:
        folders = [Path(p) for p in metafunc.config.getoption("oracles")] or [ORACLES]
        cases = sorted(case for folder in folders for case in folder.glob("*.npz"))
        if not cases:
            raise pytest.UsageError(f"no oracle cases (*.npz) in {', '.join(map(str, folders))}")
        metafunc.parametrize("oracle", cases, ids=[case.stem for case in cases])
