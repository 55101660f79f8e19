"""The page of an inspection in a real browser: by mouse and keyboard, light and dark, on a desk and on a telephone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from pipeline.face.inspection import Inspection, ReadChunk, SeenToken
from pipeline.face.page import render
from tests.browser import chromium, complaints, look_like, low_contrast, missing, requested
from tests.made_up_inspection import inspection_of, made_up_inspection

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

READABLE = 4.5  # WCAG 2.2, level AA, text
MANY_TABS = 12  # more than there are stops before the tokens
HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=//127.0.0.1/x onerror=window.hacked=1>",
    "<!--<script>",
    "javascript:window.hacked=1//'\"`${window.hacked=1}",
    "x" * 300,
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


class Page:
    """An inspection in the browser."""

    def __init__(self, browser: webdriver.Chrome, file: Path) -> None:
        self.browser, self.file = browser, file

    def show(self, inspection: Inspection, *, width: int = 1100, dark: bool = False, fragment: str = "") -> Page:
        self.file.write_text(render(inspection), encoding="utf-8")
        look_like(self.browser, width=width, dark=dark)
        self.browser.get("about:blank")
        requested(self.browser)
        complaints(self.browser)
        self.browser.get(self.file.as_uri() + fragment)
        return self

    def find(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def press(self, *keys: str) -> None:
        ActionChains(self.browser).send_keys(*keys).perform()

    @property
    def tokens(self) -> list[WebElement]:
        return self.all(".token")

    @property
    def focused(self) -> WebElement:
        return self.browser.switch_to.active_element

    def focused_token(self) -> int:
        return int(
            self.browser.execute_script(
                "return [...document.querySelectorAll('.token')].indexOf(document.activeElement)"
            )
        )

    def rows(self) -> list[list[str]]:
        return [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in self.all("#chunks tbody tr")]

    def widths(self) -> tuple[int, int]:
        wide, seen = self.browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        return int(wide), int(seen)


@pytest.fixture
def page(browser: webdriver.Chrome, tmp_path: Path) -> Page:
    return Page(browser, tmp_path / "page.html")


@pytest.fixture(autouse=True)
def nothing_loaded_and_no_complaint(page: Page) -> Iterator[None]:
    yield
    assert set(requested(page.browser)) == {page.file.as_uri()}
    assert complaints(page.browser) == []


def two_tokens() -> Inspection:
    chunks = [
        ReadChunk(" red hen", "farm.txt", 1204, -0.5, 0.0625, 12, (0, 3)),
        ReadChunk("a mill\nby", "mill.txt", 310, 11.25, 0.375, 18, (1,)),
        ReadChunk("the corn", "farm.txt", 1100, 9.0, 0.125, 12, (2, 4, 5)),
    ]
    return inspection_of([SeenToken("The", None, None, []), SeenToken(" mill", 0.5, 3.0, chunks, left_out=1445)])


def test_a_click_shows_what_a_token_read(page: Page) -> None:
    page.show(two_tokens())
    assert page.find("#hint").is_displayed() and not page.find("#opened").is_displayed()
    page.tokens[1].click()
    assert page.find("#panel-title").text == "Token 2: “·mill”"
    assert page.find("#losses").text.split("\n") == [
        "Loss, nats", "3.00 → 0.50", "Change", "−2.50", "Probability", "5.0 % → 61 %",
    ]  # fmt: skip
    assert page.rows() == [
        ["38 %", "a mill↵\nby", "mill.txt", "310", "18", "1", "11.25"],
        ["13 %", "the corn", "farm.txt", "1,100", "12", "2, 4, 5", "9.00"],
        ["6.3 %", "·red hen", "farm.txt", "1,204", "12", "0, 3", "−0.50"],
    ]
    assert page.find("#count").text == "3 chunks; 1,445 with smaller shares are left out"


def test_chunks_are_filtered_by_layer_and_the_filter_stays(page: Page) -> None:
    page.show(two_tokens(), fragment="#token-2")
    layers = Select(page.find("#layer"))
    assert [option.text for option in layers.options] == ["all", "12: 2 chunks, 19 %", "18: 1 chunk, 38 %"]
    layers.select_by_value("12")
    assert [row[1] for row in page.rows()] == ["the corn", "·red hen"]
    page.find("#previous").click()
    assert page.find("#count").text == "It read nothing from memory."
    assert not page.find("#chunks").is_displayed()
    assert page.focused == page.find("#panel-title")  # the button is gone: there is no token before
    page.find("#next").click()
    assert page.focused == page.find("#panel-title")
    assert len(page.rows()) == 3


def test_the_keyboard_does_what_the_mouse_does(page: Page) -> None:
    page.show(made_up_inspection())
    for _ in range(MANY_TABS):
        page.press(Keys.TAB)
        if page.focused_token() >= 0:
            break
    assert page.focused_token() == 0
    page.press(Keys.ARROW_LEFT)
    assert page.focused_token() == 0
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.focused_token() == 2
    above = page.focused.rect["y"]
    page.press(Keys.ARROW_DOWN)
    below = page.focused_token()
    assert below > 2 and page.focused.rect["y"] > above
    assert page.focused.rect["y"] == min(token.rect["y"] for token in page.tokens if token.rect["y"] > above)
    page.press(Keys.ARROW_UP)
    assert page.focused.rect["y"] == above
    page.press(Keys.END)
    assert page.focused_token() == len(page.tokens) - 1
    page.press(Keys.HOME, Keys.ARROW_RIGHT)
    for opening in (Keys.ENTER, Keys.SPACE):
        assert page.focused.value_of_css_property("outline-style") == "solid"
        page.press(opening)
        assert page.focused == page.find("#panel-title") and page.find("#opened").is_displayed()
        page.press(Keys.ESCAPE)
        assert page.focused_token() == 1 and not page.find("#opened").is_displayed()
    page.press(Keys.SHIFT + Keys.TAB + Keys.SHIFT)
    assert page.focused_token() < 0  # one stop for all tokens


def test_next_and_close_are_reached_from_an_opened_token(page: Page) -> None:
    page.show(made_up_inspection(), fragment="#token-5")
    page.tokens[4].click()
    page.press(Keys.TAB, Keys.TAB)
    assert page.focused == page.find("#next")
    page.press(Keys.ENTER, Keys.SPACE)
    assert page.find("#panel-title").text.startswith("Token 7:") and page.focused == page.find("#next")
    assert [token.get_attribute("aria-current") for token in page.tokens[4:8]] == [None, None, "true", None]
    page.press(Keys.TAB, Keys.ENTER)
    assert page.focused_token() == 6


def test_what_memory_did_is_told_in_words_colours_and_lines(page: Page) -> None:
    tokens = [SeenToken(" t", after, 3.0, []) for after in (0.5, 1.75, 2.25, 2.75, 2.95, 3.25, 3.75, 4.5, 6.0)]
    page.show(inspection_of(tokens))
    kinds = ["helped4", "helped3", "helped2", "helped1", "same", "hurt1", "hurt2", "hurt3", "hurt4"]
    assert [str(token.get_attribute("class")).split()[1] for token in page.tokens] == kinds
    assert page.tokens[0].accessible_name == "“·t”, −2.50 nats, memory helped"
    assert page.tokens[4].accessible_name == "“·t”, −0.05 nats, no change"
    assert page.tokens[8].accessible_name == "“·t”, +3.00 nats, memory hurt"
    lines = [token.value_of_css_property("border-bottom-style") for token in page.tokens]
    assert lines == ["solid"] * 5 + ["dashed"] * 4
    page.find("#numbers").click()
    written = "return getComputedStyle(arguments[0], '::after').content"
    assert page.browser.execute_script(written, page.tokens[0]) == '"−2.5"'


def test_the_head_of_the_page_sums_up(page: Page) -> None:
    inspection = inspection_of(
        [SeenToken("A", None, None, []), SeenToken(" b", 1.0, 2.0, []), SeenToken(" c", 2.0, 1.5, [])],
        perplexity_with=15.0,
        perplexity_without=20.0,
    )
    page.show(inspection)
    assert page.find("#figures").text.split("\n") == [
        "Perplexity without → with memory", "20.0 → 15.0", "Change", "−25 %",
        "Tokens helped", "1 of 2", "Tokens hurt", "1",
    ]  # fmt: skip
    assert page.find("summary").text == "3 remembered documents, 7,382 tokens"
    page.find("#extremes button").click()
    assert page.find("#panel-title").text == "Token 2: “·b”"


def test_gates_are_written_with_numbers(page: Page) -> None:
    inspection = made_up_inspection()
    page.show(inspection)
    rows = [
        [cell.text.split("\n") for cell in row.find_elements(By.TAG_NAME, "td")] for row in page.all("#gates tbody tr")
    ]
    assert [[float(weight) for weight, _ in row] for row in rows] == [
        [pytest.approx(weight, abs=0.0051) for weight in gates.weights] for gates in inspection.gates
    ]
    assert [[float(learnt.replace("−", "-").replace("±", "")) for _, learnt in row] for row in rows] == [
        [pytest.approx(learnt, abs=0.0051) for learnt in gates.learnt] for gates in inspection.gates
    ]


def test_white_space_and_what_cannot_be_seen_is_shown(page: Page) -> None:
    texts = ["Go", "\n\n", "  ", "\t", " on", "", "\u202eevil", " \u062f\u200c\u0648"]
    page.show(inspection_of([SeenToken(text, 1.0, 1.0, []) for text in texts]))
    assert [token.text for token in page.tokens] == [
        "Go",
        "↵↵",
        "··",
        "⇥",
        "on",
        "∅",
        "⟨202E⟩evil",
        "\u062f\u200c\u0648",
    ]
    first, _, third, *_ = (token.rect["y"] for token in page.tokens)
    assert third > first
    assert len(page.all("#tokens br")) == 2


@pytest.mark.parametrize("width", [360, 1100])
def test_hostile_text_is_shown_as_text(page: Page, width: int) -> None:
    tokens = [SeenToken(text, 0.5, 2.0, [ReadChunk(text, text, 5, 1.0, 0.5, 1, (0,))]) for text in HOSTILE]
    for place, text in enumerate(HOSTILE):
        page.show(inspection_of(tokens, title=text, document=text), width=width, fragment=f"#token-{place + 1}")
        assert page.browser.title == text
        assert page.find("h1").text == text
        assert [token.text for token in page.tokens] == list(HOSTILE)
        assert page.rows()[0][1:3] == [text, text]
        assert page.browser.execute_script("return typeof window.hacked") == "undefined"
        wide, window = page.widths()
        assert wide <= window


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1100])
def test_all_text_has_contrast_and_fits_the_window(page: Page, width: int, dark: bool) -> None:
    page.show(made_up_inspection(), width=width, dark=dark, fragment="#token-47")
    looked, poor = low_contrast(page.browser, READABLE)
    assert looked > len(page.tokens)
    assert poor == []
    ground = page.browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(18, 22, 28)" if dark else "rgb(255, 255, 255)")
    wide, window = page.widths()
    assert window == width and wide <= window


def test_on_a_telephone_the_panel_comes_over_the_text_and_leaves_its_token_in_sight(page: Page) -> None:
    page.show(made_up_inspection(), width=360)
    assert not page.find("#panel").is_displayed()
    last = page.tokens[-1]
    page.browser.execute_script("arguments[0].click()", last)
    panel = page.find("#panel")
    assert panel.is_displayed()
    bottom, top = page.browser.execute_script(
        "return [arguments[0].getBoundingClientRect().bottom, arguments[1].getBoundingClientRect().top]", last, panel
    )
    assert 0 < bottom <= top
    page.find("#close").click()
    assert not panel.is_displayed()


def test_the_page_has_a_language_landmarks_and_names(page: Page) -> None:
    page.show(made_up_inspection(), fragment="#token-47")
    assert page.find("html").get_attribute("lang") == "en"
    assert all(len(page.all(landmark)) == 1 for landmark in ("header", "main", "aside", "h1"))
    controls = [node for node in page.all("button, select, input, [role]") if node.is_displayed()]
    assert len(controls) > len(page.tokens)
    named = (
        "return arguments[0].filter((node) => node.ariaLabel || node.textContent.trim() || node.labels.length).length"
    )
    assert page.browser.execute_script(named, controls) == len(controls)
    identifiers = [node.get_attribute("id") for node in page.all("[id]")]
    assert len(identifiers) == len(set(identifiers))
