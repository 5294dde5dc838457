"""The head gets the last states of a batch in one piece, whoever asks for them."""

import pytest
import torch
from peft import get_peft_model

from sparsemem import SparseMemoryConfig
from sparsemem.background.states import layer_inputs
from sparsemem.evaluation.likelihood import log_probs
from tiny import SMALL, batch

PROMPTS = [[5, 6, 7, 8], [5, 6, 9, 11], [5, 6, 10, 4]]
USES = {
    "states": lambda model: list(layer_inputs(model, [batch(3, labels=False)])),
    "generate": lambda model: model.generate(
        input_ids=torch.tensor(PROMPTS), max_new_tokens=2, pad_token_id=0, do_sample=False
    ),
    "scores": lambda model: log_probs(model, PROMPTS, [[[6]]] * 3),
}


@pytest.mark.parametrize("use", USES)
def test_the_head_gets_few_states_that_are_contiguous(tiny_llama, use):
    """For others torch multiplies the head with each row apart: 15 s a batch of eight in a model of 0.5B."""
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL)).eval()
    head, seen = model.get_base_model().lm_head, []
    handle = head.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        USES[use](model)
    handle.remove()
    first = next(states for states in seen if len(states) > 1)
    assert first.shape[1] == 1
    assert all(states.is_contiguous() for states in seen)
    model.unload()
    assert not head._forward_pre_hooks
