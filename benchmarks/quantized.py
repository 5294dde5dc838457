"""What 8 and 4 bits cost: a trained adapter with quantised rows against the same with float32 rows.

    sparsemem train smollm2 --data TAUGHT.jsonl --method smf --seed 0 --out ADAPTER
    python benchmarks/quantized.py docs/results/quantized.json ADAPTER TAUGHT.jsonl HELDOUT.jsonl

By file: the share of questions whose whole answer is the model's first choice at every token (teacher
forcing), the largest difference of logits and the mean KL from float32, both at the tokens of answers.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from sparsemem import load, memory_layers, quantize_rows
from sparsemem.atomic import write_json
from sparsemem.data.reading import read_records
from sparsemem.data.records import batches, encode
from sparsemem.provenance import environment


@torch.no_grad()
def answers(model: Any, data: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, float]:
    """Logits at the tokens of answers, [tokens, vocabulary]; the share of answers that are right."""
    held, right = [], []
    for batch in data:
        logits, labels = model(**{**batch, "labels": None}).logits[:, :-1], batch["labels"][:, 1:]
        known = labels != -100
        held.append(logits[known])
        right += ((logits.argmax(-1) == labels) | ~known).all(1).tolist()
    return torch.cat(held), sum(right) / len(right)


def main() -> None:
    out, adapter, *files = sys.argv[1:]
    found: dict[str, Any] = {"files": {}, "bytes": {}, "adapter": "smf, seed 0, 200 steps", **environment()}
    plain: dict[str, torch.Tensor] = {}
    for bits in (32, 8, 4):
        model, tokenizer = load(adapter)
        model.eval()
        written = sum(int(m.values.any(1).sum()) * m.d_out * 4 for m in memory_layers(model).values())
        size = written if bits == 32 else sum(one.num_bytes() for one in quantize_rows(model, bits).values())
        found["bytes"][str(bits)] = size
        for file in files:
            examples = encode(read_records(file), tokenizer)
            logits, recall = answers(model, batches(examples, 16, 0))
            row: dict[str, float] = {"recall": recall}
            if bits == 32:
                plain[file] = logits
            else:
                row["largest_difference"] = float((logits - plain[file]).abs().max())
                before, after = plain[file].log_softmax(-1), logits.log_softmax(-1)
                row["mean_kl"] = float((before.exp() * (before - after)).sum(-1).mean())
            found["files"].setdefault(Path(file).stem, {})[str(bits)] = row
    write_json(Path(out), found)
    sys.stdout.write(f"{found}\n")


if __name__ == "__main__":
    main()
