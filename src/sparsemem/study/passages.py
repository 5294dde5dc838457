"""Read documents and split them into passages: text, Markdown, HTML, and PDF where pypdf is installed.

A passage is consecutive sentences of one section, up to a number of tokens. Documents are read as they are
asked for, so their size does not matter.
"""

import codecs
import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".txt", ".md", ".markdown", ".html", ".htm", ".pdf")
MOST_TOKENS = 512
# A paragraph is cut behind so many lines, and a sentence without an end behind so many characters.
MOST_LINES = 1_000
LONGEST = 1_000
_CHUNK = 1 << 16
# no sentence ends after these
_SHORT = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|No|vs|etc|Inc|Ltd|Co|[A-Z])|\be\.g|\bi\.e)\.$")
_END = re.compile(r"[.!?][\"”’')\]]*\s+(?=[\"“‘'(\[]?[^\Wa-z_])|[。！？]")
_PRONOUN = re.compile(r"(?:it|its|he|his|she|her|they|their|this|these)\b", re.IGNORECASE)
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r"\s*(?:```|~~~)")
_ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+")


class Sentence(NamedTuple):
    """A sentence and its first and last line, or page, counted from 1."""

    text: str
    first: int
    last: int


class Passage(NamedTuple):
    """Attributes:
    document: its name, as it was given.
    section: the headings above it, outermost first, joined by " > "; empty before the first heading.
    unit: what `first` and `last` of its sentences count: "lines" or "pages".
    """

    document: str
    section: str
    sentences: tuple[Sentence, ...]
    unit: str

    @property
    def text(self) -> str:
        return " ".join(sentence.text for sentence in self.sentences)

    def alone(self, sentence: Sentence) -> str:
        """A sentence to be read alone: behind its heading, where it names its subject with a pronoun."""
        topic = self.section.rpartition(" > ")[2]
        return f"{topic}: {sentence.text}" if topic and _PRONOUN.match(sentence.text) else sentence.text

    @property
    def task(self) -> str:
        return f"{self.document} § {self.section}" if self.section else self.document

    @property
    def digest(self) -> str:
        """Of what it says and where it stands, but for its lines."""
        return hashlib.sha256(f"{self.task}\n{self.text}".encode()).hexdigest()


class _Block(NamedTuple):
    """A paragraph (level 0) as lines with their numbers, or a heading."""

    level: int
    lines: list[tuple[int, str]]


def documents(names: Iterable[str]) -> list[Path]:
    """The files of documents and of folders of documents, checked to their ends: bad ones fail at once.

    Raises:
        ValueError: a file that is missing, empty, no text, or of a kind that is not read; two of one name.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        found = (
            sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        )
        if not found:
            raise ValueError(f"folder {name!r} has no document; give {', '.join(SUFFIXES)} files")
        files += found
    for file in files:
        _check(file)
    return list(dict.fromkeys(files))


def passages(path: Path, count: Callable[[str], int], most: int = MOST_TOKENS) -> Iterator[Passage]:
    """The passages of a document, in order.

    Args:
        count: the number of tokens of a text.
        most: tokens in a passage; a longer sentence is a passage of its own.

    Raises:
        ValueError: a PDF that cannot be read.
    """
    unit = "pages" if path.suffix.lower() == ".pdf" else "lines"
    titles: list[str] = []
    held: list[Sentence] = []
    size = 0

    def passage() -> Passage:
        return Passage(path.as_posix(), " > ".join(filter(None, titles)), tuple(held), unit)

    for block in _blocks(path):
        if block.level:
            if held:
                yield passage()
            held, size = [], 0
            titles[block.level - 1 :] = [""] * (block.level - 1 - len(titles))
            titles.append(" ".join(text for _, text in block.lines))
            continue
        for sentence in _sentences(block.lines):
            tokens = count(sentence.text)
            if held and size + tokens > most:
                yield passage()
                held, size = [], 0
            held.append(sentence)
            size += tokens
    if held:
        yield passage()


def _check(path: Path) -> None:
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise ValueError(f"document {str(path)!r} is of an unknown kind; give {', '.join(SUFFIXES)} files")
    if kind == ".pdf" and find_spec("pypdf") is None:
        raise ValueError(f"document {str(path)!r} is a PDF, which needs pypdf; run `pip install pypdf`")
    decoder = codecs.getincrementaldecoder("utf-8")()
    has_text = False
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                if kind == ".pdf":
                    has_text = chunk.startswith(b"%PDF")
                    break
                if b"\0" in chunk:
                    raise ValueError(
                        f"document {str(path)!r} is not text, it has zero bytes; give UTF-8 text"
                    )
                has_text = bool(decoder.decode(chunk).strip("\ufeff \t\r\n")) or has_text
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"document {str(path)!r} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"document {str(path)!r} cannot be read ({error.strerror}); give a file") from error
    if not has_text:
        raise ValueError(f"document {str(path)!r} has no text; leave it out")


def _blocks(path: Path) -> Iterator[_Block]:
    kind = path.suffix.lower()
    if kind == ".pdf":
        yield from _pdf(path)
        return
    with path.open(encoding="utf-8-sig") as file:
        if kind in (".html", ".htm"):
            reader = _Html()
            while chunk := file.read(_CHUNK):
                reader.feed(chunk)
                yield from reader.taken()
            reader.close()
            reader.end_block(0)
            yield from reader.taken()
        else:
            yield from _paragraphs(enumerate(file, start=1), markdown=kind != ".txt")


def _paragraphs(lines: Iterable[tuple[int, str]], *, markdown: bool) -> Iterator[_Block]:
    """Blank lines end a paragraph; in Markdown headings, items and code do too, and code is left out."""
    held: list[tuple[int, str]] = []
    in_code = False
    for number, line in lines:
        text = line.strip()
        if markdown and _FENCE.match(line):
            in_code, text = not in_code, ""
        elif in_code:
            continue
        level = 0
        if markdown and (found := _HEADING.match(text)):
            level, text = len(found[1]), found[2]
        elif markdown and len(held) == 1 and re.fullmatch(r"=+|-{3,}", text):
            # a line under its heading
            yield _Block(1 if text[0] == "=" else 2, held)
            held, text = [], ""
        if held and (level or not text or len(held) == MOST_LINES or (markdown and _ITEM.match(line))):
            yield _Block(0, held)
            held = []
        if level:
            yield _Block(level, [(number, _plain(text))])
        elif text and not re.fullmatch(r"[-*_=|: ]{3,}", text):
            held.append((number, _plain(_ITEM.sub("", text)) if markdown else text))
    if held:
        yield _Block(0, held)


def _plain(text: str) -> str:
    """Markdown without links, images, emphasis, marks of code and of quotations."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(
        r"(\*\*|__|`|(?<!\w)[*_](?=\S)|(?<=\S)[*_](?!\w))", "", text.lstrip("> ").strip("|")
    ).strip()


class _Html(HTMLParser):
    """Headings and paragraphs of a page, without its scripts, styles and navigation."""

    _SKIPPED = frozenset(("script", "style", "head", "nav", "template", "noscript", "svg"))
    # these do not end a paragraph
    _WITHIN = frozenset(
        re.findall(r"\w+", "a abbr b cite code em i kbd mark q s small span strong sub sup time u var wbr")
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._skipped: list[str] = []
        self._lines: dict[int, str] = {}
        self._done: list[_Block] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._SKIPPED:
            self._skipped.append(tag)
        elif tag not in self._WITHIN:
            self.end_block(0)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipped:
            del self._skipped[self._skipped.index(tag) :]
        elif tag not in self._WITHIN:
            self.end_block(int(tag[1]) if re.fullmatch(r"h[1-6]", tag) else 0)

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            for number, text in enumerate(data.split("\n"), start=self.getpos()[0]):
                self._lines[number] = self._lines.get(number, "") + text

    def end_block(self, level: int) -> None:
        lines = [(number, " ".join(text.split())) for number, text in self._lines.items() if text.strip()]
        if lines:
            self._done.append(_Block(level, lines))
        self._lines = {}

    def taken(self) -> list[_Block]:
        done, self._done = self._done, []
        return done


def _pdf(path: Path) -> Iterator[_Block]:
    from pypdf import PdfReader  # type: ignore[import-not-found]
    from pypdf.errors import PyPdfError  # type: ignore[import-not-found]

    try:
        for number, page in enumerate(PdfReader(path).pages, start=1):
            lines = [(number, line.strip()) for line in page.extract_text().splitlines() if line.strip()]
            if lines:
                yield _Block(0, lines)
    except (PyPdfError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"document {str(path)!r} cannot be read as PDF ({error}); save it again") from error


def _sentences(lines: list[tuple[int, str]]) -> Iterator[Sentence]:
    """The sentences of a paragraph, each with its lines."""
    starts, text = [], ""
    for _, line in lines:
        text += " " if text else ""
        starts.append(len(text))
        text += line

    def line_of(place: int) -> int:
        return lines[bisect_right(starts, place) - 1][0]

    begin = 0
    ends = [
        m.end() for m in _END.finditer(text) if not _SHORT.search(text, max(m.start() - 7, 0), m.start() + 1)
    ]
    for end in [*ends, len(text)]:
        while begin < end:
            cut = end
            if end - begin > LONGEST:
                # behind a word, where there is one
                cut = max(text.rfind(" ", begin, begin + LONGEST) + 1, 0) or begin + LONGEST
            kept = text[begin:cut].strip()
            if kept:
                yield Sentence(kept, line_of(begin), line_of(begin + len(text[begin:cut].rstrip()) - 1))
            begin = cut
