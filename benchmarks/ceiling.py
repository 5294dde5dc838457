"""How much of the medical task the base's late states hold: probes on cached states.

    python benchmarks/ceiling.py docs/results/ceiling.json

For each depth, the state at the start of the answer of 2,400 training and 400 test diagnoses of
`compare medical` goes into a classifier of chapters; the test asks for the right one of the item's four
choices. Linear: ridge regression. MLP: one hidden layer of 512, AdamW, mean of three seeds. Strength and
number of epochs are chosen on a split of the training categories, by the same question.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsemem.adapter.blocks import num_blocks
from sparsemem.atomic import write_json
from sparsemem.compare.recipes.medical import SETTINGS, chapter_items, held_out_categories
from sparsemem.data.asked import answer_starts
from sparsemem.data.forms import Form
from sparsemem.data.models import load_base
from sparsemem.data.records import question_ids
from sparsemem.provenance import environment

RIDGES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
EPOCHS = (5, 10, 20, 40)
SEEDS = (0, 1, 2)


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_base(SETTINGS.model)
    train, test = chapter_items(SETTINGS.num_train, SETTINGS.num_test)
    blocks = num_blocks(model)
    depths = sorted({blocks * part // 8 for part in range(3, 8)} | {blocks - 2, blocks - 1})
    layers = [f"model.layers.{depth}.mlp" for depth in depths]
    asked = [Form(question_ids(one["question"], tokenizer), "", "", "bare", "") for one in (*train, *test)]
    states = answer_starts(model, asked, layers)
    width = states.shape[1] // len(layers)
    learnt, chosen_on = held_out_categories(train, SETTINGS.num_test)
    rows: dict[str, Any] = {}
    parts = dict(zip(depths, states.split(width, 1), strict=True))
    parts["all"] = states
    for name, x in parts.items():
        of = dict(zip([one["question"] for one in (*train, *test)], x, strict=True))
        pick = lambda items, of=of: torch.stack([of[one["question"]] for one in items])  # noqa: E731
        rows[str(name)] = {
            "linear": probe(ridge, RIDGES, pick, learnt, chosen_on, train, test),
            "mlp": probe(mlp, EPOCHS, pick, learnt, chosen_on, train, test),
        }
    command = f"python benchmarks/ceiling.py {' '.join(sys.argv[1:])}"
    found = {"command": command, "seeds": SEEDS, "blocks": blocks, "accuracy": rows}
    write_json(Path(sys.argv[1]), {**found, "num_test": len(test), **environment()})


def probe(fit: Any, options: tuple, pick: Any, learnt: list, chosen_on: list, train: list, test: list) -> Any:
    """Accuracy on the test items, of the option that is best on categories outside the learnt ones."""
    best = max(options, key=lambda one: accuracy(fit, one, pick, learnt, chosen_on))
    return {"chosen": best, "test": accuracy(fit, best, pick, train, test)}


def accuracy(fit: Any, option: float, pick: Any, train: list, test: list) -> float:
    names = sorted({name for one in (*train, *test) for name in one["choices"]})
    classes = torch.tensor([names.index(one["choices"][one["answer"]]) for one in train])
    x, y = pick(train), pick(test)
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    scores = fit((x - mean) / spread, classes, len(names), (y - mean) / spread, option)
    right = [
        max(range(4), key=lambda n: float(row[names.index(one["choices"][n])])) == one["answer"]
        for row, one in zip(scores, test, strict=True)
    ]
    return sum(right) / len(right)


def ridge(x: Tensor, classes: Tensor, num: int, test: Tensor, strength: float) -> Tensor:
    """Scores [tests, classes] of a regression on the classes."""
    x, test = functional.pad(x, (0, 1), value=1.0).double(), functional.pad(test, (0, 1), value=1.0).double()
    gram = x.T @ x + strength * torch.eye(x.shape[1], dtype=torch.float64)
    return test @ torch.linalg.solve(gram, x.T @ functional.one_hot(classes, num).double())


def mlp(x: Tensor, classes: Tensor, num: int, test: Tensor, epochs: int) -> Tensor:
    """Mean log-probabilities [tests, classes] over SEEDS."""
    total = torch.zeros(len(test), num)
    for seed in SEEDS:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(x.shape[1], 512), nn.GELU(), nn.Dropout(0.3), nn.Linear(512, num))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1)
        for _ in range(epochs):
            for part in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                functional.cross_entropy(net(x[part]), classes[part]).backward()
                optimizer.step()
        with torch.no_grad():
            total += net.eval()(test).log_softmax(-1)
    return total / len(SEEDS)


if __name__ == "__main__":
    main()
