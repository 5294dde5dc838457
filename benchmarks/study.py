"""Documents of PokeMQA statements taught by `study`: what a teacher finds, and what the taught model answers.

    python benchmarks/study.py docs/results/study.json DATA/pokemqa.jsonl DATA/wikitext2_raw_test.txt

Five documents of ten facts each (one subject a fact; the objects are counterfactual), each statement before
a sentence of WikiText. Teachers: SmolLM2 itself, and a rule that knows the statements' forms, which is the
upper bound of everything behind the teacher. Asked: the data's own wordings, three or four a fact, which no
teacher sees, and as many untaught subjects of the same relations. Beside it: the base with the passage in
front that shares most words with the question, and LoRA on the documents as `{"text"}`.
"""

import json
import math
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from sparsemem import Stream, finetune, load_base
from sparsemem.atomic import write_json
from sparsemem.data.generation import answer_tokens
from sparsemem.data.records import question_ids
from sparsemem.data.subjects import is_named
from sparsemem.evaluation.answers import is_right
from sparsemem.precision import precision_of
from sparsemem.provenance import environment
from sparsemem.stream.tasks import tasks_of
from sparsemem.study.passages import Passage, Sentence, passages
from sparsemem.study.study import study
from sparsemem.study.teachers import Prompted, of_model

DOCUMENTS, FACTS, FILLERS, SEED = 5, 10, 1, 0
NUM_TOKENS, LORA_EPOCHS, PASSAGE_TOKENS = 12, 5, 48
# The first words of a relation in the data: the statement, a question, a rewording, and words of which a true
# question has one.
FORMS = {
    "Who is the employer of": (
        "The employer of {} is {}.",
        "What is the employer of {}?",
        "{} has which employer?",
        "employ|work|job",
    ),
    "Who is the author of": (
        "The author of {} is {}.",
        "What is the name of the author of {}?",
        "{} has which author?",
        "author|wr[io]t",
    ),
    "Which university was": (
        "The university that educated {} is {}.",
        "What university educated {}?",
        "{} got an education at which university?",
        "educat|universit|stud",
    ),
    "What is the country of citizenship of": (
        "{} is a citizen of {}.",
        "{} is a citizen of what?",
        "What is {} a citizen of?",
        "citizen|national",
    ),
    "What is the capital of": (
        "The capital of {} is {}.",
        "{} has what capital?",
        "What city is the capital of {}?",
        "capital",
    ),
    "What language does": (
        "{} speaks {}.",
        "{} speaks which language?",
        "Which language is spoken by {}?",
        "speak|spoke|language",
    ),
    "Who is {} married": (
        "{} is married to {}.",
        "{} is married to whom?",
        "Whom is {} married to?",
        "marri|spouse|wife|husband",
    ),
    "Which city did {} die": (
        "{} died in the city of {}.",
        "{} died in what city?",
        "What city did {} die in?",
        "die|death",
    ),
    "Who is the developer of": (
        "The developer of {} is {}.",
        "What is the name of the developer of {}?",
        "{} has which developer?",
        "develop",
    ),
    "What type of music does": (
        "The type of music that {} plays is {}.",
        "{} plays what type of music?",
        "What music does {} play?",
        "music|genre|play",
    ),
    "What position does": (
        "The position that {} plays is {}.",
        "{} plays which position?",
        "In which position does {} play?",
        "position",
    ),
    "Which continent is": (
        "{} is located on the continent of {}.",
        "{} is located on which continent?",
        "On which continent is {} located?",
        "continent|locat",
    ),
    "Which sport is": (
        "{} is associated with the sport of {}.",
        "{} is associated with which sport?",
        "With which sport is {} associated?",
        "sport",
    ),
    "Which city is the headquarter": (
        "The headquarters of {} is located in {}.",
        "Where is the headquarters of {} located?",
        "The headquarters of {} is located in which city?",
        "headquarter",
    ),
    "Who founded": (
        "The founder of {} is {}.",
        "What is the name of the founder of {}?",
        "{} has which founder?",
        "found",
    ),
    "Which city was {} born": (
        "{} was born in the city of {}.",
        "{} was born in which city?",
        "In what city was {} born?",
        "born|birth",
    ),
    "Which religion is": (
        "The religion of {} is {}.",
        "{} has which religion?",
        "What is the religion of {}?",
        "religio",
    ),
    "Which country was": (
        "{} was created in the country of {}.",
        "{} was created in which country?",
        "In what country was {} created?",
        "creat|country",
    ),
}


class Oracle:
    """Knows the forms of the statements."""

    def __init__(self, facts: list[dict[str, Any]]) -> None:
        self.facts = {fact["statement"]: fact for fact in facts}
        self.asked = {form.format(fact["subject"]): fact for fact in facts for form in fact["forms"]}

    def write(self, passage: Passage) -> list[tuple[Sentence, str, str]]:
        told = [(one, self.facts[one.text]) for one in passage.sentences if one.text in self.facts]
        return [(one, fact["forms"][0].format(fact["subject"]), fact["object"]) for one, fact in told]

    def reword(self, questions: Any) -> list[list[str]]:
        return [[self.asked[one]["forms"][1].format(self.asked[one]["subject"])] for one in questions]

    def answer(self, asked: Any) -> list[str]:
        facts = [(self.asked[question], text) for question, text in asked]
        return [fact["object"] if fact["statement"] in text else "" for fact, text in facts]


def chosen_facts(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Facts to teach, and as many others of the same relations, all of different subjects."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    chance = random.Random(SEED)
    chance.shuffle(rows)
    found: dict[str, list[dict[str, Any]]] = {}
    seen: set[str] = set()
    for row in rows:
        form = next((f for head, f in FORMS.items() if row["relation"].startswith(head)), None)
        # names that contain each other would make a true record hard to tell
        clear = not any(is_named(row["subject"], one) or is_named(one, row["subject"]) for one in seen)
        if form is None or not clear or len(seen) >= 4 * DOCUMENTS * FACTS:
            continue
        seen.add(row["subject"])
        statement = form[0].format(row["subject"], row["object"])
        found.setdefault(row["relation"], []).append(
            {**row, "statement": statement, "forms": form[1:3], "words": form[3]}
        )
    taught: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for facts in found.values():
        half = len(facts) // 2
        taught += facts[:half]
        others += facts[half : 2 * half]
    pairs = list(zip(taught, others, strict=True))
    chance.shuffle(pairs)
    pairs = pairs[: DOCUMENTS * FACTS]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def write_documents(folder: Path, facts: list[dict[str, Any]], prose: Path) -> list[Path]:
    """Documents in which each statement is a paragraph with a sentence of WikiText behind it."""
    lines = prose.read_text(encoding="utf-8").splitlines()
    text = " ".join(line for line in lines if len(line) > 200 and "<unk>" not in line)
    sentences = [
        one for one in re.split(r"(?<=[.]) (?=[A-Z])", text) if 40 < len(one) < 160 and "@" not in one
    ]
    chance = random.Random(SEED)
    paths = []
    for number in range(DOCUMENTS):
        own = facts[number * FACTS : (number + 1) * FACTS]
        parts = [f"# Notes {number + 1}"]
        parts += ["\n".join([fact["statement"], *chance.sample(sentences, FILLERS)]) for fact in own]
        path = folder / f"notes-{number + 1}.md"
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    ids = [question_ids(prompt, tokenizer) for prompt in prompts]
    tokens = answer_tokens(model, tokenizer, ids, max_new_tokens=NUM_TOKENS)
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def right(facts: list[dict[str, Any]], said: list[str]) -> float:
    wanted = [fact["object"] for fact in facts for _ in fact["questions"]]
    return sum(is_right(one, answer) for one, answer in zip(said, wanted, strict=True)) / len(wanted)


def judged(records: list[dict[str, Any]], facts: list[dict[str, Any]]) -> dict[str, Any]:
    """Which facts were found, and which records are true: subject, object, a word of the relation."""
    true, found = 0, set()
    for record in records:
        wordings = [record["prompt"], *record["wordings"]]
        for place, fact in enumerate(facts):
            fits = is_right(record["completion"], fact["object"]) or is_right(
                fact["object"], record["completion"]
            )
            if fits and all(
                is_named(fact["subject"], one) and re.search(fact["words"], one.casefold())
                for one in wordings
            ):
                true += 1
                found.add(place)
                break
    return {
        "records": len(records),
        "true_records": true,
        "facts_found": len(found),
        "share_found": len(found) / len(facts),
        "share_true": true / len(records) if records else None,
    }


def best_passage(question: str, texts: list[str]) -> str:
    """The passage with the largest sum of inverse document frequencies of the question's words."""
    having = Counter(word for text in texts for word in set(re.findall(r"\w+", text.casefold())))
    words = set(re.findall(r"\w+", question.casefold()))

    def score(text: str) -> float:
        there = words & set(re.findall(r"\w+", text.casefold()))
        return sum(math.log(1 + len(texts) / having[word]) for word in there)

    return max(texts, key=score)


def main(out: Path, data: Path, prose: Path) -> None:
    began = time.perf_counter()
    facts, others = chosen_facts(data)
    asked = [question for fact in facts for question in fact["questions"]]
    near = [fact["questions"][0] for fact in others]
    model, tokenizer = load_base("smollm2")
    result: dict[str, Any] = {
        "command": f"python benchmarks/study.py {out} {data.name} {prose.name}",
        "documents": DOCUMENTS, "facts": len(facts), "questions": len(asked), "neighbours": len(near),
        "seed": SEED, "precision": precision_of(model), "model": "smollm2", **environment(),
    }  # fmt: skip

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        paths = write_documents(folder, facts, prose)
        texts = [one.text for path in paths for one in passages(path, count, PASSAGE_TOKENS)]
        base_near = answers(model, tokenizer, near)
        result["base"] = {"right": right(facts, answers(model, tokenizer, asked))}
        write_json(out, result)
        began_here = time.perf_counter()
        fronted = [f"{best_passage(question, texts)}\n\n{question}" for question in asked]
        result["retrieval"] = {
            "right": right(facts, answers(model, tokenizer, fronted)),
            "passages": len(texts),
            "seconds": round(time.perf_counter() - began_here, 1),
        }
        write_json(out, result)
        base = of_model(model, tokenizer)
        for name, teacher in (("oracle", Oracle(facts)), ("smollm2", Prompted(base))):
            began_here = time.perf_counter()
            file = folder / f"{name}.jsonl"
            done = study(
                [str(path) for path in paths], file, teacher, base, count, about={"teacher": name}, say=print
            )
            records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            row = {"seconds_study": round(time.perf_counter() - began_here, 1), **judged(records, facts)}
            row |= {"dropped": done["dropped"], "passages": done["passages"]}
            row["examples"] = [
                {key: record[key] for key in ("subject", "prompt", "completion", "wordings")}
                for record in records
            ]
            began_here = time.perf_counter()
            stream = Stream(load_base("smollm2")[0], folder / name, tokenizer=tokenizer, seed=SEED)
            for task in tasks_of(records) if records else []:
                stream.teach(task.name, task.records)
            row["seconds_learn"] = round(time.perf_counter() - began_here, 1)
            row["right"] = right(facts, answers(stream.model, tokenizer, asked))
            after = answers(stream.model, tokenizer, near)
            row["neighbours_changed"] = sum(a != b for a, b in zip(base_near, after, strict=True)) / len(near)
            result[name] = row
            write_json(out, result)
        began_here = time.perf_counter()
        tuned = finetune(
            load_base("smollm2")[0], [{"text": text} for text in texts], method="lora", tokenizer=tokenizer,
            epochs=LORA_EPOCHS, seed=SEED,
        )  # fmt: skip
        said, after = (answers(tuned.model, tokenizer, questions) for questions in (asked, near))
        result["lora_on_text"] = {
            "right": right(facts, said),
            "neighbours_changed": sum(a != b for a, b in zip(base_near, after, strict=True)) / len(near),
            "epochs": LORA_EPOCHS,
            "seconds": round(time.perf_counter() - began_here, 1),
        }
    result["seconds"] = round(time.perf_counter() - began, 1)
    write_json(out, result)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
