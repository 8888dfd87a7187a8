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
from contextlib import suppress
from pathlib import Path

from docs.scripts.pages import ROOT
from docs.scripts.run_figures import stdlib
from tests.helpers.chromium import PROGRAM, Chromium

WIDTH, HEIGHT = 1200, 860
"""Of the window, in pixels."""
_WAIT = 120.0  # seconds, for TensorBoard to read the run and for the browser to draw it
_CURVES = """(function count(root) {
    let found = 0;
    for (const one of root.querySelectorAll("*")) {
        if (one.localName === "path" && (one.getAttribute("d") || "").length > 100) found += 1;
        if (one.shadowRoot) found += count(one.shadowRoot);
    }
    return found;
})(document)"""
"""Counts the curves of the page, most of which are in the shadows of TensorBoard's elements."""


def tensorboard(file: Path) -> None:
    """Draw the screen of which `mhla monitor stdlib` prints the address, in light.

    Raises:
        SystemExit: there is no Chromium.
        TimeoutError: the screen has no curves.
    """
    if PROGRAM is None:
        raise SystemExit(f"{file}: needs Debian's package chromium")
    run = stdlib()
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mhla_lightning", "monitor", str(run), "--port", str(port)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths.strip(os.pathsep)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdout is not None
        try:
            address = monitor.stdout.readline().split()[0]
            _wait_for_run(f"http://localhost:{port}/data/runs", run.name)
            file.write_bytes(photograph(address))
        finally:
            monitor.send_signal(signal.SIGTERM)


def _wait_for_run(address: str, name: str) -> None:
    """Wait until TensorBoard lists a run."""
    until = time.monotonic() + _WAIT
    while time.monotonic() < until:
        with suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
            if f'"{name}"' in answer.read().decode():
                return
        time.sleep(0.5)
    raise TimeoutError(f"{address} does not list {name}")


def photograph(address: str, curves: int = 3) -> bytes:
    """Return a window's content as a PNG, once its curves are drawn and nothing moves.

    Args:
        address: of the page.
        curves: at least that many.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Chromium(Path(profile))
        try:
            browser.open(address, WIDTH, HEIGHT)
            before, until = b"", time.monotonic() + _WAIT
            while time.monotonic() < until:
                time.sleep(2)
                picture = base64.b64decode(browser.send("Page.captureScreenshot")["data"])
                if picture == before and browser.run(_CURVES) >= curves:
                    return picture
                before = picture
        finally:
            browser.close()
    raise TimeoutError(f"{address} shows fewer than {curves} curves, or moves")
