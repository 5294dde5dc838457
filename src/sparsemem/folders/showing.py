"""`patch show`: the tokens in context that read a patch's most-changed rows, as text and as an HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..evaluation.readers import RowReaders, row_readers
from ..patches.patch import RowPatch
from .patching import spaces_of

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
td { padding: .15rem .6rem .15rem 0; vertical-align: top; }
mark { background: #ffe08a; }
.weight, .change { font-variant-numeric: tabular-nums; color: #666; }
.context { white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: 13px; }
</style>
<h1>{{ name }}</h1>
<p>
{% for key, value in layers.items() %}
{{ key }}: {{ value.rows }} rows, {{ value.centres }} centres of scope.
{% endfor %}
</p>
{% for row in rows %}
<h2>{{ row.layer }}, {{ "row of its own" if row.own else "row" }} {{ row.row }}
<span class="change">change {{ "%.3g" | format(row.change) }}</span></h2>
{% if row.fact %}<p>{{ row.fact }}</p>{% endif %}
<table>
{% for one in row.readers %}
<tr><td class="weight">{{ "%.2f" | format(one.weight) }}</td>
<td class="context">{{ one.before }}<mark>{{ one.token }}</mark>{{ one.after }}</td></tr>
{% else %}
<tr><td>no token of these texts reads it</td></tr>
{% endfor %}
</table>
{% endfor %}
</html>
"""


def readers_of(adapter: Path, patch: RowPatch, text: Path | None) -> list[RowReaders]:
    """The readers of a patch's rows, with the model of an adapter folder.

    Raises:
        ValueError: no adapter, a text that cannot be read, or a patch of another memory.
    """
    from ..data.models import load
    from .contents import ADAPTER_FILE

    if not (adapter / ADAPTER_FILE).is_file():
        raise ValueError(
            f"--adapter {adapter} has no {ADAPTER_FILE}; give a folder that graft, train or learn made"
        )
    texts: list[str] = []
    if text is not None:
        try:
            texts = [part for part in text.read_text(encoding="utf-8").split("\n\n") if part.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text {text} cannot be read as UTF-8 text ({error})") from error
    model, tokenizer = load(str(adapter))
    return row_readers(model, tokenizer, patch, texts, spaces=spaces_of(adapter))  # type: ignore[arg-type]


def text_of(readers: Sequence[RowReaders]) -> str:
    """The readers as plain text, one line each."""
    lines = []
    for row in readers:
        kind = "row of its own" if row.own else "row"
        lines.append(
            f"{row.layer}, {kind} {row.row}, change {row.change:.3g}" + (f": {row.fact}" if row.fact else "")
        )
        lines += [
            f"  {one.weight:.2f}  {_line(one.before)}[{_line(one.token)}]{_line(one.after)}"
            for one in row.readers
        ] or ["  no token of these texts reads it"]
    return "\n".join(lines)


def page_of(name: str, described: dict[str, Any], readers: Sequence[RowReaders]) -> str:
    """The readers as an HTML page; texts are data in it, never markup."""
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(_PAGE).render(name=name, layers=described["layers"], rows=readers)


def _line(text: str) -> str:
    return text.replace("\n", "\\n")
