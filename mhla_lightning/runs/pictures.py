"""Images of a training, for every logger that can show them."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger

log = logging.getLogger(__name__)


@runtime_checkable
class LogsImages(Protocol):
    """A logger with the method of Lightning's WandbLogger."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Show images, each uint8 (H, W, 3)."""
        ...


@runtime_checkable
class LogsVideos(Protocol):
    """A logger with the method of Lightning's WandbLogger."""

    def log_video(self, key: str, videos: list[Any], step: int | None = None, **options: list[Any]) -> None:
        """Show videos, each a file-like object; `format` holds the kind of each."""
        ...


def showing(loggers: Sequence[Logger]) -> list[Logger]:
    """Return the loggers that can show images; the log names each other kind once."""
    able = [logger for logger in loggers if _shows(logger)]
    for logger in loggers:
        if logger not in able:
            _left_out(type(logger).__name__)
    return able


def _shows(logger: Logger) -> bool:
    return isinstance(logger, TensorBoardLogger | MLFlowLogger | LogsImages)


@cache
def _left_out(kind: str) -> None:
    log.info(f"{kind} shows no images: heat maps, grids and clips go to the other loggers")


def show_image(loggers: Sequence[Logger], tag: str, pixels: np.ndarray, step: int) -> None:
    """Show an image in every logger that can.

    Args:
        loggers: of a trainer.
        tag: name of the image.
        pixels: uint8 (H, W, 3).
        step: optimizer steps done.
    """
    for logger in showing(loggers):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, pixels, step, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            cast(Any, logger.experiment).log_image(logger.run_id, pixels, key=tag, step=step)
        elif isinstance(logger, LogsImages):
            logger.log_image(tag, [pixels], step)


def show_gif(loggers: Sequence[Logger], tag: str, gif: bytes, size: tuple[int, int], step: int) -> None:
    """Show an animated GIF in every logger that can.

    Args:
        loggers: of a trainer.
        tag: name of the clip.
        gif: content of the file.
        size: height and width in pixels.
        step: optimizer steps done.
    """
    for logger in showing(loggers):
        if isinstance(logger, TensorBoardLogger):
            from tensorboard.compat.proto.summary_pb2 import Summary

            image = Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=gif)
            summary = Summary(value=[Summary.Value(tag=tag, image=image)])
            logger.experiment.file_writer.add_summary(summary, step)
        elif isinstance(logger, MLFlowLogger):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, f"{tag.replace('/', '-')}-{step}.gif")
                path.write_bytes(gif)
                cast(Any, logger.experiment).log_artifact(logger.run_id, str(path), "images")
        elif isinstance(logger, LogsVideos):
            logger.log_video(tag, [io.BytesIO(gif)], step, format=["gif"])
