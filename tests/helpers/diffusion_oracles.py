"""Checks of diffusion against the authors' numbers. `meta` and `arrays` are a case's json and npz."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhla_lightning.diffusion import DDPM, FlowMatching, Guidance, guided, respaced, sample

Meta = Mapping[str, Any]
Arrays = Mapping[str, Tensor]


def check_ddpm(meta: Meta, arrays: Arrays) -> None:
    """Tables and respacing to the last bit, training losses, steps on a chain of ten."""
    process = DDPM()
    for table in ("betas", "alphas_cumprod", "posterior_log_variance_clipped"):
        np.testing.assert_array_equal(getattr(process.chain, table), arrays[table].numpy())
    for respacing in (
        name.removeprefix("timestep_map.") for name in arrays if name.startswith("timestep_map.")
    ):
        timestep_map, betas = respaced(respacing)
        np.testing.assert_array_equal(timestep_map, arrays[f"timestep_map.{respacing}"].numpy())
        np.testing.assert_array_equal(betas, arrays[f"betas.{respacing}"].numpy())
    x0, noise, prediction, t = (arrays[f"in.{name}"] for name in ("x0", "noise", "model_out", "t"))
    x_t = process.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, arrays["out.x_t"], rtol=1e-6, atol=1e-6)
    for name, value in process.losses(prediction, x0, noise, x_t, t).items():
        torch.testing.assert_close(value, arrays[f"out.{name}"], rtol=1e-5, atol=1e-7)
    _, chain = process.shortened(10)
    steps = torch.tensor([0, 1, 5, 9])
    for clip in (False, True):
        back = chain.p_mean_variance(prediction, x0, steps, clip_denoised=clip)
        for ours, name in ((back.mean, "pmean"), (back.log_variance, "plogvar"), (back.x0, "pxstart")):
            torch.testing.assert_close(ours, arrays[f"out.{name}_clip{int(clip)}"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        chain.ddim_step(prediction, x0, steps), arrays["out.ddim_eta0"], rtol=1e-5, atol=1e-5
    )


def check_flow(meta: Meta, arrays: Arrays) -> None:
    """The release's grid of times to the last bit, what the model is told, x_t and the loss."""
    told = re.search(r"shift ([0-9.]*[0-9])", meta.get("source", ""))
    assert told, f"no shift is named in {meta.get('source')}"
    process = FlowMatching(shift=float(told[1]), integer_times=True)
    grid = torch.tensor([process.grid_time(index) for index in range(1000)], dtype=torch.float64)
    assert torch.equal(grid, arrays["sigmas"])
    assert torch.equal(process.model_time(grid), arrays["timestep_map"].floor())
    x0, noise, prediction, t = (arrays[f"in.{name}"] for name in ("x0", "noise", "model_out", "t"))
    x_t = process.add_noise(x0, noise, grid[t])
    assert torch.equal(process.model_time(grid[t]).long(), arrays["out.model_timestep"])
    torch.testing.assert_close(x_t, arrays["out.x_t"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        process.losses(prediction, x0, noise, x_t, grid[t])["loss"], arrays["out.loss"], rtol=1e-6, atol=1e-6
    )


def check_dpm_sampler(meta: Meta, arrays: Arrays) -> None:
    """Guided DPM-Solver++ 2M from the same noise: the samples, and the times at which the model was
    called.
    """
    options = meta["constructor"]
    process, guidance = FlowMatching(shift=options["flow_shift"]), Guidance(options["cfg_scale"])
    null, calls = 1, list[float]()

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append(float(t[0]))
        with_text, without = (torch.cat([arrays[f"in.{name}"]] * 2).float() for name in ("cond", "uncond"))
        time = t.view(-1, 1, 1, 1) / 1000
        return torch.tanh(x) * (0.5 + time) - torch.where(
            (y == null).view(-1, 1, 1, 1), without, with_text
        ) * (1 - time)

    for steps in (int(name.rpartition("steps")[2]) for name in arrays if name.startswith("out.dpmpp2m")):
        calls.clear()
        denoise = guided(model, torch.tensor([0, 0]), null, guidance)
        ours = sample(
            denoise, process, sampler="dpm++", steps=steps, noise=arrays["in.z"], step_noise=no_noise
        )
        torch.testing.assert_close(ours.double(), arrays[f"out.dpmpp2m_steps{steps}"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.tensor(calls), arrays[f"out.times_steps{steps}"], rtol=1e-6, atol=0)


def no_noise(step: int) -> Tensor:
    raise AssertionError(f"a deterministic sampler asked for the noise of step {step}")
