"""How Lightning reads and writes the file of a checkpoint folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from mhla_lightning.checkpoints.source import ShardedSource, open_source


class RunCheckpointIO(TorchCheckpointIO):
    """Lightning's TorchCheckpointIO lacks two things: writing later, in the order and the thread that the
    checkpoint callback chooses, and reading what the ranks of a sharded run wrote."""

    def __init__(self) -> None:
        self._taken: dict[str, Any] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Takes what is to be written; :meth:`take` gives it out."""
        self._taken = checkpoint

    def take(self, change: Callable[[Any], Any]) -> tuple[dict[str, Any], Callable[[Path], None]]:
        """What was saved last, after `change`, and the function that writes it."""
        assert self._taken is not None, "nothing was saved"
        kept, self._taken = change(self._taken), None
        return kept, lambda path: super(RunCheckpointIO, self).save_checkpoint(kept, path)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """The file's content; of a sharded run with weights and optimizer put together."""
        source = open_source(Path(path))
        return source.as_whole() if isinstance(source, ShardedSource) else dict(source.checkpoint)
