"""The options of the evaluation `samples`. Importing this module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from mhla_lightning.errors import UserError

_LAST_SEED = 2**32 - 1
_NEIGHBOURS = 3  # of precision and recall, which need more images than that


@dataclass(frozen=True)
class SampleOptions:
    """How samples are drawn, and the classifier that judges them.

    Attributes:
        classifier: a classifier run, by id or folder.
        n: images, the same number of every class; of a text-to-image model, one for each of the first n
            held-out captions.
        guidance: scale of classifier-free guidance; 1 means none.
        sampler: name in diffusion.SAMPLERS; None means ddpm, for flow matching euler.
        steps: of the sampler.
        seed: of the noise.
        reference: REF.npz or shards of real images; None means the val split of the run's data.
        batch_size: images drawn at once.
        ema: take averaged weights where the run has them.
        device: auto means the GPU where there is one.

    Raises:
        UserError: a value of another type or outside its range; the key is the option.
    """

    classifier: str
    n: int = 500
    guidance: float = 1.5
    sampler: str | None = None
    steps: int = 250
    seed: int = 0
    reference: str | None = None
    batch_size: int = 50
    ema: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        whole = {"n": _NEIGHBOURS + 1, "steps": 1, "seed": 0, "batch_size": 1}
        for name, least in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(name, f"{value!r} is not a whole number of at least {least}")
        if self.seed > _LAST_SEED:
            raise UserError("seed", f"{self.seed} is too large; a seed is between 0 and {_LAST_SEED}")
        for name in ("classifier", "sampler", "reference", "device"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name in ("sampler", "reference")):
                raise UserError(name, f"{value!r} is no text")
        if (
            not isinstance(self.guidance, (int, float))
            or isinstance(self.guidance, bool)
            or not 0 <= self.guidance < float("inf")
        ):
            raise UserError("guidance", f"{self.guidance!r} is not a finite number of at least 0")
        if not isinstance(self.ema, bool):
            raise UserError("ema", f"{self.ema!r} is neither true nor false")
