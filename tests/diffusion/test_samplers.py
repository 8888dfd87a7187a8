"""Samplers, on data whose best denoiser is known in closed form."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mhla_lightning.diffusion import DDPM, SAMPLERS, FlowMatching, Process, check_sampler, sample
from mhla_lightning.diffusion.guidance import Denoiser
from mhla_lightning.randomness import generator
from tests.helpers.diffusion_oracles import no_noise
from tests.helpers.errors import refused
from tests.helpers.marks import every_nth

ORACLES = Path(__file__).parents[1] / "oracles"
MEAN, STD = 0.7, 0.4
SERVED = [(sampler, process) for sampler, serves in SAMPLERS.items() for process in serves]
PROCESS: dict[str, Process] = {"ddpm": DDPM(), "flow": FlowMatching(shift=3.0)}


def normal(*key: int | str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(generator(*key).standard_normal(shape, np.float32))


def keyed_noise(images: range, shape: tuple[int, ...] = (2, 8, 8)) -> tuple[Tensor, Callable[[int], Tensor]]:
    """First noise and step noise of these images, each drawn by its own key."""

    def rows(*key: int | str) -> Tensor:
        return torch.stack([normal(*key, image, shape=shape) for image in images])

    return rows("first"), lambda step: rows("step", step)


def of_gaussian(process: Process) -> Denoiser:
    """What a perfect network predicts where the data is N(MEAN, STD^2)."""
    if isinstance(process, FlowMatching):

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            t = time.view(-1, 1, 1, 1) / 1000
            spread = (1 - t) ** 2 * STD**2 + t**2
            noise, x0 = (
                t * (x - (1 - t) * MEAN) / spread,
                MEAN + (1 - t) * STD**2 * (x - (1 - t) * MEAN) / spread,
            )
            return noise - x0

        return velocity
    assert isinstance(process, DDPM)
    level = torch.from_numpy(process.chain.alphas_cumprod).float()

    def epsilon(x: Tensor, time: Tensor) -> Tensor:
        signal = level[time].view(-1, 1, 1, 1)
        noise = (1 - signal).sqrt() * (x - signal.sqrt() * MEAN) / (signal * STD**2 + 1 - signal)
        return torch.cat([noise, torch.zeros_like(noise)], 1) if process.learn_variance else noise

    return epsilon


def wavy(process: Process) -> Denoiser:
    """A denoiser that is neither linear nor pointwise, near enough to the best one for samples of the
    data's size.
    """
    best, kernel = of_gaussian(process), normal("kernel", shape=(process.out_channels(2), 2, 3, 3)) / 3

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        return best(x, time) + 0.1 * torch.tanh(
            torch.nn.functional.conv2d(x, kernel, padding=1) + time.view(-1, 1, 1, 1) / 1000
        )

    return denoise


@pytest.mark.parametrize("steps", [50, 250])
@pytest.mark.parametrize(("sampler", "name"), SERVED)
def test_samples_have_mean_and_spread_of_the_data(sampler: str, name: str, steps: int) -> None:
    """16,384 values: standard errors are 0.003 and 0.002. The rest of the tolerance is the steps'; all but
    DPM-Solver++ are of first order.
    """
    process = PROCESS[name]
    noise, step_noise = keyed_noise(range(64), (4, 8, 8))
    drawn = sample(
        of_gaussian(process), process, sampler=sampler, steps=steps, noise=noise, step_noise=step_noise
    )
    tolerance = 0.03 if steps == 50 and sampler != "dpm++" else 0.015
    assert drawn.mean().item() == pytest.approx(MEAN, abs=tolerance)
    assert drawn.std().item() == pytest.approx(STD, abs=tolerance)


@pytest.mark.parametrize(("sampler", "name"), [served for served in SERVED if served[0] != "ddpm"])
def test_more_steps_come_nearer(sampler: str, name: str) -> None:
    """From a fixed noise a deterministic sampler comes to one sample as the steps grow."""
    process = PROCESS[name]
    noise, _ = keyed_noise(range(4))
    limit, many, few = (
        sample(wavy(process), process, sampler=sampler, steps=n, noise=noise, step_noise=no_noise)
        for n in (1000, 200, 20)
    )
    assert (many - limit).abs().mean() < (few - limit).abs().mean() / 3


@pytest.mark.parametrize("learn_variance", [True, False])
def test_ancestral_variance_is_what_the_network_says(learn_variance: bool) -> None:
    """From the same noises, the largest variance (beta) spreads samples more than the smallest, which is
    also the fixed one.
    """
    process = DDPM(learn_variance)
    noise, step_noise = keyed_noise(range(32))

    def spread(v: float) -> float:
        denoise = of_gaussian(process)

        def with_variance(x: Tensor, time: Tensor) -> Tensor:
            prediction = denoise(x, time)
            prediction[:, 2:] = v
            return prediction

        return (
            sample(with_variance, process, sampler="ddpm", steps=10, noise=noise, step_noise=step_noise)
            .std()
            .item()
        )

    fixed = (
        sample(
            of_gaussian(DDPM(False)),
            DDPM(False),
            sampler="ddpm",
            steps=10,
            noise=noise,
            step_noise=step_noise,
        )
        .std()
        .item()
    )
    assert spread(-1.0) == pytest.approx(fixed, rel=1e-5)
    assert (spread(1.0) > 1.02 * fixed) == learn_variance


@pytest.mark.parametrize("steps", [7, 50, 300, 1000])
def test_ddim_of_diffusers_is_our_formula(steps: int) -> None:
    process = DDPM()
    denoise = wavy(process)
    noise, _ = keyed_noise(range(4))
    theirs = sample(denoise, process, sampler="ddim", steps=steps, noise=noise, step_noise=no_noise)
    timestep_map, chain = process.shortened(steps)
    x = noise
    for t in reversed(range(steps)):
        x = chain.ddim_step(denoise(x, torch.full((4,), int(timestep_map[t]))), x, torch.full((4,), t))
    torch.testing.assert_close(theirs, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sampler", "name"), SERVED)
def test_an_image_does_not_depend_on_its_batch(sampler: str, name: str) -> None:
    process = PROCESS[name]
    drawn = []
    for images in (range(6), range(4, 5)):
        noise, step_noise = keyed_noise(images)
        drawn.append(
            sample(wavy(process), process, sampler=sampler, steps=12, noise=noise, step_noise=step_noise)
        )
    torch.testing.assert_close(drawn[0][4:5], drawn[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sampler", "name"), SERVED)
def test_no_generator_but_the_callers_is_used(sampler: str, name: str) -> None:
    process, asked = PROCESS[name], list[int]()
    noise, step_noise = keyed_noise(range(2))
    before = torch.get_rng_state()

    def watched(step: int) -> Tensor:
        asked.append(step)
        return step_noise(step)

    once, again = (
        sample(wavy(process), process, sampler=sampler, steps=9, noise=noise, step_noise=watched)
        for _ in range(2)
    )
    assert torch.equal(once, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert asked == (list(range(8)) * 2 if sampler == "ddpm" else [])


@pytest.mark.parametrize("steps", every_nth([1, 2, 13, 999, 250, 1000], 3))
@pytest.mark.parametrize(("sampler", "name"), SERVED)
def test_times_run_from_noise_to_data(sampler: str, name: str, steps: int) -> None:
    process, times, done = PROCESS[name], list[Tensor](), list[int]()
    noise, step_noise = keyed_noise(range(2), (2, 2, 2))

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        times.append(time)
        return wavy(process)(x, time).bfloat16()

    drawn = sample(
        denoise,
        process,
        sampler=sampler,
        steps=steps,
        noise=noise,
        step_noise=step_noise,
        on_step=lambda step, x: done.append(step),
    )
    assert drawn.dtype == torch.float32
    assert torch.isfinite(drawn).all()
    assert done == list(range(steps))
    each = torch.stack(times)
    assert each.shape == (steps, 2)
    assert torch.equal(each[:, 0], each[:, 1])
    assert (each[:, 0].double().diff() < 0).all()
    assert 990 < each[0, 0] <= 1000
    assert each[-1, 0] >= 0
    assert each.is_floating_point() == (name == "flow")


@pytest.mark.parametrize(("sampler", "first", "last"), [("euler", 1.0, 0.1), ("dpm++", 0.999, 0.0999)])
def test_flow_grids_are_even_and_shifted_once(sampler: str, first: float, last: float) -> None:
    """Ten steps; DPM-Solver++ starts short of pure noise, where its log signal-to-noise ratio is not
    defined.
    """
    process, times = FlowMatching(shift=3.0), list[Tensor]()

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        times.append(time)
        return x

    sample(denoise, process, sampler=sampler, steps=10, noise=torch.zeros(1, 2, 4, 4), step_noise=no_noise)
    torch.testing.assert_close(
        torch.cat(times), 1000 * process.shifted(torch.linspace(first, last, 10)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_solvers_of_diffusers_ignore_the_variance(sampler: str) -> None:
    noise, _ = keyed_noise(range(2))
    learned, plain = (
        sample(of_gaussian(process), process, sampler=sampler, steps=10, noise=noise, step_noise=no_noise)
        for process in (DDPM(), DDPM(False))
    )
    assert torch.equal(learned, plain)


@pytest.mark.parametrize(("sampler", "name"), SERVED)
def test_a_prediction_of_another_width_is_refused(sampler: str, name: str) -> None:
    noise, step_noise = keyed_noise(range(2))
    with pytest.raises(ValueError, match="the network predicts 3 channels"):
        sample(
            lambda x, time: x[:, :1].expand(-1, 3, -1, -1),
            PROCESS[name],
            sampler=sampler,
            steps=3,
            noise=noise,
            step_noise=step_noise,
        )


@pytest.mark.parametrize(
    ("sampler", "name", "steps", "key"),
    [
        ("dmp++", "flow", 10, "sampler"),
        (["ddpm"], "ddpm", 10, "sampler"),
        ("euler", "ddpm", 10, "sampler"),
        ("ddpm", "flow", 10, "sampler"),
        ("ddpm", "ddpm", 0, "steps"),
        ("euler", "flow", 1001, "steps"),
        ("ddim", "ddpm", 2.5, "steps"),
        ("ddim", "ddpm", True, "steps"),
    ],
)
def test_wrong_samplers(sampler: Any, name: str, steps: Any, key: str) -> None:
    with refused(key):
        check_sampler(sampler, PROCESS[name], steps)
    with refused(key):
        sample(
            wavy(PROCESS[name]),
            PROCESS[name],
            sampler=sampler,
            steps=steps,
            noise=torch.zeros(1, 2, 4, 4),
            step_noise=no_noise,
        )


@pytest.mark.parametrize(("sampler", "name"), SERVED)
def test_without_diffusers(sampler: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    if sampler == "ddpm":
        noise, step_noise = keyed_noise(range(2))
        assert torch.isfinite(
            sample(wavy(DDPM()), DDPM(), sampler="ddpm", steps=3, noise=noise, step_noise=step_noise)
        ).all()
        return
    with refused("sampler"):
        check_sampler(sampler, PROCESS[name], 10)
