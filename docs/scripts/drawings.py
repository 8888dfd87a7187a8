"""Drawings in SVG: what MHLA computes, and generated code. Both bring their own light ground."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

import torch

from mhla_lightning.attention.mhla import MixingMatrix

SIDE, BLOCKS = 6, 3
"""Tokens and blocks of an axis of the image that is drawn."""
QUERY = 5
"""Block whose mixture is drawn: the right one of the middle row."""
_COLORS = ("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f")
_INK, _FAINT = "#1f2328", "#59636e"


def mhla_drawing() -> str:
    """Return the drawing: tokens in blocks, summaries, mixing matrix, mixture, output."""
    mixing = MixingMatrix((BLOCKS, BLOCKS)).weight.detach()
    parts = [
        _text(94, 38, "1. tokens in blocks", 14, _INK),
        *_tokens(24, 70),
        _arrow(178, 142),
        _text(290, 38, "2. one summary a block", 14, _INK),
        *_summaries(228, 70),
        _text(290, 250, "S_b = Σ φ(k) v^T", 14, _FAINT),
        _arrow(376, 142),
        _text(492, 38, "3. a learned matrix mixes", 14, _INK),
        *_matrix(420, 70, mixing),
        _text(492, 250, "M × M weights in [0, 1]", 14, _FAINT),
        _arrow(580, 142),
        _text(690, 38, "4. each block reads its own", 14, _INK),
        *_mixture(624, 70, mixing),
        _text(690, 250, "o = φ(q) Σ_b m_ib S_b", 14, _FAINT),
        _text(400, 296, "softmax: all pairs of tokens · linear attention: one summary of all", 14, _FAINT),
        _text(400, 320, "MHLA: M summaries, and for each query block its own mixture of them", 14, _INK),
    ]
    return _svg(800, 340, parts)


def code_drawing(text: str) -> str:
    """Return generated code as a picture; its prompt is the first line.

    Args:
        text: prompt and continuation.
    """
    lines = [line[:84].rstrip() for line in text.splitlines()[:16]]
    rows = [
        f'<text x="20" y="{34 + 18 * number}" font-size="13" fill="{_INK}" xml:space="preserve" '
        f'font-family="ui-monospace, Menlo, Consolas, monospace">{escape(line)}</text>'
        for number, line in enumerate(lines)
    ]
    return _svg(720, 34 + 18 * len(lines), rows)


def _svg(width: int, height: int, parts: list[str]) -> str:
    ground = f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff" stroke="#d1d9e0"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{9 * width // 8}">'
    return "\n".join([head, ground, *parts, "</svg>"]) + "\n"


def _text(x: int, y: int, text: str, size: int, color: str) -> str:
    shifted = re.sub(
        r"_(\w+)", r'<tspan dy="4" font-size="10">\1</tspan><tspan dy="-4">&#8203;</tspan>', escape(text)
    )
    shifted = re.sub(r"\^(\w)", r'<tspan dy="-5" font-size="10">\1</tspan>', shifted)
    font = "-apple-system, Segoe UI, Helvetica, Arial, sans-serif"
    return (
        f'<text x="{x}" y="{y}" text-anchor="middle" font-family="{font}" font-size="{size}" '
        f'fill="{color}">{shifted}</text>'
    )


def _square(x: float, y: float, side: float, color: str, opacity: float = 1.0, edge: str = "none") -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" rx="2" fill="{color}" '
        f'fill-opacity="{opacity:.2f}" stroke="{edge}" stroke-width="2"/>'
    )


def _arrow(x: int, y: int) -> str:
    return (
        f'<path d="M{x} {y} h26 m-8 -7 l8 7 l-8 7" fill="none" stroke="{_FAINT}" stroke-width="2" '
        'stroke-linecap="round" stroke-linejoin="round"/>'
    )


def _block(row: int, column: int) -> int:
    wide = SIDE // BLOCKS
    return row // wide * BLOCKS + column // wide


def _tokens(x: int, y: int) -> Iterator[str]:
    for row in range(SIDE):
        for column in range(SIDE):
            gap = 6 * (row // (SIDE // BLOCKS)), 6 * (column // (SIDE // BLOCKS))
            left, top = x + 22 * column + gap[1], y + 22 * row + gap[0]
            yield _square(left, top, 19, _COLORS[_block(row, column)])


def _summaries(x: int, y: int) -> Iterator[str]:
    for block in range(BLOCKS**2):
        left, top = x + 50 * (block % BLOCKS) - 4, y + 50 * (block // BLOCKS) + 10
        for part in range(4):
            yield _square(left + 11 * (part % 2), top + 11 * (part // 2), 10, _COLORS[block], 0.45 + part / 6)


def _matrix(x: int, y: int, mixing: torch.Tensor) -> Iterator[str]:
    for row in range(BLOCKS**2):
        for column in range(BLOCKS**2):
            share = float(mixing[row, column] / mixing.max())
            yield _square(x + 16 * column, y + 16 * row, 14, "#24478f", 0.06 + 0.94 * share)
    yield (
        f'<rect x="{x - 3}" y="{y + 16 * QUERY - 3}" width="148" height="20" rx="4" fill="none" '
        f'stroke="{_COLORS[QUERY]}" stroke-width="3"/>'
    )


def _mixture(x: int, y: int, mixing: torch.Tensor) -> Iterator[str]:
    heights = mixing[QUERY] / mixing[QUERY].max()
    for block in range(BLOCKS**2):
        tall = 96 * float(heights[block])
        yield (
            f'<rect x="{x + 15 * block}" y="{y + 100 - tall:.1f}" width="12" height="{tall:.1f}" rx="2" '
            f'fill="{_COLORS[block]}"/>'
        )
    yield f'<path d="M{x - 2} {y + 101} h138" stroke="{_FAINT}" stroke-width="1"/>'
    for part in range(4):
        yield _square(x + 24 + 22 * part, y + 120, 19, _COLORS[QUERY])
