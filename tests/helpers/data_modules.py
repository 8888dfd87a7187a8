"""Data modules from flat options: each goes to the section of the constructor that has it."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any, TypeVar

from mhla_lightning.data.modules.base import ShardDataModule
from mhla_lightning.data.modules.options import ClipConfig, OrderConfig, ReadingConfig, TextConfig

SECTIONS = {"order": OrderConfig, "reading": ReadingConfig, "text": TextConfig, "clips": ClipConfig}
M = TypeVar("M", bound=ShardDataModule)


def build(module: type[M], **options: Any) -> M:
    """Return a data module; `num_workers=0` becomes `reading=ReadingConfig(num_workers=0)`, and so on."""
    parameters = inspect.signature(module).parameters
    for section, kind in SECTIONS.items():
        names = {field.name for field in fields(kind)} & set(options) - set(parameters)
        if section in parameters and names:
            chosen = {name: options.pop(name) for name in names}
            options[section] = replace(parameters[section].default, **chosen)
    return module(**options)
