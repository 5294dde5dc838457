"""Facts: which taught answer is given at a token, by two keys and by the answer's own tokens.

A fact is one taught question with its answer. Its answer begins at a token where three things hold:

1. About whom. A name of its subject occurs in the context of the token, in the last turn. A fact without a
   subject has no such condition.
2. What is asked. The cosine of the token's question key (see `space`) to the fact's own is at least the
   fact's first threshold.
3. Nearness. The score of the token's late state is at least the fact's second threshold: its cosine to the
   fact's own, less what nearness to known states counts. A fact with a subject has a threshold that every
   state passes.

Where a chat template makes the tokens before an answer, they are compared too. Of several facts the one whose
subject was named last is taken, then the longer name, the nearer question key, the later fact.

The answer continues as long as the context continues with its tokens. So an answer that has begun is given to
its end, and no answer is given from its middle. This depends on the tokens of the context and on the base's
states alone, so it is the same with and without a KV cache (law 15).

Reference: ours (no paper). dev/LOG.md has the measurements.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .space import Space, nearest_known


@dataclass(frozen=True)
class Facts:
    """Facts in the order of teaching. Tensors are float32 or int64.

    Attributes:
        fact_ids [num_facts]: an identity that no other fact has; not 0.
        fact_keys [num_facts, key_width]: question keys, of length 1.
        fact_states [num_facts, d]: whitened late states, of length 1.
        fact_least [num_facts, 2]: the thresholds of question key and late state.
        fact_openings [num_facts, 2]: the two tokens before the answer; -1: any.
        fact_sizes [num_facts]: number of tokens of each answer.
        names [num_names, 1 + length]: names of subjects: the fact's identity, then token classes, filled up
            with -1. A fact may have several names, or none.
        answers [num_tokens]: the tokens of all answers, one after another.
        rows [num_tokens, d_out]: what is added to the residual stream where the token is to be predicted;
            [0, 0] if a table holds it.
    """

    fact_ids: Tensor
    fact_keys: Tensor
    fact_states: Tensor
    fact_least: Tensor
    fact_openings: Tensor
    fact_sizes: Tensor
    names: Tensor
    answers: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.fact_ids)

    @cached_property
    def first(self) -> Tensor:
        """[num_facts], the place of each fact's first token among `answers`."""
        return self.fact_sizes.cumsum(0) - self.fact_sizes

    @cached_property
    def fact_of_token(self) -> Tensor:
        """[num_tokens], the place of the fact that each token of `answers` belongs to."""
        return torch.arange(len(self), device=self.fact_ids.device).repeat_interleave(self.fact_sizes)

    @cached_property
    def openings(self) -> list[list[int]]:
        """The different pairs of `fact_openings`."""
        return self.fact_openings.unique(dim=0).tolist()

    @cached_property
    def place_of(self) -> dict[int, int]:
        """The place of each fact by its identity."""
        return {one: place for place, one in enumerate(self.fact_ids.tolist())}

    @cached_property
    def on_host(self) -> "Facts":
        """The same with all whole numbers on the CPU, where names are looked up and answers are followed."""
        if self.fact_ids.is_cpu:
            return self
        whole = {key: getattr(self, key) for key in FACT_TENSORS}
        return replace(self, **{key: one.cpu() for key, one in whole.items() if not one.is_floating_point()})

    @cached_property
    def index(self) -> "NameIndex":
        return NameIndex(self)

    def chosen(self, kept: Tensor) -> "Facts":
        """The facts of a mask [num_facts] bool."""
        tokens = kept.repeat_interleave(self.fact_sizes)
        names = self.names[torch.isin(self.names[:, 0], self.fact_ids[kept])]
        length = int((names >= 0).sum(1).amax()) if len(names) else 1
        parts = {key: getattr(self, key)[kept] for key in FACT_PARTS}
        rows = self.rows[tokens] if len(self.rows) else self.rows
        return Facts(**parts, names=names[:, :length], answers=self.answers[tokens], rows=rows)

    def without(self, other: "Facts") -> "Facts":
        """The facts that another table does not hold.

        Raises:
            ValueError: a fact of the other table is not here.
        """
        taken = torch.isin(self.fact_ids, other.fact_ids)
        if int(taken.sum()) != len(other):
            raise ValueError("these facts are not in the scope")
        left = self.chosen(~taken)
        return left if left.rows.any() else replace(left, rows=left.rows.new_zeros(0, 0))


FACT_TENSORS = tuple(field.name for field in fields(Facts))
FACT_PARTS = tuple(key for key in FACT_TENSORS if key.startswith("fact_"))


def no_facts() -> Facts:
    """A table without facts."""
    real, whole = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    return Facts(
        fact_ids=whole,
        fact_keys=real.new_zeros(0, 0),
        fact_states=real.new_zeros(0, 0),
        fact_least=real.new_zeros(0, 2),
        fact_openings=whole.new_zeros(0, 2),
        fact_sizes=whole,
        names=whole.new_zeros(0, 1),
        answers=whole,
        rows=real.new_zeros(0, 0),
    )


def joined_facts(several: Sequence[Facts]) -> Facts:
    """The facts of several tables, one table after another."""
    held = [one for one in several if len(one)] or list(several[:1])
    if len(held) == 1:
        return held[0]
    length, width = (
        max(part.shape[1] for part in parts) for parts in zip(*((o.names, o.rows) for o in held), strict=True)
    )
    names = [F.pad(one.names, (0, length - one.names.shape[1]), value=-1) for one in held]
    rows = [one.rows if len(one.rows) else one.rows.new_zeros(len(one.answers), width) for one in held]
    parts = {key: torch.cat([getattr(one, key) for one in held]) for key in (*FACT_PARTS, "answers")}
    return Facts(**parts, names=torch.cat(names), rows=torch.cat(rows) if width else held[0].rows)


class Context(NamedTuple):
    """The tokens of a batch up to the end of the present forward pass.

    Attributes:
        ids: [batch, total] int64; -1 at padding, and where the token is not known.
        given: [batch, past, 2] int64, for each token of earlier passes: the identity of the fact whose answer
            was given there, or 0, and the number of its token.
    """

    ids: Tensor
    given: Tensor


class Found(NamedTuple):
    """A name in a context: of which fact (by place), where its last token is, and how long it is.

    `is_whole` is False if the token after it goes on with its last word.
    """

    fact: int
    end: int
    length: int
    is_whole: bool


class NameIndex:
    """Finds the names of many facts in a context, in a time that does not grow with their number."""

    def __init__(self, facts: Facts) -> None:
        names = facts.names[:, 1:]
        lengths = (names >= 0).sum(1)
        places = [facts.place_of[one] for one in facts.names[:, 0].tolist()]
        fact = torch.tensor(places, dtype=torch.int64, device=names.device)
        self.nameless = dict.fromkeys(
            (~torch.isin(facts.fact_ids, facts.names[:, 0])).nonzero().flatten().tolist()
        )
        self.lengths = lengths.unique().tolist()
        # for each length: hashes in ascending order, and the names and facts in the same order
        self._held = {}
        for length in self.lengths:
            chosen = (lengths == length).nonzero().flatten()
            hashes, order = _hashes(names[chosen, :length]).sort(stable=True)
            self._held[length] = (hashes, names[chosen, :length][order], fact[chosen][order])
        self._first = names[:, 0].unique() if names.shape[1] else names.flatten()

    def found(self, classes: Tensor, edges: Tensor) -> list[Found]:
        """All names in one context, given as token classes and edges [total]."""
        # a name begins with a word
        goes_on = F.pad((edges[:-1] >= 2) & (edges[1:] % 2 == 1), (1, 1))
        begins = (torch.isin(classes, self._first) & ~goes_on[:-1]).nonzero().flatten()
        found = []
        for length in self.lengths if len(begins) else []:
            at = begins[begins + length <= len(classes)]
            if not len(at):
                continue
            windows = classes[at[:, None] + torch.arange(length, device=at.device)]
            hashes, names, facts = self._held[length]
            wanted = _hashes(windows)
            low, high = torch.searchsorted(hashes, wanted), torch.searchsorted(hashes, wanted, right=True)
            for place in (high > low).nonzero().flatten().tolist():
                for held in range(int(low[place]), int(high[place])):
                    if torch.equal(names[held], windows[place]):
                        end = int(at[place]) + length - 1
                        found.append(Found(int(facts[held]), end, length, not goes_on[end + 1]))
        return found


def given_at(facts: Facts, space: Space, context: Context, late: Tensor, middle: Tensor | None) -> Tensor:
    """Which token of `answers` is to be predicted at each token of the pass: [batch, new] int64, -1 for none.

    Args:
        late: [batch, new, d], states of the gate's layer.
        middle: [batch, new, width], states of the middle layers; None: as if no question were asked.
    """
    device, past = context.ids.device, context.given.shape[1]
    size = (len(context.ids), context.ids.shape[1] - past)
    if not len(facts):
        return context.ids.new_full(size, -1)
    facts, places = facts.on_host, torch.full(size, -1)
    # all tokens, and what was given at the last one before: the host waits once
    held = torch.cat([context.ids, *([context.given[:, -1]] if past else [])], 1).cpu()
    ids = held[:, : context.ids.shape[1]]
    if past:
        _continue_past(facts, ids[:, past:], held[:, -2:], places)
    starts = _possible_starts(facts, ids, past)
    if middle is None or not len(starts):
        return places.to(device, non_blocking=True)
    row_of, at = (one.to(device, non_blocking=True) for one in (starts[:, 0], starts[:, 1] - past))
    keys, z = space.keys(middle[row_of, at]), space.late(late[row_of, at])
    known = space.known_weight * nearest_known(z, space.known)
    numbers = starts[:, 0].unique_consecutive(return_counts=True)
    first = 0
    for row, number in zip(*(one.tolist() for one in numbers), strict=True):
        chosen = slice(first, first + number)
        first += number
        begun = _begun(facts, space, ids[row], starts[chosen, 1], keys[chosen], z[chosen], known[chosen])
        for position, fact in begun:
            # an answer that has begun is given to its end
            if places[row, position - past] < 0:
                places[row, position - past] = int(facts.first[fact])
                _continue(facts, places[row], ids[row, past:], position - past + 1, fact, 1)
    return places.to(device, non_blocking=True)


def noted(facts: Facts, places: Tensor) -> Tensor:
    """What a later pass has to know of places [batch, new]: `Context.given` [batch, new, 2]."""
    inside = places >= 0
    at = places.clamp_min(0)
    fact = facts.fact_of_token[at] if len(facts) else at
    number = at - facts.first[fact] if len(facts) else at
    ids = facts.fact_ids[fact] if len(facts) else at
    return torch.stack([ids, number], -1) * inside[..., None]


def _possible_starts(facts: Facts, ids: Tensor, past: int) -> Tensor:
    """[n, 2] (row, position) of new tokens at which an answer may begin, by the tokens alone."""
    now, before = ids[:, past:], F.pad(ids, (1, 0), value=-1)[:, past:-1]
    may = torch.zeros_like(now, dtype=torch.bool)
    for first, second in facts.openings:
        fits = now >= 0 if second < 0 else now == second
        may |= fits if first < 0 else fits & (before == first)
    places = may.nonzero()
    places[:, 1] += past
    return places


def _begun(
    facts: Facts, space: Space, ids: Tensor, positions: Tensor, keys: Tensor, z: Tensor, known: Tensor
) -> list[tuple[int, int]]:
    """(position, fact) of the answers that begin in one row, in the order of positions.

    Args:
        ids: [total], the row's tokens.
        positions [n], keys [n, key_width], z [n, d], known [n]: of the tokens at which an answer may begin;
            the whitened states and what nearness to known states takes off their scores.
    """
    names = facts.index.found(*space.on_host.classes_of(ids))
    candidates = [*dict.fromkeys(one.fact for one in names), *facts.index.nameless]
    if not candidates:
        return []
    turns = _ends_of(ids, space.on_host.turn)
    at = torch.tensor(candidates)
    before = F.pad(ids, (1, 0), value=-1)[positions]
    openings, last_two = facts.fact_openings[at], torch.stack([before, ids[positions]], 1)
    at = at.to(keys.device, non_blocking=True)
    near, least = keys @ facts.fact_keys[at].T, facts.fact_least[at].T
    fits = (near >= least[0]) & (z @ facts.fact_states[at].T - known[:, None] >= least[1])
    # -2 is below every cosine
    near = near.where(fits, -2.0).cpu()
    open_ = ((openings == -1) | (openings == last_two[:, None])).all(-1) & (near > -2.0)
    best: dict[int, tuple[int, int, float, int]] = {}
    for number, place in open_.nonzero().tolist():
        fact, position = candidates[place], int(positions[number])
        turn = max((end for end in turns if end < position), default=-1)
        named = [
            (one.end, one.length)
            for one in names
            if one.fact == fact
            and turn < one.end
            and (one.end == position or (one.end < position and one.is_whole))
        ]
        if named or fact in facts.index.nameless:
            end, length = max(named, default=(-1, -1))
            rank = (end, length, float(near[number, place]), fact)
            best[position] = max(best.get(position, rank), rank)
    return [(position, rank[-1]) for position, rank in sorted(best.items())]


def _continue(facts: Facts, places: Tensor, ids: Tensor, at: int, fact: int, number: int) -> None:
    """Go on with a fact's answer from its token `number` at new position `at` of a row, in place."""
    size, first = int(facts.fact_sizes[fact]), int(facts.first[fact])
    while number < size and at < len(ids) and ids[at] == facts.answers[first + number - 1]:
        places[at] = first + number
        at, number = at + 1, number + 1


def _continue_past(facts: Facts, ids: Tensor, last: Tensor, places: Tensor) -> None:
    """Go on with the answers that were being given at the last token of the pass before, in place.

    Args:
        ids: [batch, new], the tokens of this pass.
        last: [batch, 2], `Context.given` of the last token before.
    """
    for row in last[:, 0].nonzero().flatten().tolist():
        fact = facts.place_of.get(int(last[row, 0]))
        if fact is not None:
            _continue(facts, places[row], ids[row], 0, fact, int(last[row, 1]) + 1)


def _ends_of(ids: Tensor, run: Tensor) -> list[int]:
    """Positions at which a run of tokens [n] ends in ids [total]."""
    if not len(run) or len(ids) < len(run):
        return []
    same = (ids.unfold(0, len(run), 1) == run).all(1)
    return (same.nonzero().flatten() + len(run) - 1).tolist()


def _hashes(runs: Tensor) -> Tensor:
    """[n] int64 hashes of runs [n, length] of token classes."""
    # odd factors, so that each step loses nothing; the sum overflows as it may
    total = torch.zeros(len(runs), dtype=torch.int64, device=runs.device)
    for column in runs.unbind(1):
        total = total * 6364136223846793005 + (column + 1) * 1442695040888963407
    return total
