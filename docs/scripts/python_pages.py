"""The page of the Python API: what `mhla_lightning.__all__` names, from the docstrings."""

from __future__ import annotations

import mhla_lightning

TITLES = {
    "api": "Verbs",
    "attention": "Attention",
    "backbones": "Backbones",
    "tasks": "Tasks",
    "data": "Data modules",
    "callbacks": "Callbacks",
    "errors": "Errors",
}
"""Room -> title of its names; rooms without one come last, under their own name."""

MORE = {
    "attention": (
        "mhla_lightning.attention.CausalSelfAttention",
        "mhla_lightning.attention.mhla.MHLA",
        "mhla_lightning.attention.mhla.CausalMHLA",
    ),
    "errors": ("mhla_lightning.errors.DataError", "mhla_lightning.errors.DiskError"),
}
"""Room -> dotted names that the package's own list does not hold."""


def page() -> str:
    """Return the page in Markdown, with a directive of mkdocstrings a name."""
    rooms = mhla_lightning._ROOMS
    order = [room for room in TITLES if room in rooms] + [room for room in rooms if room not in TITLES]
    parts = [
        "# Python\n",
        "`import mhla_lightning as mhla` gives every name of this page, unless its heading says otherwise.",
        "Each is imported at its first use.\n",
    ]
    for room in order:
        parts.append(f"## {TITLES.get(room, room)}\n")
        parts += [_directive(f"mhla_lightning.{room}.{name}", f"mhla.{name}") for name in rooms[room]]
        parts += [_directive(name, name) for name in MORE.get(room, ())]
    return "\n".join(parts)


def _directive(name: str, heading: str) -> str:
    return f"::: {name}\n    options:\n      heading: {heading}\n      heading_level: 3\n"
