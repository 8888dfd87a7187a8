"""Jobs that draw images or videos of prompts.

Here are their settings, their text features, and the drawing of the batches that a folder lacks.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mhla_lightning.data.index import TextEncoding
from mhla_lightning.errors import UserError
from mhla_lightning.inference.diffusion.parts import (
    TEXT,
    Draw,
    batches,
    claim,
    draw_parts,
    part_file,
    read_npy,
)
from mhla_lightning.inference.diffusion.prompts import Prompt, TextCache
from mhla_lightning.runs.folder import RunFolder

_EMPTY = Prompt("", "the empty prompt")


class PromptedData(Protocol):
    """What a job asks of the data module of a run."""

    text_encoder: TextEncoding | None


class PromptedRun(Protocol):
    """What a job asks of a run."""

    @property
    def run(self) -> RunFolder: ...
    @property
    def checkpoint(self) -> Path: ...
    @property
    def averaged(self) -> bool: ...
    @property
    def data(self) -> PromptedData: ...
    def identity(self) -> dict[str, Any]: ...


class PromptedJob(ABC):
    """Which prompts to draw, and how often each.

    Attributes:
        prompts: in their order.
        batch_size: samples drawn at once.
    """

    prompts: tuple[Prompt, ...]
    batch_size: int

    @property
    @abstractmethod
    def of(self) -> PromptedRun:
        """Return the run."""

    @property
    @abstractmethod
    def copies(self) -> int:
        """Return the samples of each prompt; sample i shows prompt i // copies."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return everything that the samples depend on, as JSON values."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the prompt of every sample."""
        return tuple(prompt.text for prompt in self.prompts for _ in range(self.copies))

    def settings_of(self, drawing: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        """Return settings. Their order and content name the folders of stopped jobs, so they stay.

        Args:
            drawing: how each sample is drawn.
            own: of this kind of job.
        """
        encoder = self.of.data.text_encoder
        given = {
            **self.of.identity(),
            **drawing,
            "text_encoder": None if encoder is None else encoder.facts(),
            "batch_size": self.batch_size,
            **own,
            "prompts": [prompt.text for prompt in self.prompts],
        }
        return json.loads(json.dumps(given))


class JobPlace(NamedTuple):
    """Where a process finds the run of a job and the folder of its samples.

    Attributes:
        run, checkpoint: folders.
        averaged: whether the weights are averaged.
        texts: prompt of every sample.
        folder: of the samples.
    """

    run: str
    checkpoint: str
    averaged: bool
    texts: tuple[str, ...]
    folder: Path

    def features(self, encoding: TextEncoding | None) -> JobFeatures:
        """Return the text features that draw_prompted has kept."""
        assert encoding is not None
        return JobFeatures(TextCache(self.folder / TEXT, encoding), self.texts)


class JobFeatures:
    """The text features of a job.

    Args:
        cache: that keeps them.
        texts: prompt of every sample.

    Attributes:
        null: of the empty prompt, (tokens, channels).
    """

    def __init__(self, cache: TextCache, texts: Sequence[str]) -> None:
        self._cache, self._texts = cache, texts
        self.null = cache.read([_EMPTY.text])[0]

    def of(self, samples: range) -> Tensor:
        """Return the features of samples, zero-padded, float32 (samples, tokens, channels)."""
        return self._cache.read([self._texts[sample] for sample in samples])


def draw_prompted(
    job: PromptedJob,
    folder: Path,
    kind: str,
    make: Callable[[JobPlace, torch.device], Draw],
    processes: int,
    device: torch.device,
    on_batch: Callable[[int], Any],
    on_prompt: Callable[[], Any],
) -> list[range]:
    """Encode the prompts and draw the batches that `folder` lacks.

    Args:
        job: what to draw; it was checked.
        folder: made where it does not exist.
        kind: what the samples are, for messages: "images".
        make: opens the run on a device and returns the function that draws; it must be picklable.
        processes: number of processes; they share the cores, and the GPUs if there are several.
        device: where the samples are drawn.
        on_batch: called with the number of samples that an earlier attempt has left, then with the number of
            each finished batch.
        on_prompt: called after each encoded prompt.

    Returns:
        The sample numbers of every batch.

    Raises:
        UserError: a run without a text encoder, a prompt that is too long, or a folder with other samples.
    """
    found = job.of
    if found.data.text_encoder is None:
        raise UserError(found.run.run_id, "its recipe has no data.text_encoder to encode prompts with")
    cache = TextCache(folder / TEXT, found.data.text_encoder)
    features = cache.encode([*job.prompts, _EMPTY], device, on_prompt)
    claim(folder, job.settings(), kind)
    cache.keep(features)
    work = batches(len(job.texts), job.batch_size)
    missing = [batch for batch in work if read_npy(part_file(folder, batch)) is None]
    on_batch(len(job.texts) - sum(map(len, missing)))
    opened = JobPlace(str(found.run.path), str(found.checkpoint), found.averaged, job.texts, folder)
    draw_parts(partial(make, opened), missing, processes, device, on_batch)
    return work
