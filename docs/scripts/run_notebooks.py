"""Run the notebooks of examples/, record their outputs for the site, and strip the files.

make notebooks
python -m docs.scripts.run_notebooks --only 1_mhla_from_its_equations
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from docs.scripts.notebooks import RECORDS, SOURCES, digest

LIMIT = 1800  # seconds of a cell, on a busy machine
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""Of a notebook: the same on every machine."""
_COLORS = 128  # of a picture, which a quarter of the bytes then holds


def strip(notebook: Path) -> None:
    """Remove from a notebook file what Jupyter adds: outputs, counts, and names of a machine."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    content["metadata"] = METADATA
    for cell in content["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell["execution_count"], cell["outputs"] = None, []
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def executed(notebook: Path) -> Any:
    """Run a notebook in a fresh kernel and an empty folder, and return it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    found = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # Sockets in the folder: a port could be read by others on this machine.
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=str(Path(folder, "kernel")))
        place = {"metadata": {"path": folder}}
        client = NotebookClient(found, km=kernel, timeout=LIMIT, startup_timeout=LIMIT, resources=place)
        return client.execute(cleanup_kc=True)  # else the kernel of a given manager runs on


def printed(cell: Any) -> str:
    """Return what a cell printed, and the value of its last line."""
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            texts.append(output.text)
        elif output.output_type == "execute_result":
            texts.append(output.data["text/plain"] + "\n")
    return "".join(texts).rstrip("\n")


def pictures(cell: Any) -> list[bytes]:
    """Return the PNG files that a cell drew."""
    return [
        base64.b64decode(output.data["image/png"])
        for output in cell.outputs
        if output.output_type in ("display_data", "execute_result") and "image/png" in output.data
    ]


def write_record(notebook: Path, run: Any) -> None:
    """Write the outputs of a run beside those of the other notebooks.

    Args:
        notebook: the file.
        run: as `executed` returns it.
    """
    for old in RECORDS.glob(f"{notebook.stem}-*.png"):
        old.unlink()
    found: list[dict[str, Any]] = []
    for cell in run.cells:
        if cell.cell_type != "code":
            continue
        names = []
        for number, picture in enumerate(pictures(cell)):
            names.append(f"{notebook.stem}-{len(found):02d}-{number}.png")
            drawn = Image.open(io.BytesIO(picture)).convert("RGB")
            drawn.quantize(_COLORS).save(RECORDS / names[-1], optimize=True)
        found.append({"code": digest(cell.source), "text": printed(cell), "pictures": names})
    content = {"format": 1, "cells": found}
    file = RECORDS / f"{notebook.stem}.json"
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Run all notebooks, or those that are named."""
    files = {file.stem: file for file in sorted(SOURCES.glob("*.ipynb"))}
    parser = argparse.ArgumentParser(description="Run the notebooks and record their outputs.")
    parser.add_argument("--only", nargs="+", choices=files, default=list(files), help="these alone")
    RECORDS.mkdir(exist_ok=True)
    for name in parser.parse_args().only:
        strip(files[name])
        start = time.perf_counter()
        write_record(files[name], executed(files[name]))
        sys.stdout.write(f"{name}: {time.perf_counter() - start:.0f} s\n")


if __name__ == "__main__":
    main()
