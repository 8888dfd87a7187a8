"""The modelled rows of language models, and the machine code of the kernel of single tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhla_lightning.attention.mhla.decode import init_state, make_room
from mhla_lightning.attention.mhla.rule import CausalRule
from mhla_lightning.attention.mhla.triton.launch import Launch, recorded
from mhla_lightning.bench.kernel_launches import operator_times
from mhla_lightning.bench.language_launches import LANGUAGE_CASES

TRAINING, PROMPT, TOKEN, BEGINNING = LANGUAGE_CASES


def test_training_of_lm_340m_keeps_its_goal() -> None:
    (times,) = operator_times([TRAINING])
    row = times.row()
    assert row["form"] == "chunks"
    assert row["triton_ms"] <= 0.75
    assert row["torch_ms"] > 5 * row["triton_ms"]


def test_prompts_take_the_forward_and_one_kernel_more() -> None:
    (times,) = operator_times([PROMPT])
    row = times.row()
    names = [launch.name for launch in PROMPT.recorded_call(9)[0][0]]
    assert names == ["causal_forward_kernel", "chunk_sum_kernel"]
    assert row["triton_kernels"][1] == 0
    assert row["torch_kernels"][0] > 2 * row["triton_kernels"][0]
    assert row["torch_ms"] > 3 * row["triton_ms"]


def test_a_token_of_all_layers_moves_its_sums_once() -> None:
    (times,) = operator_times([TOKEN])
    row = times.row()
    assert row["triton_kernels"] == [24, 0]
    sums = 3 * 64 * 4 * 128 * 256 * 4  # current read and written, mixed read
    assert 24 * sums < 1e9 * row["triton_gigabytes"] < 24 * 1.01 * sums
    assert row["torch_ms"] > 3 * row["triton_ms"]
    assert row["torch_kernels"][0] > 20 * 24


def test_a_token_that_begins_a_chunk_reads_all_earlier_ones() -> None:
    common, rare = (operator_times([case])[0].row() for case in (TOKEN, BEGINNING))
    ring = 24 * 31 * 64 * 4 * 128 * 256 * 4
    assert 1e9 * (rare["triton_gigabytes"] - common["triton_gigabytes"]) == pytest.approx(ring)
    assert rare["torch_ms"] > rare["triton_ms"]


def launch(
    dims: tuple[int, int], normalizer: str = "none", form: str = "absolute", span: str | None = None
) -> Launch:
    """Return the launch of a token; without a span there is no decay."""
    from mhla_lightning.attention.mhla.triton.decode import Token, step_chunks

    rule = CausalRule(normalizer=normalizer, form=form, decay_span=span or "chunk")
    state = init_state(
        64,
        heads=4,
        dim_k=dims[0],
        dim_v=dims[1],
        blocks=32,
        rule=rule,
        decays=span is not None,
        device="meta",
    )
    make_room(state, state.reach.kept)

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = (meta(64, 4, dim, dtype=torch.bfloat16) for dim in (dims[0], *dims))
    mixing = meta(4, 32) if form == "relative" else meta(32, 32)
    with recorded() as found:
        step_chunks(state, Token(q, k, v, 0.0, None, None if span is None else meta(64, 4), v.dtype), mixing)
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_of_a_token_compiles_without_spills(capability: int) -> None:
    from mhla_lightning.bench.kernel_code import SHARED_BYTES, compile_launch

    launches = [
        TOKEN.recorded_call(capability // 10)[0][0][0],
        launch((128, 256), "block", "relative", "sequence"),
        launch((128, 256), "block", "absolute", "chunk"),
        launch((72, 72), "block", "absolute", "sequence"),
        launch((64, 64)),
    ]
    for one in launches:
        code = compile_launch(one, capability)
        assert code.spilled == 0, code
        assert code.registers <= 128, code  # two programs of 256 threads a processor
        assert code.shared <= SHARED_BYTES[capability], code
