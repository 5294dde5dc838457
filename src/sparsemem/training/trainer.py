"""The Trainer of `finetune`: it trains the whole model, or a tail memory on cached states."""

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer

from ..optim.rows import RowOptimizer
from ..precision import autocast, takes
from .cached import TailHead
from .callbacks import Progress


class FinetuneTrainer(Trainer):
    """A Trainer that prints nothing, supports row optimizers, and computes logits only where there is loss.

    Args:
        head: computes the loss of a tail memory from states of supervised positions; None: the model does.
        options: of Trainer.
    """

    def __init__(self, head: TailHead | None, **options: Any) -> None:
        super().__init__(**options)
        self.head = head
        if head is not None:
            self.model_accepts_loss_kwargs = True
        # the default callbacks print every log to stdout, which is for results
        self.remove_callback(PrinterCallback)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Progress)
        if isinstance(self.optimizer, RowOptimizer):
            # a row optimizer averages over processes itself, and DDP refuses a model in which only rows train
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.head is not None:
            states = {key: inputs[key] for key in ("states", "shift_labels")}
            return super().compute_loss(self.head, states, *args, **kwargs)  # type: ignore[arg-type]
        # logits are a fifth of a small model's computation, and most positions have no loss
        if takes(self.model, "logits_to_keep"):  # type: ignore[arg-type]
            labels = inputs["labels"][:, 1:]
            kept = (labels != -100).any(dim=0).nonzero().squeeze(1)
            inputs = {**inputs, "logits_to_keep": kept, "shift_labels": labels[:, kept].contiguous()}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs, start_time=None):
        # Trainer logs the norm of `.grad`, which value rows do not have
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if "grad_norm" in logs and isinstance(optimizer, RowOptimizer):
            logs = {**logs, "grad_norm": float(optimizer.last_grad_norm)}  # type: ignore[arg-type]
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs):
        # evaluation draws a random number, and a resumed run does not repeat earlier evaluations
        with torch.random.fork_rng():
            return super().evaluate(*args, **kwargs)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        # unlike accelerate's mixed precision, this does not replace model.forward
        return autocast(self.model)  # type: ignore[arg-type]

    def floating_point_ops(self, inputs):
        # Trainer would count a pass through the model, which training on states does not make
        return 0 if self.head is not None else super().floating_point_ops(inputs)
