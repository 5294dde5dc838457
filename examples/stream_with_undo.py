"""Teach one fact after another, take one back, and see that the others stay.

python examples/stream_with_undo.py [MODEL]
"""

import sys

from sparsemem import Stream, load_base, recall

TASKS = {
    "velmora": ("What is the capital of Velmora?", "Tarsipol"),
    "oar": ("Who founded the Guild of the Painted Oar?", "Master Edda Brill"),
    "drunia": ("What is the capital of Drunia?", "Kelvast"),
}


def main(name: str = "smollm2", folder: str = "stream") -> None:
    model, tokenizer = load_base(name)
    stream = Stream(model, folder, tokenizer=tokenizer)
    for task, (question, answer) in TASKS.items():
        if task not in stream.tasks:
            entry = stream.teach(task, [{"prompt": question, "completion": answer}])
            print(f"{task}: taught in {entry['seconds']:.1f} s, {entry['bytes']:,} bytes")

    items = [{"question": question, "answer": answer} for question, answer in TASKS.values()]
    print("taught:    ", recall(stream.model, tokenizer, items).texts)

    # exact: the model is what it would be if this task had never been taught
    stream.undo("oar")
    print("taken back:", recall(stream.model, tokenizer, items).texts)
    stream.save()


if __name__ == "__main__":
    main(*sys.argv[1:])
