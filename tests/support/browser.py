"""A real headless browser: pages at a size and in a colour scheme, what its console says, what axe-core finds.

Chromium and its driver come from the system (Debian: `chromium`, `chromium-driver`), axe-core from npm; `make browser`
says how. Neither is part of the package.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AXE = Path(os.environ.get("FEDPEFT_AXE", ".venv/axe/package/axe.min.js"))
SHOTS = os.environ.get("FEDPEFT_SHOTS")  # a folder for pictures of all pages, for people to look at
WIDE, NARROW = 1400, 420  # CSS pixels
HEIGHT = 900
PAGES = [(width, scheme) for width in (WIDE, NARROW) for scheme in ("light", "dark")]
# What axe calls best practice is asked for too: headings in order, all content in landmarks.
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


class Browser:
    """One window."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.axe = AXE.read_text(encoding="utf-8")

    def open(self, url: str, width: int = WIDE, scheme: str = "light", script: bool = True) -> None:
        """Load a page at a width; what the console said of the one before is forgotten."""
        command = self.driver.execute_cdp_cmd
        command("Emulation.setScriptExecutionDisabled", {"value": not script})
        metrics = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        command("Emulation.setDeviceMetricsOverride", metrics)
        command(
            "Emulation.setEmulatedMedia",
            {
                "features": [
                    {"name": "prefers-color-scheme", "value": scheme},
                    {"name": "prefers-reduced-motion", "value": "reduce"},
                ]
            },
        )
        self.console()
        self.driver.get(url)

    def run(self, script: str, *values: Any) -> Any:
        """What a function body of JavaScript returns."""
        return self.driver.execute_script(script, *values)

    def console(self) -> list[str]:
        """Errors and warnings since the last look, those of the content policy and of missing files too."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]

    def violations(self) -> list[str]:
        """What axe finds wrong, a line for each element."""
        self.run("if (!window.axe) { " + self.axe + "\n}")
        asked = json.dumps({"runOnly": {"type": "tag", "values": RULES}, "resultTypes": ["violations"]})
        found = self.driver.execute_async_script(
            f"axe.run(document, {asked}).then(arguments[0], error => arguments[0]({{failed: String(error)}}))"
        )
        assert "violations" in found, found
        return [
            f"{rule['id']}: {node['target']} {node['html'][:160]} {node.get('failureSummary', '')[:300]}"
            for rule in found["violations"]
            for node in rule["nodes"]
        ]

    def overflow(self) -> list[str]:
        """Elements that reach beyond the right edge though nothing around them scrolls; empty where none does."""
        return list(
            self.run(
                """
                const width = document.documentElement.clientWidth, out = [];
                if (document.documentElement.scrollWidth > width) out.push(
                    `the page is ${document.documentElement.scrollWidth} wide, the window ${width}`);
                for (const item of document.body.querySelectorAll("*")) {
                    if (item.closest(".wide, pre, svg") || !item.getClientRects().length) continue;
                    const box = item.getBoundingClientRect();
                    if (box.right > width + 1) out.push(`${item.tagName} ${item.className} to ${box.right}: ` +
                        item.textContent.slice(0, 80));
                }
                return out.slice(0, 10);
                """
            )
        )

    def wait_for(self, text: str, seconds: float = 20) -> None:
        """Until the page says so."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds).until(lambda _: text in self.run("return document.body.innerText"))

    def press(self, key: str, times: int = 1) -> None:
        """Press a key of selenium's `Keys` by its name."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        ActionChains(self.driver).send_keys(*[getattr(Keys, key)] * times).perform()

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(text).perform()

    def tab_stops(self) -> list[str]:
        """What has the focus, one Tab after the other, once around the page."""
        self.run("document.activeElement.blur(); window.scrollTo(0, 0)")
        stops: list[str] = []
        for _ in range(400):
            self.press("TAB")
            stop = self.run(
                """
                const item = document.activeElement;
                if (!item || item === document.body) return "";
                const style = getComputedStyle(item);
                const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
                return item.tagName + (item.id ? "#" + item.id : "") + (seen ? "" : " WITHOUT OUTLINE");
                """
            )
            if not stop:
                break
            stops.append(stop)
        return stops

    def shoot(self, name: str) -> None:
        """A picture of the whole page into `FEDPEFT_SHOTS`, where that is set."""
        if SHOTS:
            height = min(6000, self.run("return document.documentElement.scrollHeight"))
            width = self.run("return window.innerWidth")
            clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            asked = {"format": "png", "captureBeyondViewport": True, "clip": clip}
            shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", asked)
            path = Path(SHOTS) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(shot["data"]))

    def pixels_of_first_image(self) -> tuple[int, int]:
        """Of the first image as shown: the red of its corner, and that of its ink, which lies farthest from it."""
        from io import BytesIO

        import numpy as np
        from PIL import Image

        (first, *_) = self.driver.find_elements("tag name", "img")
        red = np.asarray(Image.open(BytesIO(first.screenshot_as_png)).convert("RGB"))[..., 0].astype(int)
        corner = red[0, 0]
        grey = red[:, : red.shape[1] // 5]  # the axis' names: letters in ink, no data
        return int(corner), int(grey.flat[np.abs(grey - corner).argmax()])

    def problems(self) -> list[str]:
        """All that is wrong with the page as it stands."""
        return [*self.console(), *self.violations(), *self.overflow()]


@contextmanager
def opened() -> Iterator[Browser]:
    """The system's Chromium, headless.

    Raises:
        AssertionError: the browser, its driver or axe-core is missing; says where it comes from.
    """
    from selenium import webdriver

    chromium, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and driver_path, "apt-get install chromium chromium-driver"
    assert AXE.is_file(), f"{AXE}: `make browser` fetches it, or set FEDPEFT_AXE"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    driver.set_script_timeout(120)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
