"""Calls of the causal Triton kernels with their references, for the process of `interpreter.py`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mhla_lightning.attention import CausalAttention, Context, Packing, build_attention
from mhla_lightning.attention.baselines.causal_linear import CausalLinear
from mhla_lightning.attention.context import Rotary
from mhla_lightning.attention.mhla import CausalMHLA
from mhla_lightning.backbones.rotary import rotations
from tests.helpers.causal_reference import dense

EPS = 1e-3  # of features and normalizer; large enough to matter


@dataclass(frozen=True)
class CausalKernelCase:
    """One call of the causal operator on kernels.

    Attributes:
        form: `dense` or `chunks`.
        documents: tokens of the documents of each row; one document a row is not packed.
        padding: tokens of padding left of the first row and right of the others.
        dim, dim_v: channels a head.
        heads: one for what is long.
        options: of the attention entry.
        operator: `mhla` or `linear`.
        rotary: whether positions turn q and k.
        many: takes what rows of very many chunks take.
        dtype: of the tokens.
    """

    form: str
    documents: tuple[tuple[int, ...], ...]
    dim: int
    dim_v: int
    options: Mapping[str, Any] = field(default_factory=dict)
    heads: int = 2
    padding: int = 0
    dtype: torch.dtype = torch.float32
    operator: str = "mhla"
    rotary: bool = False
    many: bool = False

    @property
    def label(self) -> str:
        """The name of the case in a test's id."""
        dtype = str(self.dtype).removeprefix("torch.")
        said = [f"{key}={value}" for key, value in self.options.items()]
        rows = "+".join("_".join(map(str, row)) for row in self.documents)
        said += ["rotary"] * self.rotary + ["many"] * self.many
        padding = [f"pad{self.padding}"] if self.padding else []
        return "-".join(
            [self.operator, self.form, rows, *padding, f"d{self.dim}", f"v{self.dim_v}", dtype, *said]
        )

    def spans(self) -> list[tuple[int, int, int]]:
        """Return row, begin and end of every document."""
        found = []
        for row, lengths in enumerate(self.documents):
            begin = 0 if row else self.padding
            for length in lengths:
                found.append((row, begin, begin + length))
                begin += length
        return found

    def context(self, log_decay: Tensor | None, device: torch.device) -> Context:
        """Return mask, documents and decays of the call."""
        shape = (len(self.documents), sum(self.documents[0]) + self.padding)
        real, documents = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.int64)
        for number, (row, begin, end) in enumerate(self.spans()):
            real[row, begin:end], documents[row, begin:end] = True, number
        packed = any(len(row) > 1 for row in self.documents)
        return Context(
            mask=real.to(device) if self.padding else None,
            documents=documents.to(device) if packed else None,
            rotary=self.turn(documents.to(device), torch.float32),
            log_decay=log_decay,
        )

    def turn(self, documents: Tensor, dtype: torch.dtype) -> Rotary | None:
        """Return the rotary of documents (batch, tokens), or None."""
        if not self.rotary:
            return None
        positions = Packing(torch.ones_like(documents, dtype=torch.bool), documents).positions
        return rotations(positions, [self.dim], 100.0, dtype)[self.dim]


def causal_errors(case: CausalKernelCase, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Return the errors of the kernels and of the torch path in float32, of output and gradients.

    The kernels run on `device`, the torch path on the CPU. Both errors are relative to the largest value of
    the reference, the full matrix of every document in float64. Gradients through numerator and normalizer
    nearly cancel; where rotary turns one of them only, both are rounded before, and errors are relative to
    the larger one.
    """
    from mhla_lightning.attention.mhla.triton import causal_ops, tiles

    torch.manual_seed(0)
    operators = [_operator(case, kernel) for kernel in ("triton", "torch", "torch")]
    if isinstance(operators[0], CausalMHLA):
        with torch.no_grad():
            operators[0].mixing.weight.uniform_(0.1, 1)
    for other in operators[1:]:
        other.load_state_dict(operators[0].state_dict())
    kernels, plain, reference = operators[0], operators[1], operators[2].double()
    batch, count = len(case.documents), sum(case.documents[0]) + case.padding
    joint = torch.randn(batch, count, case.heads, 2 * case.dim + case.dim_v).to(case.dtype)
    inputs = [x.detach() for x in joint.split([case.dim, case.dim, case.dim_v], -1)]
    if kernels.token_decay:
        inputs.append(-0.5 * torch.rand(batch, count, case.heads))
    grad = torch.randn(batch, count, case.heads, case.dim_v).to(case.dtype)
    most = 0 if case.many else tiles.MOST_MIXED
    there = [x.to(device) for x in inputs]
    with (
        mock.patch.object(causal_ops, "causal_dense_is_cheaper", return_value=case.form == "dense"),
        mock.patch.object(tiles, "MOST_MIXED", most),
    ):
        got = _all(kernels.to(device), case, there, grad.to(device))
    want = _all(reference, case, [x.double() for x in inputs], grad.double(), by_document=True)
    beside = _all(plain, case, [x.float() for x in inputs], grad.float())
    scales = {name: x.abs().max() for name, x in want.items()}
    if case.rotary and case.options.get("normalizer") == "block":
        part = _all(reference, case, [x.double() for x in inputs], grad.double(), True, numerator=True)
        scales = {name: x.abs().max().maximum(scales[name]) for name, x in part.items()}
    return {
        name: (_relative(got[name], x, scales[name]), _relative(beside[name], x, scales[name]))
        for name, x in want.items()
    }


def _operator(case: CausalKernelCase, kernel: str) -> CausalAttention:
    entry = {"name": case.operator, "eps": EPS, "feature_map": "relu_eps", "kernel": kernel}
    if case.operator == "mhla":
        size = case.options["chunk_size"]
        entry["max_chunks"] = max(-(-length // size) for row in case.documents for length in row)
    built = build_attention(
        {**entry, **case.options}, heads=case.heads, dim_k=case.dim, dim_v=case.dim_v, causal=True
    )
    assert isinstance(built, CausalAttention)
    return built


def _all(
    operator: CausalAttention,
    case: CausalKernelCase,
    inputs: Sequence[Tensor],
    grad: Tensor,
    by_document: bool = False,
    numerator: bool = False,
) -> dict[str, Tensor]:
    """Return the output and all gradients by name, with `numerator` those through the numerator alone."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    q, k, v, log_decay = (*leaves, None)[:4]
    if by_document:
        out = torch.zeros_like(grad)
        for row, begin, end in case.spans():
            turn = case.turn(torch.zeros(1, end - begin, dtype=torch.int64), torch.float64)
            parts = [x[row : row + 1, begin:end] for x in leaves]
            found = dense(operator, *parts) if turn is None else _turned(operator, turn, numerator, *parts)
            out = out.index_put((torch.tensor(row), torch.arange(begin, end)), found[0])
    else:
        out = operator(q, k, v, case.context(log_decay, grad.device))
    parameters = dict(operator.named_parameters())
    gradients = torch.autograd.grad(out, [*leaves, *parameters.values()], grad)
    names = ["q", "k", "v", "log_decay"][: len(leaves)] + list(parameters)
    return {"out": out.detach()} | dict(zip(names, gradients, strict=True))


def _turned(
    operator: CausalAttention,
    turn: Rotary,
    alone: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
) -> Tensor:
    """The reference with features that are turned for the numerator, and are not for the normalizer.

    `alone` gives the normalizer no gradient.
    """
    assert isinstance(operator, (CausalLinear, CausalMHLA))
    plain = copy.copy(operator)
    plain.phi = _same
    if isinstance(plain, CausalMHLA):
        normalizer, plain.rule = plain.rule.normalizer, replace(plain.rule, normalizer="none")
    else:
        normalizer, plain.normalizer = plain.normalizer, "none"
    features = [operator.phi(x) for x in (q, k)]
    numerator = dense(plain, turn(features[0]), turn(features[1]), v, log_decay)
    if normalizer == "none":
        return numerator
    total = dense(plain, features[0], features[1], torch.ones_like(v[..., :1]), log_decay) + EPS
    return numerator / (total.detach() if alone else total)


def _same(x: Tensor) -> Tensor:
    return x


def _relative(got: Tensor, want: Tensor, scale: Tensor) -> float:
    return float((got.cpu().double() - want).abs().max() / scale)


def check_causal_operators() -> dict[str, str]:
    """Run torch.library.opcheck on both operators; return what each of its tests says."""
    from mhla_lightning.attention.mhla.triton import causal_ops

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 1, 8, requires_grad=True) for _ in range(3))
    weights = torch.rand(1, 1, 2, 2, requires_grad=True)
    until, after = (-torch.rand(1, 1, 2, 2, requires_grad=True) for _ in range(2))
    numbers = ([2, 1], [EPS, EPS])
    terms = (weights, until.detach().requires_grad_(), after.detach().requires_grad_(), None, None)
    found: dict[str, str] = {}
    results = torch.library.opcheck(causal_ops.causal, (q, k, v, *terms, *numbers), raise_exception=False)
    found |= {f"causal.{test}": said for test, said in results.items()}
    with torch.no_grad():
        plain = [x.detach() for x in (q, k, v)]
        detached = [x.detach() if isinstance(x, Tensor) else x for x in terms]
        saved = [x.detach() for x in causal_ops.causal(*plain, *detached, *numbers)]
        args = (torch.ones(1, 4, 1, 8), plain, *detached, saved, *numbers)
        results = torch.library.opcheck(causal_ops.causal_backward, args, raise_exception=False)
    return found | {f"backward.{test}": said for test, said in results.items()}
