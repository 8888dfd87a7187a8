"""How the progress of a run is shown."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

log = logging.getLogger(__name__)


class Report(Protocol):
    """Shows a run's progress to a person."""

    def line(self, text: str) -> None:
        """Show a step of the run."""

    def problem(self, text: str) -> None:
        """Show why the run ends early."""

    def metrics(self, title: str, last: Mapping[str, float], best: Mapping[str, float] | None = None) -> None:
        """Show values by tag: the last of each and, after training, the best."""


class LogReport:
    """The report of a run that Python code starts: lines of the package's logger."""

    def line(self, text: str) -> None:
        log.info(text)

    def problem(self, text: str) -> None:
        log.error(text)

    def metrics(self, title: str, last: Mapping[str, float], best: Mapping[str, float] | None = None) -> None:
        shown = (
            f"{tag} {value:.4f}" + (f" (best {best[tag]:.4f})" if best else "") for tag, value in last.items()
        )
        log.info(f"{title}: {', '.join(shown)}")
