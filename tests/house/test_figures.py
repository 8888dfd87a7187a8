"""`make figures`: what draws the pictures of README and docs, without the trainings."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from docs.scripts import screens
from docs.scripts.drawings import code_drawing
from docs.scripts.run_figures import recorded_bits, results, side_by_side
from mhla_lightning.inference.diffusion.video_files import write_mp4
from tests.helpers.chromium import PROGRAM
from tests.helpers.run_folders import write_run
from tests.house.source import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def test_generated_code_is_drawn_line_by_line() -> None:
    lines = ["def read(self):", '    if a < b and c > "&":', "\treturn ''", *["x" * 100] * 20]
    drawn = ElementTree.fromstring(code_drawing("\n".join(lines)))
    texts = [one.text for one in drawn.iter(f"{SVG}text")]
    assert texts[:2] == lines[:2]
    assert len(texts) == 16
    assert max(len(text or "") for text in texts) == 84


def test_results_are_those_of_the_page(tmp_path: Path) -> None:
    numbers = recorded_bits((ROOT / "docs/results.md").read_text())
    assert numbers == {"linear": (2.51, 3.28), "mhla": (1.94, 1.92), "softmax": (1.94, 2.59)}
    results(tmp_path / "results.png")
    with Image.open(tmp_path / "results.png") as image:
        assert image.width == 1040


def test_clips_are_one_moving_picture(tmp_path: Path) -> None:
    for number in range(3):
        frames = np.full((5, 32, 32, 3), 80 * number, np.uint8)
        frames[:, :, :, 0] += (np.arange(5, dtype=np.uint8) * 10)[:, None, None]
        write_mp4(tmp_path / f"{number}.mp4", frames, 8.0)
    side_by_side(tmp_path, tmp_path / "clips.webp")
    with Image.open(tmp_path / "clips.webp") as image:
        assert (image.size, image.n_frames) == ((3 * 160, 160), 5)  # type: ignore[attr-defined]
        image.seek(4)
        drawn = np.asarray(image.convert("RGB"), dtype=int)
    for number in range(3):
        red, green, blue = drawn[80, 80 + 160 * number]
        assert (red, green, blue) == pytest.approx((80 * number + 40, 80 * number, 80 * number), abs=16)


@pytest.mark.slow  # starts TensorBoard and a browser
@pytest.mark.skipif(PROGRAM is None, reason="needs Debian's package chromium")
def test_monitor_opens_with_loss_and_validation_of_a_named_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "digits", steps=24)
    with screens.first_screen(run.path) as browser:
        found = browser.run(
            f"""(() => {{ {screens.WALK}
                const shown = [...walk(document)].filter(one => one.getClientRects().length);
                const texts = name => shown.filter(one => one.matches(name))
                    .map(one => one.textContent.trim());
                return {{charts: texts(".heading-label"), runs: texts(".run-row, .item-label-container")}};
            }})()"""
        )
        drawn = screens.picture(browser)
        assert browser.errors == []
    assert found["charts"][:2] == ["training", "validation (val_ema: averaged weights)"]
    assert found["runs"] == ["digits"]
    with Image.open(io.BytesIO(drawn)) as image:
        assert image.size == (screens.WIDTH, screens.HEIGHT)
