"""Names of the weights that RAVLT's authors publish, and ours (arXiv 2411.07635)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_STEM = {
    "0": "0.conv",
    "1": "0.bn",
    "3": "2.conv",
    "4": "2.bn",
    "6": "4.conv",
    "7": "4.bn",
    "9": "6.conv",
    "10": "6.bn",
}
"""Place in their stem -> in ours, which keeps a convolution and its norm together."""

_IN_BLOCK = (
    (r"^pos\.", "cpe.depthwise.conv."),
    (r"^norm([12])\.norm\.", r"norm\1."),
    (r"^gamma_([12])$", r"ls\1.gamma"),
    (r"^attn\.lepe\.", "attn.lepe.conv."),
    (r"^ffn\.dwconv\.", "mlp.dwconv.conv."),
    (r"^ffn\.", "mlp."),
)


def vlt_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of RAVLT under our names and in our shapes; other names stay.

    1 x 1 convolutions become linear layers. Their queries, keys, values and gates are one layer, and ours
    two. Tables of rotary angles are no weights of ours.

    Args:
        state: the tensors.
    """
    if not any(name.startswith("layers.") for name in state):
        return dict(state)
    weights: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(".RoPE.angle"):
            continue
        ours = _our_name(name)
        if ours.endswith((".gamma", ".fc.weight")):
            value = value.flatten() if ours.endswith(".gamma") else value.flatten(1)
        elif re.search(r"\.(qkvo|proj|fc1|fc2)\.weight$", ours):
            value = value.flatten(1)
        if ".qkvo." in ours:
            weights[ours.replace(".qkvo.", ".qkv.")] = value[: len(value) // 4 * 3]
            weights[ours.replace(".qkvo.", ".gate.")] = value[len(value) // 4 * 3 :]
        else:
            weights[ours] = value
    return weights


def _our_name(name: str) -> str:
    if found := re.match(r"patch_embed\.proj\.(\d+)\.(.+)", name):
        return f"stem.{_STEM[found[1]]}.{found[2]}" if found[1] in _STEM else name
    if found := re.match(r"layers\.(\d+)\.downsample\.(reduction|norm)\.(.+)", name):
        part = "conv" if found[2] == "reduction" else "bn"
        return f"stages.{int(found[1]) + 1}.downsample.{part}.{found[3]}"
    if found := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)", name):
        inner = found[3]
        for theirs, ours in _IN_BLOCK:
            inner = re.sub(theirs, ours, inner)
        return f"stages.{found[1]}.blocks.{found[2]}.{inner}"
    for theirs, ours in (("proj.", "head_conv.0.conv."), ("norm.", "head_conv.0.bn."), ("head.", "head.fc.")):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
