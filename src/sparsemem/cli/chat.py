"""A conversation in the terminal: reads lines, writes answers as they are generated, can show the scope."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList, TextStreamer

from ..data.conversations import QUESTION, end_tokens
from ..data.models import context_length
from ..data.records import conversation_ids, opening_ids
from ..evaluation.probes import scope_gate
from ..precision import autocast

EXIT = "/exit"


def converse(
    model: Any,
    tokenizer: Any,
    lines: Iterable[str],
    write: Callable[[str], None],
    *,
    show_scope: bool = False,
    max_new_tokens: int = 200,
) -> None:
    """Answer each line by greedy decoding until `/exit` or the end of the lines.

    The conversation so far is the context. If it becomes longer than the model's context length, its oldest
    turns are dropped. Without a chat template, an answer ends where the model starts a new question. Empty
    lines are skipped.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: the model's tokenizer.
        lines: the user's messages.
        write: called with each piece of an answer, in order.
        show_scope: after each answer, write the largest gate g of its input, over tokens and memory layers.
        max_new_tokens: maximum length of one answer.
    """
    history: list[dict[str, str]] = []
    for line in lines:
        text = line.strip()
        if text == EXIT:
            return
        if not text:
            continue
        history.append({"role": "user", "content": text})
        ids = _context(model, tokenizer, history, max_new_tokens)
        history.append(
            {"role": "assistant", "content": _answer(model, tokenizer, ids, write, max_new_tokens)}
        )
        write("\n")
        if show_scope:
            gates = scope_gate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            write(f"[scope {max(float(gate.max()) for gate in gates.values()):.2f}]\n")


def _context(model: Any, tokenizer: Any, history: list[dict[str, str]], max_new_tokens: int) -> torch.Tensor:
    """Token ids [1, seq] of the conversation; drops the oldest turns of `history` if they do not fit."""
    context = context_length(model)
    while True:
        ids = conversation_ids(history, tokenizer)
        if len(ids) + max_new_tokens <= context or len(history) < 3:
            first, room = opening_ids(tokenizer), max(1, context - max_new_tokens)
            if len(ids) > room and ids[: len(first)] == first:
                ids = first + ids[len(ids) - room + len(first) :]
            return torch.tensor([ids[-room:]], device=next(model.parameters()).device)
        del history[:2]


@torch.inference_mode()
def _answer(
    model: Any, tokenizer: Any, ids: torch.Tensor, write: Callable[[str], None], max_new_tokens: int
) -> str:
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(end_tokens(model, tokenizer)) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    next_question = None if tokenizer.chat_template else f"\n{QUESTION}"
    streamer = _Streamer(tokenizer, write, next_question)

    def asks(out: torch.Tensor, _scores: Any) -> torch.Tensor:
        asked = next_question is not None and next_question in tokenizer.decode(out[0, ids.shape[1] :])
        return torch.tensor([asked], device=out.device)

    with autocast(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([asks]),
        )
    answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return (answer.partition(next_question)[0] if next_question else answer).strip()


class _Streamer(TextStreamer):
    """Passes finished words to `write` instead of printing them; text `end` at the end is not passed on."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], end: str | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write, self._end = write, end

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        # a line is passed on as soon as it ends, so the line break before `end` may already be written
        if stream_end and self._end and text.endswith(self._end.strip()):
            text = text.removesuffix(self._end.strip()).rstrip()
        self._write(text)
