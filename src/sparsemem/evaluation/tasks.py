"""The tasks of `sparsemem eval`: six probes, each on a user's file or on the paper's benchmark.

| task            | metrics      | prompt                            | from the Hub                        |
| --------------- | ------------ | --------------------------------- | ----------------------------------- |
| recall          | contains_acc | chat template, else `Question: `  | needs a file                        |
| triviaqa        | contains_acc | `triviaqa_prompt`                 | trivia_qa, rc.nocontext, validation |
| multiple-choice | acc, acc_sum | chat template where there is one  | needs a file                        |
| medmcqa         | acc, acc_sum | `medmcqa_prompt`                  | medmcqa, validation                 |
| perplexity      | ppl          | BOS, if any, then the text        | needs a file                        |
| wikitext        | ppl          | lines, a blank line between them  | wikitext-103-raw-v1, test           |
| mentions        | changed, ... | chat template where there is one  | needs a file                        |
| contexts        | right, ...   | chat template where there is one  | needs a file                        |
| neighbours      | taught, ...  | chat template where there is one  | needs a file                        |

`acc` uses the mean log-probability of an option's tokens, `acc_sum` their sum. An answer to triviaqa is right
if a normalised alias is a substring of it; recall requires whole words. mentions works for adapters only. It
asks things about the taught subjects that were not taught: `changed` is the share of answers that differ from
the base model's, `perplexity` is that of the base model's answers, and `prose_perplexity` is that of prose
which names the subjects. contexts and neighbours are those of `neighbours.py`. `items.py` reads the data.

Reference: Gupta 2026 (2605.03229), evaluation; medmcqa, wikitext and triviaqa are its tasks.
"""

from functools import partial
from typing import Any

import torch
from peft import PeftModel

from ..choices import TASKS
from ..data.generation import complete
from ..data.known import PROBE_FORMS
from ..data.models import load
from ..data.records import choice_tokens, opening_ids, prompt_ids
from ..precision import precision_of
from .items import read_items
from .likelihood import split_tokens
from .mentions import mentions
from .neighbours import contexts, neighbours
from .probes import Evaluation, contains, multiple_choice, perplexity, recall

TRIVIAQA_TOKENS = 32


def evaluate(
    model: Any,
    tokenizer: Any,
    task: str,
    *,
    items: list[dict[str, Any]] | str,
    chat: bool = False,
    precision: str | None = "float32",
) -> Evaluation:
    """Run a task on its items.

    Args:
        items: what `read_items` returned for this task.
        chat: ask triviaqa's questions through the chat template, without the paper's prompt.
        precision: "float32", "bfloat16", or None for the faster of the two.

    Raises:
        ValueError: a text of fewer than two tokens, `chat` for a task that does not have it, or mentions on a
            model without an adapter.
    """
    if chat and task != "triviaqa":
        raise ValueError(
            f"chat: task {task} does not have this option; leave it out, or use it with triviaqa"
        )
    if isinstance(items, str):
        # `verbose=False`: no warning about a text longer than the context, since it is read in windows
        ids = torch.tensor(
            tokenizer(items, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long
        )
        ppl = perplexity(model, ids, opening=opening_ids(tokenizer), precision=precision)
        return Evaluation({"ppl": ppl}, len(ids))
    if task == "triviaqa":
        correct = _triviaqa(model, tokenizer, items, chat, precision)
        return Evaluation({"contains_acc": sum(correct) / len(correct)}, len(items), correct)
    if task == "mentions":
        return _mentions(model, tokenizer, items, precision)
    if TASKS[task] == "taught":
        return _taught(model, tokenizer, task, items, precision)
    if TASKS[task] == "recall":
        answers = recall(model, tokenizer, items, precision=precision)
        return Evaluation({"contains_acc": answers.share}, len(items), answers.correct)
    tokens = medmcqa_tokens if task == "medmcqa" else choice_tokens
    found = multiple_choice(model, tokenizer, items, tokens=tokens, precision=precision)
    return Evaluation({"acc": found.share, "acc_sum": found.share_by_sum}, len(items), found.correct)


def medmcqa_prompt(item: dict[str, Any]) -> str:
    """The paper's prompt, up to `Answer:`."""
    return "\n".join(["Medical exam question:", f"Question: {item['question']}", *_lettered(item), "Answer:"])


def medmcqa_text(item: dict[str, Any]) -> str:
    """The paper's training text: prompt, right option, and the explanation where there is one.

    It is used in `{"text": ...}` records, with the loss on all tokens.
    """
    explanation = item.get("explanation")
    told = f"\nExplanation: {explanation}" if explanation else ""
    return f"{medmcqa_prompt(item)} {_lettered(item)[item['answer']]}{told}"


def medmcqa_tokens(item: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt and of ` A. text` to ` D. text`, split as lm-evaluation-harness does."""
    return split_tokens(tokenizer, medmcqa_prompt(item), [f" {option}" for option in _lettered(item)])


def triviaqa_prompt(item: dict[str, Any]) -> str:
    """`Question: ...\\nAnswer:` as in the paper, after the item's worked examples if it has any."""
    worked = [f"Question: {one['question']}\nAnswer: {one['answer'][0]}" for one in item.get("examples", ())]
    return "\n\n".join([*worked, f"Question: {item['question']}\nAnswer:"])


def _triviaqa(model: Any, tokenizer: Any, items: list[dict], chat: bool, precision: str | None) -> list[bool]:
    """Whether the greedy answer contains a normalised alias, even within a word."""
    worked = any("examples" in item for item in items)
    if chat and worked:
        raise ValueError("chat: worked examples are not possible with chat; leave out num_fewshot or chat")
    if chat and not tokenizer.chat_template:
        raise ValueError("chat: needs a chat template and the tokenizer has none; leave it out")
    if chat:
        prompts = [prompt_ids(item["question"], tokenizer) for item in items]
    else:
        prompts = [tokenizer(triviaqa_prompt(item)).input_ids for item in items]
    # after worked examples a model continues with questions of its own
    stop = "\n" if worked else None
    texts = complete(
        model, tokenizer, prompts, max_new_tokens=TRIVIAQA_TOKENS, stop=stop, precision=precision
    )
    return [contains(text, item["answer"]) for text, item in zip(texts, items, strict=True)]


def _mentions(model: Any, tokenizer: Any, items: list[dict], precision: str | None) -> Evaluation:
    if not isinstance(model, PeftModel):
        raise ValueError(
            "task mentions compares an adapter with its base and this model has no adapter; give an adapter"
        )
    found = mentions(model, tokenizer, [item["subject"] for item in items], precision=precision)
    return Evaluation(
        metrics={
            "changed": found.changed,
            "perplexity": found.perplexity,
            "prose_perplexity": found.prose_perplexity,
        },
        n=len(items) * len(PROBE_FORMS),
        base={
            "changed": 0.0,
            "perplexity": found.base_perplexity,
            "prose_perplexity": found.prose_base_perplexity,
        },
    )


def _taught(model: Any, tokenizer: Any, task: str, items: list[dict], precision: str | None) -> Evaluation:
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"task {task} compares an adapter with its base and this model has no adapter; give an adapter"
        )
    ask = contexts if task == "contexts" else neighbours
    found = ask(model, tokenizer, items, precision=precision)
    base = {key: 0.0 for key in found.metrics if not key.endswith("right")}
    return Evaluation(found.metrics, len(found.texts), base={**base, **found.base_right})


def _lettered(item: dict[str, Any]) -> list[str]:
    return [f"{letter}. {choice}" for letter, choice in zip("ABCD", item["choices"], strict=True)]


def evaluate_named(
    model: str,
    task: str,
    data: str | None = None,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    dtype: str = "float32",
    precision: str | None = "float32",
) -> dict[str, Any]:
    """Evaluate a model or an adapter on a task; for an adapter, evaluate its base model too.

    Args:
        model: a name or folder that `load` can load.
        task: one of `TASKS`, a task of lm-evaluation-harness, or a YAML file that defines such a task.
        data: file with the items; None: a benchmark's own data from the Hub.
        dtype: of the weights, "float32" or "bfloat16".
        precision: "float32", "bfloat16", or None for the faster of the two. bfloat16 weights allow only
            "bfloat16" or None.

    Returns:
        `{"task", "metrics", "n", "model", "precision"}`, and for an adapter "base": the base model's metrics.

    Raises:
        ValueError: a model, task, option or data that is missing, has the wrong form, or does not fit.
    """
    options: dict[str, Any] = {"chat": chat, "precision": precision}
    if task in TASKS:
        items = read_items(task, data, limit=limit, num_fewshot=num_fewshot or 0)
        run = partial(evaluate, task=task, items=items, **options)
    else:
        from .harness import evaluate_harness, find_task

        if data is not None:
            raise ValueError(
                f"data={str(data)!r}: task {task!r} is not one of {', '.join(TASKS)}, and tasks of "
                "lm-evaluation-harness name their own data; leave out --data"
            )
        run = partial(evaluate_harness, task=find_task(task), limit=limit, num_fewshot=num_fewshot, **options)
    loaded, tokenizer = load(model, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    result = run(loaded, tokenizer)
    found = {"task": task, "metrics": result.metrics, "n": result.n, "model": model}
    found["precision"] = precision_of(loaded, precision)
    if result.base is not None:
        found["base"] = result.base
    elif isinstance(loaded, PeftModel):
        with loaded.disable_adapter():
            found["base"] = run(loaded, tokenizer).metrics
    return found
