"""A conversation in the terminal: lines in, streamed answers out, and how far each input was in scope."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList, TextStreamer

from ..data.records import QUESTION, conversation_ids, opening_ids
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
    """Answer each line, greedily and streaming, until `/exit` or the end of the lines.

    The conversation so far is the context, its oldest turns left out once it outgrows the model's. Without a
    chat template an answer ends where the model asks the next question itself. Empty lines are passed over.

    Args:
        write: gets the pieces of the answers, in order.
        show_scope: after each answer, the largest gate g over the tokens of its input, in all memory layers.
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
    """Token ids [1, seq] of the conversation; shortens `history` where it does not fit."""
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
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
    stop = model.generation_config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id if stop is None else stop,
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
    """Hands finished words to `write` where transformers would print them, but not the `end` of them all."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], end: str | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write, self._end = write, end

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        # a line is handed on as soon as it ends, so that its break may be gone by now
        if stream_end and self._end and text.endswith(self._end.strip()):
            text = text.removesuffix(self._end.strip()).rstrip()
        self._write(text)
