"""An operator in a file of its own: linear attention with relu(x) ** power as its feature map.

mhla test-operator examples/power_operator.py
PYTHONPATH=examples lightning run classification/deit_tiny_mhla_mnist_cpu --imports '[power_operator]' \
    --model.attention '{name: power, power: 3}'
"""

import torch
from torch import Tensor

from mhla_lightning.attention import Attention, Context, register_attention


class Power(Attention):
    example = {"power": 3.0}  # the options that `mhla test-operator` takes

    def __init__(
        self, *, heads: int, dim_k: int, dim_v: int, grid: object = None, power: float = 2.0
    ) -> None:
        super().__init__()
        self.power = power

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(x if x.dtype == torch.float64 else x.float()) ** self.power

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        q, k, turn = self.features(q), self.features(k), context.rotary or (lambda x: x)
        if context.mask is not None:  # padded keys count nowhere, padded outputs are 0
            q, k = (x * context.mask[..., None, None] for x in (q, k))
        summary = torch.einsum("bthk,bthd->bhkd", turn(k), v.to(k.dtype))
        total = torch.einsum("bthk,bhk->bth", q, k.sum(1))[..., None] + 1e-6
        return (torch.einsum("bthk,bhkd->bthd", turn(q), summary) / total).to(v.dtype)

    def flops(self, tokens: int, heads: int, dim_k: int, dim_v: int) -> int:
        return 2 * heads * tokens * dim_k * (2 * dim_v + 1)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:  # for checks alone
        weights = torch.einsum("bihk,bjhk->bhij", self.features(q), self.features(k))
        if context.mask is not None:
            weights = weights * context.mask[:, None, :, None] * context.mask[:, None, None]
        total = weights.sum(-1).transpose(1, 2)[..., None] + 1e-6
        return torch.einsum("bhij,bjhd->bihd", weights, v) / total


register_attention("power", Power)
