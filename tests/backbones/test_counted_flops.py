"""FLOPs of models against torch's counter on a CPU, which misses the products inside softmax attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mhla_lightning.backbones import build_backbone

TEXT = (torch.zeros(1, 16, 64),)
TIME = (torch.zeros(1),)


def products(queries: int, keys: int, channels: int) -> int:
    """q k^T and the sum of v: 2 products of queries x keys x channels, 2 FLOPs a multiply-add."""
    return 2 * 2 * queries * keys * channels


@pytest.mark.parametrize(
    ("name", "attention", "options", "by_hand", "share"),
    [
        ("sana_tiny", "linear", {}, 4 * products(256, 16, 128), 0.0172),
        ("sana_tiny", "softmax", {}, 4 * (products(256, 16, 128) + products(256, 256, 128)), 0.3024),
        ("wan_tiny", "linear", {}, 4 * products(8 * 16 * 16, 16, 128), 0.0187),
        (
            "vlt_tiny",
            "softmax",
            {"img_size": 64, "num_classes": 10},
            2 * products(256, 256, 64)
            + 2 * products(64, 64, 128)
            + 6 * products(16, 16, 256)
            + 2 * products(4, 4, 512),
            0.1001,
        ),
    ],
    ids=["sana", "sana softmax", "wan", "vlt softmax"],
)
def test_what_torch_misses_on_a_cpu_is_counted_by_hand(
    name: str, attention: str, options: dict[str, Any], by_hand: int, share: float
) -> None:
    """Ours is the count on tensors without data, where torch takes the products one by one."""
    model: Any = build_backbone(name, attention=attention, **options).eval()
    shape = (3, 64, 64) if name == "vlt_tiny" else (3, *model.input_size)
    given = (torch.zeros(1, *shape), *(() if name == "vlt_tiny" else TIME + TEXT))
    counted = []
    for device in ("cpu", "meta"):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.to(device)(*(value.to(device) for value in given))
        counted.append(counter.get_total_flops())
    assert model.flops(model.grid) == counted[1] == counted[0] + by_hand
    assert by_hand / counted[0] == pytest.approx(share, abs=1e-4)
