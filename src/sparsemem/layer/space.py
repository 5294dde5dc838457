"""The space of a gate: how states are compared, and how the context of a token is read.

It comes from the base model, its tokenizer and a background alone. Everything taught with one base shares it.

Late states are whitened: unit vectors in which the background's states have no preferred direction. The
question key is a projection of the states of several middle layers, fitted so that questions for the same
relation have nearly the same key whoever they are about (`background.question_key`).

Reference: ours (no paper).
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Space:
    """Tensors are float32 or int64. Those of the question key and of the context may be empty.

    Attributes:
        mean [d], whitener [d, d]: of late states.
        known [num_known, d], known_weight [1]: whitened states of what the base knows, and how much nearness
            to them counts.
        key_mean [width], key_projection [width, key_width]: of the states of the middle layers, side by side.
        classes [vocabulary]: class of each token; tokens that are one word piece in different spelling have
            one class. -1: of no class.
        edges [vocabulary]: 1 if the token's first character may continue a word, plus 2 if another token may
            continue its last one.
        turn [n]: the tokens with which a user's turn begins in a chat template.
    """

    mean: Tensor
    whitener: Tensor
    known: Tensor
    known_weight: Tensor
    key_mean: Tensor
    key_projection: Tensor
    classes: Tensor
    edges: Tensor
    turn: Tensor

    def same(self, other: "Space") -> bool:
        return all(torch.equal(getattr(self, key), getattr(other, key)) for key in SPACE_TENSORS)

    @cached_property
    def on_host(self) -> "Space":
        """The same with what reads the context on the CPU."""
        if self.classes.is_cpu:
            return self
        held = {"classes": self.classes, "edges": self.edges, "turn": self.turn}
        return replace(self, **{key: one.cpu() for key, one in held.items()})

    def late(self, states: Tensor) -> Tensor:
        """Whitened states [n, d] float32 of length 1, of states [n, d]."""
        return whiten(states, self.mean, self.whitener)

    def keys(self, states: Tensor) -> Tensor:
        """Question keys [n, key_width] float32 of length 1, of states [n, width] of the middle layers."""
        return F.normalize((states.float() - self.key_mean) @ self.key_projection, dim=-1)

    def classes_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Classes and edges of token ids of any shape; -1 and 0 for an id that is no token."""
        # a model may have more tokens than its tokenizer
        known = (ids >= 0) & (ids < len(self.classes))
        at = ids.clamp(0, len(self.classes) - 1)
        return torch.where(known, self.classes[at], -1), torch.where(known, self.edges[at], 0)


SPACE_TENSORS = tuple(field.name for field in fields(Space))


def plain_space(mean: Tensor, whitener: Tensor, known: Tensor, known_weight: float) -> Space:
    """A space of late states alone."""
    none, whole = mean.new_zeros(0), torch.zeros(0, dtype=torch.int64)
    weight = mean.new_tensor([known_weight])
    return Space(mean, whitener, known, weight, none, mean.new_zeros(0, 0), whole, whole, whole)


def whiten(states: Tensor, mean: Tensor, whitener: Tensor) -> Tensor:
    """Whiten states [tokens, d] and scale them to length 1: [tokens, d] float32."""
    return F.normalize((states.float() - mean) @ whitener.T, dim=-1)


def nearest_known(z: Tensor, known: Tensor) -> Tensor:
    """Largest cosine of each state z [tokens, d] to a known state, at least 0: [tokens]."""
    return (z @ known.T).amax(-1).clamp_min(0) if len(known) else z.new_zeros(z.shape[0])
