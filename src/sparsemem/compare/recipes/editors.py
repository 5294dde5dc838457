"""The methods of the lifelong benchmark: each is taught one fact after another, and answers questions."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any, Protocol

from ...data.shapes import Turns, as_turns
from .edits import Edit

BACKGROUND_METHODS = ("smf-shared", "smf-own-write")


class Editor(Protocol):
    """Attributes: `model`: what answers on its own, for prose; None: there is no such model.

    `seconds` and `bytes`: of teaching so far, and of what must be kept for it.
    """

    model: Any
    seconds: float
    bytes: int

    def teach_until(self, edits: Sequence[Edit], number: int) -> None:
        """Teach the first `number` edits one at a time, except those that were taught before."""
        ...

    def ask(self, asked: Sequence[str | Turns], max_new_tokens: int) -> list[str]:
        """Greedy answers to questions, or to conversations that end with one."""
        ...


class Plain:
    """A model that answers; by itself it is the base, which is taught nothing."""

    model: Any
    seconds: float
    bytes: int

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.seconds, self.bytes = 0.0, 0

    def teach_until(self, edits: Sequence[Edit], number: int) -> None:
        pass

    def ask(self, asked: Sequence[str | Turns], max_new_tokens: int) -> list[str]:
        from ...data.generation import complete
        from ...data.records import conversation_ids

        prompts = [conversation_ids(as_turns(one), self.tokenizer) for one in asked]
        return complete(self.model, self.tokenizer, prompts, max_new_tokens=max_new_tokens)


class Streamed(Plain):
    """`Stream`: rows of its own for each edit."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path, seed: int) -> None:
        from ...stream.stream import Stream

        self.stream = Stream(model, folder, tokenizer=tokenizer, seed=seed)
        super().__init__(None, tokenizer)

    def teach_until(self, edits: Sequence[Edit], number: int) -> None:
        held = set(self.stream.tasks)
        names = [f"edit-{index:04d}" for index in range(number)]
        for name, edit in zip(names, edits, strict=False):
            if name not in held:
                self.stream.teach(name, [edit.record])
        self.stream.select(names)
        self.model = self.stream.model
        entries = [entry for entry in self.stream.ledger.active() if entry["task"] in set(names)]
        self.seconds = float(sum(entry["seconds"] for entry in entries))
        self.bytes = sum(entry["bytes"] for entry in entries)


class Finetuned(Plain):
    """One model that `finetune` trains on each edit in turn, with nothing to protect earlier ones."""

    def __init__(self, model: Any, tokenizer: Any, method: str, options: dict[str, Any]) -> None:
        super().__init__(model, tokenizer)
        self.method, self.options, self.background = method, options, None
        self.taught = 0

    def teach_until(self, edits: Sequence[Edit], number: int) -> None:
        from ...training.finetune import finetune

        options = {**self.options, "mentions": 0} if self.method == "smf" else dict(self.options)
        for edit in edits[self.taught : number]:
            began = time.perf_counter()
            if self.background is not None:
                options["background"] = self.background
            done = finetune(
                self.model, [edit.record], self.method, tokenizer=self.tokenizer, batch_size=1, **options
            )
            self.model, self.background = done.model, done.background
            self.seconds += time.perf_counter() - began
            self.bytes = 4 * done.trained_params
        self.taught = max(self.taught, number)


class LoraEach:
    """One LoRA for each edit, trained on the base; the nearest taught question's answers."""

    model = None

    def __init__(self, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
        self.base, self.tokenizer, self.options = model, tokenizer, options
        self.adapted: Any = None
        self.edits: list[Edit] = []
        self.seconds, self.bytes = 0.0, 0

    def teach_until(self, edits: Sequence[Edit], number: int) -> None:
        from peft import get_peft_model

        from ...training.finetune import finetune
        from ...training.methods import lora_config

        for edit in edits[len(self.edits) : number]:
            began = time.perf_counter()
            name = f"edit-{len(self.edits)}"
            if self.adapted is None:
                self.adapted = get_peft_model(self.base, lora_config(), adapter_name=name)
            else:
                self.adapted.add_adapter(name, lora_config())
            self.adapted.set_adapter(name)
            done = finetune(
                self.adapted, [edit.record], "lora", tokenizer=self.tokenizer, batch_size=1, **self.options
            )
            self.seconds += time.perf_counter() - began
            self.bytes += 4 * done.trained_params
            self.edits.append(edit)

    def ask(self, asked: Sequence[str | Turns], max_new_tokens: int) -> list[str]:
        nearest = Nearest([edit.question for edit in self.edits])
        chosen = [nearest(as_turns(one)[-1]["content"]) for one in asked]
        answers = [""] * len(asked)
        for index in sorted(set(chosen)):
            self.adapted.set_adapter(f"edit-{index}")
            places = [place for place, one in enumerate(chosen) if one == index]
            some = [asked[place] for place in places]
            found = Plain(self.adapted, self.tokenizer).ask(some, max_new_tokens)
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
        return answers


class Retrieved:
    """No training: the nearest taught question and its answer go before the question, as a former turn."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.edits: Sequence[Edit] = ()
        self.seconds, self.bytes = 0.0, 0

    def teach_until(self, edits: Sequence[Edit], number: int) -> None:
        self.edits = edits[:number]
        self.bytes = sum(len((edit.question + edit.answer).encode()) for edit in self.edits)

    def ask(self, asked: Sequence[str | Turns], max_new_tokens: int) -> list[str]:
        nearest = Nearest([edit.question for edit in self.edits])
        chats = []
        for one in asked:
            turns = as_turns(one)
            fact = self.edits[nearest(turns[-1]["content"])]
            shown = [
                {"role": "user", "content": fact.question},
                {"role": "assistant", "content": fact.answer},
            ]
            # behind a system prompt
            place = int(turns[0]["role"] == "system")
            chats.append([*turns[:place], *shown, *turns[place:]])
        return Plain(self.model, self.tokenizer).ask(chats, max_new_tokens)


class Nearest:
    """The place of the text that is nearest by TF-IDF and cosine, the first of equals."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(_words(text)) for text in texts]
        having = Counter(word for count in counts for word in count)
        self.idf = {word: log((1 + len(texts)) / (1 + number)) + 1 for word, number in having.items()}
        self.places: dict[str, list[tuple[int, float]]] = {}
        for place, count in enumerate(counts):
            for word, weight in self._weights(count).items():
                self.places.setdefault(word, []).append((place, weight))

    def __call__(self, text: str) -> int:
        scores: Counter[int] = Counter({0: 0.0})  # type: ignore[dict-item]
        for word, weight in self._weights(Counter(_words(text))).items():
            for place, other in self.places.get(word, []):
                scores[place] += weight * other  # type: ignore[assignment]
        return max(scores, key=lambda place: (scores[place], -place))

    def _weights(self, count: Counter[str]) -> dict[str, float]:
        weights = {word: number * self.idf.get(word, 0.0) for word, number in count.items()}
        length = sum(weight**2 for weight in weights.values()) ** 0.5 or 1.0
        return {word: weight / length for word, weight in weights.items()}


def editor_of(method: str, model: Any, tokenizer: Any, folder: Path, seed: int, options: Any) -> Editor:
    """The method by its name, with the base model to be taught."""
    if method == "smf":
        return Streamed(model, tokenizer, folder / "stream", seed)
    if method in BACKGROUND_METHODS:
        from peft import get_peft_model

        from ...data.general import general_background
        from ...training.methods import memory_config

        write = "own" if method == "smf-own-write" else "last"
        model = get_peft_model(model, memory_config(write=write))
        return Finetuned(model, tokenizer, "smf", {**options, "background": general_background()})
    if method == "lora-each":
        return LoraEach(model, tokenizer, options)
    if method == "retrieval":
        return Retrieved(model, tokenizer)
    if method in ("lora", "full"):
        return Finetuned(model, tokenizer, method, options)
    return Plain(model, tokenizer)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
