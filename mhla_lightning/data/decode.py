"""A raw sample to (image, label), and the account of those that cannot be decoded."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from PIL import Image
from webdataset.autodecode import imagehandler

from mhla_lightning.data.reading import RawSample
from mhla_lightning.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
JUDGED_AFTER = 100  # samples read before a share of bad ones means anything
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}
_to_pil_rgb = imagehandler("pilrgb", IMAGE_EXTENSIONS)
_log = logging.getLogger(__name__)


class BadSample(Exception):
    """A sample that cannot be used; it is skipped and counted."""


def image_extension(data: bytes) -> str | None:
    """'jpg' or 'png' by the first bytes, None for anything else."""
    return next((extension for magic, extension in _MAGIC.items() if data.startswith(magic)), None)


def decode(sample: RawSample, classes: int) -> tuple[Image.Image, int]:
    """The RGB image and the label (0 <= label < classes) of a raw sample. Raises BadSample with the reason."""
    return _decode_image(sample), _decode_label(sample, classes)


def _decode_image(sample: RawSample) -> Image.Image:
    extension = next((name for name in IMAGE_EXTENSIONS if name in sample), None)
    if extension is None:
        raise BadSample(f"no member {' or '.join(IMAGE_EXTENSIONS)}")
    if image_extension(sample[extension]) is None:  # PIL would try every format it knows, PostScript through an external program among them
        raise BadSample(f"member {extension} is neither JPEG nor PNG")
    try:
        return _to_pil_rgb(extension, sample[extension])
    except Exception as error:  # PIL's plugins raise nearly anything on damaged bytes, decompression bombs included
        raise BadSample(f"image cannot be decoded: {error}") from error


def _decode_label(sample: RawSample, classes: int) -> int:
    if "cls" not in sample:
        raise BadSample("no member cls")
    text = sample["cls"].strip()
    if not text.isdigit() or len(text) > 9 or int(text) >= classes:
        raise BadSample(f"cls is {text[:20]!r}; it must be an integer from 0 to {classes - 1}")
    return int(text)


@dataclass
class SkipMeter:
    """What one worker has read and skipped; ends the run when the share of bad samples passes the limit.

    limit: largest share of skipped samples, judged after 100 samples or one full pass.
    """

    limit: float
    read: int = 0
    skipped: int = 0
    _reported: int = 0
    _last: str = ""

    def good(self) -> None:
        """Count a sample that was decoded."""
        self.read += 1

    def bad(self, sample: RawSample, reason: BadSample) -> None:
        """Count a skipped sample. Raises DataError when the share is over the limit."""
        self.read += 1
        self.skipped += 1
        self._last = f"the last is {sample['__key__']} in {sample['__url__']} ({reason})"
        _log.info("skipped %s of %s: %s", sample["__key__"], sample["__url__"], reason)
        if self.read >= JUDGED_AFTER:
            self.judge()

    def judge(self) -> None:
        """Raise DataError when the share is over the limit, or when nothing at all could be decoded."""
        share = self.skipped / max(self.read, 1)
        if self.skipped and (share > self.limit or self.skipped == self.read):
            found = f"{self.skipped} of {self.read} samples ({share:.1%}) cannot be decoded"
            raise DataError(f"{found}, more than data.max_skipped_share {self.limit:g} allows; {self._last}")

    def take(self) -> int:
        """Samples skipped since the last call."""
        fresh, self._reported = self.skipped - self._reported, self.skipped
        return fresh
