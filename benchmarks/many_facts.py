"""What many facts cost: teaching, opening, reading a token, memory. Made-up names.

    python benchmarks/many_facts.py docs/results/many_facts.json [--facts 100000] [--model smollm2]

The model is a tiny random one, unless a name is given.

Facts are taught in tasks of 1,000, the last hundred one at a time. Seconds are medians of the same work at
100 facts and at all of them, in one process.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import CHAT_TEMPLATE, make_tokenizer
from sparsemem import Stream, load_base, memory_layers
from sparsemem.data.records import question_ids
from sparsemem.provenance import environment

SYLLABLES = (
    "ba",
    "co",
    "di",
    "fu",
    "gel",
    "hor",
    "im",
    "jan",
    "ko",
    "lur",
    "mes",
    "nol",
    "os",
    "pra",
    "qui",
    "rem",
    "sta",
    "tov",
    "ul",
    "vex",
    "wim",
    "zan",
)
PER_TASK = 1_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--facts", type=int, default=100_000)
    parser.add_argument("--model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measured(Path(folder) / "s", arguments.model, arguments.facts)
    named = f" --model {arguments.model}" if arguments.model else ""
    command = f"python benchmarks/many_facts.py {arguments.out} --facts {arguments.facts}{named}"
    text = json.dumps({"command": command, "facts": arguments.facts, **result, **environment()}, indent=1)
    arguments.out.write_text(text + "\n")


def measured(folder: Path, name: str | None, number: int) -> dict:
    records = facts(number)
    base, tokenizer = loaded(name)
    stream = Stream(base, folder, tokenizer=tokenizer, background=background())
    first = [
        timed(lambda one=one, n=n: stream.teach(f"one-{n}", [one])) for n, one in enumerate(records[:100])
    ]
    few = reading(stream, tokenizer, records[:50])
    few_base = base_reading(stream, tokenizer, records[:50])
    resident = psutil.Process().memory_info().rss
    for at in range(100, number - 100, PER_TASK):
        stream.teach(f"many-{at}", records[at : min(at + PER_TASK, number - 100)])
    last = [
        timed(lambda one=one, n=n: stream.teach(f"last-{n}", [one])) for n, one in enumerate(records[-100:])
    ]
    composing = timed(lambda: stream.model)
    many = reading(stream, tokenizer, records[:25] + records[-25:])
    many_base = base_reading(stream, tokenizer, records[:50])
    grown = psutil.Process().memory_info().rss - resident
    scope = memory_layers(stream.model)[stream.layer].scope
    held = sum(
        part.numel() * part.element_size()
        for key, part in scope.tensors().items()
        if key in ("fact_keys", "fact_states", "rows", "names")
    )
    saving = timed(stream.save)
    opening = timed(lambda: Stream(loaded(name)[0], folder, tokenizer=tokenizer).model)
    return {
        "seconds": {
            "teach one of the first 100": statistics.median(first),
            "teach one of the last 100": statistics.median(last),
            "compose": composing,
            "save": saving,
            "open": opening,
            "token at 100": few,
            "token at all": many,
            "base token, measured with the first": few_base,
            "base token, measured with the second": many_base,
        },
        "ratios": {
            "teaching": statistics.median(last) / statistics.median(first),
            "token": (many / many_base) / (few / few_base),
            "token at 100, to the base": few / few_base,
            "token at all, to the base": many / many_base,
        },
        "bytes a fact": {"resident, with patches": grown / number, "tensors": held / number},
    }


def loaded(name: str | None):
    """The base model and its tokenizer."""
    if name:
        return load_base(name)
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def background() -> list[dict]:
    return [{"prompt": f"What is {a} and {b}?", "completion": f"{a + b}"} for a in range(6) for b in range(8)]


def facts(number: int) -> list[dict]:
    draw = random.Random(0)
    names: dict[str, None] = {}
    while len(names) < number:
        name = " ".join("".join(draw.choices(SYLLABLES, k=3)).capitalize() for _ in range(2))
        names[name] = None
    answers = ("Ada", "Bo", "Cy", "Di")
    return [
        {"prompt": f"Who runs {name}?", "completion": draw.choice(answers), "subject": name} for name in names
    ]


def reading(stream, tokenizer, records) -> float:
    """Seconds a token of greedy answers, one question at a time."""
    stream.model.eval()
    return statistics.median(_seconds(stream.model, tokenizer, record) for record in records)


def base_reading(stream, tokenizer, records) -> float:
    with stream.model.disable_adapter():
        return statistics.median(_seconds(stream.model, tokenizer, record) for record in records)


def _seconds(model, tokenizer, record) -> float:
    ids = torch.tensor([question_ids(record["prompt"], tokenizer)])
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        return timed(lambda: model.generate(input_ids=ids, **options)) / 16


def timed(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
