"""Check the built site: links and anchors inside it, and that its pages load nothing from a network.

python docs/scripts/check_links.py site
"""

from __future__ import annotations

import posixpath
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "source": "srcset", "iframe": "src", "video": "src"}
"""Tags whose attribute a browser fetches by itself; `link` is read below."""


@dataclass
class Page(HTMLParser):
    """The anchors and links of a page.

    Args:
        anchors: that a link may point to.
        links: addresses as written.
        loads: addresses that a browser fetches with the page.
    """

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag offers and what it asks for."""
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon"):
            self.loads.append(given.get("href", ""))
        if LOADED.get(tag) in given:
            self.loads.append(given[LOADED[tag]])


def problems(site: Path) -> Iterator[str]:
    """Yield a line for each link without a target, and for each file that comes from a network."""
    pages = {}
    for file in sorted(site.rglob("*.html")):
        page = pages[file.relative_to(site).as_posix()] = Page()
        page.feed(file.read_text(encoding="utf-8"))
    for name, page in pages.items():
        if name == "404.html":  # its links are absolute: it is shown at any address
            continue
        yield from (f"{name}: loads {address}" for address in page.loads if _is_outside(address))
        for address in [*page.links, *page.loads]:
            if not _is_outside(address) and not _has_target(site, pages, name, address):
                yield f"{name}: no target for {address}"


def _is_outside(address: str) -> bool:
    return bool(urlsplit(address).scheme or urlsplit(address).netloc)


def _has_target(site: Path, pages: dict[str, Page], name: str, address: str) -> bool:
    path, anchor = unquote(urlsplit(address).path), unquote(urlsplit(address).fragment)
    target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
    if (site / target).is_dir():
        target = posixpath.normpath(posixpath.join(target, "index.html"))
    if target not in pages:
        return (site / target).is_file()
    return not anchor or anchor in pages[target].anchors


def main() -> int:
    """Print every problem of the site that is named; return the exit code."""
    found = list(problems(Path(sys.argv[1])))
    sys.stdout.writelines(f"{line}\n" for line in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
