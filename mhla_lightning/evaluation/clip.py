"""CLIP score: how well images show their prompts (arXiv 2104.08718).

Importing this module imports no torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhla_lightning.errors import UserError, missing_extra
from mhla_lightning.runs.folder import RunFolder

if TYPE_CHECKING:
    import numpy as np
    import torch

DEFAULT_CLIP = "openai/clip-vit-large-patch14"
"""The network of most published scores; scores of different networks do not compare."""

_LAST_SEED = 2**32 - 1
_BATCH = 32  # pairs in CLIP at once


@dataclass(frozen=True)
class ClipScoreOptions:
    """How images of prompts are drawn, and the network that judges them.

    Attributes:
        prompts: file of prompts, one a line or .jsonl.
        clip: a CLIP model of transformers: a folder, or a name on the Hugging Face hub.
        n: images of each prompt.
        size: [height, width] in pixels; None means as in training.
        guidance: scale of classifier-free guidance; 1 means none.
        sampler: name in diffusion.SAMPLERS; None means dpm++.
        steps: of the sampler.
        seed: of the noise.
        batch_size: images drawn at once.
        ema: take averaged weights where the run has them.
        device: auto means the GPU where there is one.

    Raises:
        UserError: a value of another type or outside its range; the key is the option.
    """

    prompts: str
    clip: str = DEFAULT_CLIP
    n: int = 1
    size: Sequence[int] | None = None
    guidance: float = 4.5
    sampler: str | None = None
    steps: int = 20
    seed: int = 0
    batch_size: int = 4
    ema: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in {"n": 1, "steps": 1, "seed": 0, "batch_size": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(name, f"{value!r} is not a whole number of at least {least}")
        if self.seed > _LAST_SEED:
            raise UserError("seed", f"{self.seed} is too large; a seed is between 0 and {_LAST_SEED}")
        for name in ("prompts", "clip", "sampler", "device"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name == "sampler"):
                raise UserError(name, f"{value!r} is no text")
        if self.size is not None and not _is_size(self.size):
            raise UserError("size", f"{self.size!r} is not [height, width] in pixels")
        number = isinstance(self.guidance, (int, float)) and not isinstance(self.guidance, bool)
        if not number or not 0 <= self.guidance < float("inf"):
            raise UserError("guidance", f"{self.guidance!r} is not a finite number of at least 0")
        if not isinstance(self.ema, bool):
            raise UserError("ema", f"{self.ema!r} is neither true nor false")


def _is_size(value: Any) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    return pair and all(type(side) is int and side > 0 for side in value)


def fix_clip(options: ClipScoreOptions, runs: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Identify the prompts and a folder of CLIP by their contents.

    Returns:
        values that replace options, and values that identify them in stored results.

    Raises:
        UserError: no such file of prompts.
    """
    file = Path(options.prompts)
    if not file.is_file():
        raise UserError("prompts", f"{options.prompts} is no file")
    places, contents = {"prompts": str(file.absolute())}, {"prompts": _sha256([file])}
    folder = Path(options.clip)
    if folder.is_dir():
        places["clip"] = str(folder.absolute())
        contents["clip"] = _sha256(sorted(folder.glob("*.safetensors")))
    return places, contents


def _sha256(files: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def check_clip(options: ClipScoreOptions, task: Any, data: Any) -> None:
    """Check that this run can be measured, before anything is trained or drawn.

    Args:
        options: of the evaluation.
        task: of the run, without weights.
        data: the run's data module.

    Raises:
        UserError: no text-to-image model, a sampler for another process, a file without prompts, or no such
            CLIP model.
    """
    _check_run(options, task)
    ClipScorer(options.clip)


def _check_run(options: ClipScoreOptions, task: Any) -> None:
    from mhla_lightning.diffusion import check_sampler
    from mhla_lightning.inference.diffusion.prompts import read_prompts
    from mhla_lightning.inference.diffusion.videos import video_sampler
    from mhla_lightning.tasks import TextToImageTask

    if not isinstance(task, TextToImageTask):
        raise UserError(
            "eval",
            f"clip draws images of prompts, and {type(task).__name__} is no text-to-image model "
            "(TextToImageTask)",
        )
    check_sampler(options.sampler or video_sampler(task.process), task.process, options.steps)
    read_prompts(options.prompts)


def measure_clip(run: RunFolder, options: ClipScoreOptions) -> dict[str, float]:
    """Draw images of the prompts into the run folder and compare them with their prompts.

    A stopped measurement continues.

    Returns:
        clip_score: mean over the images, see :meth:`ClipScorer.scores`.

    Raises:
        UserError: see :func:`check_clip`.
    """
    from mhla_lightning.diffusion import Guidance
    from mhla_lightning.inference.diffusion.parts import job_name
    from mhla_lightning.inference.diffusion.prompts import read_prompts
    from mhla_lightning.inference.diffusion.text_images import (
        TextDrawing,
        TextImageJob,
        draw_text_images,
        find_text_image_run,
    )
    from mhla_lightning.inference.diffusion.videos import video_sampler
    from mhla_lightning.inference.weights import choose_device

    found, device = find_text_image_run(str(run.path), ema=options.ema), choose_device(options.device)
    _check_run(options, found.task)
    judge = ClipScorer(options.clip, device)  # first, because drawing takes longer than to find it missing
    size = None if options.size is None else (options.size[0], options.size[1])
    sampler = options.sampler or video_sampler(found.task.process)
    drawing = TextDrawing(size, options.seed, sampler, options.steps, Guidance(float(options.guidance)))
    prompts = tuple(read_prompts(options.prompts))
    job = TextImageJob(found, prompts, options.n, drawing, options.batch_size)
    folder = found.run.path / "images" / job_name(found.checkpoint, job.settings())
    images = draw_text_images(job, folder, 1, device, lambda count: None)
    return {"clip_score": float(judge.scores(images, job.texts).mean())}


class ClipScorer:
    """A CLIP model of transformers.

    Args:
        name: a folder, or a name on the Hugging Face hub; its weights are safetensors.
        device: where it runs.

    Attributes:
        tokens: of the longest text; longer texts lose their end.

    Raises:
        UserError: transformers is missing, no such model, or a model of another kind.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        try:
            from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
        except ImportError as error:
            raise UserError(None, missing_extra("transformers", "diffusion", "a CLIP score")) from error
        try:
            config = CLIPConfig.from_pretrained(name)
            model, report = CLIPModel.from_pretrained(name, use_safetensors=True, output_loading_info=True)
            self._tokenizer = CLIPTokenizer.from_pretrained(name)
            self._processor = CLIPImageProcessor.from_pretrained(name)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError("clip", _not_opened(name, error)) from error
        if report["missing_keys"]:
            raise UserError(
                "clip", f"{name} holds no whole CLIP model: {sorted(report['missing_keys'])[0]} is missing"
            )
        self._model, self._device = model.to(device).eval(), device
        self.tokens: int = config.text_config.max_position_embeddings

    def count_longer(self, texts: Sequence[str]) -> int:
        """Return how many texts have more tokens than the model reads."""
        return sum(len(tokens) > self.tokens for tokens in self._tokenizer(list(texts)).input_ids)

    def scores(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        texts: Sequence[str],
        on_batch: Callable[[int], Any] = lambda count: None,
    ) -> np.ndarray:
        """Return 100 max(cos(image, text), 0) of each pair.

        Args:
            images: uint8 (H, W, 3) each.
            texts: one for each image.
            on_batch: called with the number of pairs of each finished batch.

        Returns:
            float64 (pairs,)
        """
        import numpy as np
        import torch

        found = []
        for first in range(0, len(texts), _BATCH):
            # Copies, because torch warns of arrays that cannot be written.
            given = [np.array(image) for image in images[first : first + _BATCH]]
            pixels = self._processor(given, return_tensors="pt").pixel_values
            tokens = self._tokenizer(
                list(texts[first : first + _BATCH]),
                padding=True,
                truncation=True,
                max_length=self.tokens,
                return_tensors="pt",
            )
            with torch.inference_mode():
                out = self._model(
                    input_ids=tokens.input_ids.to(self._device),
                    attention_mask=tokens.attention_mask.to(self._device),
                    pixel_values=pixels.to(self._device),
                )
            cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
            found.append(100 * cosine.clamp(min=0).double().cpu().numpy())
            on_batch(len(cosine))
        return np.concatenate(found)


def _not_opened(name: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0][:160]
    if os.path.isdir(name):
        return (
            f"{name} is no folder of a CLIP model with its tokenizer, image processor and safetensors "
            f"({reason})"
        )
    return (
        f"{name} cannot be opened ({type(error).__name__}: {reason}); name a folder of a CLIP model, made "
        f"where there is a network by hf download {name if '/' in name else DEFAULT_CLIP} --local-dir FOLDER"
    )
