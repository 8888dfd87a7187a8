"""Markdown from elsewhere in the checkout as pages of the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

MOVED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "mhla_lightning/data/README.md": "rooms/data.md",
    "mhla_lightning/strategies/README.md": "rooms/strategies.md",
    "cluster/README.md": "rooms/cluster.md",
}
"""File of the checkout -> page of the site."""


def examples() -> dict[str, str]:
    """Return the examples of the checkout -> their pages."""
    files = sorted(path.relative_to(ROOT) for path in (ROOT / "examples").rglob("*.py"))
    return {file.as_posix(): file.with_suffix(".md").as_posix() for file in files}


def notebooks() -> dict[str, str]:
    """Return the notebooks of the checkout -> their pages."""
    files = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
    return {file.relative_to(ROOT).as_posix(): f"notebooks/{file.stem}.md" for file in files}


def relinked(text: str, source: str, page: str) -> str:
    """Return a page whose links to files of the checkout are links to pages of the site.

    Args:
        text: of the page, in Markdown.
        source: its file in the checkout, which its links are relative to.
        page: its place in the site.
    """
    places = MOVED | examples() | notebooks()

    def place(target: str) -> str | None:
        path, mark, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return None
        found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        there = places.get(found, found.removeprefix("docs/") if found.startswith("docs/") else None)
        if there is None:
            return None  # mkdocs names it as a link without a target
        return posixpath.relpath(there, posixpath.dirname(page) or ".") + mark + anchor

    def link(match: re.Match[str]) -> str:
        return f"{match[1]}{place(match[2]) or match[2]}{match[3]}"

    return re.sub(r"(\]\(|(?:src|srcset)=\")([^)\"\s]+)(\)|\")", link, text)
