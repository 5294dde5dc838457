"""Cost of a memory in a bfloat16 model of real size on a CPU, at the shape of Qwen2.5-0.5B or Llama-3.2-1B.

    OMP_NUM_THREADS=1 python benchmarks/real_size.py Qwen2.5-0.5B docs/results/real_size/Qwen2.5-0.5B.json

Random weights cost what trained ones cost; nothing is said of quality. The tokenizer is SmolLM2's without its
chat template. Insertion, calibration on 32 records, `finetune` on 100 facts, unloading, `learn` of the same
facts, and greedy answers after each, in turn with the base's. Seconds are CPU time of the process. Bytes are
the growth of its resident memory, the largest within a stage. The question key of `learn` is fitted on 8
relations instead of an eighth of the width of the states, which costs in proportion.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from many_facts import facts
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import sparsemem.data.asked
from sparsemem import SparseMemoryConfig, Stream, calibrate, finetune, load_base, memory_layers
from sparsemem.atomic import write_json
from sparsemem.data.general import general_background
from sparsemem.data.generation import complete_tokens
from sparsemem.data.records import batches, encode, question_ids
from sparsemem.provenance import environment
from sparsemem.training.trainer import peak_memory

FACTS, RECORDS, STEPS = facts(100), 32, 50
NEW_TOKENS, ASKED = 16, 2
RELATIONS = 8

SHAPES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "Qwen2.5-0.5B": (
        Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=151_936, hidden_size=896, intermediate_size=4_864, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        ),
    ),
    "Llama-3.2-1B": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=128_256, hidden_size=2_048, intermediate_size=8_192, num_hidden_layers=16,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32_768,
            tie_word_embeddings=True,
        ),
    ),
}  # fmt: skip


class Stages:
    """CPU seconds and growth of memory of named stages."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}

    def run(self, name: str, work: Callable[[], Any], share: int = 1) -> Any:
        with peak_memory(self.model) as peak:
            began = time.process_time()
            done = work()
            self.seconds[name] = round((time.process_time() - began) / share, 4)
        self.bytes[name] = peak.peak_bytes
        sys.stderr.write(f"{name}: {self.seconds[name]} s\n")
        return done


def made(name: str, tokenizer) -> PreTrainedModel:
    kind, config = SHAPES[name]
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.bos_token_id = None
    torch.manual_seed(0)
    return kind._from_config(config, dtype=torch.bfloat16).eval()


def measured(name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    tokenizer = load_base("smollm2")[1]
    tokenizer.chat_template = None
    base = made(name, tokenizer)
    stages, parameters = Stages(base), sum(p.numel() for p in base.parameters())
    prompts = [question_ids(fact["prompt"], tokenizer) for fact in FACTS[:32]]
    answers = [tokenizer(" " + fact["completion"])["input_ids"] for fact in FACTS[:32]]
    examples, read = encode(FACTS, tokenizer), encode(general_background()[:RECORDS], tokenizer)

    def said(model) -> float:
        found = complete_tokens(model, tokenizer, prompts, max_new_tokens=max(map(len, answers)))
        right = [ids[: len(answer)] == answer for ids, answer in zip(found, answers, strict=True)]
        return sum(right) / len(right)

    @torch.no_grad()
    def passes(model) -> None:
        for batch in batches(examples, 8, tokenizer.pad_token_id):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=1)

    def answer(ids) -> None:
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        model.generate(input_ids=torch.tensor([ids]), **options)

    def tokens(stage: str) -> None:
        model.eval()
        seconds = {f"token, {stage}": 0.0, f"token, base, in turn with {stage}": 0.0}
        for ids in prompts[: ASKED + 1]:
            for name in seconds:
                with model.disable_adapter() if "base" in name else nullcontext():
                    began = time.process_time()
                    answer(ids)
                    # the first round does not count
                    seconds[name] += (time.process_time() - began) * (ids is not prompts[0])
        stages.seconds |= {name: round(total / ASKED / NEW_TOKENS, 4) for name, total in seconds.items()}

    stages.run("pass over the facts, base", lambda: passes(base))
    config = SparseMemoryConfig(task_type="CAUSAL_LM")
    model = stages.run("insert", lambda: get_peft_model(base, config))
    held = sum(t.numel() * t.element_size() for m in memory_layers(model).values() for t in m.parameters())
    background = stages.run("calibrate", lambda: calibrate(model, batches(read, 8, tokenizer.pad_token_id)))
    options = {"background": background, "tokenizer": tokenizer, "mentions": 0, "max_steps": STEPS}
    stages.run("finetune", lambda: finetune(model, examples, "smf", **options))
    tokens("finetune")
    share = {"finetune": said(model)}

    bare = model.unload()
    sparsemem.data.asked.PER_RELATION, sparsemem.data.asked.LEAST_RELATIONS = sys.maxsize, RELATIONS
    with tempfile.TemporaryDirectory() as folder:
        stream = stages.run(
            "learn, begin",
            lambda: Stream(
                bare, Path(folder) / "s", tokenizer=tokenizer, background=general_background()[:RECORDS]
            ),
        )
        stages.run("learn, teach", lambda: stream.teach("all", FACTS))
        model = stream.model
        tokens("learn")
        share["learn"] = said(model)
    return {
        "parameters": parameters,
        "bytes of the base": 2 * parameters,
        "bytes of the memory": held,
        "tokens": {
            "facts": sum(len(one["input_ids"]) for one in examples),
            "calibration": sum(len(one["input_ids"]) for one in read),
        },
        "seconds": stages.seconds,
        "bytes": stages.bytes,
        "facts said": share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    command = f"python benchmarks/real_size.py {arguments.shape} {arguments.out}"
    settings = {"facts": len(FACTS), "records": RECORDS, "steps": STEPS, "relations": RELATIONS}
    source = environment()
    write_json(arguments.out, {"command": command, **settings, **measured(arguments.shape), **source})


if __name__ == "__main__":
    main()
