"""Pages of the site that are no files in docs/: the reference, and Markdown from elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # mkdocs puts only this folder there

from docs.scripts import commands, notebooks, python_pages, recipe_keys  # noqa: E402
from docs.scripts.pages import MOVED, ROOT, examples, relinked  # noqa: E402
from docs.scripts.pages import notebooks as notebook_pages  # noqa: E402

GENERATED = {
    "reference/commands.md": commands.page,
    "reference/recipes.md": recipe_keys.list_page,
    "reference/recipe-keys.md": recipe_keys.page,
    "reference/python.md": python_pages.page,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and those that are elsewhere in the checkout."""
    pages = {page: make() for page, make in GENERATED.items()}
    for source, page in MOVED.items():
        pages[page] = relinked((ROOT / source).read_text(encoding="utf-8"), source, page)
    for source, page in examples().items():
        code = (ROOT / source).read_text(encoding="utf-8")
        pages[page] = f"# {source}\n\n```python\n{code}```\n"
    for source, page in notebook_pages().items():
        pages[page] = relinked(notebooks.page(ROOT / source), source, page)
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links of a page in docs/ to the pages of the site."""
    uri = page.file.src_uri
    return markdown if page.file.generated_by else relinked(markdown, f"docs/{uri}", uri)
