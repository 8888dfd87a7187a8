"""An operator of your own in a file of your own: linear attention with relu(x) ** power as its features.

  mhla test-operator examples/power_operator.py
  PYTHONPATH=examples lightning run classification/deit_tiny_mhla_mnist_cpu --imports '[power_operator]' \
      --model.attention '{name: power, power: 3}'
"""

import torch

from mhla_lightning.attention import Attention, dense_mhla, register_attention


class Power(Attention):
    def __init__(self, *, heads, dim_k, dim_v, grid=None, power=2.0):
        super().__init__()
        self.power = power

    def attend(self, q, k, v, context):
        turn = context.rotary or (lambda x: x)
        real = 1 if context.mask is None else context.mask[..., None, None]
        features_q, features_k = (torch.relu(x.float() if x.dtype.itemsize < 4 else x) ** self.power for x in (q, k))
        features_k = features_k * real
        summary = torch.einsum("bthk,bthd->bhkd", turn(features_k), v.to(features_k.dtype))
        out = torch.einsum("bthk,bhkd->bthd", turn(features_q), summary)
        total = torch.einsum("bthk,bhk->bth", features_q, features_k.sum(1)) + 1e-6
        return (out / total[..., None] * real).to(v.dtype)

    def flops(self, tokens, heads, dim_k, dim_v):
        return 2 * heads * tokens * dim_k * (2 * dim_v + 1)


register_attention("power", Power)
