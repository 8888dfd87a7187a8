"""Choice between Triton and torch, and between the two forms of MHLA, in one place.

Nothing here imports Triton: a machine without it reads this file alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from mhla_lightning.attention.base import known
from mhla_lightning.attention.context import Context, HalfRotary, PairRotary, Rotary
from mhla_lightning.attention.packing import DocumentChunks
from mhla_lightning.attention.transforms import in_transform
from mhla_lightning.errors import UserError, unknown_name

KERNELS = ("auto", "triton", "torch")
VARIABLE = "MHLA_KERNEL"
LEAST_CAPABILITY = 8  # Ampere: tensor cores for bf16
INSTALLED = find_spec("triton") is not None
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, for tests
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_BATCH = 65535  # programs along one axis
_WRONG_BATCH = f"it takes 1 to {LARGEST_BATCH:,} samples"
LARGEST_DIM = 128  # channels a head; a summary of more leaves no registers for tokens


def kernel_setting(option: str) -> str:
    """Return the implementation that an operator is built for.

    The environment variable MHLA_KERNEL wins over the option.

    Args:
        option: `auto` takes Triton on CUDA for bf16 and fp16 where it can serve the call, and compiled C++ on
            a CPU for short rows. `triton` demands Triton; `torch` takes torch's own operations alone.

    Raises:
        UserError: unknown name.
    """
    known("kernel", option, KERNELS)
    forced = os.environ.get(VARIABLE)
    if not forced:
        return option
    if forced not in KERNELS:
        raise UserError(VARIABLE, unknown_name("name", forced, KERNELS))
    return forced


def takes_triton(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, context: Context, unfit: str | None = None
) -> bool:
    """Return whether a bidirectional call runs on Triton kernels.

    Args:
        kernel: of :func:`kernel_setting`.
        q, k, v: of the call.
        context: of the call.
        unfit: what of the operator itself the kernels cannot do; None means nothing.

    Raises:
        UserError: `triton` was demanded and cannot serve the call.
    """
    return _decide(kernel, q, lambda: unfit or machine_obstacle(q) or _obstacle(q, k, v, context))


def _decide(kernel: str, q: Tensor, obstacle: Callable[[], str | None]) -> bool:
    if kernel == "torch" or (kernel == "auto" and not (q.is_cuda and q.dtype.itemsize == 2)):
        return False
    reason = obstacle()
    if reason is None and in_transform(q):
        reason = "it has no rule for torch.func and forward-mode derivatives"
    if kernel == "triton" and reason is not None:
        raise UserError("kernel", f"'triton' cannot serve this call: {reason}; use 'auto' or 'torch'")
    return reason is None


def machine_obstacle(q: Tensor) -> str | None:
    """Return what keeps Triton kernels from running where q is; None means nothing."""
    if q.dtype not in DTYPES:
        return f"it takes bf16, fp16 and float32, and q is {q.dtype}"
    if not q.is_cuda and not (q.device.type == "cpu" and INTERPRETING):
        return f"it needs a CUDA device, and q is on {q.device.type}"
    if q.is_cuda and torch.cuda.get_device_properties(q.device).major < LEAST_CAPABILITY:
        return "it needs compute capability 8.0 (A100) or newer"
    return None if INSTALLED else "Triton is not installed"


def _obstacle(q: Tensor, k: Tensor, v: Tensor, context: Context) -> str | None:
    if context.mask is not None:
        return "it takes no mask"
    if context.rotary is not None and not isinstance(context.rotary, PairRotary):
        return "it takes rotary positions of a grid only"
    if context.rotary is not None and q.shape[3] % 2:
        return "rotary positions need an even number of channels"
    if max(q.shape[3], v.shape[3]) > LARGEST_DIM:
        return f"it takes up to {LARGEST_DIM} channels a head"
    return _operand_obstacle(q, k, v)


def _operand_obstacle(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v have different dtypes: {q.dtype}, {k.dtype} and {v.dtype}"
    if q.numel() == 0 or q.shape[0] > LARGEST_BATCH:
        return _WRONG_BATCH
    if q.shape[1] * max(x.stride(1) for x in (q, k, v)) >= 2**31:  # places are 32-bit numbers
        return "it takes samples of up to 2^31 elements"
    return None


def turn_table(rotary: Rotary | None) -> Tensor | None:
    """Return the table of a rotary that :func:`takes_triton` let pass."""
    if rotary is None:
        return None
    assert isinstance(rotary, PairRotary)
    return rotary.turn_table()


def operands(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as the kernels take them: under autocast in its dtype, as SDPA does."""
    kind = q.device.type
    if kernel == "torch" or kind not in ("cuda", "cpu") or not torch.is_autocast_enabled(kind):
        return q, k, v
    if kernel == "auto" and kind == "cpu":
        return q, k, v
    lower = torch.get_autocast_dtype(kind)
    q, k, v = (x.to(lower) if x.dtype == torch.float32 else x for x in (q, k, v))
    return q, k, v


@dataclass(frozen=True)
class Costs:
    """Constants of the choice between the forms; ratios matter, not the chip.

    Attributes:
        flops: of matrix products a second that short kernels reach with bf16 operands.
        bytes: to and from memory a second.
        launch: seconds that a kernel costs at least.
    """

    flops: float = 550e12
    bytes: float = 3.0e12
    launch: float = 4e-6


COSTS = Costs()


@dataclass(frozen=True)
class CallSizes:
    """Sizes of one call.

    Attributes:
        rows: batch x heads.
        tokens, blocks: of one row.
        padded: rows that its tokens take in tiles of the dense form.
        dim_k, dim_v: channels a head.
    """

    rows: int
    tokens: int
    blocks: int
    padded: int
    dim_k: int
    dim_v: int


def dense_seconds(sizes: CallSizes, costs: Costs = COSTS) -> float:
    """Return the model's time of forward and backward with the N x N form.

    The forward has two products and the backward seven. Every launch reads and writes tokens once, and a
    long row has two launches backward.
    """
    whole = sizes.padded <= WHOLE_ROW
    pairs = sizes.rows * sizes.padded**2
    products = 2 * pairs * (sizes.dim_k + sizes.dim_v)
    flops = 4.5 * products
    passes = sizes.rows * sizes.tokens * (sizes.dim_k + sizes.dim_v) * (6 if whole else 8)
    return max(flops / costs.flops, 2 * passes / costs.bytes) + (2 if whole else 3) * costs.launch


def block_seconds(sizes: CallSizes, costs: Costs = COSTS) -> float:
    """Return the model's time of forward and backward with summaries of blocks.

    Summaries cross memory four times forward and seven times backward.
    """
    summary = sizes.dim_k * sizes.dim_v
    flops = 6 * sizes.rows * (2 * sizes.tokens * summary + sizes.blocks**2 * summary)
    passes = 6 * sizes.rows * sizes.tokens * (sizes.dim_k + sizes.dim_v)
    passes += 11 * sizes.rows * sizes.blocks * summary
    return max(flops / costs.flops, 2 * passes / costs.bytes) + 10 * costs.launch


WHOLE_ROW = 256
"""Padded tokens of the longest row whose gradients one program finishes; see `tiles.py`."""


def dense_is_cheaper(sizes: CallSizes) -> bool:
    """Return whether the N x N form is expected to be the faster one."""
    return dense_seconds(sizes) <= block_seconds(sizes)


LARGEST_VALUE = 256  # channels of v a head in the causal kernels


def causal_unfit(offset: float | None) -> str | None:
    """Return what of a causal operator the kernels over whole rows cannot do.

    Args:
        offset: of the feature map relu(x) + offset; None means another map.
    """
    return "it takes the feature maps 'relu' and 'relu_eps'" if offset is None else None


def prepare(kernel: str, chunks: DocumentChunks) -> None:
    """Compute what causal kernels read of documents; it is kept there."""
    if kernel != "torch" and chunks.slot.is_cuda:
        _ = chunks.layout


def takes_causal(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, context: Context, unfit: str | None = None
) -> bool:
    """Return whether a causal call over whole rows runs on Triton kernels.

    The arguments are those of :func:`takes_triton`.

    Raises:
        UserError: `triton` was demanded and cannot serve the call.
    """
    return _decide(kernel, q, lambda: unfit or machine_obstacle(q) or _causal_obstacle(q, k, v, context))


def _causal_obstacle(q: Tensor, k: Tensor, v: Tensor, context: Context) -> str | None:
    if context.rotary is not None and not isinstance(context.rotary, HalfRotary):
        return "it takes rotary positions that turn two halves of a head"
    if q.shape[3] > LARGEST_DIM or v.shape[3] > LARGEST_VALUE:
        return f"it takes up to {LARGEST_DIM} channels of q and {LARGEST_VALUE} of v a head"
    return _operand_obstacle(q, k, v)


def takes_prefill(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context,
    learned: Tensor | None,
    unfit: str | None,
) -> bool:
    """Return whether a prompt runs on Triton kernels.

    Else it runs on torch, also where `triton` is set. The state that the kernels leave has no gradients.

    Args:
        kernel, q, k, v, context, unfit: see :func:`takes_triton`.
        learned: the mixing matrix or decay; None means none.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, learned)):
        return False
    if kernel == "triton":
        return not (unfit or machine_obstacle(q) or _causal_obstacle(q, k, v, context)) and not in_transform(
            q
        )
    return takes_causal(kernel, q, k, v, context, unfit)


def takes_step(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, context: Context, sums: Tensor, learned: Tensor | None
) -> bool:
    """Return whether one more token of every sequence is processed by a Triton kernel.

    Args:
        kernel: of :func:`kernel_setting`.
        q, k, v, context: of the token.
        sums: of the state.
        learned: the mixing matrix or decay; None means none.

    Raises:
        UserError: `triton` was demanded and cannot serve the call.
    """

    def obstacle() -> str | None:
        if torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (q, k, v, sums, learned)
        ):
            return "a single token has no gradients there; step under torch.no_grad()"
        if sums.dtype != torch.float32:
            return f"it takes a state in float32, and this one is in {sums.dtype}"
        if context.rotary is not None and not isinstance(context.rotary, HalfRotary):
            return "it takes rotary positions that turn two halves of a head"
        if q.shape[3] > LARGEST_DIM or v.shape[3] > LARGEST_VALUE:
            return f"it takes up to {LARGEST_DIM} channels of q and {LARGEST_VALUE} of v a head"
        return machine_obstacle(q) or (None if 0 < q.shape[0] <= LARGEST_BATCH else _WRONG_BATCH)

    return _decide(kernel, q, obstacle)


@dataclass(frozen=True)
class CausalSizes:
    """Sizes of one causal call.

    Attributes:
        rows: batch x heads.
        chunks: of one row.
        size: tokens per chunk.
        dim_k, dim_v: channels a head.
    """

    rows: int
    chunks: int
    size: int
    dim_k: int
    dim_v: int


def causal_dense_seconds(sizes: CausalSizes, costs: Costs = COSTS) -> float:
    """Return the model's time of forward and backward with every earlier key read.

    These are half of all N x N pairs.
    """
    tokens = sizes.chunks * sizes.size
    pairs = sizes.rows * tokens * (tokens + sizes.size) / 2
    flops = 2 * pairs * (6 * sizes.dim_k + 4 * sizes.dim_v)
    passes = 8 * sizes.rows * tokens * (sizes.dim_k + sizes.dim_v)
    return max(flops / costs.flops, 2 * passes / costs.bytes) + 3 * costs.launch


def causal_chunk_seconds(sizes: CausalSizes, costs: Costs = COSTS) -> float:
    """Return the model's time of forward and backward with means of chunks.

    The pairs inside chunks are added, and means cross memory ten times.
    """
    tokens, summary = sizes.chunks * sizes.size, sizes.dim_k * sizes.dim_v
    pairs = sizes.rows * tokens * sizes.size / 2
    flops = 2 * pairs * (6 * sizes.dim_k + 4 * sizes.dim_v)
    flops += 6 * sizes.rows * summary * (2 * tokens + sizes.chunks**2)
    passes = 11 * sizes.rows * tokens * (sizes.dim_k + sizes.dim_v) + 10 * sizes.rows * sizes.chunks * summary
    return max(flops / costs.flops, 2 * passes / costs.bytes) + 12 * costs.launch


def causal_dense_is_cheaper(sizes: CausalSizes) -> bool:
    """Return whether reading every earlier key is expected to be the faster form."""
    return causal_dense_seconds(sizes) <= causal_chunk_seconds(sizes)
