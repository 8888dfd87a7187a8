"""Agreement of VLT with tensors of RAVLT's authors."""

from __future__ import annotations

from typing import Any

import torch

from mhla_lightning.backbones import VLT, VLTOptions
from mhla_lightning.backbones.ravlt_names import vlt_weights


def check_ravlt(case: Any) -> None:
    """A whole model: logits, and gradients of the image and of some weights.

    Their normalizer divides by the number of tokens before it adds eps, ours after. Relative to the logits
    that makes 1e-8.
    """
    made, image = case.meta["constructor"], case.arrays["in.img"].requires_grad_()
    (ratio,) = set(made["mlp_ratios"])
    options = VLTOptions(
        img_size=tuple(image.shape[-2:]),
        num_classes=made["num_classes"],
        embed_dims=made["embed_dims"],
        depths=made["depths"],
        num_heads=made["num_heads"],
        mlp_ratio=ratio,
        head_dim=made["projection"],
    )
    model = VLT({"name": "linear", "preset": "ravlt"}, options).double().eval()
    model.load_state_dict(model.adapt_state_dict(case.group("param.")))
    logits = model(image)
    torch.testing.assert_close(logits, case.arrays["out.logits"], rtol=1e-6, atol=1e-8)
    expected = vlt_weights(case.group("grad."))
    ours = dict(model.named_parameters())
    found = torch.autograd.grad(
        logits, [image, *(ours[name] for name in expected)], case.arrays["in.cotangent"]
    )
    for gradient, wanted in zip(found, [case.arrays["grad_in.img"], *expected.values()], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-8)
