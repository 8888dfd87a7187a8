"""The peak of the GPU that torch names."""

from __future__ import annotations

import pytest

from mhla_lightning.planning.gpus import peak_of_device


@pytest.mark.parametrize(
    ("device", "precision", "products", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", "highest", 989e12),
        ("NVIDIA H100 80GB HBM3", "32-true", "highest", 67e12),
        ("NVIDIA H100 80GB HBM3", "32-true", "high", 494.5e12),
        ("NVIDIA H200", "bf16-true", "high", 989e12),
        ("NVIDIA A100-SXM4-80GB", "16-mixed", "highest", 312e12),
        ("Tesla V100-SXM2-32GB", "32-true", "high", 15.7e12),
        ("NVIDIA L4", "bf16-mixed", "highest", 121e12),
        ("NVIDIA L40S", "bf16-mixed", "highest", 362e12),
        ("NVIDIA H100 PCIe", "bf16-mixed", "highest", None),
        ("Tesla V100-SXM2-32GB", "bf16-mixed", "highest", None),
        ("another", "32-true", "highest", None),
    ],
)
def test_peak_of_a_device(device: str, precision: str, products: str, peak: float | None) -> None:
    assert peak_of_device(device, precision, products) == peak
