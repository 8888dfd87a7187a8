"""A logger of somebody's own, which shows images as Lightning's WandbLogger does."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch.loggers.logger import Logger


class RecordingLogger(Logger):
    """Keeps what it is given.

    Attributes:
        made: all loggers of this class, the newest last.
        scalars: tag -> values.
        images: (tag, step, image).
        videos: (tag, step, bytes, format).
    """

    made: ClassVar[list[RecordingLogger]] = []

    def __init__(self) -> None:
        super().__init__()
        self.scalars: dict[str, list[float]] = {}
        self.images: list[tuple[str, int | None, Any]] = []
        self.videos: list[tuple[str, int | None, bytes, str]] = []
        self.made.append(self)

    @property
    def name(self) -> str:
        return "recording"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for tag, value in metrics.items():
            self.scalars.setdefault(tag, []).append(float(value))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.images += [(key, step, image) for image in images]

    def log_video(self, key: str, videos: list[Any], step: int | None = None, **options: list[Any]) -> None:
        for video, kind in zip(videos, options["format"], strict=True):
            self.videos.append((key, step, video.read(), kind))
