"""The causal kernels' launches: FLOPs, bytes, the form that is taken, and machine code for two GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.attention.mhla.triton.choice import CausalSizes, causal_dense_is_cheaper
from mhla_lightning.attention.mhla.triton.launch import Launch, recorded
from mhla_lightning.attention.mhla.triton.terms import CausalTerms

BATCH, HEADS, SIZE, TOKENS = 16, 4, 64, 2048  # of lm_340m
DECAYS = ("none", "chunk", "sequence")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def launches(
    far: bool,
    capability: int,
    dims: tuple[int, int],
    decay: str,
    packed: bool,
    normalize: bool,
    rotary: bool = False,
) -> list[Launch]:
    """Return the launches of one forward and backward."""
    from mhla_lightning.attention.mhla.triton import causal

    count = TOKENS // SIZE
    q, k, v, grad = (
        meta(BATCH, TOKENS, HEADS, d, dtype=torch.bfloat16) for d in (*dims[:1] * 2, *dims[1:] * 2)
    )
    logs = [meta(BATCH, HEADS, count, SIZE) for _ in range(DECAYS.index(decay))] + [None] * 2
    turns = meta(2, 1, TOKENS, dims[0] // 2) if rotary else None
    layout = meta(BATCH, count, SIZE + 2, dtype=torch.int32) if packed else None
    terms = CausalTerms(meta(BATCH, HEADS, count, count), layout, logs[0], logs[1], turns)
    plan = causal.CausalPlan(SIZE, far, 0.0, 1e-6 if normalize else None)
    with recorded(capability // 10) as found, torch.no_grad():
        saved = causal.forward(q, k, v, terms, plan)
        causal.backward(grad, (q, k, v), terms, saved, plan)
    return list(found)


def test_short_rows_are_dense_and_long_ones_in_chunks() -> None:
    short, long = (CausalSizes(BATCH * HEADS, tokens // SIZE, SIZE, 128, 256) for tokens in (512, 16_384))
    assert causal_dense_is_cheaper(short)
    assert not causal_dense_is_cheaper(long)


@pytest.mark.parametrize(("far", "names"), [(False, 3), (True, 4)], ids=["dense", "chunks"])
def test_kernels_and_bytes_of_a_call(far: bool, names: int) -> None:
    found = launches(far, 90, (128, 256), "none", False, False)
    assert len({launch.name for launch in found}) == names
    assert len(found) == names + 2 * far  # means of chunks and their mixing, forward and backward
    tokens = 2 * BATCH * TOKENS * HEADS * (2 * 128 + 2 * 256)
    forward = next(launch for launch in found if launch.name == "causal_forward_kernel")
    means = 2 * BATCH * HEADS * (TOKENS // SIZE) * 128 * 256 if far else 0
    weights = 4 * BATCH * HEADS * (TOKENS // SIZE) ** 2
    assert forward.bytes == tokens + means + weights


@pytest.mark.parametrize("form", ["dense", "chunks"])
def test_flops_are_counted_for_both_forms(form: str) -> None:
    from mhla_lightning.attention.mhla.triton.causal_ops import triton_causal_mhla

    q, k, v = (meta(2, 24, 3, 8) for _ in range(3))
    terms = CausalTerms(meta(1, 1, 4, 4))
    with FlopCounterMode(display=False) as counter:
        out = triton_causal_mhla(q, k, v, terms, 6, offset=0.0, eps=None, form=form)
    forward = counter.get_total_flops()
    assert forward == 2 * 3 * (24 * 24 * 16 if form == "dense" else 4 * 36 * 16 + 2 * 64 * (2 * 24 + 16))
    with FlopCounterMode(display=False) as counter:
        out.backward(torch.empty_like(out))
    assert counter.get_total_flops() > 2 * forward - 1
    assert terms.weights.grad is not None
    assert terms.weights.grad.shape == terms.weights.shape


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("far", [False, True], ids=["dense", "chunks"])
@pytest.mark.parametrize(
    ("dims", "decay", "packed", "normalize", "rotary"),
    [
        ((128, 256), "none", False, False, True),
        ((128, 256), "none", False, False, False),
        ((128, 256), "sequence", True, True, False),
        ((64, 64), "sequence", True, True, False),
        ((64, 64), "none", False, True, True),
        ((72, 72), "none", False, False, True),
        ((128, 256), "none", False, True, True),
    ],
    ids=["lm_340m", "no rotary", "normalizer", "64", "rotary and normalizer", "72", "wide, both"],
)
def test_causal_kernels_compile_without_spills(
    capability: int,
    far: bool,
    dims: tuple[int, int],
    decay: str,
    packed: bool,
    normalize: bool,
    rotary: bool,
) -> None:
    from mhla_lightning.bench.kernel_code import SHARED_BYTES, compile_launch

    for launch in launches(far, capability, dims, decay, packed, normalize, rotary):
        code = compile_launch(launch, capability)
        assert code.spilled == 0, code
        assert code.shared <= SHARED_BYTES[capability], code
        assert code.tensor_core > 0, code
