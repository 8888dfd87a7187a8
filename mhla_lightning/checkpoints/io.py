"""How Lightning reads and writes the file of a checkpoint folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from mhla_lightning.checkpoints.source import ShardedSource, open_source


class RunCheckpointIO(TorchCheckpointIO):
    """Lightning's TorchCheckpointIO, with later writing and with reading of rank files.

    The checkpoint callback chooses when and in which thread the file is written. A checkpoint whose ranks
    wrote a file each is read as one.
    """

    def __init__(self) -> None:
        self._taken: dict[str, Any] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Keep the content; :meth:`take` gives it out."""
        self._taken = checkpoint

    def take(self, change: Callable[[Any], Any]) -> tuple[dict[str, Any], Callable[[Path], None]]:
        """Return the content saved last, after `change`, and the function that writes it."""
        assert self._taken is not None, "nothing was saved"
        kept, self._taken = change(self._taken), None
        return kept, lambda path: super(RunCheckpointIO, self).save_checkpoint(kept, path)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Return the file's content, with weights and optimizer of all rank files put together.

        Raises:
            UserError: a damaged file, or weights that are not finite.
        """
        source = open_source(Path(path))
        source.check()
        return source.as_whole() if isinstance(source, ShardedSource) else dict(source.checkpoint)
