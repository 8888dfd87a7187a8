"""Models of diffusers, from safetensors only, and the hash that tells them apart."""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhla_lightning.errors import UserError, missing_extra, unknown_name
from mhla_lightning.finite import check_finite

CONFIG = "config.json"


def open_model(name: str, subfolder: str | None, classes: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Open a model; return it and its configuration.

    Args:
        name: a folder written by save_pretrained, or a name on the Hugging Face hub.
        subfolder: of the folder or name; None is the folder itself or, in a pipeline, `vae`.
        classes: of diffusers, one of which the model has.

    Raises:
        UserError: diffusers is missing. The name exists neither here nor on the hub. The model has another
            class. The weights are no safetensors, do not fit the configuration, or are not finite.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UserError(None, missing_extra("diffusers", "diffusion", f"the VAE {name}")) from error
    kind, given, place = _config(name, subfolder, classes)
    return _load(getattr(diffusers, kind), name, place), given


def _config(
    name: str, subfolder: str | None, classes: Sequence[str]
) -> tuple[str, dict[str, Any], str | None]:
    """Return the class, configuration and subfolder of an autoencoder."""
    from diffusers import AutoencoderKL

    local = Path(name).expanduser().is_dir()
    if not local and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise UserError(
            "vae",
            f"the folder {name} does not exist; give a folder written by save_pretrained, or a name like "
            "stabilityai/sd-vae-ft-ema",
        )
    places = [subfolder] if subfolder is not None else [None, "vae"]
    reasons = []
    for place in places:
        try:
            with _quiet():
                found = AutoencoderKL.load_config(_address(name), subfolder=place)
        except (OSError, ValueError, RuntimeError) as error:  # of diffusers and of the hub
            reasons.append(_reason(error))
            if "connect" in str(error).lower() or "offline" in str(error).lower():
                break
            continue
        if str(found.get("_class_name")) not in classes:
            raise UserError("vae", unknown_name("class", found.get("_class_name"), classes, of=name))
        return str(found["_class_name"]), found, place
    where = (
        f"the folder {name} holds no {CONFIG} of a VAE"
        if local
        else f"{name} is no folder here and could not be fetched from the hub"
    )
    raise UserError(
        "vae",
        f"{where} ({reasons[0]}): give a folder written by save_pretrained, or a name like "
        "stabilityai/sd-vae-ft-ema",
    )


def _load(kind: Any, name: str, subfolder: str | None) -> nn.Module:
    try:
        # The model is first made with random weights; the caller's random numbers must not change.
        with _quiet(), torch.random.fork_rng(devices=[]):
            model, info = kind.from_pretrained(
                _address(name),
                subfolder=subfolder,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except Exception as error:  # noqa: BLE001  of four packages: diffusers, safetensors, the hub, torch
        raise UserError(
            "vae", f"the weights of {name} cannot be read from a safetensors file ({_reason(error)})"
        ) from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:
        raise UserError(
            "vae",
            f"the weights of {name} do not fit its {CONFIG}: {len(wrong)} are missing or misshaped, e.g. "
            f"{wrong[0]}",
        )
    check_finite(model.state_dict(), "vae", f"{name}: ")
    return model.eval().requires_grad_(False)


def _address(name: str) -> str:
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings: diffusers 0.42 passes a deprecated argument to huggingface_hub 2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def content_hash(model: nn.Module) -> str:
    """Return the sha256 of the class, the configuration and the weights as float32.

    Defaults are left out of the configuration, so that another version of diffusers gives the same.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(model).__init__).parameters.items()
    }
    config: Any = model.config
    said = {
        key: json.dumps(value, default=str)
        for key, value in sorted(config.items())
        if not key.startswith("_")
    }
    own = {key: text for key, text in said.items() if text != json.dumps(defaults.get(key), default=str)}
    digest = hashlib.sha256(json.dumps([type(model).__name__, own]).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().contiguous().numpy())
    return digest.hexdigest()
