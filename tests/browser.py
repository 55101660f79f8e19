"""A real browser without a window: Debian's Chromium, driven by selenium, that tells what it loads and complains of."""

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
_LOW_CONTRAST = """
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const luminance = (colour) => {
  const linear = (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const part = numbers(colour).slice(0, 3).map((value) => linear(value / 255));
  return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
};
const ground = (node) => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if ((numbers(colour)[3] ?? 1) === 1) return colour;
  }
  return "rgb(255, 255, 255)";
};
const found = [];
let looked = 0;
for (const node of document.querySelectorAll("body *")) {
  const text = [...node.childNodes].filter((child) => child.nodeType === 3).map((child) => child.data).join("").trim();
  if (!text || !node.checkVisibility({ visibilityProperty: true }) || node.tagName === "OPTION") continue;
  looked += 1;
  const [low, high] = [luminance(getComputedStyle(node).color), luminance(ground(node))].sort((a, b) => a - b);
  const contrast = (high + 0.05) / (low + 0.05);
  if (contrast < arguments[0]) found.push(`${text}: ${contrast.toFixed(2)}`);
}
return [looked, found];
"""


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


def low_contrast(driver: webdriver.Chrome, least: float) -> tuple[int, list[str]]:
    """How many visible texts there are, and those that stand out less than `least` against what is behind them."""
    looked, found = driver.execute_script(_LOW_CONTRAST, least)
    return looked, found
