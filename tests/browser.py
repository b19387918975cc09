"""A real Chromium for tests, with onnxruntime-web beside it: `make browser` installs both.

Without them, tests that need them are skipped and say so; with CI=true they fail.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from advkd.stages.page.serve import address_of, make_server
from tests.conftest import ROOT

RUNTIME = ROOT / ".browser/node_modules/onnxruntime-web"
BINARIES = ("chromium", "chromedriver")
SECONDS = 60.0


def require_browser() -> Path:
    """The folder of onnxruntime-web; skips the test where it or Chromium is missing."""
    missing = [name for name in BINARIES if shutil.which(name) is None]
    if not RUNTIME.is_dir():
        missing.append("onnxruntime-web")
    if missing:
        said = f"no {', no '.join(missing)}: `make browser` installs what the page's tests need"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(said)
    return RUNTIME


@contextmanager
def open_browser() -> Iterator[Any]:
    """A headless Chromium that selenium drives; its console is kept for `errors`."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_script_timeout(SECONDS)
    try:
        yield driver
    finally:
        driver.quit()


def errors(driver: Any) -> list[str]:
    """Errors in the console since the last call; warnings are about the tests' own reading of canvases."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A page's address, served by the code that `advkd-page --serve` uses."""
    with make_server(folder, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield address_of(server)
        finally:
            server.shutdown()


def wait_until_shown(driver: Any, wanted: str) -> None:
    """Wait for a whole grid: `wanted` is "first seed/class", the class empty for the teacher's own."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, SECONDS, poll_frequency=0.05).until(
        lambda found: found.execute_script("return document.body.dataset.shown") == wanted,
        message=f"the grid {wanted} was not shown",
    )


def set_device(driver: Any, width: int, height: int, scheme: str = "light") -> None:
    """Size of the window, and the colour scheme that the user prefers."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme_feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_feature)
