# SPDX-License-Identifier: Apache-2.0
"""The chat page, driven in headless Chromium over a stand-in for the model."""

import json
import shutil

import pytest
from serving import FAKE, serving
from serving import until as until_slowly

from ktx_jax.resources import demo_model

selenium = pytest.importorskip("selenium")
from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
]  # fmt: skip


def until(condition):
    until_slowly(condition, seconds=30)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium with its chromedriver on this machine"),
]


@pytest.fixture(scope="module")
def server():
    with serving(FAKE, str(demo_model()), "--name", "tiny") as server:
        yield server.wait_ready()


@pytest.fixture
def page(server, tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,800"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.get("about:blank")
        driver.get_log("performance")  # what the browser's own first page asked for is not the page's
        driver.get(server.url)
        until(lambda: driver.find_element(By.ID, "model").text == "tiny")
        yield driver
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
        asked = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in asked if e["method"] == "Network.requestWillBeSent"]
        foreign = [url for url in urls if not url.startswith((server.url, "data:", "chrome:"))]
        assert urls
        assert foreign == []
    finally:
        driver.quit()


def named(page, name):
    """The visible controls of an accessible name; none if the page changes meanwhile."""
    found = page.find_elements(By.CSS_SELECTOR, "button, textarea, input")
    try:
        return [element for element in found if element.is_displayed() and element.accessible_name == name]
    except StaleElementReferenceException:
        return []


def say(page, text):
    page.switch_to.active_element.send_keys(text, Keys.ENTER)


def replies(page):
    return texts(page, "article.assistant .body")


def texts(page, selector):
    return page.execute_script("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector)


def speed(page):
    return "".join(texts(page, ".speed"))


def done(page):
    until(lambda: named(page, "Send"))


def test_a_conversation_by_keyboard(page, tmp_path):
    field = page.switch_to.active_element
    assert field.accessible_name == "Message"
    field.send_keys("say **bold** and `code`", Keys.SHIFT, Keys.ENTER, Keys.NULL, "<b>not bold</b>")
    assert replies(page) == []
    field.send_keys(Keys.ENTER)
    until(lambda: replies(page) == ["bold and code\n<b>not bold</b>"])
    done(page)
    body = page.find_element(By.CSS_SELECTOR, "article.assistant .body")
    assert [e.text for e in body.find_elements(By.TAG_NAME, "strong")] == ["bold"]
    assert [e.text for e in body.find_elements(By.TAG_NAME, "code")] == ["code"]
    assert not body.find_elements(By.TAG_NAME, "b")
    assert "tokens/s" in speed(page)
    assert page.switch_to.active_element.get_attribute("value") == ""
    say(page, "say\n```python\nprint(1)\n```".replace("\n", Keys.SHIFT + Keys.ENTER + Keys.NULL))
    until(lambda: page.find_elements(By.CSS_SELECTOR, "pre code"))
    done(page)
    assert page.find_element(By.CSS_SELECTOR, "pre code").text == "print(1)"
    assert named(page, "Copy")
    page.refresh()  # the conversation is kept
    until(lambda: len(replies(page)) == 2)
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ALT, "n")
    until(lambda: replies(page) == [])


def test_stop_and_regenerate(page, server):
    say(page, "endless")
    until(lambda: replies(page) and "w3" in replies(page)[0])
    assert named(page, "Stop")
    assert "tokens/s" in speed(page)
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    done(page)
    until(lambda: server.metric("ktx_batch_requests") == 0)
    assert "stopped" in speed(page)
    [again] = named(page, "Regenerate reply")
    again.click()
    until(lambda: named(page, "Stop"))
    named(page, "Stop")[0].click()
    done(page)
    assert len(replies(page)) == 1
    named(page, "New chat")[0].click()
    assert replies(page) == []


def test_settings_are_sent(page):
    named(page, "Settings")[0].click()
    named(page, "System prompt")[0].send_keys("say")
    named(page, "Longest reply")[0].send_keys("2")
    named(page, "Temperature")[0].send_keys("0.5")
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    until(lambda: not named(page, "System prompt"))
    page.find_element(By.ID, "prompt").click()
    say(page, "one two three four")
    until(lambda: speed(page))
    done(page)
    assert "cut at the limit" in speed(page)
    assert speed(page).count("2 tokens") == 1
    named(page, "Settings")[0].click()
    named(page, "Back to the defaults")[0].click()
    assert named(page, "Longest reply")[0].get_attribute("value") == ""


def test_errors_are_told(page):
    say(page, "full")
    until(lambda: page.find_elements(By.CSS_SELECTOR, "[role=alert]"))
    assert "wait already" in page.find_element(By.CSS_SELECTOR, "[role=alert]").text
    assert named(page, "Regenerate reply")
    page.get_log("browser")  # the browser reports the 429 as well


@pytest.mark.parametrize(("name", "width", "height"), [("desktop", 1280, 800), ("phone", 390, 844)])
def test_it_fits_screens_light_and_dark(page, tmp_path, name, width, height):
    shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": name == "phone"}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
    say(page, "say A list: [1, 2] " + "and a very long line of code " * 6)
    done(page)
    backgrounds = set()
    for dark in (False, True):
        button = named(page, "Dark mode")[0]
        if (button.get_attribute("aria-pressed") == "true") != dark:
            button.click()
        assert page.save_screenshot(str(tmp_path / f"{name}-{'dark' if dark else 'light'}.png"))
        backgrounds.add(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
        named(page, "Settings")[0].click()
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        for element in page.find_elements(By.CSS_SELECTOR, "dialog :is(button, textarea, input)"):
            if element.is_displayed():
                assert element.accessible_name, element.get_attribute("outerHTML")
                box = element.rect
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= width
        page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert len(backgrounds) == 2
