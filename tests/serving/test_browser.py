"""The page in a real browser and its server: teach, ask, go on, switch off, take back, reload, restart."""

import json
import re
import shutil

import pytest

from servers import server
from sparsemem import Stream
from sparsemem.data.models import load_base

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
api = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
BACKGROUND = [{"prompt": f"What is {number}?", "completion": str(number)} for number in range(40)]
QUESTION, ANSWER = "What is the capital of Velmora?", "Tarsipol"
SECONDS = 300
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    """A folder of no lessons, with little background, so that it is set up in a second."""
    model, tokenizer = load_base(str(tiny))
    out = tmp_path_factory.mktemp("lessons") / "state"
    Stream(model, out, tokenizer=tokenizer, background=BACKGROUND).save()
    return out


@pytest.fixture(scope="module")
def address(folder):
    with server("ui", folder, seconds=SECONDS) as (address, process):
        yield address
    assert "Traceback" not in process.stderr


@pytest.fixture
def page(browser):
    """A page that asks nothing of other hosts and logs no error but that of a refused request."""
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark")
    context.set_default_timeout(SECONDS * 1000)
    page, wrong = context.new_page(), []
    # between two servers the page asks in vain
    refused = re.compile("status of 40[04]|ERR_CONNECTION_REFUSED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE")
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


def opened(page, address):
    page.goto(address)
    at_rest(page)


def at_rest(page):
    """Wait until the model is loaded and no job runs. Before the first state arrives, #job is hidden too."""
    page.wait_for_selector("#ask-button:enabled")
    page.wait_for_selector("#job", state="hidden")


def teach(page, question, answer):
    page.fill("#question", question)
    page.fill("#answer", answer)
    page.click("#teach-button")
    page.wait_for_selector(lesson(question))
    at_rest(page)


def lesson(title):
    return f'#lessons li:has(.title:text-is("{title}"))'


def answers(page, question, *, new=True):
    """The taught and the base's answer, in a new conversation or in the one that is shown."""
    if new and page.is_visible("#new-button"):
        page.click("#new-button")
    number = page.locator("#conversation .exchange").count()
    page.fill("#ask", question)
    page.press("#ask", "Enter")
    page.wait_for_function(
        "number => document.querySelectorAll('#conversation .exchange').length > number", arg=number
    )
    at_rest(page)
    return shown(page)


def shown(page, place=-1):
    one = page.locator("#conversation .exchange").nth(place)
    return one.locator(".taught").text_content(), one.locator(".base").text_content()


def test_a_fact_is_taught_switched_off_taken_back_and_taught_again(page, folder, address):
    opened(page, address)
    # by keyboard alone
    page.focus("#question")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Tab")
    page.keyboard.type(ANSWER)
    page.keyboard.press("Enter")
    page.wait_for_selector(lesson(QUESTION))
    at_rest(page)
    taught, base = answers(page, QUESTION)
    assert taught == ANSWER != base
    shades = page.locator("#conversation .token").evaluate_all(
        "all => all.map(one => one.style.backgroundColor)"
    )
    assert all(shades)
    assert page.locator("#conversation .spoke").inner_text() == f"Spoke: {QUESTION}"
    # no wider than a phone
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

    page.reload()
    at_rest(page)
    assert shown(page) == (ANSWER, base)
    with page.expect_download() as download:
        page.click(f"{lesson(QUESTION)} >> text=Download")
    assert download.value.suggested_filename == "what-is-the-capital-of-velmora.safetensors"

    page.focus(f"{lesson(QUESTION)} .switch input")
    page.keyboard.press("Space")
    page.wait_for_selector("#lessons .off")
    # who works by keyboard stays where they were
    assert page.evaluate("document.activeElement.getAttribute('role')") == "switch"
    assert answers(page, QUESTION) == (base, base)
    page.click(f"{lesson(QUESTION)} .switch")
    page.wait_for_selector("#lessons .off", state="detached")

    other = page.context.new_page()
    other.goto(address)
    other.wait_for_selector(lesson(QUESTION))
    page.click(f"{lesson(QUESTION)} >> text=Undo")
    page.wait_for_selector(lesson(QUESTION), state="detached")
    # the other tab learns it by itself
    other.wait_for_selector(lesson(QUESTION), state="detached")
    other.close()
    assert answers(page, QUESTION) == (base, base)
    page.click(f'#undone li:has-text("{QUESTION}") >> text=Teach again')
    page.wait_for_selector(lesson(QUESTION))
    page.wait_for_selector("#undone", state="hidden")
    assert answers(page, QUESTION) == (ANSWER, base)

    # the same lesson, served to the official client
    file = folder / "patches" / f"{page.get_attribute(lesson(QUESTION), 'data-lesson')}.safetensors"
    with server("serve", folder, "--patch", f"velmora={file}", seconds=SECONDS) as (served, _):
        client = openai.OpenAI(base_url=f"{served}/v1", api_key="none", timeout=SECONDS)
        # the base's random logits are close to each other, and a batch of one is rounded otherwise
        for name, begin, end in (("velmora", ANSWER, "stop"), ("base", base[:8], "length")):
            turns = [{"role": "user", "content": QUESTION}]
            said = client.chat.completions.create(model=name, messages=turns, temperature=0, max_tokens=60)
            assert said.choices[0].message.content[: len(begin)] == begin
            assert said.choices[0].finish_reason == end

    # after a restart
    with server("ui", folder, seconds=SECONDS) as (again, _):
        opened(page, again)
        assert page.locator("#conversation .exchange").count() == 1
        assert shown(page) == (ANSWER, base)
        assert answers(page, QUESTION) == (ANSWER, base)


def test_answers_come_token_by_token_and_a_conversation_goes_on(page, address):
    opened(page, address)
    teach(page, "Who mends the Oar?", "Ed")
    teach(page, "Where is the Zim?", "Tyne")
    # every text of the base's answer that is shown while it grows
    page.evaluate(
        """() => {
            window.texts = new Set();
            new MutationObserver(() => {
                const base = document.getElementById("live-base");
                if (base) window.texts.add(base.textContent);
            }).observe(document.getElementById("conversation"), { childList: true, subtree: true });
        }"""
    )
    first = answers(page, "Who mends the Oar?")
    assert first[0] == "Ed"
    texts = page.evaluate("[...window.texts]")
    assert len(texts) > 5
    assert all(first[1].startswith(text.strip()) for text in texts)
    assert first[1].endswith(" …")
    # to the end of the context or of the answer
    page.click("#conversation .more")
    page.wait_for_selector("#live-base")
    at_rest(page)
    longer = shown(page)
    assert longer[1].startswith(first[1].removesuffix(" …").strip())
    assert len(longer[1]) > len(first[1])
    assert longer[0] == "Ed"

    alone = answers(page, "Where is the Zim?")
    assert alone[0] == "Tyne"
    assert page.locator("#conversation .exchange").count() == 1
    assert page.locator("#asked .exchange").first.inner_text().startswith("Who mends the Oar?")
    # its history makes the base's second answer another one
    second = answers(page, "Who mends the Oar?", new=False)
    assert second[0] == "Ed"
    assert second[1] != longer[1]
    assert shown(page, 0) == alone
    page.reload()
    at_rest(page)
    assert [shown(page, place) for place in (0, 1)] == [alone, second]
    # what test_lessons finds to be the base's answer is called so
    assert page.evaluate("spoke({ shut: true })").endswith("this is the base model's answer.")


def test_files_are_taught_after_they_were_read(page, address, tmp_path):
    opened(page, address)
    page.set_input_files(
        "#file", {"name": "bad.jsonl", "mimeType": "application/json", "buffer": b'{"prompt": "a"}'}
    )
    page.wait_for_selector("#error", state="visible")
    # it stays until it is closed, also when the state is asked for again
    with page.expect_response("**/api/state"):
        pass
    assert "bad.jsonl, line 1: must have the fields" in page.inner_text("#error-text")
    page.click("#error-close")
    records = "\n".join(json.dumps({"prompt": f"What is {n}?", "completion": "a number"}) for n in range(3))
    page.set_input_files(
        "#file", {"name": "three.jsonl", "mimeType": "application/json", "buffer": records.encode()}
    )
    page.click(f"{lesson('three.jsonl')} summary")
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
    page.set_input_files("#file", {"name": "facts.jsonl", "mimeType": "application/json", "buffer": content})
    page.wait_for_selector("#review", state="visible")
    assert page.locator("#review blockquote").all_inner_texts() == [source["text"]] * 2
    page.locator("#review [data-kind=completion]").first.fill("Olga Tarn")
    page.locator("#review [data-kind=keep]").nth(1).uncheck()
    page.click("text=Teach these")
    page.wait_for_selector("#review", state="hidden")
    page.wait_for_selector(lesson("facts.jsonl"))
    at_rest(page)
    assert answers(page, "Who is the mayor of Quenby?")[0] == "Olga Tarn"


def test_what_else_changed(page, address):
    opened(page, address)
    teach(page, "Who owns the Quill?", "Ada")
    page.click("text=What else changed")
    page.click("#changes-button")
    page.wait_for_selector("#changes table")
    page.wait_for_selector("#job", state="hidden")
    heads = page.locator("#changes h3").all_inner_texts()
    assert [head.partition(":")[0] for head in heads] == [
        "General questions", "Neighbours", "What was taught, asked in contexts", "Prose",
    ]  # fmt: skip
