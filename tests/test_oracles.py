"""Agreement with tensors of the authors' modules and of an independent float64 reference. A case's kind is
read off its contents: its name is free.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mhla_lightning.attention import (
    MHLA,
    BlockGrid,
    CausalFeatures,
    CausalRule,
    CausalSelfAttention,
    MixingInit,
    MixingMatrix,
    SelfAttention,
    causal_mhla,
    dense_mhla,
    init_state,
    initial_mixing,
    mhla,
    step_state,
)
from mhla_lightning.attention.mhla.fused import fused_mhla
from mhla_lightning.backbones import build_backbone
from mhla_lightning.backbones.causal_lm import LANGUAGE_PRESETS, CausalLM
from mhla_lightning.backbones.dit import DiT, DiTOptions
from mhla_lightning.backbones.rotary import rotations
from mhla_lightning.backbones.vit import VISION_PRESETS, VisionTransformer, ViTOptions, vit_name
from mhla_lightning.diffusion import Guidance, guided
from tests.helpers.diffusion_oracles import check_ddpm, check_dpm_sampler, check_flow
from tests.helpers.oracles import ORACLES
from tests.helpers.ravlt_oracles import check_ravlt
from tests.helpers.video_oracles import check_rope_tables, check_video_layer, check_wan


@dataclass
class Case:
    meta: dict
    arrays: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): value for name, value in self.arrays.items() if name.startswith(prefix)
        }


def load(path: Path) -> Case:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(np.array(file[name])) for name in file.files}
    return Case(json.loads(path.with_suffix(".json").read_text()), arrays)


def assert_close(actual: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def check_dense(case: Case) -> None:
    grid = BlockGrid(case.meta["grid"], block_size=case.meta["block"])
    q, k = (torch.relu(case.arrays[f"in.{name}"]) + 1e-6 for name in "qk")
    v, is_causal, scale = case.arrays["in.v"], case.meta["causal"], case.meta["scale"]
    assert grid.blocks == tuple(case.meta["layout"])
    assert torch.equal(grid.block_of_token, case.arrays["in.block_index"].long())
    for kind in ("rand", "init"):
        mixing = case.arrays[f"in.mix_{kind}"]
        for normalizer, key in (("block", f"out.norm_{kind}"), ("none", f"out.nonorm_{kind}")):
            dense = dense_mhla(
                q * scale, k, v, mixing, grid.block_of_token, normalizer=normalizer, causal=is_causal
            )
            assert_close(dense, case.arrays[key], 1e-10, 1e-12)
            if not is_causal:
                qb, kb, vb = (grid.to_blocks(x) for x in (q * scale, k, v))
                fast = grid.from_blocks(
                    mhla(qb, kb, vb, mixing, normalizer=normalizer, eps=0.0, mask=grid.mask)
                )
                assert_close(fast, case.arrays[key], 1e-10, 1e-12)
                qr, kr, vr = (case.arrays[f"in.{name}"].transpose(1, 2) for name in "qkv")
                normalize = normalizer == "block"
                fused = fused_mhla(
                    qr, kr, vr, mixing, grid, offset=1e-6, normalize=normalize, eps=0.0, dtype=torch.float64
                ).transpose(1, 2)
                assert_close(fused * (1 if normalize else scale), case.arrays[key], 1e-10, 1e-12)
            else:
                causal = causal_mhla(
                    q,
                    k,
                    v,
                    mixing,
                    chunk_size=case.meta["block"][0],
                    scale=scale,
                    normalizer=normalizer,
                    eps=0.0,
                )
                assert_close(causal, case.arrays[key], 1e-10, 1e-12)
                rule = CausalRule(
                    chunk_size=case.meta["block"][0], scale=scale, normalizer=normalizer, eps=0.0
                )
                assert_close(streamed(q, k, v, mixing, rule), case.arrays[key], 1e-10, 1e-12)
    init = "causal_uniform" if is_causal else "local_row"
    assert_close(initial_mixing(grid.distances(), init), case.arrays["in.mix_init"], 1e-10, 1e-12)
    if "out.A_rand" in case.arrays:
        identity = torch.eye(grid.tokens, dtype=q.dtype).expand(*q.shape[:2], -1, -1)
        attention = dense_mhla(
            q * scale,
            k,
            identity,
            case.arrays["in.mix_rand"],
            grid.block_of_token,
            normalizer="none",
            causal=is_causal,
        )
        assert_close(attention, case.arrays["out.A_rand"], 1e-10, 1e-12)


def streamed(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, rule: CausalRule) -> Tensor:
    """Causal MHLA token by token; (batch, heads, tokens, dim)."""
    batch, heads, tokens, dim_k = q.shape
    blocks, dim_v = mixing.shape[-1], v.shape[-1]
    state = init_state(batch, heads=heads, dim_k=dim_k, dim_v=dim_v, blocks=blocks, rule=rule, dtype=q.dtype)
    return torch.stack(
        [
            step_state(state, CausalFeatures(q[:, :, t], k[:, :, t], v[:, :, t]), mixing)
            for t in range(tokens)
        ],
        dim=2,
    )


def check_language_operator(case: Case) -> None:
    """The release's chunk form, in parallel and streamed. Its recurrent form is a record of bugs N2 and
    N3, not a target.
    """
    size = case.meta["constructor"]["chunk_size"]
    q, k, v = (case.arrays[f"in.{name}"].transpose(1, 2).requires_grad_() for name in "qkv")
    rule = CausalRule(chunk_size=size, eps=0.0)
    for mixing_key, key in (
        ("in.mix", "out.chunk"),
        ("in.mix_init", "out.chunk_init"),
        ("in.mix_rand", "out.chunk_rand"),
    ):
        if mixing_key not in case.arrays:
            continue
        mixing, expected = case.arrays[mixing_key].requires_grad_(), case.arrays[key].transpose(1, 2)
        out = causal_mhla(q, k, v, mixing, chunk_size=size)
        assert_close(out, expected, 1e-4, 1e-5)
        with torch.no_grad():
            assert_close(streamed(q, k, v, mixing, rule), expected, 1e-4, 1e-5)
        if "in.cotangent" in case.arrays:
            cotangent = case.arrays["in.cotangent"].transpose(1, 2)
            grads = torch.autograd.grad((out * cotangent).sum(), [q, k, v, mixing])
            for name, grad in zip("qkv", grads[:3], strict=True):
                assert_close(grad, case.arrays[f"grad_in.{name}"].transpose(1, 2), 1e-4, 1e-5)
            assert_close(grads[3], case.arrays["grad.mix"], 1e-4, 1e-5)


def check_language_layer(case: Case) -> None:
    options = case.meta["constructor"]
    entry = {
        "name": "mhla",
        **LANGUAGE_PRESETS["release"]["mhla"],
        "heads": options["num_heads"],
        "expand_k": options["expand_k"],
        "expand_v": options["expand_v"],
        "gate": options["use_output_gate"],
    }
    attention = CausalSelfAttention(options["hidden_size"], attention=entry)
    attention = attention.to(next(iter(case.group("in.x_").values())).dtype)
    prefix = "model.layers.0.attn."
    model = build_backbone("lm_tiny")
    assert isinstance(model, CausalLM)
    adapted = model.adapt_state_dict({prefix + name: value for name, value in case.group("param.").items()})
    attention.load_state_dict({name.removeprefix("layers.0.attn."): value for name, value in adapted.items()})
    for name, x in case.group("in.x_").items():
        positions = torch.arange(x.shape[1])[None]
        rotary = rotations(positions, [attention.dim_k], 10000, x.dtype)[attention.dim_k]
        assert_close(attention(x, rotary=rotary), case.arrays[f"out.y_{name}"], 1e-4, 1e-5)


def check_locality(case: Case) -> None:
    for name, expected in case.arrays.items():
        kind, _, size = name.rpartition(".")
        counts = [int(n) for n in size.split("x")]
        init = "causal_uniform" if kind == "causal_uniform" else "local_row"
        actual = initial_mixing(BlockGrid(counts, block_size=1).distances(), init)
        assert_close(actual, expected, 1e-12, 1e-14)
        assert_close(MixingMatrix(counts, init).matrix().double(), expected, 1e-6, 1e-7)


def check_init2d(case: Case) -> None:
    for name, expected in case.arrays.items():
        parts = re.match(r"(?P<kind>.+)\.side(?P<side>\d+)\.group(?P<group>\d+)", name)
        assert parts, name
        blocks = int(parts["side"]) // math.isqrt(int(parts["group"]))
        check_init(parts["kind"], [blocks, blocks], expected)


def check_init3d(case: Case) -> None:
    for name, expected in case.arrays.items():
        kind, _, size = name.rpartition(".")
        check_init(kind, [int(n) for n in size.split("x")], expected)


def check_init(kind: str, counts: list[int], expected: Tensor) -> None:
    """kind is a rule, with its option's value behind it where that is not the default: exp_sigma1,
    local_thres1.
    """
    rule, _, option = kind.partition("_")
    options = {}
    if option:
        key = f"{rule}_{option.rstrip('0123456789.')}"
        options[key] = float(kind.removeprefix(key))
    given = MixingInit(exp_sigma=options.get("exp_sigma", 3.0), local_thres=options.get("local_thres", 1.5))
    actual = MixingMatrix(counts, rule, init_options=given).matrix()
    if math.prod(counts) == 1:  # the release divides by zero there; ours is defined (SPEC P8)
        assert torch.equal(actual, torch.ones(1, 1))
        return
    assert_close(actual, expected.float(), 1e-5, 1e-7)


LAYER_KEYS = {
    *("dim", "heads", "dim_head", "dropout", "window_size", "block_size", "embed_len", "transform"),
    *("qk_norm", "qkv_bias", "exp_sigma", "local_thres", "eps", "fixed_weight_value"),
}
"""Arguments of the release's attention that the check below serves."""


def side_of(count: int) -> int:
    """The side of a square of this many tokens: the release knows no others."""
    side = math.isqrt(count)
    assert side**2 == count, f"{count} is no square number"
    return side


def dtype_of(case: Case) -> torch.dtype:
    dtype = getattr(torch, case.meta["dtype"].split()[0].removeprefix("torch."))
    assert dtype in TOLERANCES, f"no tolerance is known for {dtype}"
    return dtype


TOLERANCES = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 1e-6), torch.float16: (1e-2, 1e-2)}
"""(rtol, atol) of an attention case, oracles/README.md; halves as coarse as their step."""


def release_layer(case: Case, pos_conv: str) -> SelfAttention:
    options = case.meta["constructor"]
    assert options.keys() <= LAYER_KEYS, f"unknown arguments {sorted(options.keys() - LAYER_KEYS)}"
    side = side_of(options.get("embed_len", 196))
    block = side_of(options.get("window_size") or options.get("block_size", 49))
    given = {key: float(options[key]) for key in ("exp_sigma", "local_thres") if key in options}
    transform, constant = options.get("transform", "cos"), options.get("fixed_weight_value")
    if constant is not None:
        transform, given = "const", {"value": constant}
    preset = {key: value for key, value in VISION_PRESETS["release"]["mhla"].items() if key != "blocks"}
    entry = {
        "name": "mhla",
        **preset,
        "block_size": block,
        "mix_init": transform,
        "mix_init_options": given,
        "pos_conv": pos_conv,
        "eps": options.get("eps", 1e-6),
        "qk_norm": options.get("qk_norm", False),
        "qkv_bias": options.get("qkv_bias", False),
    }
    attention = SelfAttention(options["dim"], options["heads"], attention=entry, grid=(side, side))
    return attention.to(dtype_of(case)).eval()


def check_release_attention(case: Case) -> None:
    kernel = case.arrays.get("param.lepe.weight")
    layer = release_layer(case, pos_conv="none" if kernel is None else f"lepe{kernel.shape[-1]}")
    operator = layer.attention
    assert isinstance(operator, MHLA)
    state = {
        vit_name(f".attn.{name}").removeprefix(".attn."): value
        for name, value in case.group("param.").items()
    }
    state["attention.mixing.weight"] = state["attention.mixing.weight"].flatten(1)
    if case.meta["mixing"] == "init":
        assert_close(operator.mixing.weight.float(), state["attention.mixing.weight"].float(), 1e-5, 1e-7)
    layer.load_state_dict(state)
    tolerance = TOLERANCES[operator.mixing.weight.dtype]

    x = case.arrays["in.x"].requires_grad_()
    y = operator.grid.to_blocks(layer(operator.grid.from_blocks(x)))
    assert_close(y, case.arrays["out.y"], *tolerance)
    if "mid.q" in case.arrays:
        check_intermediates(case, layer, operator, tolerance)
    if "in.cotangent" in case.arrays:
        parameters = dict(layer.named_parameters())
        grads = torch.autograd.grad((y * case.arrays["in.cotangent"]).sum(), [x, *parameters.values()])
        assert_close(grads[0], case.arrays["grad_in.x"], *tolerance)
        expected = {
            vit_name(f".attn.{name}").removeprefix(".attn."): value
            for name, value in case.group("grad.").items()
        }
        assert expected.keys() == parameters.keys()
        for name, grad in zip(parameters, grads[1:], strict=True):
            assert_close(grad, expected[name].view_as(grad), *tolerance)


def check_intermediates(
    case: Case, layer: SelfAttention, operator: MHLA, tolerance: tuple[float, float]
) -> None:
    heads, mid = layer.heads, case.group("mid.")
    q, k, v = (t.unflatten(0, (-1, heads)) for t in (mid["q"], mid["k"], mid["v"]))
    mixing = operator.mixing.matrix()
    numerator = mhla(q, k, v, mixing, normalizer="none")
    assert_close(numerator.flatten(0, 1), mid["numerator"], *tolerance)
    slot = mhla(q, k, v, mixing, normalizer="slot", eps=operator.eps)
    assert_close(slot * mid["normalizer"].unflatten(0, (-1, heads)), numerator, *tolerance)
    raster = [operator.grid.from_blocks(t) for t in (q, k, v)]
    dense = dense_mhla(
        raster[0],
        raster[1],
        raster[2],
        mixing,
        operator.grid.block_of_token,
        normalizer="slot",
        eps=operator.eps,
    )
    assert_close(operator.grid.to_blocks(dense), slot, *tolerance)
    if layer.lepe is None:
        return
    raster_v = operator.grid.from_blocks(v).transpose(1, 2).flatten(2)
    assert_close(operator.grid.to_blocks(layer.lepe(raster_v, operator.grid.grid)), mid["lepe"], *tolerance)


def check_vit(case: Case) -> None:
    options, attn = case.meta["constructor"], case.meta["attn"]
    block = side_of(attn["window_size"])
    image = case.arrays["in.img"]
    entry = {
        "name": "mhla",
        "preset": "release",
        "block_size": block,
        "mix_init": attn["transform"],
        "qk_norm": options.get("qk_norm", False),
    }
    sizes = ViTOptions(
        img_size=tuple(image.shape[-2:]),
        token_multiple=options["img_size"] // options["patch_size"] // options["piece_size"],
        in_chans=image.shape[1],
        **{
            key: options[key]
            for key in ("patch_size", "embed_dim", "depth", "num_heads", "num_classes", "drop_path_rate")
            if key in options
        },
    )
    model = VisionTransformer(entry, sizes).eval()
    model = model.to(image.dtype)
    model.load_state_dict(model.adapt_state_dict(case.group("param.")))
    seen: dict[str, Tensor] = {}
    model.patch_drop.register_forward_hook(lambda module, args, output: seen.update(tokens=output))
    features = model.forward_features(image)
    assert_close(seen["tokens"], case.arrays["mid.tokens_after_pos"], 1e-4, 1e-5)
    grid = BlockGrid(model.grid, block_size=block)
    assert_close(grid.to_blocks(features).flatten(1, 2), case.arrays["mid.features"], 1e-4, 1e-5)
    assert_close(model(image), case.arrays["out.logits"], 1e-4, 1e-5)


def check_dit(case: Case) -> None:
    """The repaired release (SPEC D1), with and without its dwconv, and its guided output."""
    options, attn = case.meta["constructor"], case.meta["block_kwargs"]
    assert attn.keys() <= {"block_size", "dwconv", "transform", "exp_sigma", "local_thres", "qk_norm"}
    entry = {
        "name": "mhla",
        "preset": "release",
        "block_size": side_of(attn["block_size"]),
        "qk_norm": attn.get("qk_norm", False),
    }
    sizes = DiTOptions(
        embed_dim=options["hidden_size"],
        dwconv=attn.get("dwconv", False),
        **{key: value for key, value in options.items() if key != "hidden_size"},
    )
    model = DiT(entry, sizes).eval().to(case.arrays["in.x"].dtype)
    parameters = model.adapt_state_dict(case.group("param."))
    assert_close(model.pos_embed, parameters["pos_embed"], 0, 1e-7)
    model.load_state_dict(parameters)
    x, t, y = (case.arrays[f"in.{name}"] for name in "xty")
    tokens = model.x_embedder(x) + model.pos_embed
    assert_close(tokens, case.arrays["mid.tokens_raster"], 1e-5, 1e-6)
    assert_close(
        model.t_embedder(t) + model.y_embedder(y), case.arrays["mid.c"], 1e-4, 1e-5
    )  # float32 angles of up to 1000 radians
    assert_close(model(x, t, y), case.arrays["out.y"], 1e-4, 1e-5)

    labels, expected = case.arrays["in.y_cfg"], case.arrays["out.cfg4"]
    assert torch.equal(labels[len(x) :], torch.full_like(y, model.num_classes))
    assert_close(
        guided(model, labels[: len(x)], model.num_classes, Guidance(4.0))(x, t),
        expected[: len(x)],
        1e-4,
        1e-5,
    )
    conditional, unconditional = (model(x, t, half) for half in labels.chunk(2))
    by_hand = unconditional + 4.0 * (conditional - unconditional)
    assert_close(by_hand[:, : model.in_channels], expected[len(x) :, : model.in_channels], 1e-4, 1e-5)
    assert_close(unconditional[:, model.in_channels :], expected[len(x) :, model.in_channels :], 1e-4, 1e-5)


@dataclass(frozen=True)
class Kind:
    """A kind of case: how its contents look, and what is checked.

    Attributes:
        meta: keys that its json has; a dotted one lies inside a section.
        arrays: patterns, each of which some array's name matches in full.
        check: raises where our numbers differ.
        only: whether every array's name matches one of the patterns.
    """

    meta: tuple[str, ...]
    arrays: tuple[str, ...]
    check: Callable[[Case], None]
    only: bool = False

    def fits(self, case: Case) -> bool:
        inside = case.meta | {
            f"{section}.{key}": value
            for section in ("constructor", "attn", "block_kwargs")
            for key, value in case.meta.get(section, {}).items()
        }
        found = [[bool(re.fullmatch(pattern, name)) for name in case.arrays] for pattern in self.arrays]
        every = all(any(column) for column in zip(*found, strict=True)) if self.only else True
        return set(self.meta) <= inside.keys() and all(any(row) for row in found) and every


_RULES = "linear|cos|exp|gaussian|local|uniform|const"
_OPTION = r"(_(sigma|thres)[0-9.]+)?"

KINDS: dict[str, Kind] = {
    "dense": Kind(("grid", "block", "layout", "causal", "scale"), (r"in\.mix_rand",), check_dense),
    "locality": Kind((), (r"([123]d|causal_uniform)\.\d+(x\d+)*",), check_locality, only=True),
    "init2d": Kind((), (rf"({_RULES}){_OPTION}\.side\d+\.group\d+\w*",), check_init2d, only=True),
    "init3d": Kind((), (rf"({_RULES}){_OPTION}\.\d+x\d+x\d+",), check_init3d, only=True),
    "attention": Kind(
        ("constructor.dim", "constructor.heads", "mixing"),
        (r"in\.x", r"out\.y", r"param\.to_qkv\.weight", r"param\.piece_attn\.conv\.weight"),
        check_release_attention,
    ),
    "vit": Kind(("constructor", "attn.window_size"), (r"in\.img", r"out\.logits"), check_vit),
    "ravlt": Kind(("constructor.embed_dims",), (r"in\.img", r"out\.logits", r"grad_in\.img"), check_ravlt),
    "dit": Kind(
        ("constructor.hidden_size", "block_kwargs"), (r"in\.x", r"in\.t", r"in\.y", r"out\.y"), check_dit
    ),
    "ddpm": Kind(
        (),
        ("betas", "alphas_cumprod", r"in\.model_out"),
        lambda case: check_ddpm(case.meta, case.arrays),
    ),
    "flow": Kind((), ("sigmas", r"in\.model_out"), lambda case: check_flow(case.meta, case.arrays)),
    "dpm": Kind(
        ("constructor.flow_shift",),
        (r"in\.z", r"out\.dpmpp2m_steps\d+"),
        lambda case: check_dpm_sampler(case.meta, case.arrays),
    ),
    "rope": Kind(
        (), (r"freqs_re_d\d+", r"freqs_im_d\d+"), lambda case: check_rope_tables(case.meta, case.arrays)
    ),
    "video": Kind(
        ("constructor.block_layout", "constructor.is_gated", "grid"),
        (r"in\.x", r"out\.y"),
        lambda case: check_video_layer(case.meta, case.arrays),
    ),
    "wan": Kind(
        ("constructor.linear_attn_idx",),
        (r"in\.latents", r"in\.ctx0", r"out\.y"),
        lambda case: check_wan(case.meta, case.arrays),
    ),
    "language_operator": Kind(
        ("constructor.chunk_size",),
        (r"in\.q", r"in\.k", r"in\.v", r"out\.chunk(_init|_rand)?"),
        check_language_operator,
    ),
    "language_layer": Kind(
        ("constructor.hidden_size", "constructor.num_heads"),
        (r"in\.x_.*", r"out\.y_.*"),
        check_language_layer,
    ),
}


def kind_of(case: Case) -> str:
    """The kind of a case by its contents; AssertionError where none or several fit."""
    found = [name for name, kind in KINDS.items() if kind.fits(case)]
    assert len(found) == 1, (
        f"the case fits {found or 'no kind'} of {', '.join(KINDS)}; its json has {', '.join(case.meta)}, its "
        f"arrays are {', '.join(list(case.arrays)[:8])}"
    )
    return found[0]


def test_oracle(oracle: Path) -> None:
    case = load(oracle)
    KINDS[kind_of(case)].check(case)


def written(folder: Path, name: str, meta: dict, arrays: dict[str, Tensor]) -> Path:
    """A case of our own making."""
    content: dict[str, Any] = {key: value.detach().numpy() for key, value in arrays.items()}
    np.savez(folder / f"{name}.npz", **content)
    (folder / f"{name}.json").write_text(json.dumps(meta))
    return folder / f"{name}.npz"


@pytest.mark.parametrize(
    ("transform", "dtype", "tokens", "window", "qk_norm", "key"),
    [
        ("exp", "float64", 64, 4, False, "block_size"),
        ("exp", "float32", 64, 16, True, "block_size"),
        ("linear", "float32", 256, 16, False, "block_size"),
        ("gaussian", "float64", 144, 9, True, "window_size"),
        ("local", "float64", 256, 16, False, "window_size"),
    ],
)
def test_a_layer_of_the_release_is_checked_under_any_name(
    tmp_path: Path, transform: str, dtype: str, tokens: int, window: int, qk_norm: bool, key: str
) -> None:
    """The output comes from the dense form, token by token; a wrong number in it is found."""
    options = {"dim": 16, "heads": 2, key: window, "embed_len": tokens, "transform": transform}
    options |= {"qk_norm": qk_norm, "qkv_bias": True}
    meta = {"constructor": options, "dtype": f"torch.{dtype}", "mixing": "init"}
    torch.manual_seed(1)
    layer = release_layer(Case(meta, {}), "lepe3")
    operator = layer.attention
    assert isinstance(operator, MHLA)
    assert layer.lepe is not None
    blocks = operator.grid
    x = torch.randn(2, blocks.num_blocks, blocks.tokens_per_block, 16, dtype=getattr(torch, dtype))
    raster = blocks.from_blocks(x)
    q, k, v = layer.qkv(layer.norm(raster)).chunk(3, -1)
    heads = [t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (layer.q_norm(q), layer.k_norm(k), v)]
    mixing, block = operator.mixing.matrix(), blocks.block_of_token
    q, k = operator.phi(heads[0]), operator.phi(heads[1])
    dense = dense_mhla(q, k, heads[2], mixing, block, normalizer="slot", eps=1e-6)
    y = layer.proj(dense.transpose(1, 2).flatten(2) + layer.lepe(v, blocks.grid))
    names = {"qkv": "to_qkv", "proj": "to_out.0", "attention.mixing": "piece_attn.conv", "lepe.conv": "lepe"}
    arrays = {"in.x": x, "out.y": blocks.to_blocks(y)}
    for name, value in layer.state_dict().items():
        module, _, leaf = name.rpartition(".")
        square = value[..., None, None] if module == "attention.mixing" else value
        arrays[f"param.{names.get(module, module)}.{leaf}"] = square
    path = written(tmp_path, "of_no_known_name", meta, arrays)
    test_oracle(path)
    arrays["out.y"] = arrays["out.y"] + 1e-3
    with pytest.raises(AssertionError):
        test_oracle(written(tmp_path, "wrong", meta, arrays))


@pytest.mark.parametrize("name", ["dense_2d", "cls_exp_lepe_f64", "video_flow", "init3d", "vit_full_tiny"])
def test_a_case_of_another_name_is_the_same_kind(tmp_path: Path, name: str) -> None:
    for suffix in (".npz", ".json"):
        (tmp_path / f"dit_real_grid_x{suffix}").symlink_to(ORACLES / f"{name}{suffix}")
    test_oracle(tmp_path / "dit_real_grid_x.npz")


def test_a_case_that_nothing_checks_fails(tmp_path: Path) -> None:
    path = written(tmp_path, "dense_9d", {"source": "elsewhere"}, {"in.x": torch.ones(2)})
    with pytest.raises(AssertionError, match="no kind"):
        test_oracle(path)
    options = {"dim": 16, "heads": 2, "block_size": 4, "embed_len": 128}
    for wrong, word in (({}, "no square"), ({"is_conv": True, "embed_len": 64}, "is_conv")):
        meta = {"constructor": options | wrong, "dtype": "torch.float32", "mixing": "init"}
        with pytest.raises(AssertionError, match=word):
            release_layer(Case(meta, {}), "none")
