"""A picture of TensorBoard, as `mhla monitor` shows it: a real browser in front of a real server."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from docs.scripts.pages import ROOT
from docs.scripts.run_figures import stdlib
from tests.helpers.chromium import PROGRAM, Chromium

WIDTH, HEIGHT = 1200, 860
"""Of the window, in pixels."""
_WAIT = 120.0  # seconds, for TensorBoard to read the run and for the browser to draw it
WALK = """function* walk(root) {
    for (const one of root.querySelectorAll("*")) {
        yield one;
        if (one.shadowRoot) yield* walk(one.shadowRoot);
    }
}"""
"""Walks over all elements of a page; most of TensorBoard's are in the shadows of others."""
_CURVES = f"""(() => {{ {WALK}
    return [...walk(document)].filter(
        one => one.localName === "path" && !one.closest("defs") && getComputedStyle(one).fill === "none"
            && (one.getAttribute("d") || "").length > 50
    ).length;
}})()"""


def tensorboard(file: Path) -> None:
    """Draw the screen of which `mhla monitor stdlib` prints the address, in light.

    Raises:
        SystemExit: there is no Chromium.
    """
    if PROGRAM is None:
        raise SystemExit(f"{file}: needs Debian's package chromium")
    with first_screen(stdlib()) as browser:
        file.write_bytes(picture(browser))


@contextmanager
def first_screen(run: Path) -> Iterator[Chromium]:
    """Give a browser with the screen that `mhla monitor RUN` names, once its curves are drawn.

    Args:
        run: its folder.

    Raises:
        TimeoutError: TensorBoard does not list the run, or draws no curves.
    """
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mhla_lightning", "monitor", str(run), "--port", str(port)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths.strip(os.pathsep)}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as monitor,
    ):
        assert monitor.stdout is not None
        browser = Chromium(Path(profile))
        try:
            address = monitor.stdout.readline().partition(" ")[0]
            assert address.startswith("http"), "mhla monitor has failed"
            _wait_for(lambda: _lists(f"http://localhost:{port}/data/runs", run.name), f"no run {run.name}")
            browser.open(address, WIDTH, HEIGHT)
            _wait_for(lambda: browser.run(_CURVES) >= 3, f"no curves in {address}")
            yield browser
        finally:
            browser.close()
            monitor.send_signal(signal.SIGTERM)


def _lists(address: str, name: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
        return f'"{name}"' in answer.read().decode()
    return False


def _wait_for(holds: Callable[[], bool], problem: str) -> None:
    until = time.monotonic() + _WAIT
    while not holds():
        if time.monotonic() > until:
            raise TimeoutError(problem)
        time.sleep(0.5)


def picture(browser: Chromium) -> bytes:
    """Return what the window shows as a PNG, once nothing moves."""
    before, now = b"", b" "
    while now != before:
        before = now
        time.sleep(2)
        now = base64.b64decode(browser.send("Page.captureScreenshot")["data"])
    return now
