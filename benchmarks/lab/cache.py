"""States of the unchanged base model at the positions that are needed, computed once and kept on disk.

A `States` holds, for each position: the inputs of the MLPs at LAYERS, the last block's output (which the
final norm reads), the next token, its record, and whether an answer starts or continues there.
The model runs as in training: eager attention, bfloat16 autocast where that is faster.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemem.data.generation import by_length, read_beginning, rows_of
from sparsemem.data.models import load_base
from sparsemem.data.records import collate, encode, prompt_ids
from sparsemem.precision import autocast

LAYERS = (21, 23, 25, 26, 27, 28)
FOLDER = Path(os.environ.get("LAB_CACHE") or "~/.cache/sparsemem-lab").expanduser()


@dataclass
class States:
    """`x` [layers, n, d], `last` [n, d] float32; `token`, `label`, `example` int64, the others bool, [n].

    `answer`: whether the next token is an answer's, after a prompt. `label` -100: no next token.
    """

    x: Tensor
    last: Tensor
    token: Tensor
    label: Tensor
    example: Tensor
    start: Tensor
    answer: Tensor

    def __len__(self) -> int:
        return len(self.last)

    def __getitem__(self, chosen: Tensor) -> "States":
        return States(self.x[:, chosen], *(getattr(self, f.name)[chosen] for f in fields(self)[1:]))

    def layer(self, number: int) -> Tensor:
        return self.x[LAYERS.index(number)]


@cache
def base() -> tuple[Any, Any]:
    model, tokenizer = load_base("smollm2")
    model.set_attn_implementation("eager")
    return model, tokenizer


def kept(name: str, inputs: Any, make: Any) -> Any:
    """The result of `make()`, which is called once for these inputs; later calls load it from disk."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]
    file = FOLDER / f"{name}-{digest}.pt"
    if not file.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        torch.save(make(), partial)
        partial.rename(file)
    return torch.load(file, weights_only=False)


def states_of_records(name: str, records: Sequence[dict], *, everywhere: bool = False) -> States:
    """States at the supervised positions of records, or at every position."""
    return kept(name, [records, everywhere, LAYERS], lambda: _read(encode(records, base()[1]), everywhere))


def states_of_examples(name: str, examples: Sequence[dict]) -> States:
    """States at the supervised positions of token ids with labels."""
    return kept(name, [examples, LAYERS], lambda: _read(examples, False))


def states_of_tokens(name: str, ids: Tensor, window: int = 256) -> States:
    """States of running text at every position, read in windows."""
    examples = [{"input_ids": part.tolist(), "labels": part.tolist()} for part in ids.split(window)]
    return kept(name, [ids.tolist(), window, LAYERS], lambda: _read(examples, True))


def states_of_choices(name: str, items: Sequence[dict]) -> tuple[States, list[int]]:
    """States of all choices of all items after their questions, examples in this order; the right ones."""
    examples = []
    for item in items:
        ids = prompt_ids(item["question"], base()[1])
        for choice in item["choices"]:
            tail = base()[1](choice, add_special_tokens=False).input_ids
            examples.append({"input_ids": ids + tail, "labels": [-100] * len(ids) + tail})
    return kept(name, [examples, LAYERS], lambda: _read(examples, False)), [item["answer"] for item in items]


@torch.no_grad()
def _read(examples: Sequence[dict], everywhere: bool) -> States:
    model, tokenizer = base()
    seen: dict[Any, Tensor] = {}

    def note(key: Any):
        return lambda _module, args: seen.__setitem__(key, args[0])

    hooks = [model.model.layers[n].mlp.register_forward_pre_hook(note(n)) for n in LAYERS]
    hooks.append(model.model.norm.register_forward_pre_hook(note("last")))
    parts: dict[int, States] = {}
    # the common beginning of all prompts is read once, unless its own positions are needed
    prompts = [one["input_ids"] for one in examples]
    shared, beginning = (0, None) if everywhere else read_beginning(model, prompts, precision=None)
    examples = [{key: value[shared:] for key, value in one.items()} for one in examples]
    for chosen in by_length([one["input_ids"] for one in examples], 16, tight=True):
        batch = collate([examples[index] for index in chosen], tokenizer.pad_token_id)
        mask = F.pad(batch["attention_mask"], (shared, 0), value=1)
        past = rows_of(beginning, [0] * len(chosen))
        with autocast(model):
            model(
                batch["input_ids"], mask, past_key_values=past, use_cache=past is not None, logits_to_keep=1
            )
        for row, index in enumerate(chosen):
            parts[index] = _positions(batch, row, index, seen, everywhere)
    for hook in hooks:
        hook.remove()
    ordered = [parts[index] for index in range(len(examples))]
    return States(
        torch.cat([p.x for p in ordered], 1),
        *(torch.cat([getattr(p, f.name) for p in ordered]) for f in fields(States)[1:]),
    )


def _positions(batch: dict, row: int, index: int, seen: dict, everywhere: bool) -> States:
    length = int(batch["attention_mask"][row].sum())
    ids, labels = batch["input_ids"][row, :length], batch["labels"][row, :length]
    follows = torch.cat([labels[1:], torch.tensor([-100])])
    supervised, labelled = follows != -100, labels != -100
    start = supervised & ~labelled
    answer = supervised & (start.any() if len(start) else False)
    where = torch.arange(length) if everywhere else supervised.nonzero().flatten()
    following = torch.cat([ids[1:], torch.tensor([-100])])
    x = torch.stack([seen[number][row][where].float() for number in LAYERS])
    example = torch.full((len(where),), index)
    last = seen["last"][row][where].float()
    return States(x, last, ids[where], following[where], example, start[where], answer[where])
