"""The pages that polyvec makes, opened in a browser: they work by keyboard, on a phone and alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from typer.testing import CliRunner

from polyvec import Embedder
from polyvec.apps.cluster import write_map
from polyvec.cli import app
from polyvec.evaluation.report import html_report
from polyvec.evaluation.run import comparisons, plan, run_cells
from tests.browser.conftest import Browser
from tests.evaluation.test_run import SUITE, random_system
from tests.serving.process import start, stop


def wait(browser: Browser, sentence: str) -> None:
    """Return when the page's status begins with ``sentence``."""
    WebDriverWait(browser.driver, 20).until(
        lambda driver: driver.find_element(By.ID, "status").text.startswith(sentence)
    )


def cells(browser: Browser, table: str) -> list[list[str]]:
    rows = browser.driver.find_elements(By.CSS_SELECTOR, f"#{table} tr")
    return [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in rows]


def test_the_servers_page_compares_narrows_and_searches_by_keyboard(browser: Browser) -> None:
    process, address = start()
    try:
        browser.driver.get(address)
        browser.driver.find_element(By.ID, "task").send_keys(Keys.TAB, Keys.ENTER)
        wait(browser, "Compared 4 texts.")
        _, *whole = cells(browser, "matrix")
        assert [row[i] for i, row in enumerate(whole)] == ["1.00"] * 4
        assert float(whole[0][1]) > float(whole[0][2]) and float(whole[2][3]) > float(whole[1][3])

        slider = browser.driver.find_element(By.ID, "dimension")
        assert slider.get_attribute("aria-valuetext") == "384 of 384, 1536 bytes a text as float32"
        slider.send_keys(Keys.HOME)
        assert slider.get_attribute("aria-valuetext") == "32 of 384, 128 bytes a text as float32"
        _, *narrow = cells(browser, "matrix")
        assert narrow != whole and [row[i] for i, row in enumerate(narrow)] == ["1.00"] * 4
        _, *costs = cells(browser, "tradeoff")
        sizes, changes = zip(*costs, strict=True)
        assert list(sizes) == ["128", "256", "512", "1024", "1536"] and changes[-1] == "0.000" < changes[0]
        off_diagonal = ~np.eye(4, dtype=bool)
        change = np.abs(np.array(narrow, float) - np.array(whole, float))[off_diagonal].mean()
        assert abs(change - float(changes[0])) < 0.01

        browser.driver.find_element(By.ID, "query").send_keys(Keys.ENTER)
        wait(browser, "Best: “\u2068Hold the button for ten seconds to reset the router.\u2069”")
        assert browser.driver.find_element(By.CSS_SELECTOR, "mark.best").text.startswith("Hold the button")
        browser.driver.find_element(By.ID, "query").clear()
        browser.driver.find_element(By.ID, "query").send_keys(Keys.ENTER)
        wait(browser, "input[0] must not be empty")

        assert browser.nameless() == [] and browser.overflow() <= 0
        assert all(url.startswith(address) for url in browser.requests())
        assert [c for c in browser.complaints() if "422" not in c and "400" not in c] == []
    finally:
        stop(process)


def test_the_servers_page_shows_the_answer_to_the_last_question(browser: Browser) -> None:
    process, address = start()
    try:
        browser.driver.get(address)
        wait(browser, "")
        texts = browser.driver.find_element(By.ID, "texts")
        browser.driver.execute_script(
            """const real = fetch;
            let asked = 0;
            fetch = (...request) => {
              const answer = real(...request);
              return asked++ ? answer : answer.finally(() => new Promise((go) => { answerFirst = go; }));
            };"""
        )
        for lines in ("one\ntwo\nthree", "one\ntwo"):
            texts.clear()
            texts.send_keys(lines)
            browser.driver.find_element(By.CSS_SELECTOR, "#compare button").click()
        wait(browser, "Compared 2 texts.")
        browser.driver.execute_async_script("answerFirst(); setTimeout(arguments[0], 300)")
        wait(browser, "Compared 2 texts.")
        assert len(cells(browser, "matrix")) == 3
    finally:
        stop(process)


def test_the_servers_page_says_what_is_wrong_until_it_is_right(browser: Browser, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["key", "team", str(tmp_path / "keys.toml")])
    process, address = start("--api-keys", tmp_path / "keys.toml")
    try:
        browser.driver.get(address)
        wait(browser, "authorization must be 'Bearer KEY'")
        key = browser.driver.find_element(By.ID, "key")
        key.send_keys("schlüssel", Keys.TAB)
        wait(browser, "the API key must be letters of ASCII alone, got others")
        key.clear()
        key.send_keys(said.stdout, Keys.TAB)
        WebDriverWait(browser.driver, 20).until(lambda d: d.find_element(By.ID, "status").text == "")
        assert browser.driver.find_element(By.ID, "model").text == "polyvec-mini"
    finally:
        stop(process)
    browser.driver.find_element(By.CSS_SELECTOR, "#compare button").click()
    wait(browser, "the server must be reachable, got no answer")


def test_the_servers_page_finds_the_ends_of_sentences_in_any_script(browser: Browser) -> None:
    process, address = start()
    try:
        browser.driver.get(address)
        texts = [
            ["\n\n Pi is 3.14, e.g. at a.example/b?c=d. ", "Really?! ", "“Yes.”\n\n", "One ... "],
            ["今天天气很好。", "「我们去公园吧！」", "面包 👩‍👩‍👧 3.5 元"],
            ["هل تأخر القطار؟ ", "नहीं। ", "हाँ।"],
        ]
        for sentences in texts:
            found = browser.driver.execute_script("return sentencesOf(arguments[0])", "".join(sentences))
            assert found == sentences
        assert browser.driver.execute_script("return sentencesOf(' \\n ')") == []
    finally:
        stop(process)


def test_the_servers_page_lays_out_text_from_right_to_left_and_long_words(browser: Browser) -> None:
    process, address = start()
    try:
        browser.driver.get(address)
        text = browser.driver.find_element(By.ID, "long")
        text.clear()
        text.send_keys("الخبز يحتاج إلى الدقيق.")
        browser.driver.find_element(By.ID, "query").send_keys(Keys.ENTER)
        wait(browser, "Best: “\u2068الخبز يحتاج إلى الدقيق.\u2069” (")
        assert text.value_of_css_property("direction") == "rtl"
        ends = "const box = (name) => document.querySelector(name).getBoundingClientRect().right;"
        gap = browser.driver.execute_script(ends + "return box('#passages') - box('#passages mark')")
        assert abs(gap) < 2  # it begins at the right
        text.clear()
        text.send_keys("https://a.example/" + "path" * 99)
        browser.driver.find_element(By.ID, "query").send_keys(Keys.ENTER)
        wait(browser, "Best: “\u2068https")
        assert browser.overflow() <= 0
    finally:
        stop(process)


def test_the_report_of_an_evaluation_is_whole(browser: Browser, tmp_path: Path) -> None:
    systems = [random_system(), random_system("other", weights="w2", seed=1)]
    results = run_cells(plan(systems, [SUITE], dimensions=[8, 16], dtypes=["float32", "binary"]), tmp_path)
    page = tmp_path / "page.html"
    page.write_text(html_report(results, list(comparisons(results))))
    browser.driver.get(page.as_uri())
    pictures = browser.driver.find_elements(By.TAG_NAME, "svg")
    assert pictures and all(picture.size["height"] > 50 for picture in pictures)
    assert browser.driver.find_elements(By.TAG_NAME, "table")
    assert browser.requests() == {page.as_uri()}
    assert browser.complaints() == [] and browser.nameless() == [] and browser.overflow() <= 0


def test_a_map_of_clusters_is_read_by_pointer_and_by_keyboard(browser: Browser, tmp_path: Path, mini: Embedder) -> None:
    texts = ["The train is late.", "The bus is late.", "Bread needs flour.", "Cake needs flour.", "The tram is late."]
    clusters = np.array([0, 0, 1, 1, 0])
    page = tmp_path / "map.html"
    write_map(page, texts, mini.encode(texts, task="separation"), clusters, ["late", "flour"])
    browser.driver.get(page.as_uri())
    first, second = browser.driver.find_elements(By.CSS_SELECTOR, "nav button")
    assert (first.text, second.text) == ("late (3)", "flour (2)")
    second.send_keys(Keys.ENTER)
    items = [item.text for item in browser.driver.find_elements(By.CSS_SELECTOR, "nav li")]
    assert items == ["Bread needs flour.", "Cake needs flour."] and second.get_attribute("aria-pressed") == "true"
    second.send_keys(Keys.ENTER)
    assert not browser.driver.find_elements(By.CSS_SELECTOR, "nav li")

    x, y = browser.driver.execute_script("return place(points[3])")
    canvas = browser.driver.find_element(By.TAG_NAME, "canvas")
    width, height = canvas.size["width"], canvas.size["height"]
    ActionChains(browser.driver).move_to_element_with_offset(canvas, x - width / 2, y - height / 2).perform()
    assert browser.driver.find_element(By.ID, "text").text == "Cake needs flour."
    assert browser.requests() == {page.as_uri()}
    assert browser.complaints() == [] and browser.nameless() == [] and browser.overflow() <= 0
