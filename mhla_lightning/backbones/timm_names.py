"""The image classifiers under names of timm, `<backbone>_<attention>`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, resolve_pretrained_cfg
from torch import Tensor, nn

from mhla_lightning.errors import UserError
from mhla_lightning.weights.adapted import AdaptsWeights, Geometry, WeightState
from mhla_lightning.weights.facts import facts_of

_DEFAULT = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "pool_size": None,
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
}
default_cfgs: dict[str, Any] = {}
"""timm's registry reads this name in the module of an entry."""

Build = Callable[..., nn.Module]
FindGeometry = Callable[[WeightState], Geometry | None]


@dataclass(frozen=True)
class TimmFacts:
    """What timm asks of an architecture.

    Args:
        first_conv: name of the first convolution.
        classifier: name of the last layer.
        features: layers or stages whose maps `features_only` returns.
    """

    first_conv: str
    classifier: str
    features: tuple[int, ...]


def register_classifiers(
    backbones: Mapping[str, TimmFacts], attentions: Iterable[str], build: Build, geometry: FindGeometry
) -> None:
    """Give every classifier a name in timm for each operator.

    Args:
        backbones: what timm asks of them, by their names in the registry.
        attentions: names in the registry.
        build: builds a backbone by its name.
        geometry: of the model that weights come from.
    """
    operators = list(attentions)
    pairs = {f"{backbone}_{name}": (backbone, name) for backbone in backbones for name in operators}
    layers = {
        name: {"first_conv": facts.first_conv, "classifier": facts.classifier}
        for name, facts in ((name, backbones[backbone]) for name, (backbone, _) in pairs.items())
    }
    default_cfgs.update(generate_default_cfgs({name: _DEFAULT | layers[name] for name in pairs}))
    for name, (backbone, attention) in pairs.items():
        if not timm.is_model(name):
            features = backbones[backbone].features
            timm.models.register_model(_entry(name, partial(build, backbone), attention, features, geometry))


def _entry(
    name: str, build: Build, attention: str, features: tuple[int, ...], geometry: FindGeometry
) -> Build:
    """Return the function that timm.create_model calls for a name; it passes our options on."""

    def entry(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        **options: Any,
    ) -> nn.Module:
        facts = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
        if pretrained and not (facts.file or facts.hf_hub_id):
            raise UserError(
                "pretrained",
                f"timm model '{name}' has no weights to download; load your own with load_state_dict, or "
                "with `init_from` in a recipe",
            )
        chosen = {"attention": attention, **options}
        return build_model_with_cfg(
            build,
            name,
            pretrained,
            pretrained_cfg=facts.to_dict(),
            pretrained_filter_fn=partial(_adapted, file=facts.file, geometry=geometry),
            feature_cfg={"feature_cls": "getter", "out_indices": features},
            **chosen,
        )

    entry.__name__ = name
    return entry


def _adapted(
    state: Mapping[str, Tensor], model: nn.Module, file: str | None, geometry: FindGeometry
) -> dict[str, Tensor]:
    """Return weights of a file of timm under our names.

    Raises:
        UserError: positions of an unknown grid: timm loads no model without them.
    """
    facts = None if file is None else facts_of(Path(file))
    adapted = cast(AdaptsWeights, model).adapt_state_dict(state, geometry(WeightState(state, facts=facts)))
    for name, reason in adapted.omitted.items():
        raise UserError("pretrained", f"{file or 'the weights'} do not fit: {name}: {reason}")
    return adapted
