"""A real headless browser for tests of pages: Debian's chromium, driven by selenium."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
)


def missing() -> str:
    """What is missing for a browser; empty if it is there."""
    programs = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    packages = [name for name in ("selenium",) if find_spec(name) is None]
    wanted = [*(f"the program {name} (Debian: chromium, chromium-driver)" for name in programs), *packages]
    return f"no browser: {' and '.join(wanted)} missing" if wanted else ""


def need_browser() -> None:
    """Skip a test where there is no browser; with `VLMPRUNE_BROWSER=required`, as in CI, let it fail."""
    if why := missing():
        (pytest.fail if os.environ.get("VLMPRUNE_BROWSER") == "required" else pytest.skip)(why)


class Page:
    """A page in the browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, width: int, scheme: str = "light", height: int = 900) -> None:
        """Open a file in a window of this width, for someone who prefers light or dark."""
        self.resize(width, height)
        self.prefer(scheme)
        self.driver.get(path.resolve().as_uri())

    def resize(self, width: int, height: int) -> None:
        """Make the window this large, in pixels of a page."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme: str, media: str = "") -> None:
        """Show the page for someone who prefers light or dark; `media` "print" shows it as it is printed."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})

    def run(self, script: str) -> Any:
        """What a function body in JavaScript returns."""
        return self.driver.execute_script(script)

    def errors(self) -> list[str]:
        """What the console has complained about since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """The page as a PNG file: all of it, or what the window shows."""
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole, **self._all(whole)})
        path.write_bytes(base64.b64decode(taken["data"]))

    def _all(self, whole: bool) -> dict[str, Any]:
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        return {"clip": {**size, "scale": 1}} if whole else {}


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with an empty profile."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(shutil.which("chromedriver"))))
    try:
        yield Page(driver)
    finally:
        driver.quit()
