"""A real browser without a window: Debian's Chromium, driven by selenium, that tells what it loaded and complained of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_LIMIT_S = 60


def missing() -> str | None:
    """Why there can be no browser here, in words; None if there can."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if lacking:
        return f"no browser: {', '.join(lacking)} not found (Debian: apt-get install chromium chromium-driver)"
    return None


@contextmanager
def chromium(folder: Path) -> Iterator[webdriver.Chrome]:
    """A browser that ends with the context; its profile is in `folder`."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for option in (*_OPTIONS, f"--user-data-dir={folder}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.set_page_load_timeout(_LIMIT_S)
        yield driver
    finally:
        driver.quit()


def look_like(driver: webdriver.Chrome, *, width: int, height: int = 900, dark: bool = False) -> None:
    """Sets the size of the window and whether the system is dark; a narrow one is a telephone's."""
    screen = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def requested(driver: webdriver.Chrome) -> list[str]:
    """The addresses that were asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def complaints(driver: webdriver.Chrome) -> list[str]:
    """What the console was told since the last call: errors, warnings, refusals of the page's policy."""
    return [entry["message"] for entry in driver.get_log("browser")]
