"""Text encoders of transformers, from safetensors only, and the hash that tells them apart."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mhla_lightning.errors import UserError
from mhla_lightning.finite import check_finite


@dataclass(frozen=True)
class PretrainedModel:
    """A class of transformers.

    Attributes:
        name: of the class.
        sizes: keys of the configuration that decide the output.
        doubled: tensors that are the same as others.
    """

    name: str
    sizes: tuple[str, ...]
    doubled: tuple[str, ...] = ()


def open_config(name: str, address: str, types: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Return the configuration of a text encoder and its subfolder.

    The subfolder is empty or, in a pipeline, text_encoder.

    Args:
        name: as the user gave it, for messages.
        address: a folder, or a name on the Hugging Face hub.
        types: values of `model_type` that are supported.

    Raises:
        UserError: no such model, or one of another type.
    """
    from transformers import PretrainedConfig

    reasons = []
    for place in ("", "text_encoder"):
        try:
            with _quiet():
                config, _ = PretrainedConfig.get_config_dict(address, subfolder=place)
        except (OSError, ValueError, RuntimeError) as error:  # of transformers and of the hub
            reasons.append(" ".join(str(error).split())[:200])
            if "connect" in str(error).lower() or "offline" in str(error).lower():
                break
            continue
        if config.get("model_type") in types:
            return config, place
        if config.get("model_type"):
            raise UserError(
                "text_encoder",
                f"{name} is a model of type {config['model_type']}; supported are {' and '.join(types)}",
            )
        reasons.append("its config.json is of no text encoder")
    raise UserError(
        "text_encoder",
        f"{name} is no folder of a UMT5EncoderModel or Gemma2Model here, and could not be fetched from the "
        f"hub ({reasons[0]})",
    )


def open_weights(name: str, address: str, place: str, kind: PretrainedModel) -> nn.Module:
    """Return a model, frozen and in eval mode.

    Args:
        name, address: see open_config.
        place: subfolder of the model.
        kind: of the model.

    Raises:
        UserError: weights that are no safetensors, do not fit the configuration, or are not finite.
    """
    import transformers

    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            opened: Any = getattr(transformers, kind.name).from_pretrained(
                address,
                subfolder=place,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                dtype="auto",
            )
            model, info = opened
    except Exception as error:  # noqa: BLE001  of four packages: transformers, safetensors, the hub, torch
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            "text_encoder", f"the weights of {name} cannot be read from a safetensors file ({reason})"
        ) from error
    wrong = sorted(str(key) for found in ("missing_keys", "mismatched_keys") for key in info[found])
    if wrong:
        raise UserError(
            "text_encoder",
            f"the weights of {name} do not fit its config.json: {len(wrong)} are missing, e.g. {wrong[0]}",
        )
    check_finite(model.state_dict(), "text_encoder", f"{name}: ")
    return model.eval().requires_grad_(False)


def open_tokenizer(name: str, address: str, place: str) -> Any:
    """Return the tokenizer of a model.

    Arguments: see open_weights. Raises UserError without one.
    """
    from transformers import AutoTokenizer

    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(
                address, subfolder="tokenizer" if place else "", trust_remote_code=False
            )
    except Exception as error:  # noqa: BLE001  of transformers, tokenizers and the hub
        reason = " ".join(str(error).split())[:200]
        raise UserError("text_encoder", f"{name} has no tokenizer that can be read ({reason})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bar of transformers and its warnings about unused weights."""
    from transformers.utils import logging

    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def content_hash(model: nn.Module, tokenizer: Any, kind: PretrainedModel) -> str:
    """Return the sha256 of everything that decides the features.

    These are sizes, vocabulary and weights (as float32).
    It is the same for every copy, device and dtype.
    """
    config: Any = model.config
    sizes = [getattr(config, key) for key in kind.sizes]
    digest = hashlib.sha256(json.dumps([sizes, sorted(tokenizer.get_vocab().items())]).encode())
    for key, tensor in sorted(model.state_dict().items()):
        if key not in kind.doubled:
            digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().float().contiguous().numpy())
    return digest.hexdigest()
