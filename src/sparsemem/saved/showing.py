"""`patch show`: the tokens in context that read a patch's most-changed rows, as text and as an HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..adapter.memories import gated_layers, key_layers_of, memory_layers
from ..background.states import layer_inputs
from ..data.models import load
from ..data.records import question_ids
from ..layer.facts import Context, given_at
from ..layer.memory import ProductKeyMemory
from ..layer.space import Space
from ..patches.facts import facts_of
from ..patches.patch import RowPatch
from ..patches.space import filled_in
from .contents import ADAPTER_FILE
from .patching import refuse_other_memory, spaces_of

CONTEXT = 8


class Reader(NamedTuple):
    """A token that reads a row: its weight (gate times share of the read), and the text around it."""

    weight: float
    before: str
    token: str
    after: str


class RowReaders(NamedTuple):
    """A changed row: the length of its change, whose fact it is, and its strongest readers, best first."""

    layer: str
    row: int
    own: bool
    change: float
    fact: str
    readers: list[Reader]


def row_readers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    patch: RowPatch,
    texts: Sequence[str] = (),
    *,
    spaces: Mapping[str, Space] | None = None,
    num_rows: int = 8,
    num_readers: int = 5,
) -> list[RowReaders]:
    """The rows that the patch changed most, and what reads them.

    Args:
        model: with the memory that the patch was made for; the patch need not be applied.
        texts: read beside the questions of the patch's own facts.
        spaces: as for `RowPatch.apply`.
        num_rows: in each layer, of its fact rows and of the table's.

    Raises:
        ArtifactError: the patch is of another memory or space.
    """
    layers = memory_layers(model)
    asked = [question_ids(fact.question, tokenizer) for fact in facts_of(patch) if fact.question]
    running = [tokenizer(text).input_ids for text in texts]
    inputs = [{"input_ids": torch.tensor([ids])} for ids in [*asked, *running] if ids]
    gate_name = list(gated_layers(layers))[-1]
    found: dict[tuple[str, bool, int], list[Reader]] = {}
    wanted = _most_changed(patch, num_rows)
    scopes = {}
    for name, layer in patch.layers.items():
        own = layers[name].scope
        known = [space for space in ((spaces or {}).get(name), own.space if own else None) if space]
        scopes[name] = filled_in(name, layer.scope, layer.space, known)
    gate_scope = scopes.get(gate_name)
    middle = key_layers_of(model)
    base = model.get_base_model()
    further = {f"key:{path}": base.get_submodule(path) for path in middle}
    for batch, states in layer_inputs(model, inputs, further=further) if inputs else ():
        ids = batch["input_ids"][0].tolist()
        gate, places = torch.ones(len(ids)), torch.full((len(ids),), -1)
        if gate_scope is not None:
            late = states[gate_name].cpu()
            keys = torch.cat([states[f"key:{path}"].cpu() for path in middle], -1)[None] if middle else None
            context = Context(batch["input_ids"], torch.zeros(1, 0, 2, dtype=torch.int64))
            places = given_at(gate_scope.facts, gate_scope.space, context, late[None], keys)[0]
            gate = torch.where(places >= 0, 1.0, gate_scope.gate(late))
        for name in patch.layers:
            reads = _reads(layers[name], places, states[name], gate, wanted[name])
            for (own, row), weights in reads.items():
                for place in weights.nonzero().flatten().tolist():
                    reader = Reader(float(weights[place]), *_around(ids, place, tokenizer))
                    found.setdefault((name, own, row), []).append(reader)
    facts = {name: _facts_by_row(patch, name) for name in patch.layers}
    return [
        RowReaders(
            name,
            row,
            own,
            change,
            facts[name].get(row, "") if own else "",
            sorted(found.get((name, own, row), []), reverse=True)[:num_readers],
        )
        for name, rows in wanted.items()
        for (own, row), change in rows.items()
    ]


def _most_changed(patch: RowPatch, number: int) -> dict[str, dict[tuple[bool, int], float]]:
    """By layer: (own row?, slot or centre) and the length of the change, largest first."""
    wanted: dict[str, dict[tuple[bool, int], float]] = {}
    for name, layer in patch.layers.items():
        table = (layer.after.float() - layer.before.float()).norm(dim=1)
        own = torch.zeros(0) if layer.scope is None else layer.scope.facts.rows.norm(dim=-1)
        wanted[name] = {}
        for is_own, changes, ids in ((False, table, layer.slots), (True, own, torch.arange(len(own)))):
            for place in changes.argsort(descending=True)[:number].tolist():
                wanted[name][is_own, int(ids[place])] = float(changes[place])
    return wanted


def _reads(
    memory: ProductKeyMemory,
    places: Tensor,
    states: Tensor,
    gate: Tensor,
    wanted: Mapping[tuple[bool, int], float],
) -> dict[tuple[bool, int], Tensor]:
    """Of each wanted row the weights [tokens] with which the states read it."""
    slots, weights = (part.cpu() for part in memory.address(states))
    reads = {}
    for own, row in wanted:
        if not own:
            reads[own, row] = gate * (weights * (slots == row)).sum(1)
        else:
            reads[own, row] = gate * (places == row)
    return reads


def _around(ids: list[int], place: int, tokenizer: Any) -> tuple[str, str, str]:
    parts = (
        ids[max(0, place - CONTEXT) : place],
        ids[place : place + 1],
        ids[place + 1 : place + 1 + CONTEXT],
    )
    return tuple(tokenizer.decode(part) for part in parts)  # type: ignore[return-value]


def _facts_by_row(patch: RowPatch, name: str) -> dict[int, str]:
    """The question of each fact row of a layer."""
    scope = patch.layers[name].scope
    questions = [fact.question for fact in facts_of(patch) for _ in range(fact.num_answers)]
    if scope is None or not questions:
        return {}
    return {row: questions[fact] for row, fact in enumerate(scope.facts.fact_of_token.tolist())}


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
<h2>{{ row.layer }}, {{ "fact row" if row.own else "row" }} {{ row.row }}
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


def readers_of(adapter: Path, patch: RowPatch, file: Path, text: Path | None) -> list[RowReaders]:
    """The readers of the rows of a patch, which `file` holds, with the model of an adapter folder.

    Raises:
        ValueError: no adapter, a text that cannot be read, or a patch of another memory.
    """
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
    refuse_other_memory(model, adapter, patch, file)
    return row_readers(model, tokenizer, patch, texts, spaces=spaces_of(adapter))  # type: ignore[arg-type]


def text_of(readers: Sequence[RowReaders]) -> str:
    """The readers as plain text, one line each."""
    lines = []
    for row in readers:
        kind = "fact row" if row.own else "row"
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
