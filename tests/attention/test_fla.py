"""The operators on flash-linear-attention: what they hand to its kernels (here their recurrence in plain
torch), and on CUDA the kernels.
"""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mhla_lightning.attention import CausalAttention, CausalSelfAttention, Packing, build_attention
from mhla_lightning.attention.base import accumulation_dtype
from mhla_lightning.attention.baselines import causal_fla as fla
from mhla_lightning.attention.baselines.causal_linear import CausalLinear
from mhla_lightning.backbones import CausalLM, build_backbone
from mhla_lightning.backbones.causal_lm import LANGUAGE_PRESETS
from mhla_lightning.backbones.compiling import Compilation
from mhla_lightning.inference.text import Sampling, generate
from tests.helpers import causal_layers as layer_contract
from tests.helpers.errors import refused
from tests.helpers.language_models import CUDA_ONLY, prompts, tiny_model
from tests.helpers.marks import every_nth

KERNELS = {
    "gla": "gla",
    "gated_deltanet": "gated_delta_rule",
    "mamba2": "simple_gla",
}  # name -> module of fla.ops
HEADS, DIM_K, DIM_V = 2, 4, 5
every_operator = pytest.mark.parametrize("name", KERNELS)


@torch.compiler.disable  # as the kernels are
def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """fla's kernels token by token, with its arguments: g (batch, tokens, heads) or one a key channel,
    with beta the delta rule.
    """
    assert q.dtype == k.dtype == v.dtype
    given = [x.to(accumulation_dtype(x)) for x in (q, k, v, g, *([] if beta is None else [beta]))]
    if cu_seqlens is None:
        out, state = _recur(given, initial_state)
    else:
        bounds = cu_seqlens.tolist()
        assert len(q) == 1
        assert bounds == sorted(set(bounds))
        assert (bounds[0], bounds[-1]) == (0, q.shape[1])
        done = [
            _recur([x[:, start:stop] for x in given], None)
            for start, stop in zip(bounds, bounds[1:], strict=False)
        ]
        out, state = torch.cat([out for out, _ in done], 1), torch.cat([state for _, state in done])
    return (scale * out).to(v.dtype), state if output_final_state else None


def _recur(given: list[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v, g, *beta = given
    state = v.new_zeros(len(q), q.shape[2], q.shape[3], v.shape[3]) if state is None else state
    outs = []
    for t in range(q.shape[1]):
        state = state * (g[:, t].exp().unsqueeze(-1) if g.dim() == 4 else g[:, t].exp()[..., None, None])
        value = (
            (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])) * beta[0][:, t, :, None]
            if beta
            else v[:, t]
        )
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], value)
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outs, 1), state


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package were there."""
    monkeypatch.setattr(fla, "find_spec", lambda name: name)


@pytest.fixture
def on_cpu(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' place is taken by their recurrence."""
    monkeypatch.setattr(fla, "load_kernels", lambda ops, name, device: (recurrence, recurrence))


def build(name: str) -> CausalAttention:
    operator = build_attention(name, heads=HEADS, dim_k=DIM_K, dim_v=DIM_V, causal=True)
    assert isinstance(operator, CausalAttention)
    return operator


def inputs(
    name: str, tokens: int, batch: int = 2, dims: tuple[int, int] = (DIM_K, DIM_V), heads: int = HEADS
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    widths = {"q": dims[0], "k": dims[0], "v": dims[1]}
    made = {
        key: torch.randn(batch, tokens, heads, dim, dtype=torch.float64, generator=generator)
        for key, dim in widths.items()
    }
    channels = (dims[0],) if name == "gla" else ()
    made["log_decay"] = -torch.rand(batch, tokens, heads, *channels, dtype=torch.float64, generator=generator)
    if name == "gated_deltanet":
        made["beta"] = torch.rand(batch, tokens, heads, dtype=torch.float64, generator=generator)
    return {key: x.requires_grad_() for key, x in made.items()}


def cut(x: dict[str, Any], start: int, stop: int, rows: slice = slice(None)) -> dict[str, Any]:
    return {key: value[rows, start:stop] for key, value in x.items()}


def written_out(
    name: str, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None = None
) -> Tensor:
    """What each paper says of one document a row, as a sum over earlier tokens where there is one."""
    if name == "gated_deltanet":
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        assert beta is not None
        eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        state, outs = q.new_zeros(len(q), q.shape[2], q.shape[3], v.shape[3]), []
        for t in range(q.shape[1]):
            kt, bt = k[:, t], beta[:, t, :, None, None]
            erase = eye - bt * kt[..., :, None] * kt[..., None, :]
            state = (
                log_decay[:, t].exp()[..., None, None] * erase @ state
                + bt * kt[..., :, None] * v[:, t, :, None, :]
            )
            outs.append((q[:, t, :, None] @ state).squeeze(-2))
        return torch.stack(outs, 1) * q.shape[-1] ** -0.5
    if name == "mamba2":
        q, k, v = F.silu(q), F.silu(k), F.silu(v) * -log_decay[..., None]
        log_decay = log_decay.unsqueeze(-1)
    until = log_decay.cumsum(1)
    passed = (until[:, :, None] - until[:, None]).exp()  # (batch, t, s, heads, dim_k or 1)
    scores = torch.einsum("bthk,bshk,btshk->bths", q, k, passed.expand(*passed.shape[:4], q.shape[-1]))
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
    out = torch.einsum("bths,bshv->bthv", scores.masked_fill(later[:, None], 0), v)
    return out if name == "mamba2" else out * q.shape[-1] ** -0.5


def gradients(x: dict[str, Any], out: Tensor) -> list[Tensor]:
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(out)
    return list(torch.autograd.grad(out, list(x.values()), weights))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_every_operator_that_other_tests_leave_out_is_here() -> None:
    assert set(KERNELS) == set(CUDA_ONLY)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("tokens", [1, 9])
@every_operator
def test_parallel_and_streamed_are_what_the_paper_says_with_all_gradients(name: str, tokens: int) -> None:
    operator, x = build(name), inputs(name, tokens)
    expected = written_out(name, **x)
    wanted = gradients(x, expected)
    for prompt in {0, tokens // 2, tokens}:
        if prompt:
            out, state = operator.prefill(**cut(x, 0, prompt))
            outs = [out]
        else:
            outs, state = (
                [],
                operator.init_state(
                    2, heads=HEADS, dim_k=DIM_K, dim_v=DIM_V, device="cpu", dtype=torch.float64
                ),
            )
        assert state.bytes == 2 * HEADS * DIM_K * DIM_V * 8
        for t in range(prompt, tokens):
            out, state = operator.step(**cut(x, t, t + 1), state=state)
            outs.append(out)
        for streamed in (torch.cat(outs, 1), operator(**x)):
            assert_close(streamed, expected)
            for actual, gradient in zip(gradients(x, streamed), wanted, strict=True):
                assert_close(actual, gradient)


@pytest.mark.usefixtures("on_cpu")
@every_operator
def test_documents_and_padding_are_sequences_of_their_own(name: str) -> None:
    operator, x = build(name), inputs(name, 12, batch=3)
    documents = torch.tensor([[-1] * 2 + [0] * 4 + [1] * 6, [0] * 1 + [7] * 8 + [-1] * 3, [-1] * 12])
    mask = documents >= 0
    hole = {
        key: value.detach()
        .masked_fill(~mask.view(3, 12, *[1] * (value.dim() - 2)), float("nan"))
        .requires_grad_()
        for key, value in x.items()
    }
    out = operator(**hole, mask=mask, documents=documents)
    expected = torch.zeros_like(out)
    for row, start, stop in ((0, 2, 6), (0, 6, 12), (1, 0, 1), (1, 1, 9)):
        expected[row, start:stop] = written_out(name, **cut(x, start, stop, slice(row, row + 1)))[0]
    assert_close(out, expected)
    for actual, gradient in zip(gradients(hole, out), gradients(x, expected), strict=True):
        assert_close(actual, gradient)
    alone = operator(**hole, packing=Packing(mask, None))
    assert_close(alone[1, :9], written_out(name, **cut(x, 0, 9, slice(1, 2)))[0])
    assert not operator(**cut(x, 0, 4), mask=torch.zeros(3, 4, dtype=torch.bool)).any()


@pytest.mark.usefixtures("on_cpu")
@every_operator
def test_states_end_at_the_last_real_token_and_take_another_order(name: str) -> None:
    operator, x = build(name), {key: value.detach() for key, value in inputs(name, 8, batch=3).items()}
    mask = torch.tensor([[1] * 5 + [0] * 3, [0] * 2 + [1] * 6, [0] * 8]).bool()
    _, state = operator.prefill(**x, mask=mask)
    _, first = operator.prefill(**cut(x, 0, 5, slice(0, 1)))
    _, second = operator.prefill(**cut(x, 2, 8, slice(1, 2)))
    nothing = operator.init_state(1, heads=HEADS, dim_k=DIM_K, dim_v=DIM_V, device="cpu", dtype=torch.float64)
    token = cut(x, 7, 8, slice(0, 1))
    wanted = [
        operator.step(**token, state=copy.deepcopy(alone))[0] for alone in (nothing, second, first, second)
    ]
    moved = state.reorder(torch.tensor([2, 1, 0, 1]))
    out, _ = operator.step(
        **{key: value.expand(4, *value.shape[1:]) for key, value in token.items()}, state=moved
    )
    assert_close(out, torch.cat(wanted))
    with refused("documents"):
        operator.prefill(**x, packing=Packing(mask, torch.zeros(3, 8)))


@pytest.mark.usefixtures("on_cpu")
@every_operator
@pytest.mark.parametrize("options", every_nth(layer_contract.LAYERS.values(), 3), ids=layer_contract.LAYERS)
def test_the_layer_keeps_its_contract(name: str, options: dict[str, Any]) -> None:
    layer_contract.check_causality(name, options)
    layer_contract.check_packing(name, options)
    for padding in ("none", "left", "right"):
        layer_contract.check_streaming(name, options, 8, padding)
    layer_contract.check_steps_from_nothing(name, options)


@pytest.mark.usefixtures("on_cpu")
@every_operator
def test_gates_start_apart_and_learn(name: str) -> None:
    layer = layer_contract.build(name)
    assert layer.decay is not None
    spans = 1 / (1 - torch.sigmoid(layer.decay.bias.detach()))
    assert spans.shape == ((4 * layer.dim_k,) if name == "gla" else (4,))
    torch.testing.assert_close(
        spans.view(-1, 4)[0], torch.tensor([4.0, 16.0, 64.0, 256.0], dtype=torch.float64), rtol=1e-4, atol=0.0
    )
    assert (layer.beta is not None) == (name == "gated_deltanet")
    torch.nn.init.normal_(layer.decay.weight, std=0.1)
    layer_contract.run(layer, layer_contract.tokens()).square().sum().backward()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.usefixtures("on_cpu")
@every_operator
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_stays_near_float64(name: str, autocast: bool) -> None:
    layer, x = layer_contract.build(name, short_conv=4, qk_norm=True), layer_contract.tokens()
    expected = layer_contract.run(layer, x)
    layer = layer.float() if autocast else layer.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = layer_contract.run(layer, x.to(next(layer.parameters()).dtype))
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # dynamo looks at it, and hides the warning otherwise
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.slow
def test_a_language_model_generates_and_compiles(name: str) -> None:
    torch.compiler.reset()
    model = tiny_model(name)
    (row,) = prompts(9)
    with torch.no_grad():
        chosen = [
            int(step.tokens[0]) for step in generate(model, [row], Sampling(greedy=True), max_new_tokens=5)
        ]
        expected = list(row)
        for _ in range(5):
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert chosen == expected[9:]
    tokens, documents = torch.tensor([row]), torch.tensor([[0] * 4 + [1] * 5])
    before = model(tokens, documents=documents)
    Compilation(backend="aot_eager").apply(model)
    assert_close(model(tokens, documents=documents), before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.slow
def test_batches_may_be_forgotten_while_a_layer_compiles() -> None:
    """Dynamo walks what a layer looks at, and fails where the collector takes something out meanwhile: no
    layer may look at all batches there are.
    """
    torch.compiler.reset()
    tokens, documents = torch.tensor(prompts(9)), torch.tensor([[0] * 4 + [1] * 5])
    batches = [Packing(None, documents) for _ in range(1000)]
    for packing in batches:
        packing.sequences()

    def forget(phase: str, info: dict[str, int]) -> None:
        del batches[-1:]

    model = tiny_model("mamba2")
    Compilation(backend="eager").apply(model)
    gc.callbacks.append(forget)
    try:
        model(tokens, documents=documents)
    finally:
        gc.callbacks.remove(forget)
    assert 0 < len(batches) < 1000


@pytest.mark.parametrize("preset", LANGUAGE_PRESETS)
@every_operator
def test_it_builds_on_the_meta_device_with_as_many_parameters_as_mhla(name: str, preset: str) -> None:
    with torch.device("meta"):
        model = build_backbone("lm_340m", attention={"name": name, "preset": preset})
    assert isinstance(model, CausalLM)
    assert abs(sum(p.numel() for p in model.parameters()) / 341_130_240 - 1) < 3e-3
    assert model.flops((2048,)) > 0
    assert {layer.attn.rotary for layer in model.layers} == {False}  # type: ignore[union-attr]


@every_operator
def test_flops_are_those_of_linear_attention_and_more_for_the_delta_rule(name: str) -> None:
    linear = CausalLinear(heads=4, dim_k=64, dim_v=128, chunk_size=64).flops(200, 4, 64, 128)
    found = build(name).flops(200, 4, 64, 128)
    assert found == linear if name != "gated_deltanet" else 1.5 * linear < found < 2.5 * linear


@every_operator
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_missing_is_named_before_a_run(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator is built, so that `mhla plan` counts it; nothing else works."""
    monkeypatch.setattr(fla, "find_spec", lambda name: None)
    operator = build(name)
    with refused("name") as error:
        operator.check_device(torch.device(device))
    assert "mhla-lightning[fla]" in str(error.value)
    assert ("CUDA device" in str(error.value)) == (device == "cpu")
    with refused("name"):
        fla.load_kernels(KERNELS[name], name, torch.device(device))


@pytest.mark.usefixtures("installed")
@every_operator
def test_without_a_cuda_device_the_first_forward_says_what_to_take(name: str) -> None:
    layer = CausalSelfAttention(32, attention={"name": name, "heads": 4})
    for call in (layer, layer.prefill, lambda x: layer.step(x, layer.init_state(1))):
        with refused("name"):
            call(torch.randn(1, 1, 32))
    build(name).check_device(torch.device("cuda"))


@every_operator
def test_shapes_on_the_meta_device_are_those_of_the_recurrence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mhla plan` and the check of a recipe run the model there, without the package."""
    monkeypatch.setattr(fla, "find_spec", lambda name: None)
    operator, x = build(name), {key: value.detach().to("meta") for key, value in inputs(name, 7).items()}
    out, state = operator.prefill(**x)
    assert out.shape == operator(**x).shape == (2, 7, HEADS, DIM_V)
    out, state = operator.step(**cut(x, 0, 1), state=state)
    assert out.shape == (2, 1, HEADS, DIM_V)
    assert state.bytes == 2 * HEADS * DIM_K * DIM_V * 8


@pytest.mark.usefixtures("on_cpu")
def test_a_missing_gate_is_named() -> None:
    x = inputs("gated_deltanet", 3)
    with refused("beta"):
        build("gated_deltanet")(**{key: value for key, value in x.items() if key != "beta"})
    with refused("log_decay"):
        build("gla")(x["q"], x["k"], x["v"])


def test_the_package_is_not_imported_with_ours() -> None:
    code = (
        "import json, sys, mhla_lightning.attention; print(json.dumps([m for m in ('fla', 'triton', "
        "'einops') if m in sys.modules]))"
    )
    assert (
        json.loads(
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        )
        == []
    )


def ops(name: str) -> Any:
    """The module of fla.ops; importing it warns where there is no GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"fla.ops.{name}")


needs_fla = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed"
)


@needs_fla
@every_operator
@pytest.mark.parametrize("started", [False, True])
def test_the_recurrence_here_is_the_reference_of_the_package(name: str, started: bool) -> None:
    kernel = KERNELS[name]
    reference = getattr(ops(f"{kernel}.naive"), f"naive_recurrent_{kernel}")
    x = {key: value.detach().float() for key, value in inputs(name, 11).items()}
    state = torch.randn(2, HEADS, DIM_K, DIM_V) if started else None
    gates = {"gk" if name == "gla" else "g": x.pop("log_decay")}
    out, end = reference(**x, **gates, initial_state=state, output_final_state=True)
    mine, my_end = recurrence(
        **x, g=next(iter(gates.values())), scale=DIM_K**-0.5, initial_state=state, output_final_state=True
    )
    torch.testing.assert_close(mine, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(my_end, end, rtol=1e-5, atol=1e-5)


@needs_fla
@every_operator
def test_the_kernels_are_there_and_take_our_arguments(name: str) -> None:
    module = ops(KERNELS[name])
    chunk, recurrent = fla.load_kernels(KERNELS[name], name, torch.device("cuda"))
    assert (chunk, recurrent) == (
        getattr(module, f"chunk_{KERNELS[name]}"),
        getattr(module, f"fused_recurrent_{KERNELS[name]}"),
    )
    gates = {"gla": ("g", "gk")}.get(name, ("g", "g"))
    for kernel, gate in zip((chunk, recurrent), gates, strict=True):
        names = list(inspect.signature(kernel).parameters)
        assert names[:4] == ["q", "k", "v", gate]
        assert {"scale", "initial_state", "output_final_state", "cu_seqlens"} <= set(names)
        assert "beta" in names or name != "gated_deltanet"


@pytest.mark.gpu
@needs_fla
@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_kernels_compute_what_the_paper_says(name: str, dtype: torch.dtype) -> None:
    operator = build_attention(name, heads=2, dim_k=32, dim_v=64, causal=True)
    assert isinstance(operator, CausalAttention)
    x = inputs(name, 150, dims=(32, 64))
    documents = torch.tensor([[0] * 70 + [1] * 80, [0] * 131 + [-1] * 19])
    mask = documents >= 0
    expected = torch.cat([written_out(name, **cut(x, 0, 70)), written_out(name, **cut(x, 70, 150))], 1)
    second = written_out(name, **cut(x, 0, 131, slice(1, 2)))
    expected = torch.cat([expected[:1], F.pad(second, (0, 0, 0, 0, 0, 19))])
    there = {
        key: value.detach().to("cuda", torch.float32 if key == "log_decay" else dtype).requires_grad_()
        for key, value in x.items()
    }
    out = operator(**there, mask=mask.cuda(), documents=documents.cuda())
    close_on_cuda(out, expected)
    for actual, gradient in zip(gradients(there, out), gradients(x, expected), strict=True):
        close_on_cuda(actual, gradient)


@pytest.mark.gpu
@needs_fla
@every_operator
def test_the_kernels_stream_what_they_compute_at_once(name: str) -> None:
    operator = build_attention(name, heads=2, dim_k=32, dim_v=64, causal=True)
    assert isinstance(operator, CausalAttention)
    x = {key: value.detach().float().cuda() for key, value in inputs(name, 100, dims=(32, 64)).items()}
    mask = (torch.arange(90) >= torch.tensor([[0], [7]])).cuda()
    with torch.no_grad():
        whole = torch.cat(
            [
                operator(**cut(x, 0, 100, slice(0, 1))),
                F.pad(operator(**cut(x, 7, 100, slice(1, 2))), (0, 0, 0, 0, 7, 0)),
            ]
        )
        out, state = operator.prefill(**cut(x, 0, 90), mask=mask)
        outs = [out]
        for t in range(90, 100):
            out, state = operator.step(**cut(x, t, t + 1), state=state)
            outs.append(out)
    close_on_cuda(torch.cat(outs, 1), whole.cpu())


def close_on_cuda(actual: Tensor, expected: Tensor) -> None:
    """Within what tf32 and bf16 products leave."""
    difference = float((actual.double().cpu() - expected.double()).norm() / expected.double().norm())
    assert difference < 2e-2, difference
