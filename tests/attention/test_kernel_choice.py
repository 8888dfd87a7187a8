"""Which implementation and which form of MHLA a call takes, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from mhla_lightning.attention import ATTENTION, BlockGrid, Context, build_attention
from mhla_lightning.attention.mhla.triton import choice, tiles
from mhla_lightning.errors import UserError
from tests.helpers.errors import refused

ON_TRITON = [name for name in sorted(ATTENTION) if name != "softmax"]


def built(name: str, **options: object) -> torch.nn.Module:
    blocks = {"blocks": 2} if name == "mhla" else {}
    return build_attention({"name": name, **blocks, **options}, heads=1, dim_k=8, dim_v=8, grid=(4,))


def tokens(dtype: torch.dtype = torch.float32, dim: int = 8) -> list[torch.Tensor]:
    return [torch.randn(1, 4, 1, dim, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("name", ON_TRITON)
def test_an_unknown_kernel_is_refused_by_its_key(name: str) -> None:
    with refused("kernel"):
        built(name, kernel="cuda")


@pytest.mark.parametrize("name", ON_TRITON)
def test_triton_is_refused_on_a_cpu(name: str) -> None:
    with pytest.raises(UserError, match="'triton' cannot serve this call: it needs a CUDA device") as found:
        built(name, kernel="triton")(*tokens())
    assert found.value.key == "kernel"


@pytest.mark.parametrize("name", ON_TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_on_a_cpu_is_the_torch_path(name: str, dtype: torch.dtype) -> None:
    automatic, plain = built(name), built(name, kernel="torch")
    q, k, v = tokens(dtype)
    assert torch.equal(automatic(q, k, v), plain(q, k, v))


def test_the_environment_wins_over_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "torch")
    built("mhla", kernel="triton")(*tokens())
    monkeypatch.setenv(choice.VARIABLE, "triton")
    with refused("kernel"):
        built("mhla", kernel="torch")(*tokens())
    monkeypatch.setenv(choice.VARIABLE, "cuda")
    with refused(choice.VARIABLE):
        built("mhla")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "bf16, fp16 and float32"),
        ({"dim": 136}, "up to 128 channels"),
        ({"v": torch.bfloat16}, "different dtypes"),
        ({"context": Context(mask=torch.ones(1, 4, dtype=torch.bool))}, "no mask"),
        ({"context": Context(rotary=lambda x: x)}, "rotary positions of a grid"),
        ({"unfit": "it takes no normalizer"}, "no normalizer"),
    ],
    ids=["dtype", "dim", "dtypes", "mask", "rotary", "operator"],
)
def test_what_kernels_cannot_do_is_refused_or_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, change: dict, reason: str
) -> None:
    monkeypatch.setattr(choice, "INTERPRETING", True)
    q, k, v = tokens(change.get("dtype", torch.float32), change.get("dim", 8))
    v = v.to(change.get("v", v.dtype))
    context, unfit = change.get("context", Context()), change.get("unfit")
    with pytest.raises(UserError, match=reason):
        choice.takes_triton("triton", q, k, v, context, unfit)
    assert not choice.takes_triton("auto", q, k, v, context, unfit)
    q, k, v = tokens()
    assert choice.takes_triton("triton", q, k, v, Context())


def test_feature_maps_and_slot_are_left_to_torch() -> None:
    for options in ({"feature_map": "elu"}, {"normalizer": "slot"}):
        with pytest.raises(UserError, match="feature maps 'relu' and 'relu_eps'"):
            built("mhla", kernel="triton", **options)(*tokens())


def test_autocast_casts_tokens_as_for_sdpa() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert {x.dtype for x in choice.operands("triton", *tokens())} == {torch.bfloat16}
        assert {x.dtype for x in choice.operands("auto", *tokens())} == {torch.float32}
    assert {x.dtype for x in choice.operands("triton", *tokens())} == {torch.float32}


def test_a_copy_keeps_its_kernel() -> None:
    assert copy.deepcopy(built("mhla", kernel="torch")).kernel == "torch"


@pytest.mark.parametrize(
    ("grid", "size", "heads", "dim", "dense"),
    [
        ((16, 16), 4, 3072, 64, True),
        ((16, 16), 4, 512, 72, True),
        ((32, 32), 4, 192, 64, True),
        ((128, 128), 16, 24, 64, False),
        ((21, 30, 50), (7, 6, 5), 12, 128, False),
    ],
    ids=["deit", "dit", "dit 512", "dit 2048", "wan"],
)
def test_short_rows_take_the_dense_form(
    grid: tuple[int, ...], size: int | tuple[int, ...], heads: int, dim: int, dense: bool
) -> None:
    blocks = BlockGrid(grid, block_size=size)
    assert choice.dense_is_cheaper(tiles.call_sizes(heads, blocks, dim, dim)) == dense


def test_the_cost_grows_with_tokens_and_the_forms_cross_once() -> None:
    sizes = [
        tiles.call_sizes(96, BlockGrid((n,), block_size=64), 64, 64) for n in (256, 512, 1024, 4096, 16384)
    ]
    assert all(
        choice.dense_seconds(a) < choice.dense_seconds(b) for a, b in zip(sizes, sizes[1:], strict=False)
    )
    chosen = [choice.dense_is_cheaper(size) for size in sizes]
    assert chosen[0]
    assert not chosen[-1]
    assert chosen == sorted(chosen, reverse=True)
