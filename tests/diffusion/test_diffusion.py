"""Noise processes: their formulas, their losses, and guidance."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mhla_lightning.diffusion import DDPM, PROCESSES, FlowMatching, Guidance, build_process, guided, respaced
from mhla_lightning.diffusion.chain import Chain, discretized_log_likelihood, linear_betas
from mhla_lightning.randomness import generator
from tests.helpers.errors import refused

ORACLES = Path(__file__).parents[1] / "oracles"
SHAPE = (6, 3, 4, 4)
TIMES = torch.tensor([0, 1, 2, 300, 998, 999])


def normal(*key: int | str, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.from_numpy(generator(*key).standard_normal(shape, np.float32))


@pytest.mark.parametrize("respacing", ["2", 21, "50", "250", "999", "1000", "ddim50", "ddim250", "ddim334"])
def test_a_short_chain_has_the_noise_levels_of_the_long_one(respacing: str | int) -> None:
    timestep_map, betas = respaced(respacing)
    assert len(timestep_map) == len(betas) == int(str(respacing).removeprefix("ddim"))
    assert timestep_map[0] == 0
    assert (np.diff(timestep_map) > 0).all()
    assert timestep_map[-1] == 999 or str(respacing).startswith("ddim")
    np.testing.assert_allclose(
        np.cumprod(1 - betas), np.cumprod(1 - linear_betas())[timestep_map], rtol=1e-12
    )


def test_one_step_is_the_noisiest() -> None:
    assert respaced(1)[0].tolist() == [999]


@pytest.mark.parametrize("respacing", ["0", "1001", "-5", "ten", "ddim", "ddim300"])
def test_wrong_respacing(respacing: str) -> None:
    with refused("respacing"):
        respaced(respacing)


def test_ddpm_keeps_variance_and_ends_in_noise() -> None:
    chain = DDPM().chain
    one, zero, t = (
        torch.ones(1000, 1, dtype=torch.float64),
        torch.zeros(1000, 1, dtype=torch.float64),
        torch.arange(1000),
    )
    signal, noise = chain.add_noise(one, zero, t), chain.add_noise(zero, one, t)
    torch.testing.assert_close(signal**2 + noise**2, one, rtol=1e-6, atol=0)
    assert (signal.diff(dim=0) < 0).all()
    assert signal[0] > 0.9999
    assert signal[-1] < 0.01


@pytest.mark.parametrize("steps", [1000, 250, 10])
def test_posterior_is_bayes_rule(steps: int) -> None:
    """Precision and mean of q(x_{t-1} | x_t, x0) from the prior of x_{t-1} given x0 and the likelihood of
    x_t given x_{t-1}.
    """
    _, chain = DDPM().shortened(steps)
    x0, x_t, t = (
        normal("x0", steps).double(),
        normal("x_t", steps).double(),
        torch.tensor([1, 2, 3, 5, steps - 2, steps - 1]),
    )
    before, beta = (
        torch.from_numpy(table).view(-1, 1, 1, 1) for table in (chain.alphas_cumprod[t - 1], chain.betas[t])
    )
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean, log_variance = chain.posterior(x0, x_t, t)
    torch.testing.assert_close(
        mean,
        (before.sqrt() * x0 / (1 - before) + (1 - beta).sqrt() * x_t / beta) / precision,
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(log_variance.double(), -precision.log(), rtol=1e-5, atol=1e-5)


def test_variance_lies_between_posterior_and_beta() -> None:
    chain, x_t, epsilon = DDPM().chain, normal("x"), normal("epsilon")

    def log_variance(v: float | None) -> Tensor:
        prediction = epsilon if v is None else torch.cat([epsilon, torch.full(SHAPE, v)], 1)
        return chain.p_mean_variance(prediction, x_t, TIMES).log_variance

    torch.testing.assert_close(log_variance(None), log_variance(-1.0))
    torch.testing.assert_close(
        log_variance(1.0)[:, 0, 0, 0].double(),
        torch.from_numpy(np.log(chain.betas))[TIMES],
        rtol=1e-6,
        atol=0,
    )
    torch.testing.assert_close(log_variance(0.0), (log_variance(1.0) + log_variance(-1.0)) / 2)
    assert (log_variance(1.0) > log_variance(-1.0))[2:].all()


def test_a_perfect_prediction_costs_nothing() -> None:
    x0, noise = normal("x0"), normal("noise")
    for process in (DDPM(learn_variance=False), FlowMatching()):
        t = TIMES if process.name == "ddpm" else TIMES / 1000
        target = noise if process.name == "ddpm" else noise - x0
        assert process.losses(target, x0, noise, process.add_noise(x0, noise, t), t)["loss"].abs().max() == 0
    process = DDPM()
    losses = process.losses(
        torch.cat([noise, -torch.ones(SHAPE)], 1), x0, noise, process.add_noise(x0, noise, TIMES), TIMES
    )
    assert losses["mse"].abs().max() == 0
    assert (
        losses["vb"][1:].abs().max() < 1e-4
    )  # float32: the posterior's mean from x0, and from the x0 seen in x_t
    assert losses["vb"][0] > 0.1  # what is left is the price of telling x0 from its neighbours, 2/255 away


def test_the_bound_is_no_gain() -> None:
    x0, noise, prediction = normal("x0").clamp(-1, 1), normal("noise"), normal("out", shape=(6, 6, 4, 4))
    process = DDPM()
    losses = process.losses(prediction, x0, noise, process.add_noise(x0, noise, TIMES), TIMES)
    assert (losses["vb"] > -1e-6).all()
    assert torch.equal(losses["loss"], losses["mse"] + losses["vb"])
    assert set(losses) == {"loss", *process.parts}


def test_the_bound_trains_the_variance_alone() -> None:
    process, x0, noise = DDPM(), normal("x0"), normal("noise")
    x_t = process.add_noise(x0, noise, TIMES)
    for part, trained, untouched in (("vb", slice(3, 6), slice(0, 3)), ("mse", slice(0, 3), slice(3, 6))):
        prediction = normal("out", shape=(6, 6, 4, 4)).requires_grad_()
        (gradient,) = torch.autograd.grad(
            process.losses(prediction, x0, noise, x_t, TIMES)[part].sum(), prediction
        )
        assert gradient[:, untouched].abs().max() == 0
        assert (gradient[:, trained].abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_loss_of_a_sample_is_its_own_and_never_half_precision(name: str) -> None:
    process = build_process(name)
    x0, noise, t = normal("x0"), normal("noise"), TIMES if name == "ddpm" else TIMES / 1000
    x_t = process.add_noise(x0, noise, t)
    prediction = normal("out", shape=(6, process.out_channels(3), 4, 4))
    together = process.losses(prediction, x0, noise, x_t, t)["loss"]
    alone = [
        process.losses(prediction[i : i + 1], x0[i : i + 1], noise[i : i + 1], x_t[i : i + 1], t[i : i + 1])[
            "loss"
        ]
        for i in range(6)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=0)
    half = process.losses(prediction.bfloat16(), x0.bfloat16(), noise.bfloat16(), x_t.bfloat16(), t)
    assert all(value.dtype == torch.float32 and value.shape == (6,) for value in half.values())
    with pytest.raises(
        ValueError, match=f"predicts 5 channels and the noise process needs {process.out_channels(3)}"
    ):
        process.losses(prediction[:, :1].expand(-1, 5, -1, -1), x0, noise, x_t, t)


def test_a_chain_refuses_predictions_of_another_width() -> None:
    with pytest.raises(ValueError, match="predicts 4 channels for a sample of 3; 3 or 6 are possible"):
        DDPM().chain.ddim_step(torch.zeros(6, 4, 4, 4), torch.zeros(SHAPE), TIMES)


def test_tables_first_used_in_inference_mode_serve_training() -> None:
    chain = Chain(linear_betas())
    with torch.inference_mode():
        chain.add_noise(normal("x0"), normal("noise"), TIMES)
    leaf = normal("x0").requires_grad_()
    chain.add_noise(leaf, normal("noise"), TIMES).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().min() > 0


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 0.01), (0.3, 0.1), (0.9, 0.5), (-1.2, 0.05)])
def test_bins_of_the_likelihood_cover_everything(mean: float, scale: float) -> None:
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mass = discretized_log_likelihood(bins, torch.tensor(mean), torch.tensor(math.log(scale))).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-5)
    assert abs(bins[mass.argmax()].item() - max(-1, min(1, mean))) < 0.01 or scale > 0.1


def test_flow_goes_straight_from_data_to_noise() -> None:
    process, x0, noise = FlowMatching(), normal("x0"), normal("noise")
    ends = process.add_noise(x0, noise, torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]))
    assert torch.equal(ends, torch.cat([x0[:3], noise[3:]]))
    t = torch.full((6,), 0.25)
    torch.testing.assert_close(
        (process.add_noise(x0, noise, t + 0.5) - process.add_noise(x0, noise, t)) / 0.5, noise - x0
    )


def drawn(process: DDPM | FlowMatching, count: int = 20_000) -> np.ndarray:
    rng = generator(3, "times")
    return np.array([process.draw_time(rng) for _ in range(count)])


def test_ddpm_times_are_uniform_steps() -> None:
    times = drawn(DDPM())
    assert set(times) <= set(range(1000))
    assert len(set(times)) == 1000
    assert times.mean() == pytest.approx(499.5, abs=8)
    assert (drawn(DDPM(), 5) == times[:5]).all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_times_are_logit_normal_then_shifted(shift: float) -> None:
    times = drawn(FlowMatching(mean=0.5, std=0.8, shift=shift))
    unshifted = times / (shift - (shift - 1) * times)
    logits = np.log(unshifted / (1 - unshifted))
    assert logits.mean() == pytest.approx(0.5, abs=0.02)
    assert logits.std() == pytest.approx(0.8, abs=0.02)
    uniform = drawn(FlowMatching(times="uniform", shift=shift))
    assert (uniform / (shift - (shift - 1) * uniform)).std() == pytest.approx(1 / math.sqrt(12), abs=0.01)


def test_integer_times_are_those_of_the_grid_and_the_model_sees_whole_numbers() -> None:
    process = FlowMatching(shift=3.0, integer_times=True)
    times = drawn(process, 2000)
    assert set(times) <= {process.grid_time(index) for index in range(1000)}
    seen = process.model_time(torch.from_numpy(times).float())
    assert torch.equal(seen, seen.round())
    assert (seen - 1000 * torch.from_numpy(times)).abs().max() <= 1


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_model_time_and_bins_span_the_axis(name: str) -> None:
    process = build_process(name)
    t = torch.arange(1000) if name == "ddpm" else torch.linspace(0, 1, 1001)
    seen = process.model_time(t)
    assert seen[0] == 0
    assert seen[-1] in (999, 1000)
    assert (seen.double().diff() > 0).all()
    for count in (1, 4, 7):
        bins = process.bins(t, count)
        assert bins.dtype == torch.int64
        assert (bins.diff() >= 0).all()
        sizes = torch.bincount(bins, minlength=count)
        assert len(sizes) == count
        assert sizes.max() - sizes.min() <= 2


def test_processes_from_a_recipe() -> None:
    assert build_process("ddpm") == DDPM()
    assert build_process({"name": "ddpm", "learn_variance": False}).out_channels(4) == 4
    assert build_process("ddpm").out_channels(4) == 8
    assert build_process({"name": "flow", "shift": 3}) == FlowMatching(shift=3)


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ("dppm", "name"),
        ({"learn_variance": False}, "name"),
        ({"name": ["ddpm"]}, "name"),
        (3, "name"),
        ({"name": "ddpm", "shift": 3}, "shift"),
        ({"name": "ddpm", "chain": 3}, "chain"),
        ({"name": "ddpm", "learn_variance": "no"}, "learn_variance"),
        ({"name": "flow", "shift": 0}, "shift"),
        ({"name": "flow", "std": float("nan")}, "std"),
        ({"name": "flow", "mean": "0"}, "mean"),
        ({"name": "flow", "times": "cosine"}, "times"),
        ({"name": "flow", "integer_times": 1}, "integer_times"),
    ],
)
def test_wrong_processes(entry: Any, key: str) -> None:
    with refused(key):
        build_process(entry)


class Recorder:
    """Predicts 8 channels that depend on x, the time and the label, and notes the size of every batch."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.batches.append(len(x))
        scaled = x * (1 + y.view(-1, 1, 1, 1)) + t.view(-1, 1, 1, 1) / 1000
        return torch.cat([scaled.sin(), scaled.cos()], 1)


NULL = 10
LATENT = (3, 4, 2, 2)


def guided_call(guidance: Guidance, t: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """The guided, conditional and unconditional predictions, and the batch sizes of the first."""
    model, x, labels = Recorder(), normal("x", shape=LATENT), torch.tensor([1, 5, 7])
    ours = guided(model, labels, NULL, guidance)(x, t)
    return ours, Recorder()(x, t, labels), Recorder()(x, t, torch.full_like(labels, NULL)), model.batches


@pytest.mark.parametrize("channels", [None, 3])
def test_guidance_moves_the_noise_and_leaves_the_variance(channels: int | None) -> None:
    ours, c, u, batches = guided_call(Guidance(4.0, channels=channels), torch.tensor([7, 7, 7]))
    count = channels or 4
    torch.testing.assert_close(ours[:, :count], u[:, :count] + 4 * (c - u)[:, :count])
    assert torch.equal(ours[:, count:], c[:, count:])
    assert batches == [6]


def test_no_guidance_is_one_plain_forward() -> None:
    ours, c, _, batches = guided_call(Guidance(1.0), torch.tensor([7, 7, 7]))
    assert torch.equal(ours, c)
    assert batches == [3]


def test_scale_zero_is_the_unconditional_model() -> None:
    ours, _, u, _ = guided_call(Guidance(0.0), torch.tensor([7, 7, 7]))
    torch.testing.assert_close(ours[:, :4], u[:, :4])


@pytest.mark.parametrize(
    ("time", "inside"), [(299, False), (300, True), (500, True), (700, True), (701, False)]
)
def test_guidance_on_a_part_of_the_axis(time: int, inside: bool) -> None:
    ours, c, u, batches = guided_call(Guidance(2.0, interval=(0.3, 0.7)), torch.full((3,), time))
    torch.testing.assert_close(ours[:, :4], (2 * c - u if inside else c)[:, :4])
    assert batches == ([6] if inside else [3])


def test_guidance_of_a_batch_of_several_times_is_each_samples_own() -> None:
    ours, c, u, _ = guided_call(Guidance(2.0, interval=(0.3, 0.7)), torch.tensor([100.0, 500.0, 900.0]))
    torch.testing.assert_close(ours[1, :4], (2 * c - u)[1, :4])
    assert torch.equal(ours[::2], c[::2])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"scale": -1}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": "4"}, "scale"),
        ({"channels": 0}, "channels"),
        ({"channels": True}, "channels"),
        ({"interval": (0.7, 0.3)}, "interval"),
        ({"interval": (0.5, 0.5)}, "interval"),
        ({"interval": (-0.1, 1)}, "interval"),
        ({"interval": (0, 1000)}, "interval"),
        ({"interval": [0.5]}, "interval"),
        ({"interval": "01"}, "interval"),
    ],
)
def test_wrong_guidance(options: dict[str, Any], key: str) -> None:
    with refused(key):
        Guidance(**options)


def test_guidance_of_more_channels_than_a_sample_has() -> None:
    with refused("guidance.channels"):
        guided_call(Guidance(2.0, channels=5), torch.tensor([7, 7, 7]))


def test_diffusion_needs_torch_and_numpy_alone() -> None:
    others = {"lightning", "deepspeed", "timm", "webdataset", "torchvision", "diffusers", "transformers"}
    code = (
        f"import sys, mhla_lightning.diffusion; print(sorted({{m.partition('.')[0] for m in "
        f"sys.modules}} & {others}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
