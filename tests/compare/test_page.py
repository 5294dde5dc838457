from html.parser import HTMLParser

from sparsemem.compare.report import html_page

SCRIPT = "<script>alert('&')</script>"
RESULTS = {
    "model": f"model {SCRIPT}",
    "recipe": f"recipe {SCRIPT}",
    "about": f"about {SCRIPT}",
    "rows": [{"method": f"method {SCRIPT}", "drift": 0.5}],
    "against_base": {f"method {SCRIPT}": {f"task {SCRIPT}": {"difference": 0, "low": 0, "high": 0, "n": 3}}},
    "examples": [
        {
            "question": f"question {SCRIPT}",
            "expected": f"expected {SCRIPT}",
            "answers": {f"method {SCRIPT}": f"answer {SCRIPT}"},
        }
    ],
    "settings": {f"setting {SCRIPT}": 1},
    "machine": f"machine {SCRIPT}",
}


class Reader(HTMLParser):
    """The tags and the text of a page, as a browser reads them."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = set(), ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def test_names_of_models_and_methods_are_no_html():
    reader = Reader()
    reader.feed(html_page(RESULTS, b"figure"))
    assert "script" not in reader.tags
    for part in (
        "model", "recipe", "about", "method", "task", "question", "expected", "answer", "setting", "machine",
    ):  # fmt: skip
        assert f"{part} {SCRIPT}" in reader.text, part


def test_a_page_without_examples_and_comparison_has_no_empty_tables():
    page = html_page({"rows": [{"method": "base", "drift": 0.0}]}, b"figure")
    assert page.count("<table") == 1
