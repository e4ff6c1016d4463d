"""`rnnzoo demo` in a browser: a question, two answers as they come, a stop, and nothing from outside this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
GUARD = 600  # seconds, against hanging for ever where something is broken

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
BROWSER = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,1100")


@pytest.fixture(scope="module")
def address(workshop, converted) -> Iterator[str]:
    pytest.importorskip("gradio")
    command = workshop.command("demo", str(converted), "--teacher", str(workshop.teacher), "--no-browser", "--json")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=workshop.environment
    )
    assert process.stdout is not None
    document = ""
    while not document.endswith("}\n}\n") and (line := process.stdout.readline()):
        document += line
    if not document:
        pytest.fail(process.communicate()[1])
    yield json.loads(document)["address"]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=GUARD)
    assert process.returncode == 130 and "Traceback" not in err, err


@pytest.fixture(scope="module")
def browser() -> Iterator:
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in BROWSER:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait(condition: Callable[[], object], seconds: float = GUARD) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the page did not get there"
        time.sleep(0.05)


class Page:
    """The demo's page in the browser."""

    def __init__(self, browser, address: str):
        self.browser = browser
        browser.get(address)
        wait(lambda: self.all("#student .zoo-panel") and self.all("#teacher .zoo-panel") and self.all("#run"))

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str):
        return self.all(selector)[0]

    def phase(self, role: str) -> str:
        script = "return document.querySelector(arguments[0]).dataset.phase"
        return self.browser.execute_script(script, f"#{role} .zoo-panel")

    def text(self, role: str) -> str:
        return self.browser.execute_script(
            "return document.querySelector(arguments[0]).textContent", f"#{role} .zoo-answer"
        )

    def figures(self, role: str) -> dict[str, str]:
        tiles = [tile.text.split("\n") for tile in self.all(f"#{role} .zoo-tile")]
        return {name: value for value, name in tiles}

    def ask(self, prompt: str, most: int) -> None:
        if not self.all("#most input"):  # what is folded in is not there
            self.one("#settings button").click()
            wait(lambda: self.all("#most input") and self.one("#most input").is_displayed())
        number = self.one("#most input[type=number]")
        self.fill(number, str(most))
        self.fill(self.one("#prompt textarea"), prompt)
        wait(lambda: self.one("#run").is_enabled())
        self.one("#run").click()

    def fill(self, field, text: str) -> None:
        field.clear()
        field.send_keys(text, "\t")

    def ended(self) -> bool:
        return {self.phase(role) for role in ("student", "teacher")} <= {"end", "length", "stopped"}


@pytest.fixture
def page(browser, address) -> Page:
    return Page(browser, address)


def test_a_question_is_answered_by_both_with_speed_and_memory(page, tmp_path):
    page.ask("The old painter opens the window", 40)
    wait(page.ended)
    for role in ("student", "teacher"):
        figures = page.figures(role)
        assert len(page.text(role)) > 5 and float(figures["tokens/s"]) > 0
        assert figures["tokens so far"] != "–"
    assert page.figures("student")["state in memory"].endswith("kB")
    assert len(page.all("#memory circle")) == 2
    assert page.one("#run").is_enabled() and not page.one("#stop").is_enabled()

    picture = Path(os.environ.get("RNNZOO_SCREENSHOT", tmp_path / "demo.png"))
    assert page.browser.save_screenshot(str(picture))
    image = pytest.importorskip("PIL.Image").open(picture).convert("RGB")
    colours = {colour for _, colour in image.getcolors(image.width * image.height)}
    # The accents of student and teacher, so that the style sheet has arrived.
    assert (0x0D, 0x94, 0x88) in colours and (0xB4, 0x53, 0x09) in colours


def test_text_comes_as_a_stream_and_stop_ends_it(page):
    page.ask("The old painter opens the window", 2000)
    lengths = []
    for _ in range(3):
        seen = len(page.text("student"))
        wait(lambda seen=seen: len(page.text("student")) > seen or page.ended())
        lengths.append(len(page.text("student")))
    assert lengths == sorted(set(lengths)) and not page.ended()
    page.one("#stop").click()
    wait(page.ended)
    assert "stopped" in (page.phase("student"), page.phase("teacher"))
    wait(lambda: page.one("#run").is_enabled())


def test_an_empty_prompt_is_said(page):
    wait(lambda: page.one("#run").is_enabled())
    page.one("#run").click()
    wait(lambda: "The prompt is empty" in page.one("body").text)


def test_nothing_is_loaded_from_outside(page):
    page.ask("![picture](https://example.org/x.png) <img src='https://example.org/y.png'>", 8)
    wait(page.ended)
    requests = []
    for entry in page.browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requests.append(message["params"]["request"]["url"])
    local = ("http://127.0.0.1:", "data:", "blob:")
    assert requests and all(url.startswith(local) for url in requests)
    assert not [entry for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]
