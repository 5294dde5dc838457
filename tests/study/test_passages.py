"""Documents to passages: sections, sentences, lines, and documents that cannot be read."""

import pytest

from sparsemem.study.passages import documents, passages

MARKDOWN = """\
A preface.

# Velmora

Velmora is a town on the
river Tarsi. Its mayor is **Dr. Ada Lindholm**.
She was elected in 2019.

Trade
-----

- The [mill](http://mill.example) of Velmora
  grinds rye.
- Its owner is Otto Brenk.

```
code. Not read.
```

# Orania
The capital of Orania is Port Hale!
"""


def count(text):
    return len(text.split())


def read(tmp_path, name, text, most=512):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return list(passages(path, count, most))


def test_markdown_by_headings_with_lines(tmp_path):
    found = read(tmp_path, "town.md", MARKDOWN)
    assert [passage.section for passage in found] == ["", "Velmora", "Velmora > Trade", "Orania"]
    assert found[1].task == f"{(tmp_path / 'town.md').as_posix()} § Velmora"
    assert [tuple(sentence) for sentence in found[1].sentences] == [
        ("Velmora is a town on the river Tarsi.", 5, 6),
        ("Its mayor is Dr. Ada Lindholm.", 6, 6),
        ("She was elected in 2019.", 7, 7),
    ]
    assert [tuple(sentence) for sentence in found[2].sentences] == [
        ("The mill of Velmora grinds rye.", 12, 13),
        ("Its owner is Otto Brenk.", 14, 14),
    ]
    assert [tuple(sentence) for sentence in found[3].sentences] == [
        ("The capital of Orania is Port Hale!", 21, 21)
    ]


def test_a_long_section_is_several_passages_of_one_task(tmp_path):
    text = "# Long\n" + "\n\n".join(f"Sentence number {n} has six words." for n in range(10))
    found = read(tmp_path, "long.md", text, most=20)
    assert {passage.section for passage in found} == {"Long"}
    assert [len(passage.sentences) for passage in found] == [3, 3, 3, 1]
    assert len({passage.digest for passage in found}) == 4


def test_the_digest_is_of_what_is_said_not_of_its_lines(tmp_path):
    before = read(tmp_path, "town.md", MARKDOWN)
    after = read(tmp_path, "town.md", "A new line.\n\n" + MARKDOWN)
    assert [one.digest for one in after[1:]] == [one.digest for one in before[1:]]
    assert after[3].sentences[0].first == before[3].sentences[0].first + 2


def test_html_without_scripts(tmp_path):
    text = (
        "<html><head><title>x</title><script>var a = 'No.';</script></head><body><h1>Velmora</h1>\n"
        "<p>Velmora is a <b>town</b> &amp; a port.\nIt lies on the Tarsi.</p><ul><li>Its mill grinds rye."
        "</li></ul>\n<h2>Trade</h2><p>Rye.</p></body></html>"
    )
    found = read(tmp_path, "page.html", text)
    assert [passage.section for passage in found] == ["Velmora", "Velmora > Trade"]
    assert [tuple(sentence) for sentence in found[0].sentences] == [
        ("Velmora is a town & a port.", 2, 2),
        ("It lies on the Tarsi.", 3, 3),
        ("Its mill grinds rye.", 3, 3),
    ]


def test_text_has_no_headings(tmp_path):
    (only,) = read(tmp_path, "notes.txt", "# Not a heading.\n\nA line.")
    assert (only.section, only.text) == ("", "# Not a heading. A line.")


def test_a_sentence_without_an_end_is_cut(tmp_path):
    found = read(tmp_path, "endless.txt", "word " * 100_000)
    assert max(len(sentence.text) for one in found for sentence in one.sentences) <= 1_000
    assert sum(len(one.text.split()) for one in found) == 100_000


def test_a_large_document_takes_time_by_its_length(tmp_path):
    """Of one paragraph, in one line or in many; quadratic time would pass the limit of a test."""
    text = "The mayor of Town 7 is Person 7, who was elected in 2019."
    for name, joint in (("line.html", " "), ("lines.txt", "\n")):
        found = read(tmp_path, name, joint.join([text] * 20_000))
        assert sum(len(one.sentences) for one in found) == 20_000
        assert {sentence.text for one in found for sentence in one.sentences} == {text}
    assert found[-1].sentences[-1].last == 20_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\xef\xbb\xbf \n", "has no text"),
        ("binary.txt", b"abc\0def", "is not text"),
        ("latin.md", "Café".encode("latin-1"), "is not UTF-8"),
        ("cut.md", "Café".encode()[:-1], "is not UTF-8"),
        ("table.xlsx", b"x", "unknown kind"),
    ],
)
def test_bad_documents_in_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        documents([str(tmp_path / name)])


def test_folders_and_what_is_missing(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.md", "deep/a.txt", "c.csv"):
        (tmp_path / name).write_text("Text.")
    assert documents([str(tmp_path)]) == [tmp_path / "b.md", tmp_path / "deep" / "a.txt"]
    with pytest.raises(ValueError, match="cannot be read"):
        documents([str(tmp_path / "absent.md")])
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no document"):
        documents([str(tmp_path / "none")])


def test_pdf_by_pages(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(tmp_path / "blank.pdf")
    (path,) = documents([str(tmp_path / "blank.pdf")])
    assert list(passages(path, count)) == []
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.4 nothing")
    with pytest.raises(ValueError, match="cannot be read as PDF"):
        list(passages(tmp_path / "bad.pdf", count))
