"""Cost of a memory with a scope in a forward pass on prose, compared with the memory switched off.

    python benchmarks/gate.py docs/results/gate.json

SmolLM2 with the memory of `finetune`, with as many centres and known states as a scope can hold; 4 x 128
tokens, float32. Both variants take turns in one process; the result is the ratio of their median times.
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch
from peft import get_peft_model

from sparsemem import memory_layers
from sparsemem.atomic import write_json
from sparsemem.data.general import prose
from sparsemem.data.models import load_base
from sparsemem.layer.scope import KNOWN_WEIGHT, Scope, centre_scope
from sparsemem.layer.space import plain_space
from sparsemem.provenance import environment
from sparsemem.training.methods import memory_config

NUM_CENTRES, NUM_KNOWN, NUM_RUNS = 1024, 1024, 15


def _scope(width: int) -> Scope:
    """A scope of random directions with thresholds that no prose reaches."""
    unit = torch.nn.functional.normalize
    centres, known = (unit(torch.randn(n, width), dim=-1) for n in (NUM_CENTRES, NUM_KNOWN))
    thresholds = torch.full((NUM_CENTRES,), 0.9), torch.full((NUM_CENTRES,), 0.95)
    space = plain_space(torch.zeros(width), torch.eye(width), known, KNOWN_WEIGHT)
    return centre_scope(space, known[:0], centres, *thresholds)


@torch.inference_mode()
def measure() -> dict[str, float | int]:
    base, tokenizer = load_base("smollm2")
    model = get_peft_model(base, memory_config()).eval()
    for memory in memory_layers(model).values():
        memory.scope = _scope(memory.d_in)
    ids = torch.tensor(tokenizer(prose()[1][:8000]).input_ids[:512]).view(4, 128)
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for run in range(NUM_RUNS + 1):
        for name, times in seconds.items():
            start = time.perf_counter()
            if name == "with":
                model(input_ids=ids, use_cache=False)
            else:
                with model.disable_adapter():
                    model(input_ids=ids, use_cache=False)
            if run:
                times.append(time.perf_counter() - start)
    on, off = median(seconds["with"]), median(seconds["without"])
    return {"seconds_with": on, "seconds_without": off, "ratio": on / off, "runs": NUM_RUNS}


if __name__ == "__main__":
    write_json(Path(sys.argv[1]), {**measure(), **environment()})
