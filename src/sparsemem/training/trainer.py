"""The Trainer of `finetune`: it trains the whole model, or a tail memory on cached states."""

import math
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, ProgressCallback, Trainer

from ..optim.rows import RowOptimizer
from ..optim.skipping import SkippedSteps
from ..precision import autocast, takes
from ..processes import summed
from .cached import TailHead
from .callbacks import Progress
from .checkpoints import list_files
from .uneven import first_records, no_loss, num_own


class FinetuneTrainer(Trainer):
    """A Trainer that prints nothing, supports row optimizers, and computes logits only where there is loss.

    Args:
        head: computes the loss of a tail memory from states of supervised positions; None: the model does.
        options: of Trainer.
    """

    def __init__(self, head: TailHead | None, **options: Any) -> None:
        super().__init__(**options)
        self.head = head
        own = getattr(self.optimizer, "skipped", None)
        # a row optimizer skips steps by itself
        self.skipped: SkippedSteps = SkippedSteps() if own is None else own
        self._bad = False
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

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        at_end = self.accelerator.gradient_state.end_of_dataloader
        if self.args.world_size == 1 or not at_end or not samples:
            return samples, num_items
        size, held = self.args.per_device_train_batch_size, len(self.train_dataset)  # type: ignore[arg-type]
        number = num_own(held, size, self.args.process_index, self.args.world_size)
        samples[-1] = first_records(samples[-1], number)
        return samples, self._get_num_items_in_batch(samples, device)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if isinstance(self._own_optimizer(), RowOptimizer) and not (inputs["labels"] != -100).any():
            # without a forward pass, so that nothing counts as read
            return no_loss(self.model)  # type: ignore[arg-type]
        if self.head is not None:
            states = {key: inputs[key] for key in ("states", "shift_labels")}
            return super().compute_loss(self.head, states, *args, **kwargs)  # type: ignore[arg-type]
        # logits are a fifth of a small model's computation, and most positions have no loss
        if takes(self.model, "logits_to_keep"):  # type: ignore[arg-type]
            labels = inputs["labels"][:, 1:]
            kept = (labels != -100).any(dim=0).nonzero().squeeze(1)
            inputs = {**inputs, "logits_to_keep": kept, "shift_labels": labels[:, kept].contiguous()}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if loss.isfinite():
            return loss
        self._bad = True
        # Trainer's running sum would stay NaN
        return torch.zeros_like(loss)

    def _get_grad_norm(self, model, grad_norm=None):
        """Trainer calls this just before the optimizer's step. A bad step is skipped in all processes."""
        norm = super()._get_grad_norm(model, grad_norm)
        bad = self._bad or (norm is not None and not math.isfinite(norm))
        if self.args.world_size > 1:
            bad = bool(summed(torch.tensor(float(bad), device=self.args.device)) > 0)
        self._bad = bad
        optimizer = self._own_optimizer()
        if isinstance(optimizer, RowOptimizer):
            if bad:
                optimizer.skip_step()
            return norm
        # torch's fused AdamW skips a step if this is not 0, as for a gradient scaler
        optimizer.found_inf = torch.ones((), device=self.args.device) if bad else None
        self.skipped.add(bad)
        return norm

    def _save_checkpoint(self, model, trial):
        if self.skipped.in_a_row:
            # the weights may be the reason; the last good checkpoint is not to be rotated away
            return
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                list_files(folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            # torch.save reports a full disk as a RuntimeError
            if isinstance(error, RuntimeError) and "write" not in str(error) and "pos" not in str(error):
                raise
            line = " ".join(str(error).split())
            raise OSError(
                f"{folder} cannot be written ({line}); earlier checkpoints are unchanged; check the free "
                "space and continue with resume"
            ) from error

    def log(self, logs, start_time=None):
        if "loss" in logs and self._bad:
            logs, self._bad = {**logs, "loss": math.nan}, False
        # Trainer logs the norm of `.grad`, which value rows do not have
        optimizer = self._own_optimizer()
        if "grad_norm" in logs and isinstance(optimizer, RowOptimizer):
            logs = {**logs, "grad_norm": float(optimizer.last_grad_norm)}  # type: ignore[arg-type]
        super().log(logs, start_time)

    def _own_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

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
