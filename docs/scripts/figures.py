"""Draw docs/images/: the drawing of MHLA, and figures of runs; train the runs that are missing.

make figures
python -m docs.scripts.figures --only mhla mixing
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from docs.scripts.drawings import code_drawing, mhla_drawing
from docs.scripts.pages import ROOT
from docs.scripts.run_figures import clips, digits, mixing, results, written_code
from docs.scripts.screens import tensorboard

IMAGES = ROOT / "docs" / "images"

FIGURES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "mhla": ("mhla.svg", lambda file: file.write_text(mhla_drawing(), encoding="utf-8")),
    "results": ("results.png", results),
    "mixing": ("mixing.png", mixing),
    "code": ("code.svg", lambda file: file.write_text(code_drawing(written_code()), encoding="utf-8")),
    "digits": ("digits.png", digits),
    "clips": ("clips.webp", clips),
    "tensorboard": ("tensorboard.png", tensorboard),  # last: it needs a browser
}
"""Name -> its file, and what draws it."""


def main() -> None:
    """Draw all figures, or those that are named."""
    parser = argparse.ArgumentParser(description="Draw the figures of README and docs.")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help="these alone")
    IMAGES.mkdir(exist_ok=True)
    for name in parser.parse_args().only:
        file, draw = FIGURES[name]
        draw(IMAGES / file)
        sys.stdout.write(f"{IMAGES / file}: {(IMAGES / file).stat().st_size / 1024:.0f} KiB\n")


if __name__ == "__main__":
    main()
