"""Noise processes, their losses and the samplers that undo them (SPEC 4.3, 6.6).

Imports torch and numpy; diffusers only for the samplers that need it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mhla_lightning.diffusion.chain import Chain, respaced
from mhla_lightning.diffusion.ddpm import DDPM
from mhla_lightning.diffusion.flow import FlowMatching
from mhla_lightning.diffusion.guidance import Denoiser, Guidance, guided
from mhla_lightning.diffusion.process import Process
from mhla_lightning.diffusion.samplers import SAMPLERS, check_sampler, default_sampler, sample
from mhla_lightning.errors import UserError, unknown_name

__all__ = [
    "DDPM",
    "PROCESSES",
    "SAMPLERS",
    "Chain",
    "Denoiser",
    "FlowMatching",
    "Guidance",
    "Process",
    "build_process",
    "check_sampler",
    "default_sampler",
    "guided",
    "respaced",
    "sample",
]

PROCESSES: dict[str, type[DDPM] | type[FlowMatching]] = {"ddpm": DDPM, "flow": FlowMatching}


def build_process(entry: str | Mapping[str, Any]) -> Process:
    """Return the noise process of a recipe.

    Args:
        entry: a name, or a mapping of `name` and the process's options.

    Raises:
        UserError: no name, an unknown name or option, or a value that the process refuses. The key is `name`
            or an option.
    """
    if not isinstance(entry, (str, Mapping)):
        raise UserError(
            "name",
            f"{entry!r} is no noise process; give a name or a mapping of `name` and options; names: "
            f"{', '.join(PROCESSES)}",
        )
    given = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = given.pop("name", None)
    if name is None:
        raise UserError(
            "name", f"it is missing beside {sorted(map(str, given))}; give one of {', '.join(PROCESSES)}"
        )
    if not isinstance(name, str) or name not in PROCESSES:
        raise UserError("name", unknown_name("noise process", name, PROCESSES))
    options = [option.name for option in dataclasses.fields(PROCESSES[name]) if option.init]
    for key in given:
        if key not in options:
            raise UserError(
                str(key), unknown_name("option", key, ("name", *options), of=f"noise process '{name}'")
            )
    return PROCESSES[name](**given)
