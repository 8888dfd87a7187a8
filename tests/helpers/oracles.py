"""The folder of oracle cases."""

from __future__ import annotations

from pathlib import Path

ORACLES = Path(__file__).parents[1] / "oracles"
