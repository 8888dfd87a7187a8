"""Settings and inputs of causal MHLA, in chunks and token by token alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mhla_lightning.attention.base import known
from mhla_lightning.attention.chunks import EXTRAPOLATIONS, SPANS
from mhla_lightning.attention.mhla.mixing import FORMS

CAUSAL_NORMALIZERS = ("none", "block")


@dataclass(frozen=True)
class CausalRule:
    """How A[t, s] is computed from features, mixing matrix and decay.

    Args:
        chunk_size: tokens per chunk.
        scale: factor on q.k; None means dim_k ** -0.5.
        normalizer: `none` (the paper's, for language) or `block`, which divides by sum_s A[t, s] + eps.
        eps: added to the normalizer.
        form: of the mixing, `absolute` or `relative`; see :class:`MixingMatrix`.
        extrapolation: for documents of more chunks than the matrix has. None refuses them; with `shift` every
            later row uses the last one, shifted, and sees as many chunks as the matrix has.
        decay_span: `chunk` applies the decay inside a chunk only, `sequence` also across chunks.
        own_chunk: False leaves out the query's own chunk, so that earlier chunks are read alone.

    Raises:
        UserError: unknown names.
    """

    chunk_size: int = 64
    scale: float | None = None
    normalizer: str = "none"
    eps: float = 1e-6
    form: str = "absolute"
    extrapolation: str | None = None
    decay_span: str = "chunk"
    own_chunk: bool = True

    def __post_init__(self) -> None:
        known("normalizer", self.normalizer, CAUSAL_NORMALIZERS)
        known("form", self.form, FORMS)
        known("extrapolation", self.extrapolation, EXTRAPOLATIONS)
        known("decay_span", self.decay_span, SPANS)

    @property
    def merges(self) -> bool:
        """Whether all chunks beyond the matrix share its last weight, and so one summary."""
        return self.form == "relative"

    def scale_for(self, dim_k: int) -> float:
        """Return the factor on q.k."""
        return dim_k**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True, eq=False)
class CausalFeatures:
    """q, k and v of a call, already through the feature map.

    Attributes:
        q, k: (batch, heads, tokens, dim_k); of one token (batch, heads, dim_k).
        v: (batch, heads, tokens, dim_v); of one token (batch, heads, dim_v).
        q_norm, k_norm: features for the normalizer where they differ (rotary); None means q and k.
        log_decay: (batch, heads, tokens), or (heads,) where all tokens decay alike, at most 0; of one token
            (batch, heads). A[t, s] takes exp of its sum over s+1..t. None means no decay.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    log_decay: Tensor | None = None
