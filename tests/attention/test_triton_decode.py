"""One more token on the Triton kernel against the forward over whole sequences, in Triton's interpreter."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.helpers.decode_kernel_cases import DecodeCase, decode_errors, prefill_errors
from tests.helpers.marks import every_nth

TOLERANCES = {torch.float32: 3e-7, torch.float16: 1e-3}  # of the largest value of the reference
SMALL = {"chunk_size": 3, "max_chunks": 5}
GATED = {"chunk_size": 3, "max_chunks": 3, "mix_form": "relative", "decay": "token", "normalizer": "block"}
SHIFT = {"chunk_size": 3, "max_chunks": 2, "extrapolation": "shift"}
LINEAR = {"name": "linear", "chunk_size": 3}
CASES = [
    DecodeCase((0, 0), 8, 8, 8, SMALL),
    DecodeCase((4, 0, 7), 8, 24, 8, {**SMALL, "normalizer": "block"}, heads=1),
    DecodeCase((5, 1), 5, 8, 24, {**SMALL, "decay": "token", "normalizer": "block"}, rotary=True, heads=1),
    DecodeCase((4, 1), 8, 8, 8, {**SHIFT, "decay": "head", "decay_span": "sequence", "mix_per_head": True}),
    DecodeCase((7, 1), 9, 8, 24, {**GATED, "decay_span": "sequence"}, rotary=True, heads=1),
    DecodeCase(
        (4, 1), 5, 8, 8, {**GATED, "decay_span": "sequence", "chunk_size": 1, "max_chunks": 2}, heads=1
    ),
    DecodeCase((5, 3), 4, 72, 40, {**SHIFT, "feature_map": "elu", "max_chunks": 1}, rotary=True),
    DecodeCase((5, 3), 6, 8, 8, {**SMALL, "intra": "window"}, rotary=True),
    DecodeCase((5, 3), 4, 72, 24, SMALL, rotary=True, heads=1),
    DecodeCase((3, 1), 3, 8, 24, {**LINEAR, "normalizer": "block", "decay": "token"}, rotary=True),
    DecodeCase((0, 0), 3, 8, 8, {**LINEAR, "decay": "head"}),
    DecodeCase((7, 1), 9, 16, 16, {**GATED, "decay_span": "sequence"}, heads=1, dtype=torch.float16),
    DecodeCase((4, 1), 5, 24, 8, {**SHIFT, "decay": "token"}, rotary=True, heads=1, dtype=torch.float16),
]
WIDE = DecodeCase((5, 3), 6, 128, 256, SMALL, rotary=True)


@pytest.mark.parametrize(
    "case", [*every_nth(CASES, 2), pytest.param(WIDE, marks=pytest.mark.slow)], ids=lambda case: case.label
)
def test_steps_equal_the_forward_over_whole_sequences(
    interpreted: ProcessPoolExecutor, case: DecodeCase
) -> None:
    error, torchs = interpreted.submit(decode_errors, case).result()
    assert error < TOLERANCES[case.dtype], (error, torchs)


PROMPTS = [case for case in CASES if any(case.prompts) and "intra" not in case.entry]
SHOWN = (1, 3, 7)  # decays by chunk and over the sequence, normalizers, a relative form, linear attention


@pytest.mark.parametrize(
    "case",
    [
        case if n in SHOWN else pytest.param(case, marks=pytest.mark.slow)
        for n, case in enumerate([*PROMPTS, DecodeCase((6, 2), 0, 8, 8, {**LINEAR, "decay": "head"})])
    ],
    ids=lambda case: case.label,
)
def test_the_state_after_a_prompt_is_that_of_its_tokens_one_by_one(
    interpreted: ProcessPoolExecutor, case: DecodeCase
) -> None:
    """On the kernels, where they take the feature map."""
    found = interpreted.submit(prefill_errors, case).result()
    assert len(found) >= 2
    for name, error in found.items():
        assert error < TOLERANCES[case.dtype], (name, found)
