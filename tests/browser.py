"""A real browser: headless Chromium, driven by Selenium."""

from __future__ import annotations

import shutil
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from selenium.webdriver.chrome.webdriver import WebDriver

_CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (_CHROMIUM and _DRIVER), reason="no Chromium and chromedriver here: apt-get install chromium chromium-driver"
)


@contextmanager
def page(path: Path, width: int = 1300, height: int = 1600) -> Iterator[WebDriver]:
    """Open a page from the disk and wait until it has drawn itself."""
    options = Options()
    options.binary_location = str(_CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(_DRIVER)))
    try:
        driver.set_window_size(width, height)
        driver.get(path.as_uri())
        deadline = time.monotonic() + 60
        while driver.execute_script("return document.documentElement.dataset.drawn") != "yes":
            assert time.monotonic() < deadline, driver.get_log("browser")  # type: ignore[no-untyped-call]
            time.sleep(0.05)
        yield driver
    finally:
        driver.quit()
