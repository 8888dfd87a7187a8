"""Clips and their captions to shards of latents and text features.

Buckets are made side by side. The bytes are the same however often the work was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhla_lightning.data.encoders.vaes import VideoAutoencoder, load_video_vae
from mhla_lightning.data.index import VAE, Clip, ShardIndex
from mhla_lightning.data.kinds.clips import Clips
from mhla_lightning.data.prepare.latents.captions import (
    CaptionFeatures,
    EncodedTexts,
    check_text_options,
    describe_text,
    text_bytes,
    text_packages,
)
from mhla_lightning.data.prepare.latents.clips import ClipSplit, open_clips
from mhla_lightning.data.prepare.latents.devices import DTYPES, find_devices, find_dtype
from mhla_lightning.data.prepare.latents.shard import (
    STORED,
    LatentJob,
    LatentTally,
    LatentTarget,
    OnSamples,
    ShardEncoder,
)
from mhla_lightning.data.prepare.latents.work import (
    LatentPlan,
    LatentReport,
    make_planned,
    settings_of,
)
from mhla_lightning.data.prepare.pack import PackOptions, Progress, check_target
from mhla_lightning.data.prepare.replacing import Note
from mhla_lightning.data.prepare.samples import Sample, latent_sample
from mhla_lightning.data.skips import JUDGED_AFTER, BadSample
from mhla_lightning.errors import DataError, UserError

_OVERHEAD = 4096  # bytes of a sample's headers in a tar file


@dataclass(frozen=True)
class VideoOptions:
    """How clips become latents.

    Args:
        vae: see vaes.load_video_vae.
        text_encoder: see text_encoders.load_text_encoder.
        tokens: the most tokens of a caption; None is the encoder's: 300 of Gemma-2, else 512.
        subfolder: of the VAE.
        name: name of the VAE in the index and in recipes; None is `vae`.
        device: see devices.find_devices; for both models.
        dtype: see devices.find_dtype; for both models.
        shards: number of training shards of a bucket.
        max_skipped_share: of clips that cannot be read or encoded; more of them end the work.
        long_captions: refuse or cut captions with more tokens.
    """

    vae: str
    text_encoder: str
    tokens: int | None = None
    subfolder: str | None = None
    name: str | None = None
    device: str = "auto"
    dtype: str | None = None
    shards: int | None = None
    max_skipped_share: float = 0.01
    long_captions: str = "refuse"

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its range."""
        check_text_options(self.tokens, self.long_captions)
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError("max_skipped_share", f"got {self.max_skipped_share}; it must be from 0 to 1")
        PackOptions(shards=self.shards)


@dataclass(frozen=True)
class VideoEncoder(ShardEncoder):
    """An encoder of clips.

    Args:
        vae: see vaes.load_video_vae.
        subfolder: see vaes.load_video_vae.
        clip: size of the clips.
        features: of their captions.
    """

    vae: str
    subfolder: str | None
    clip: Clip
    features: CaptionFeatures

    def latents(
        self, job: LatentJob, device: str, tally: LatentTally, on_samples: OnSamples
    ) -> Iterator[Sample]:
        """See ShardEncoder. One clip is decoded while another is encoded."""
        opened = _opened(
            self.vae, self.subfolder, device, self.dtype, str(job.header.vae and job.header.vae.sha256)
        )
        return self._latents(job, opened, tally, on_samples)

    def _latents(
        self, job: LatentJob, vae: VideoAutoencoder, tally: LatentTally, on_samples: OnSamples
    ) -> Iterator[Sample]:
        with ThreadPoolExecutor(self.threads) as pool:
            clips = iter(job.samples)
            ahead = pool.submit(self._next, clips)
            seen = 0
            while (found := ahead.result()) is not None:
                ahead = pool.submit(self._next, clips)
                name, content = found
                if isinstance(content, BadSample):
                    tally.skip(job.split, name, str(content))
                else:
                    yield from self._encode(job, vae, name, content, tally)
                seen += 1
                if len(tally.skipped) == seen >= JUDGED_AFTER:
                    raise DataError(
                        job.split,
                        f"none of the first {seen} clips gives a latent; {tally.skipped[-1][0]}: "
                        f"{tally.skipped[-1][1]}",
                    )
                on_samples(job.split, 1)

    def _next(self, clips: Iterator[Sample]) -> tuple[str, dict[str, Any] | BadSample] | None:
        """Return the next clip's name, and its content or the reason why it cannot be read."""
        sample = next(clips, None)
        if sample is None:
            return None
        try:
            return sample.name, Clips(self.clip).inspect({"__key__": sample.name, **sample.members})
        except BadSample as reason:
            return sample.name, reason

    def _encode(
        self, job: LatentJob, vae: VideoAutoencoder, name: str, content: dict[str, Any], tally: LatentTally
    ) -> Iterator[Sample]:
        """Yield the sample to write, if its latent can be stored."""
        wanted = job.header.vae
        assert wanted is not None
        video = torch.from_numpy(content["clip"]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        try:
            with torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            ):
                latent = vae.encode(video)[0].cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise UserError(
                "device",
                f"the device has too little memory for clips of {self.clip}; choose a device with "
                "more, or smaller clips",
            ) from error
        with np.errstate(over="ignore"):
            stored = latent.astype(STORED[self.dtype])
        if not np.isfinite(stored).all():
            tally.skip(
                job.split, name, f"its latent holds NaN or values that {STORED[self.dtype]} does not reach"
            )
            return
        tally.add(stored[None], None, wanted)
        caption = content["caption"]
        yield latent_sample(job.header, name, stored, text=self.features.read(caption), caption=caption)


@lru_cache(maxsize=1)
def _opened(name: str, subfolder: str | None, device: str, dtype: str, sha256: str) -> VideoAutoencoder:
    vae = load_video_vae(name, subfolder, device, DTYPES[dtype])
    if vae.sha256 != sha256:
        raise DataError(
            "vae", f"the weights of {name} changed while latents were made; begin again with `overwrite`"
        )
    return vae


def make_video_latents(
    source: str | Path,
    to: str | Path,
    options: VideoOptions,
    *,
    overwrite: bool = False,
    wait: bool = True,
    on_progress: Progress | None = None,
    on_note: Note | None = None,
) -> LatentReport:
    """Write the latents and text features of clips as shards under `to`, bucket by bucket.

    Args:
        source: see clips.open_clips.
        to: the folder to make.
        options: how clips become latents.
        overwrite: see make.make_latents, also for the arguments that follow.
        wait: wait for another process that makes `to`.
        on_progress: called with a split, its samples done and its samples in all.
        on_note: called with remarks for the user.

    Raises:
        UserError, Interrupted: see make.make_latents.
        DataError: a bad source, or a caption that is too long.
    """
    target = check_target(source, to)
    devices = find_devices(options.device)
    dtype = find_dtype(options.dtype, devices[0])
    clips = open_clips(source)
    headers = _headers(clips, options, dtype)

    def targets(texts: EncodedTexts | None) -> list[LatentTarget]:
        assert texts is not None
        made = []
        for split, header in zip(clips, headers, strict=True):
            encoder = VideoEncoder(
                dtype, devices, 1, options.vae, options.subfolder, split.clip, texts.features
            )
            source = split.plan(options.shards, _sample_bytes(header, STORED[dtype].itemsize))
            made.append(LatentTarget(split.name, texts.described(header), source, encoder))
        return made

    plan = LatentPlan(
        "clips",
        {split.name: header for split, header in zip(clips, headers, strict=True)},
        [split.name for split in clips],
        _settings(clips, headers[0], options, dtype, devices[0]),
        dtype,
        devices,
        options.max_skipped_share,
        partial(_captions, clips),
        targets,
        options.long_captions == "cut",
    )
    return make_planned(target, plan, overwrite, wait, on_progress, on_note)


def _headers(clips: Sequence[ClipSplit], options: VideoOptions, dtype: str) -> list[ShardIndex]:
    """Return an index of every split, without shards.

    Raises UserError for models that cannot be opened, or clips that do not fit.
    """
    vae = load_video_vae(options.vae, options.subfolder)
    shapes = []
    for split in clips:
        try:
            shapes.append(vae.latent_shape(split.clip.frames, split.clip.height, split.clip.width))
        except UserError as error:
            raise UserError(split.address, error.reason) from error
    text = describe_text(options.text_encoder, options.tokens, dtype)
    made = [
        VAE(options.name or options.vae, 1.0, 0.0, shape, vae.kind, vae.sha256, False, False)
        for shape in shapes
    ]
    return [
        ShardIndex("video_latents", (), vae=found, clip=split.clip, text=text)
        for split, found in zip(clips, made, strict=True)
    ]


def _settings(
    clips: Sequence[ClipSplit], header: ShardIndex, options: VideoOptions, dtype: str, device: str
) -> dict[str, Any]:
    """Return the facts that decide which bytes are written, for the user to read."""
    assert header.vae is not None
    assert header.text is not None
    text = {f"text {key}": value for key, value in header.text.facts().items()}
    facts = {"vae": header.vae.name, "sha256": header.vae.sha256, **text, "shards": options.shards}
    if options.long_captions != "refuse":  # else the facts are those of versions that knew no choice
        facts |= {"text long_captions": options.long_captions}
    facts |= {"clips": [f"{split.name} {split.clip} {split.split.index.hash}" for split in clips]}
    packages = ["torch", "diffusers", *text_packages(header.text)]
    return settings_of(facts, dtype, device, packages)


def _captions(clips: Sequence[ClipSplit]) -> dict[str, str]:
    """Return all captions, each with the sample that it was first found at."""
    seen: dict[str, str] = {}
    for split in clips:
        for name, caption in split.captions():
            seen.setdefault(caption, f"{name} of {split.name}")
    return seen


def _sample_bytes(header: ShardIndex, itemsize: int) -> int:
    """Return roughly the bytes of a sample in a tar file."""
    assert header.vae is not None
    assert header.text is not None
    return math.prod(header.vae.shape) * itemsize + text_bytes(header.text) + _OVERHEAD
