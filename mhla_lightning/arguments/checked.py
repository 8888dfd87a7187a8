"""Values of options: their types by annotation, and their ranges by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin

from mhla_lightning.arguments.hints import argument_hints, item_hint, options_of
from mhla_lightning.errors import UserError

Range = tuple[float, float, str]
"""The least and the largest value, and both in words."""

_SHARE: Range = (0.0, 1.0, "of 0 to 1")
_BELOW_ONE: Range = (0.0, math.nextafter(1.0, 0.0), "of 0 to below 1")
_NOT_NEGATIVE: Range = (0.0, math.inf, "of at least 0")
_ABOVE: Range = (math.ulp(0.0), math.inf, "above 0")
_COUNT: Range = (1.0, math.inf, "of at least 1")
RANGES: dict[str, Range] = {
    "dropout": _SHARE,
    "drop_rate": _SHARE,
    "drop_path_rate": _BELOW_ONE,
    "eps": _NOT_NEGATIVE,
    "norm_eps": _NOT_NEGATIVE,
    "qk_norm_eps": _NOT_NEGATIVE,
    "num_classes": _NOT_NEGATIVE,
    "short_conv": _NOT_NEGATIVE,
    "expand_k": _ABOVE,
    "expand_v": _ABOVE,
    "in_chans": _COUNT,
    "mlp_ratio": _ABOVE,
    "rope_base": _ABOVE,
}
"""Ranges by an option's name, which means the same in every class."""


class CheckedOptions:
    """A frozen dataclass whose fields hold what their annotations say.

    Whole numbers are at least 1, and other numbers are finite.

    Other ranges are in :data:`RANGES`. A subclass with a `__post_init__` calls this one first.

    Raises:
        UserError: a value of another type or outside its range; the key is the field.
    """

    def __post_init__(self) -> None:
        for key, hint in _hints(type(self)).items():
            whole = int in options_of(hint) or item_hint(hint) is int
            _check(key, getattr(self, key), hint, RANGES.get(key, _COUNT if whole else None))


def check_arguments(target: type | Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Refuse arguments that are not what a class's or function's annotations say.

    Args:
        target: takes the arguments; those without a readable annotation pass.
        values: by name.

    Raises:
        UserError: a value of another type, or outside its range in :data:`RANGES`.
    """
    hints = _hints(target) if isinstance(target, type) else {}
    for key, value in values.items():
        if key in hints:
            _check(key, value, hints[key], RANGES.get(key))


_hints_of: dict[type, dict[str, Any]] = {}


def _hints(target: type) -> dict[str, Any]:
    if target not in _hints_of:
        _hints_of[target] = argument_hints(target)
    return _hints_of[target]


def _check(key: str, value: Any, hint: Any, limits: Range | None) -> None:
    kinds = options_of(hint)
    tests = [_TESTS.get(get_origin(kind) or kind) for kind in kinds]
    if None in tests:  # a type of which nothing is known here
        return
    if not any(test and test(value, kind, limits) for test, kind in zip(tests, kinds, strict=True)):
        allowed = " or ".join(_words(kind, limits) for kind in kinds)
        raise UserError(key, f"found {value!r}; give {allowed}")


def _whole(value: Any, kind: Any, limits: Range | None) -> bool:
    right = isinstance(value, Integral) and not isinstance(value, bool)
    return right and (limits is None or limits[0] <= value <= limits[1])


def _number(value: Any, kind: Any, limits: Range | None) -> bool:
    right = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return right and (limits is None or limits[0] <= value <= limits[1])


def _list(value: Any, kind: Any, limits: Range | None) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return False
    item = item_hint(kind)
    test = _TESTS.get(item)
    return test is None or all(test(each, item, limits) for each in value)


_TESTS: dict[Any, Callable[[Any, Any, Range | None], bool]] = {
    int: _whole,
    float: _number,
    bool: lambda value, kind, limits: isinstance(value, bool),
    str: lambda value, kind, limits: isinstance(value, str),
    type(None): lambda value, kind, limits: value is None,
    Literal: lambda value, kind, limits: value in get_args(kind),
    Mapping: lambda value, kind, limits: isinstance(value, Mapping),
    Sequence: _list,
}
"""The annotations that are checked, by their origin."""


def _words(kind: Any, limits: Range | None) -> str:
    """Return what an annotation takes, in words."""
    within = "" if limits is None else f" {limits[2]}"
    if get_origin(kind) is Sequence:
        item = {int: f"whole numbers{within}", float: "numbers"}.get(item_hint(kind), "values")
        return f"a list of {item}"
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    return {
        int: f"a whole number{within}",
        float: f"a number{within}",
        bool: "true or false",
        str: "a name",
        type(None): "null",
    }.get(kind, "a mapping")
