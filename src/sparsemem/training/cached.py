"""Cached states: the base model's states that train a tail memory, computed once and used for many epochs.

No trainable parameter lies below the last residual. So a step needs only the last residual and the read
layers' inputs, at supervised positions. From them it computes addresses, reads, final norm and head, without
running any block of the base model.

Choices: each position is one float32 row (last residual, read layers' inputs). The rows are kept in memory up
to a limit, and in a memory-mapped file beyond it. In float32 on a CPU every record is computed alone, so its
states depend on no other record, and a run without the cache trains bit-identical rows (law 12).
"""

import copy
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers.utils.logging import tqdm

from ..adapter.blocks import final_norm, final_width
from ..adapter.memories import memory_layers, writes_last
from ..adapter.reads import gated_sum
from ..artifacts import fingerprint_base
from ..atomic import write_atomically
from ..background.scoping import Supervised
from ..background.states import layer_inputs, supervised
from ..data.records import collate
from ..precision import autocast, precise, precision_of

logger = logging.getLogger(__name__)

# Records in one forward pass where rounding may depend on the batch size anyway.
READ_AT_ONCE = 8
# Largest difference between logits from cached states and the model's, relative to the largest logit.
AGREEMENT = 0.02


class TailHead:
    """Memory, final norm and head, applied to states of supervised positions.

    It is called like a model, with a batch of `StateRows`, and returns loss and logits.
    """

    def __init__(self, model: Any, pad_token_id: int) -> None:
        self.model, self.pad_token_id = model, pad_token_id
        self.layers = memory_layers(model)
        base = model.get_base_model()
        found = final_norm(base)
        assert found is not None
        self.norm, self.head = found[1], model.get_output_embeddings()
        self.width = final_width(base)
        self._cast: Tensor | None = None
        self._inner, _, rest = found[0].partition(".")
        self._shell = _shell(base, self._inner, self.norm) if rest else None
        self._plain = self._shell is None or self._is_plain()

    def __call__(
        self,
        states: Tensor | Sequence[dict[str, Any]],
        shift_labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Loss and logits of states [n, width + sum d_in]; records are turned into their states first."""
        if not isinstance(states, Tensor):
            states = torch.cat([rows for rows, _ in self.rows_of(states)]).to(shift_labels.device)
        logits = self.logits(states).float()
        loss = functional.cross_entropy(logits, shift_labels, reduction="sum")
        count = len(shift_labels) if num_items_in_batch is None else num_items_in_batch
        return {"loss": loss / count, "logits": logits}

    def logits(self, states: Tensor) -> Tensor:
        """Logits [n, vocabulary] of states [n, width + sum d_in]."""
        hidden, inputs = self.parts(states)
        *_, deepest = self.layers
        memory = self.layers[deepest]
        gate = memory.relevance(inputs[deepest]) if memory.has_scope else None
        if memory.has_facts:
            # these are positions of taught answers, where the gate is open
            gate = torch.ones(len(states), device=states.device)
        return self.logits_of(gated_sum(hidden, self.layers, inputs, gate))

    def logits_of(self, residual: Tensor) -> Tensor:
        """[n, vocabulary] of last residuals [n, width], as they are read behind the last block."""
        residual = residual.to(next(self.model.parameters()).dtype)
        return self._project(self.norm(residual)) if self._plain else self._asked(residual)

    def _asked(self, residual: Tensor) -> Tensor:
        """Logits as the model computes them, which may scale or cap them after the head."""
        assert self._shell is not None
        self._shell.get_submodule(self._inner).state = residual[None]
        ids = torch.zeros(1, len(residual), dtype=torch.int64, device=residual.device)
        return type(self._shell).forward(self._shell, input_ids=ids).logits[0]

    @torch.no_grad()
    def _is_plain(self) -> bool:
        parameter = next(self.model.parameters())
        states = torch.randn(4, self.width, generator=torch.Generator().manual_seed(0)).to(parameter)
        with precise(self.model):
            return torch.equal(self._project(self.norm(states)), self._asked(states))

    def _project(self, x: Tensor) -> Tensor:
        """Apply the head; its frozen weight is cast once, where autocast would cast it in every step."""
        kind = x.device.type
        if type(self.head) is not nn.Linear or not torch.is_autocast_enabled(kind):
            return self.head(x)
        if self._cast is None:
            self._cast = self.head.weight.detach().to(torch.get_autocast_dtype(kind))
        return functional.linear(x, self._cast, self.head.bias)

    def parts(self, states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Split states into the last residual [n, width] and each read layer's inputs [n, d_in]."""
        sizes = [self.width, *(memory.d_in for memory in self.layers.values())]
        hidden, *inputs = states.split(sizes, dim=1)
        return hidden, dict(zip(self.layers, inputs, strict=True))

    def rows_of(self, examples: Sequence[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield float32 states [n, width + sum d_in] on the CPU and labels [n], a few records at a time."""
        parameter = next(self.model.parameters())
        exact = precision_of(self.model) == "float32"
        step = 1 if exact and parameter.device.type == "cpu" else READ_AT_ONCE
        parts = (examples[first : first + step] for first in range(0, len(examples), step))
        batches = [collate(part, self.pad_token_id) for part in parts]
        for batch, seen in layer_inputs(self.model, batches, further={_NORM: self.norm}):
            predicts = supervised(batch)[0]
            columns = [
                seen[name][predicts.to(seen[name].device)].float().cpu() for name in (_NORM, *self.layers)
            ]
            labels = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
            yield torch.cat(columns, 1), labels[batch["attention_mask"].bool()][predicts]

    def agrees(self, example: dict[str, Any]) -> bool:
        """Whether the logits from cached states are the model's logits, within AGREEMENT."""
        with torch.no_grad(), autocast(self.model):
            ((states, _),) = self.rows_of([example])
            device = next(self.model.parameters()).device
            ours = self.logits(states.to(device)).float()
            batch = {key: value.to(device) for key, value in collate([example], self.pad_token_id).items()}
            predicts = supervised(batch)[0]
            theirs = self.model(input_ids=batch["input_ids"]).logits[0][predicts].float()
        return bool((ours - theirs).abs().max() <= AGREEMENT * theirs.abs().max())


class _Inner(nn.Module):
    """Stands for the model within a causal language model, and for each of its parts: its output is the
    final norm of `state`."""

    def __init__(self, norm: nn.Module, inner: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.state: Tensor | None = None
        # not as a part of this module
        self._for = (inner,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            held = getattr(self._for[0], name)
            return self if isinstance(held, nn.Module) else held

    def forward(self, *_: Any, **__: Any) -> "_InnerOutput":
        return _InnerOutput((self.norm(self.state),))


class _InnerOutput(tuple):
    """Whatever else a model reads from the output of the model within is None."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


def _shell(base: nn.Module, inner: str, norm: nn.Module) -> nn.Module:
    """A copy of the outer model that shares all parts but one."""
    shell = copy.copy(base)
    vars(shell)["_modules"] = {**base._modules, inner: _Inner(norm, base.get_submodule(inner))}
    return shell


class StateRows(Dataset):
    """The supervised positions of records; `[i]`: `{"states": [n, width + sum d_in], "labels": [n]}`.

    Without the cache `states` is the record itself, and each step computes the states.
    """

    def __init__(
        self, head: TailHead, examples: Sequence[dict[str, Any]], cache_bytes: int, folder: Path
    ) -> None:
        """Compute the states. More than `cache_bytes` of them go to a file in `folder`; 0: no cache."""
        self.examples = examples
        labels = [[label for label in one["labels"][1:] if label != -100] for one in examples]
        self.labels = [torch.tensor(one) for one in labels]
        ends = torch.tensor([len(one) for one in labels]).cumsum(0).tolist()
        self.spans = list(zip([0, *ends[:-1]], ends, strict=True))
        self.rows = self._computed(head, ends[-1], cache_bytes, folder) if cache_bytes else None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        begin, end = self.spans[index]
        states = self.examples[index] if self.rows is None else self.rows[begin:end]
        return {"states": states, "labels": self.labels[index]}

    def supervised(self, head: TailHead, number: int) -> Supervised:
        """States of random records with at least `number` supervised positions; all if there are fewer."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        sizes = torch.tensor([len(one) for one in self.labels])
        num_drawn = int((sizes[order].cumsum(0) < number).sum()) + 1
        chosen = sorted(order[:num_drawn].tolist())
        if self.rows is None:
            parts = [rows for rows, _ in head.rows_of([self.examples[index] for index in chosen])]
        else:
            parts = [self.rows[slice(*self.spans[index])] for index in chosen]
        _, inputs = head.parts(torch.cat(parts))
        start = [answer_starts(self.examples[index]["labels"]) for index in chosen]
        return Supervised(inputs, torch.tensor(chosen).repeat_interleave(sizes[chosen]), torch.cat(start))

    def _computed(self, head: TailHead, number: int, cache_bytes: int, folder: Path) -> Tensor:
        width = head.width + sum(memory.d_in for memory in head.layers.values())
        read = tqdm(head.rows_of(self.examples), desc="states", total=None, leave=False, delay=5)
        if 4 * number * width <= cache_bytes:
            return torch.cat([rows for rows, _ in read])
        path = folder / f"states-{self._digest(head)}.f32"
        if not path.exists():
            logger.info("writing the states of %d positions to %s", number, path)
            write_atomically(path, lambda part: _write_rows(part, read))
        return torch.from_file(str(path), size=number * width, dtype=torch.float32).view(number, width)

    def _digest(self, head: TailHead) -> str:
        text = repr([(one["input_ids"], one["labels"]) for one in self.examples])
        text += fingerprint_base(head.model) + repr(list(head.layers))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def collate_states(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate a batch for `TailHead`: states of all supervised positions, or the records, labels [n], and
    how many of these each record has."""
    states = [item["states"] for item in items]
    labels = torch.cat([item["labels"] for item in items])
    return {
        "states": torch.cat(states) if isinstance(states[0], Tensor) else states,
        "shift_labels": labels,
        "labels": labels,
        "sizes": torch.tensor([len(item["labels"]) for item in items]),
    }


def train_states(
    model: Any, examples: Sequence[dict[str, Any]], pad_token_id: int, cache_bytes: int, folder: Path
) -> tuple[TailHead, StateRows] | None:
    """The head and states that a tail memory trains on; None if anything else trains or they do not fit.

    Args:
        cache_bytes, folder: as for `StateRows`.
    """
    others = [n for n, p in model.named_parameters() if p.requires_grad and "sparse_memory_" not in n]
    if not writes_last(memory_layers(model)) or others or model.get_output_embeddings() is None:
        return None
    head = TailHead(model, pad_token_id)
    if not head.agrees(examples[0]):
        logger.warning(
            "the logits of %s do not come from final norm and head alone; training uses the whole model",
            type(model.get_base_model()).__name__,
        )
        return None
    return head, StateRows(head, examples, cache_bytes, folder)


def _write_rows(path: Path, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
    with path.open("wb") as file:
        for rows, _ in parts:
            file.write(rows.numpy().tobytes())


def answer_starts(labels: Sequence[int]) -> Tensor:
    """[n] bool: at which of a record's supervised positions an answer starts."""
    now = torch.tensor(list(labels)) != -100
    return ~now[:-1][now[1:]]


_NORM = "norm"
