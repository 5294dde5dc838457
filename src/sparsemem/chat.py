"""A conversation in the terminal: lines in, streamed answers out, and how far each input was in scope."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from .models import autocast
from .probes import scope_gate

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

    With a chat template the conversation so far is the context, its oldest turns left out once it outgrows
    the model's; without one every line is continued on its own. Empty lines are passed over.

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
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
        else:
            text = history[-1]["content"]
        # a chat template writes the special tokens itself
        ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt").input_ids
        if ids.shape[1] + max_new_tokens <= context or len(history) < 3 or not tokenizer.chat_template:
            return ids[:, -max(1, context - max_new_tokens) :].to(next(model.parameters()).device)
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
    streamer = _Streamer(tokenizer, write)
    with autocast(model):
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


class _Streamer(TextStreamer):
    """Hands finished words to `write` where transformers would print them."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)
