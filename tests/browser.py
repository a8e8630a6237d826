"""A browser for tests of pages."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait


class Browser:
    """A headless Chromium."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
            options.add_argument(flag)
        options.binary_location = str(shutil.which("chromium"))
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))

    def open(self, path: Path, fragment: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get(f"{path.as_uri()}{fragment}")

    def all(self, css: str) -> list[WebElement]:
        return [each for each in self.driver.find_elements(By.CSS_SELECTOR, css) if each.is_displayed()]

    def one(self, css: str) -> WebElement:
        found = self.all(css)
        assert len(found) == 1, f"{len(found)} of {css}"
        return found[0]

    def table(self, css: str = "table") -> list[list[str]]:
        """Cells of the one table that is shown."""
        script = "return [...arguments[0].tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.innerText))"
        return self.driver.execute_script(script, self.one(css))

    def header(self, title: str) -> WebElement:
        return next(each for each in self.all("thead button") if each.text == title)

    def wait(self, title: str) -> None:
        """Until the heading of a view is shown and has the focus."""
        WebDriverWait(self.driver, 10).until(lambda driver: driver.switch_to.active_element.text == title)

    def errors(self) -> list[str]:
        return [each["message"] for each in self.driver.get_log("browser") if each["level"] != "INFO"]


def luminance(colour: str) -> float:
    """Of a colour as a browser says it, 0 to 1."""
    parts = [float(each) / 255 for each in re.findall(r"[\d.]+", colour)[:3]]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    """Of two colours as WCAG has it, 1 to 21; texts need 4.5."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
