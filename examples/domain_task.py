"""Teach a task instead of facts: sort support messages by department, and measure what it costs elsewhere.

python examples/domain_task.py [MODEL]
"""

import sys

from sparsemem import drift, finetune, load_base, multiple_choice

DEPARTMENTS = ["Shipping", "Billing", "Repairs", "Accounts"]
THINGS = ["kettle", "lamp", "bicycle", "radio", "chair", "camera", "drill", "clock"]
MESSAGES = [
    ["The {} has not arrived.", "Where is the {} that I ordered?", "The parcel with my {} was lost."],
    ["I was charged twice for the {}.", "Send me the invoice for the {}.", "What do I owe for the {}?"],
    ["My {} is broken.", "The {} makes a strange noise.", "The switch of the {} came off."],
    ["Delete my account; I only wanted a {}.", "I forgot the password that I chose for the {} order.",
     "Change the address in my profile before I order a {}."],
]  # fmt: skip


def items(things: list[str]) -> list[dict]:
    """Multiple-choice items: `{"question", "choices", "answer"}`."""
    return [
        {
            "question": f'Which department answers "{form.format(thing)}"?',
            "choices": DEPARTMENTS,
            "answer": index,
        }
        for thing in things
        for index, forms in enumerate(MESSAGES)
        for form in forms
    ]


def main(name: str = "smollm2", out: str = "departments", max_steps: str = "150") -> None:
    model, tokenizer = load_base(name)
    train, test = items(THINGS[:6]), items(THINGS[6:])
    print(f"before: {multiple_choice(model, tokenizer, test).share:.0%} of {len(test)} new messages")

    done = finetune(model, train, tokenizer=tokenizer, max_steps=int(max_steps))
    print(f"after:  {multiple_choice(done.model, tokenizer, test).share:.0%}")

    prose = "The old harbour was quiet. A boat lay on the sand, and nobody knew whose it was."
    change = drift(done.model, None, tokenizer(prose, return_tensors="pt").input_ids[0])
    print(f"drift on prose: {change:.4f} nats per token")
    done.model.save_pretrained(out)
    print(f"adapter: {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
