"""What a tokenizer makes of a conversation: the text an answer is generated from, the answer, and its end.

Choices: a prompt is what the chat template makes for generation. Thinking is switched off, and a block that
the template has opened is closed, unless the answer has thoughts of its own. The answer keeps its indentation
and ends with the template's first special token after it, or else with the tokenizer's end of text. Without a
chat template, messages become `Question: ...\\nAnswer: ...`.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Begins a user's turn where there is no chat template.
QUESTION = "Question:"
# Stands for an answer, to see what the template puts around it.
_ANSWER = "sparsemem"
# A prompt and its rewritten form end alike if so many characters agree.
_ALIKE = 8
_OPENED = re.compile(r"<think>\s*$")
_THOUGHTS = re.compile(r"<think>\s*(</think>\s*)?$")
# A space that begins an answer divided it from its prompt in older formats; indentation is longer.
_BEFORE_ANSWER = re.compile(r"^(?:\s*\n| (?=\S))")


def prompt_text(
    turns: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[dict] | None = None,
    **options: Any,
) -> str:
    """The text of a conversation, up to where its next answer begins.

    Args:
        tools: descriptions of functions, for the chat template.
        options: further variables of the chat template, such as enable_thinking=True.

    Raises:
        ValueError: the chat template refuses the turns or takes no tools.
    """
    if not tokenizer.chat_template:
        return _plain(turns, str(tokenizer.eos_token or ""), tools, answer_follows=True)
    options = {"enable_thinking": False, "thinking": False, **options}
    text = _rendered(turns, tokenizer, tools, options, answer_follows=True)
    if not options["enable_thinking"] and _OPENED.search(text):
        return f"{text.rstrip()}\n\n</think>\n\n"
    return text


def exchanges(
    turns: Sequence[dict], tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict] | None = None
) -> list[tuple[str, str]]:
    """Prompt and answer of each assistant turn; not of a first turn, nor of one whose weight is 0.

    Raises:
        ValueError: as `prompt_text`.
    """
    found = []
    for index, turn in enumerate(turns):
        if not index or turn["role"] != "assistant" or turn.get("weight") == 0:
            continue
        thinks = {"enable_thinking": True, "thinking": True} if "</think>" in turn["content"] else {}
        prompt = prompt_text(turns[:index], tokenizer, tools=tools, **thinks)
        found.append((prompt, _answer(turns[:index], turn, prompt, tokenizer, tools, thinks)))
    return found


def conversation_text(
    turns: Sequence[dict], tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict] | None = None
) -> str:
    """The text of a whole conversation."""
    if not tokenizer.chat_template:
        return _plain(turns, str(tokenizer.eos_token or ""), tools, answer_follows=False)
    return _rendered(turns, tokenizer, tools, {"enable_thinking": False, "thinking": False})


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: those of the model, of the tokenizer and of the chat template."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
        found = _first_special(_rendered(turns, tokenizer, None, {}).rpartition(_ANSWER)[2], tokenizer)
        ends.add(tokenizer.convert_tokens_to_ids(found[1]) if found else None)
    return ends - {None}


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Within, any error of a tokenizer or a chat template becomes a ValueError of one sentence."""
    try:
        yield
    except (TemplateError, TypeError, LookupError, AttributeError, UnicodeError, ArithmeticError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the model's {what} refuses the text: {why}") from error


def _answer(
    before: Sequence[dict], turn: dict, prompt: str, tokenizer: Any, tools: Any, options: dict[str, Any]
) -> str:
    content = _BEFORE_ANSWER.sub("", turn["content"]).rstrip()
    if not tokenizer.chat_template:
        return f"{' ' if content[:1].strip() else ''}{content}{tokenizer.eos_token or ''}"
    options = options or {"enable_thinking": False, "thinking": False}
    marked = [*before, {"role": "assistant", "content": _ANSWER}]
    head, found, tail = _rendered(marked, tokenizer, tools, options).rpartition(_ANSWER)
    if not found:
        raise ValueError("the model's chat template leaves out what the assistant says; use another template")
    special = _first_special(tail, tokenizer)
    end = tail[: special[0]] if special else f"{tail.rstrip()}{tokenizer.eos_token or ''}"
    if turn.get("tool_calls"):
        whole = _rendered([*before, turn], tokenizer, tools, options)
        start = prompt if whole.startswith(prompt) else _THOUGHTS.sub("", prompt)
        if not whole.startswith(start):
            raise ValueError("the model's chat template rewrites the turns before a tool call")
        # a call may end with another token than an answer
        calls, _, rest = whole[len(start) :].rpartition(end)
        if not rest.strip():
            return calls + end
        return rest.rstrip() + ("" if special else str(tokenizer.eos_token or ""))
    if options["enable_thinking"]:
        lead, opened = "", _OPENED.search(prompt)
        content = content.removeprefix("<think>").lstrip("\n") if opened else content
    else:
        lead = _lead(head, prompt)
    return lead + content + end


def _lead(head: str, prompt: str) -> str:
    """What the template puts between a prompt and its answer.

    Args:
        head: what it puts before an answer that is there already. It may have rewritten the prompt.
    """
    if head.startswith(prompt):
        return head[len(prompt) :]
    blank, asked = head[len(head.rstrip()) :], prompt[len(prompt.rstrip()) :]
    alike = head.rstrip()[-_ALIKE:] == prompt.rstrip()[-_ALIKE:]
    return blank.removeprefix(asked) if alike else ""


def _first_special(text: str, tokenizer: Any) -> tuple[int, str] | None:
    """Where the first special token of a text ends, and the token; None: there is none."""
    named = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    # white space is a token of its own in some vocabularies
    places = [(text.find(one), -len(one), one) for one in named if one.strip() and one in text]
    if not places:
        return None
    place, _, token = min(places)
    return place + len(token), token


def _rendered(
    turns: Sequence[dict], tokenizer: Any, tools: Any, options: dict[str, Any], answer_follows: bool = False
) -> str:
    if tools and "tools" not in str(tokenizer.chat_template):
        raise ValueError("the model's chat template takes no tools; leave them out")
    with refusals("chat template"):
        return str(
            tokenizer.apply_chat_template(
                list(turns), tools=tools, tokenize=False, add_generation_prompt=answer_follows, **options
            )
        )


def _plain(turns: Sequence[dict], end: str, tools: Any, *, answer_follows: bool) -> str:
    """The text of a conversation for models without a chat template; `end` follows every answer."""
    say_plain()
    if tools or any(turn.get("tool_calls") for turn in turns):
        raise ValueError("the model has no chat template, which tools need; leave them out")
    forms = {"user": (f"{QUESTION} ", "\n"), "assistant": ("Answer: ", f"{end}\n\n")}
    pieces = []
    for turn in turns:
        before, after = forms.get(turn["role"], ("", "\n\n"))
        pieces += [before, turn["content"].strip(), after]
    return "".join([*pieces, "Answer:"] if answer_follows else pieces)


@cache
def say_plain() -> None:
    logger.warning(
        "the tokenizer has no chat template: messages and questions become 'Question: ...\\nAnswer: ...', "
        "prompts stay as they are written"
    )
