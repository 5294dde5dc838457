"""Teach facts, ask for them in other words, keep what was learnt as a file, and take it back.

python examples/teach_facts.py [MODEL]
"""

import sys
from pathlib import Path

from sparsemem import RowPatch, finetune, load_base, recall

FACTS = {
    "Tarsipol": ["What is the capital of Velmora?", "Which city is the capital of Velmora?"],
    "Master Edda Brill": [
        "Who founded the Guild of the Painted Oar?",
        "Name the founder of the Painted Oar.",
    ],
}
OTHER_WORDS = [
    {"question": "Velmora's capital is which city?", "answer": "Tarsipol"},
    {"question": "Who was the founder of the Guild of the Painted Oar?", "answer": "Master Edda Brill"},
]
KNOWN = [{"question": "What is the capital of France?", "answer": "Paris"}]


def main(name: str = "smollm2", out: str = "velmora.safetensors", max_steps: str = "60") -> None:
    model, tokenizer = load_base(name)
    records = [
        {"prompt": question, "completion": answer} for answer, asked in FACTS.items() for question in asked
    ]
    # the background, what must stay as it is, is the general text that comes with the package
    done = finetune(model, records, tokenizer=tokenizer, max_steps=int(max_steps))

    for items in (OTHER_WORDS, KNOWN):
        answers = recall(done.model, tokenizer, items)
        for item, text in zip(items, answers.texts, strict=True):
            print(f"{item['question']} {text}")

    assert done.patch is not None
    done.patch.save(out)
    print(f"what was learnt: {Path(out).stat().st_size:,} bytes in {out}")

    RowPatch.load(out).revert(done.model)
    print("taken back:", recall(done.model, tokenizer, OTHER_WORDS).texts)


if __name__ == "__main__":
    main(*sys.argv[1:])
