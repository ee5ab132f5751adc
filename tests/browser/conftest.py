"""A headless Chromium through WebDriver. Without one the tests are skipped, but not in continuous integration."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from selenium import webdriver


class Browser:
    """``driver`` at a page, with what the page asked for and complained about."""

    def __init__(self, *, width: int, dark: bool) -> None:
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},900"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        # A window of Chromium is at least 500 pixels wide, a phone is not.
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})

    def requests(self) -> set[str]:
        """Return the addresses that were asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}

    def complaints(self) -> list[str]:
        """Return the warnings and errors on the console since the last call."""
        log = self.driver.get_log("browser")
        return [entry["message"] for entry in log if entry["level"] in ("WARNING", "SEVERE")]

    def nameless(self) -> list[str]:
        """Return the roles of the controls that a screen reader could not name."""
        tree: dict[str, Any] = self.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})
        controls = ("textbox", "button", "combobox", "slider", "searchbox", "img", "table", "region", "navigation")
        roles = [(node["role"]["value"], node.get("name", {}).get("value")) for node in tree["nodes"] if "role" in node]
        return [role for role, name in roles if role in controls and not name]

    def overflow(self) -> int:
        """Return by how many pixels the page is wider than the window."""
        # Not ``innerWidth``: on a phone it grows with the page.
        width = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
        return int(self.driver.execute_script(width))


@pytest.fixture(params=[(1200, False), (360, True)], ids=["desktop", "phone, dark"])
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    if shutil.which("chromedriver") is None:
        assert "CI" not in os.environ, "chromium and chromium-driver must be installed where CI is set"
        pytest.skip("chromium and chromium-driver are not installed")
    width, dark = request.param
    browser = Browser(width=width, dark=dark)
    yield browser
    browser.driver.quit()
