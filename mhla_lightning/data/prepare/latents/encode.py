"""Images to latents."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import numpy as np
import torch

from mhla_lightning.data.encoders.vaes import Autoencoder, load_vae
from mhla_lightning.data.kinds.latents import FLIPPED, LATENT, LOGVAR, draw
from mhla_lightning.data.prepare.latents.captions import CaptionFeatures
from mhla_lightning.data.prepare.latents.devices import DTYPES
from mhla_lightning.data.prepare.latents.images import Picture, picture
from mhla_lightning.data.prepare.latents.shard import STORED, LatentJob, LatentTally, OnSamples, ShardEncoder
from mhla_lightning.data.prepare.samples import Sample, latent_sample, npy_bytes
from mhla_lightning.data.skips import JUDGED_AFTER, BadSample
from mhla_lightning.errors import DataError, UserError
from mhla_lightning.randomness import generator


@dataclass(frozen=True)
class ImageEncoder(ShardEncoder):
    """An encoder of images.

    Args:
        vae: see vaes.load_vae.
        subfolder: see vaes.load_vae.
        size: pixels a side.
        batch_size: images at once.
        seed: of the draws, where moments are not kept.
        features: of their captions; None where images have classes.
    """

    vae: str
    subfolder: str | None
    size: int
    batch_size: int
    seed: int
    features: CaptionFeatures | None = None

    def latents(
        self, job: LatentJob, device: str, tally: LatentTally, on_samples: OnSamples
    ) -> Iterator[Sample]:
        """See ShardEncoder. Raises DataError also when nothing can be encoded."""
        opened = _opened(self, device, str(job.header.vae and job.header.vae.sha256))
        return self._latents(job, opened, tally, on_samples)

    def _latents(
        self, job: LatentJob, vae: Autoencoder, tally: LatentTally, on_samples: OnSamples
    ) -> Iterator[Sample]:
        seen = 0
        with ThreadPoolExecutor(self.threads) as pool:
            for batch in self._pictures(job, pool):
                good = []
                for number, (name, found) in enumerate(batch, start=job.first + seen):
                    if isinstance(found, Picture):
                        good.append((number, found))
                    else:
                        tally.skip(job.split, name, str(found))
                if good:
                    yield from self._encode(job, vae, good, tally)
                seen += len(batch)
                if len(tally.skipped) == seen >= JUDGED_AFTER:
                    raise DataError(
                        job.split,
                        f"none of the first {seen} images gives a latent; {tally.skipped[-1][0]}: "
                        f"{tally.skipped[-1][1]}",
                    )
                on_samples(job.split, len(batch))

    def _pictures(
        self, job: LatentJob, pool: ThreadPoolExecutor
    ) -> Iterator[list[tuple[str, Picture | BadSample]]]:
        """Yield (name, picture) of all images in batches; one batch is read ahead of the device."""
        images = iter(job.samples)
        classes = len(job.header.classes)

        def begin() -> list[tuple[str, Future[Picture | BadSample]]]:
            return [
                (image.name, pool.submit(picture, image, self.size, classes))
                for image in islice(images, self.batch_size)
            ]

        batch = begin()
        while batch:
            ahead = begin()
            yield [(name, future.result()) for name, future in batch]
            batch = ahead

    def _encode(
        self, job: LatentJob, vae: Autoencoder, pictures: list[tuple[int, Picture]], tally: LatentTally
    ) -> Iterator[Sample]:
        """Yield the samples of a batch.

        Args:
            job: the shard.
            vae: on the device.
            pictures: with their number in the split.
            tally: of the shard.
        """
        wanted = job.header.vae
        assert wanted is not None
        pixels = (
            torch.from_numpy(np.stack([found.pixels for _, found in pictures]))
            .permute(0, 3, 1, 2)
            .contiguous()
        )
        images = pixels.float() / 127.5 - 1
        arrays: dict[str, np.ndarray] = {}
        for name in (LATENT, FLIPPED) if wanted.flipped else (LATENT,):
            arrays |= self._posterior(
                job,
                vae,
                name,
                images if name == LATENT else images.flip(-1),
                [number for number, _ in pictures],
            )
        finite = np.logical_and.reduce([np.isfinite(array).all(axis=(1, 2, 3)) for array in arrays.values()])
        for row in np.flatnonzero(~finite):
            tally.skip(
                job.split,
                pictures[row][1].name,
                f"its latent holds NaN or values that {STORED[self.dtype]} does not reach",
            )
        for name in (LATENT, FLIPPED):
            if name in arrays and finite.any():
                logvar = arrays.get(LOGVAR[name])
                tally.add(arrays[name][finite], None if logvar is None else logvar[finite], wanted)
        for row in np.flatnonzero(finite):
            found = pictures[row][1]
            text = (
                None if found.caption is None or self.features is None else self.features.read(found.caption)
            )
            sample = latent_sample(
                job.header,
                found.name,
                arrays[LATENT][row],
                label=found.label,
                text=text,
                caption=found.caption,
            )
            more = {f"{name}.npy": npy_bytes(array[row]) for name, array in arrays.items() if name != LATENT}
            yield replace(
                sample,
                members=sample.members | more | ({"json": found.json} if found.json is not None else {}),
            )

    def _posterior(
        self, job: LatentJob, vae: Autoencoder, name: str, images: torch.Tensor, numbers: list[int]
    ) -> dict[str, np.ndarray]:
        """Return the members of a batch, (B, C, h, w) each.

        They are mean and log-variance, or one latent, drawn where the encoder gives a distribution.
        """
        stored = STORED[self.dtype]
        try:
            with torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            ):
                mean, logvar = (
                    None if found is None else found.cpu().numpy() for found in vae.encode(images)
                )
        except torch.OutOfMemoryError as error:
            raise UserError(
                "batch_size",
                f"the device has too little memory for {self.batch_size} images at once; choose fewer",
            ) from error
        assert mean is not None
        if logvar is not None and not (job.header.vae and job.header.vae.moments):
            keys = [(self.seed, "posterior", job.split, number, name) for number in numbers]
            mean = np.stack(
                [draw(one, its, generator(*key)) for one, its, key in zip(mean, logvar, keys, strict=True)]
            )
            logvar = None
        arrays = {name: mean} | ({LOGVAR[name]: logvar} if logvar is not None else {})
        with np.errstate(over="ignore"):  # infinite values are reported later, with the image's name
            return {key: array.astype(stored) for key, array in arrays.items()}


@lru_cache(maxsize=1)
def _opened(encoder: ImageEncoder, device: str, sha256: str) -> Autoencoder:
    vae = load_vae(encoder.vae, encoder.subfolder, device, DTYPES[encoder.dtype])
    if vae.sha256 != sha256:
        raise DataError(
            "vae",
            f"the weights of {encoder.vae} changed while latents were made; begin again with `overwrite`",
        )
    return vae
