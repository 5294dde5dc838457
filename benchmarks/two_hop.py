"""Questions about the answer of a taught fact: asked directly, and after the model has stated the fact.

    python benchmarks/two_hop.py ADAPTER benchmarks/results/two_hop.json

ADAPTER is a folder with an adapter that was trained on the demo's handbook. For each fact whose held-out
wording the model answers correctly, FORMS asks about the answer's spelling, in four ways:

    direct         "What is the first letter of the name of the capital of Ulbrosk?"
    recited        the held-out question and the model's own answer first, then the question of `direct`
    written_out    the same, then the question with the answer's word in it: "... of the word Cravinsko?"
    base           the question with the word in it, asked to the base model: the best that it can do

No answer of a handbook fact is the subject of another fact, so only questions about spelling join two facts.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsemem.atomic import write_json
from sparsemem.compare.recipes.questions import handbook
from sparsemem.data.generation import complete
from sparsemem.data.models import load
from sparsemem.data.records import conversation_ids
from sparsemem.evaluation.probes import is_right, recall
from sparsemem.provenance import environment

# For each kind of fact: the words that stand for the answer in a question.
NAMES = {
    "capital": "the capital of {}",
    "founder": "the founder of the {}",
    "author": "the author of {}",
    "composer": "the composer of the {}",
    "painter": "the painter of {}",
    "inventor": "the inventor of the {}",
    "ruler": "the last king of {}",
    "remedy": "the remedy for {}",
    "currency": "the currency of {}",
    "language": "the language of {}",
}
MAX_NEW_TOKENS = 24
WORDS = ("zero", "one", "two", "three")

# For each name: the question about a thing, and the function that answers it for a word.
FORMS: dict[str, tuple[str, Callable[[str], list[str]]]] = {
    "first_letter": (
        "What is the first letter of {}? Answer with one letter.",
        lambda word: [word[0]],
    ),
    "number_of_words": (
        "How many words are in {}, one or two? Answer with one word.",
        lambda word: [WORDS[len(word.split())], str(len(word.split()))],
    ),
    "repeat_twice": (
        "Write {} two times, with a comma between.",
        lambda word: [f"{word} {word}"],
    ),
}


def ask(model: Any, tokenizer: Any, conversations: list[list[dict[str, str]]]) -> list[str]:
    prompts = [conversation_ids(turns, tokenizer) for turns in conversations]
    return complete(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=16)


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]


def measure(adapter: str) -> dict[str, Any]:
    model, tokenizer = load(adapter)
    facts = [fact for fact in handbook() if fact["kind"] in NAMES]
    recited = recall(
        model, tokenizer, [{"question": fact["heldout"], "answer": fact["answer"]} for fact in facts]
    )
    known = [
        (fact, text) for fact, text, right in zip(facts, recited.texts, recited.correct, strict=True) if right
    ]
    right: dict[str, dict[str, float]] = {}
    shown: dict[str, list[dict[str, Any]]] = {}
    for name, (form, answer_of) in FORMS.items():
        about = [form.format(NAMES[fact["kind"]].format(fact["subject"])) for fact, _ in known]
        about_word = [form.format(f'"{fact["answer"]}"') for fact, _ in known]
        firsts = [(fact["heldout"], text) for fact, text in known]
        answers = {
            "direct": ask(model, tokenizer, [turns(question) for question in about]),
            "recited": ask(
                model, tokenizer, [turns(*first, q) for first, q in zip(firsts, about, strict=True)]
            ),
            "written_out": ask(
                model, tokenizer, [turns(*first, q) for first, q in zip(firsts, about_word, strict=True)]
            ),
        }
        with model.disable_adapter():
            answers["base"] = ask(model, tokenizer, [turns(question) for question in about_word])
        expected = [answer_of(fact["answer"]) for fact, _ in known]
        right[name] = {
            way: sum(map(is_right, texts, expected)) / len(known) for way, texts in answers.items()
        }
        # how often the model gives the taught answer itself to a question about it
        right[name]["direct_names_it"] = sum(
            is_right(text, fact["answer"]) for text, (fact, _) in zip(answers["direct"], known, strict=True)
        ) / len(known)
        shown[name] = [
            {
                "question": question,
                "expected": wanted[0],
                **{way: texts[at] for way, texts in answers.items()},
            }
            for at, (question, wanted) in enumerate(zip(about, expected, strict=True))
        ]
    every = ("direct", "recited", "written_out", "base")
    return {
        "facts": len(facts),
        "known": len(known),
        "right": right,
        "mean": {way: sum(one[way] for one in right.values()) / len(right) for way in every},
        "answers": shown,
    }


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), {**measure(sys.argv[1]), **environment()})
