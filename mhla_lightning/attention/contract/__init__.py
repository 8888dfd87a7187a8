"""The rules that models rely on, as checks of any operator.

`mhla test-operator` prints the verdicts. Tests of our own operators run the same checks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from mhla_lightning.attention.contract import alone, causal, shared
from mhla_lightning.attention.contract.subject import Broken, NotChecked, Subject
from mhla_lightning.errors import UserError

__all__ = ["BIDIRECTIONAL", "CAUSAL", "Broken", "NotChecked", "Subject", "RuleResult", "check_contract"]

Check = Callable[[Subject], str]
"""Returns what was compared; raises :class:`Broken`, :class:`NotChecked`, or UserError for a refusal."""

_SHARED: dict[str, Check] = {
    "shape": shared.check_shape,
    "samples": shared.check_samples,
    "dense": shared.check_dense,
    "gradients": shared.check_gradients,
}
_SPEED: dict[str, Check] = {
    "rotary": shared.check_rotary,
    "bf16": alone.check_bf16,
    "compile": alone.check_compile,
    "FLOPs": alone.check_flops,
}
BIDIRECTIONAL: dict[str, Check] = {**_SHARED, "padding": shared.check_padding, **_SPEED}
CAUSAL: dict[str, Check] = {
    **_SHARED,
    "causality": causal.check_causality,
    "padding": causal.check_padding,
    "packing": causal.check_packing,
    "streaming": causal.check_streaming,
    "reorder": causal.check_reorder,
    **_SPEED,
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RuleResult:
    """The result of one check.

    Attributes:
        check: its name.
        result: `refused` is a message of the operator, which models pass on; `broken` is a violated rule.
        detail: what was compared, what is wrong, or what the operator says.
    """

    check: str
    result: Literal["holds", "not checked", "refused", "broken"]
    detail: str


def check_contract(subject: Subject, without: Collection[str] = ()) -> Iterator[RuleResult]:
    """Run every check of the operator's kind.

    Args:
        subject: the operator, its options and its inputs.
        without: names of checks that are left out.

    Yields:
        one verdict a check, in the order of the tables above.
    """
    for name, check in (CAUSAL if subject.kind.causal else BIDIRECTIONAL).items():
        if name not in without:
            yield _verdict(name, check, subject)


def _verdict(name: str, check: Check, subject: Subject) -> RuleResult:
    try:
        return RuleResult(name, "holds", check(subject))
    except NotChecked as reason:
        return RuleResult(name, "not checked", str(reason))
    except UserError as error:
        return RuleResult(name, "refused", str(error))
    except Broken as error:
        return RuleResult(name, "broken", str(error))
    except Exception as error:  # noqa: BLE001  (any error of code that is not ours)
        log.debug("check %s", name, exc_info=error)
        first = str(error).strip().partition("\n")[0]
        return RuleResult(name, "broken", f"{type(error).__name__}: {first}")
