import torch

from servers import wait_for
from sparsemem.training.finetune import finetune
from sparsemem.training.trainer import peak_memory

MEGABYTE = 1 << 20


def test_the_peak_is_what_the_block_added_at_its_highest():
    held_before = torch.ones(64 * MEGABYTE // 4)
    with peak_memory(torch.nn.Linear(2, 2)) as peak:
        added = torch.ones(48 * MEGABYTE // 4)
        wait_for(lambda: peak.peak_bytes > 40 * MEGABYTE)
        del added
    assert 40 * MEGABYTE < peak.peak_bytes < 64 * MEGABYTE
    assert held_before.numel() == 16 * MEGABYTE


def test_full_finetuning_adds_gradients_and_two_moments(tiny_llama, tokenizer):
    model = tiny_llama(hidden_size=256, intermediate_size=1024)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    done = finetune(model, [{"text": "Some words."}], "full", tokenizer=tokenizer, max_steps=2)
    assert 2.5 * weights < done.peak_bytes < 8 * weights
