"""The part of a patch for one memory layer: changed rows, and the added scope.

The functions make it, check it, write it into a memory, and convert it to the tensors of a file and back.
`tensors` does the same for tensors without slots.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..artifacts import ArtifactError
from ..layer.facts import FACT_PARTS
from ..layer.memory import ProductKeyMemory
from ..layer.scope import SCOPE_TENSORS, Scope, empty_tensor
from ..layer.space import SPACE_TENSORS
from .space import lookup, no_space, space_digest
from .tensors import same_bytes

_REPLACED = "since: the scope of {name} was replaced, not extended; use set_scope(..., extend=True)"


@dataclass
class LayerPatch:
    """What one run changed in one memory layer. All tensors are on the CPU.

    Attributes:
        slots: [n] int64, ascending.
        before, after: [n, d_out], the rows before and after the run.
        addressing: fingerprint of the layer's addressing before the run.
        scope: the scope that the run added, or None.
        space: digest of the scope's space, if the patch refers to it. The scope's own space is empty then.
    """

    slots: Tensor
    before: Tensor
    after: Tensor
    addressing: str
    scope: Scope | None = None
    space: str | None = None

    def referring(self) -> "LayerPatch":
        """The same, but it refers to the space of its scope by digest and does not contain it."""
        if self.scope is None or self.space is not None:
            return self
        return replace(
            self, scope=replace(self.scope, space=no_space()), space=space_digest(self.scope.space)
        )


def diff_layer(
    name: str, memory: ProductKeyMemory, before: Mapping[str, Tensor], addressing: str
) -> LayerPatch:
    """Make the LayerPatch of one layer.

    Args:
        name: of the layer.
        memory: the layer now.
        before: the tensors before, as `since` of `RowPatch.diff`.
        addressing: fingerprint of the addressing before.

    Raises:
        ValueError: `before` has no table of this layer, a table of another shape, or a scope that is not part
            of the present one.
    """
    old = lookup(before, name, "values")
    if old is None:
        raise ValueError(
            f"since: has no value table of {name}; pass RowPatch.snapshot(model) or an adapter folder"
        )
    new = memory.values.detach().cpu()
    if old.shape != new.shape:
        raise ValueError(
            f"since: the table of {name} has shape {tuple(old.shape)}, the model's has {tuple(new.shape)}; "
            "pass a snapshot of this model"
        )
    old = old.detach().cpu().to(new.dtype)
    # Compare bytes, not values, so that 0.0 and -0.0, or two different NaNs, count as different.
    slots = (_as_ints(old) != _as_ints(new)).any(1).nonzero().flatten()
    patch = LayerPatch(slots, old[slots].clone(), new[slots].clone(), addressing)
    first, last = _scope_in(before, name), None if memory.scope is None else memory.scope.copy()
    if last is not None:
        try:
            patch.scope = last if first is None else last.without(first)
        except ValueError as error:
            raise ValueError(_REPLACED.format(name=name)) from error
    elif first is not None:
        raise ValueError(_REPLACED.format(name=name))
    return patch


def checked_scope(name: str, memory: ProductKeyMemory, layer: LayerPatch, *, forward: bool) -> Scope | None:
    """Check that a patch of one layer can be applied or reverted, and compute the scope after that.

    Args:
        name: of the layer.
        memory: the layer now. Not changed.
        layer: the patch of this layer.
        forward: True to apply the patch, False to revert it.

    Raises:
        ArtifactError: the rows do not fit the table, are not as they must be, or the scope cannot be added or
            removed.
    """
    if layer.after.shape[1] != memory.d_out or (
        len(layer.slots) and int(layer.slots[-1]) >= memory.num_slots
    ):
        raise ArtifactError(
            f"patch: the rows of {name} do not fit a table of {memory.num_slots} x {memory.d_out}; "
            "use the adapter that it was made with"
        )
    present = memory.values[layer.slots.to(memory.values.device)].cpu()
    expected = layer.before if forward else layer.after
    if not same_bytes(present, expected.to(present.dtype)):
        state = "before the patch" if forward else "after it"
        raise ArtifactError(
            f"patch: rows of {name} are not as they were {state}; apply patches in order, revert in reverse "
            "order"
        )
    now = None if memory.scope is None else memory.scope.copy()
    if layer.scope is None:
        if forward and now is not None and len(layer.slots):
            raise ArtifactError(
                f"patch: has no scope but {name} has one, so the gate would be 0 for what the patch teaches; "
                "call clear_scope(model) first"
            )
        return now
    if not forward:
        try:
            return None if now is None else now.without(layer.scope)
        except ValueError as error:
            raise ArtifactError(
                f"patch: its scope is not in {name}, so it is not applied now; apply it before reverting it"
            ) from error
    if now is None:
        if memory.values.any():
            raise ArtifactError(
                f"patch: has a scope, but {name} has rows that were written without one, and the gate would "
                "be 0 for what they teach; revert the patches that wrote them first"
            )
        return layer.scope
    if not now.same_space(layer.scope):
        raise ArtifactError(
            f"patch: its scope of {name} was made with another background than the model's; "
            "make both with the same background"
        )
    return now.joined(layer.scope)


@torch.no_grad()
def write_layer(memory: ProductKeyMemory, layer: LayerPatch, scope: Scope | None, *, forward: bool) -> None:
    """Write the rows after (forward) or before into a memory, and set its scope. Check first."""
    rows = layer.after if forward else layer.before
    memory.values[layer.slots.to(memory.values.device)] = rows.to(memory.values)
    memory.scope = scope


def is_after(tensors: Mapping[str, Tensor], name: str, layer: LayerPatch) -> bool:
    """Whether the rows of a layer in an adapter's saved tensors are as they were after the run."""
    values = lookup(tensors, name, "values")
    if values is None or (layer.slots.numel() and int(layer.slots[-1]) >= len(values)):
        return False
    return same_bytes(values[layer.slots], layer.after.to(values.dtype))


def packed_layer(name: str, layer: LayerPatch) -> dict[str, Tensor]:
    """The tensors of a layer for a file, in bfloat16 where that loses nothing; rows of zeros are left out."""
    held = {"slots": layer.slots, "after": _smallest(layer.after)}
    if layer.before.any():
        held["before"] = _smallest(layer.before)
    if layer.scope is not None:
        parts = layer.scope.tensors()
        kept = [key for key in SCOPE_TENSORS if layer.space is None or key not in SPACE_TENSORS]
        # an empty tensor has nothing to say
        held |= {f"scope_{key}": _smallest(parts[key]) for key in kept if parts[key].numel()}
    return {f"{name}/{key}": value for key, value in held.items()}


def _smallest(tensor: Tensor) -> Tensor:
    """In fewer bits, if that loses nothing."""
    if not tensor.is_floating_point():
        small = tensor.to(torch.int32)
        return small if torch.equal(small.to(tensor.dtype), tensor) else tensor
    rounded = tensor.to(torch.bfloat16)
    return rounded if torch.equal(rounded.to(tensor.dtype), tensor) else tensor


def unpacked_layer(
    path: str | Path, tensors: Mapping[str, Tensor], name: str, addressing: str, space: str | None = None
) -> LayerPatch:
    """The opposite of `packed_layer`.

    Args:
        path: the file, for error messages.
        tensors: all tensors of the file.
        name: of the layer.
        addressing: fingerprint of the addressing before.
        space: digest of the space that the scope refers to, or None if the file contains it.

    Raises:
        ArtifactError: tensors of the layer are missing or contradict each other.
    """
    held = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
    problem = _problem(held, space)
    if problem:
        raise ArtifactError(f"{path}: layer {name}: {problem}; get an undamaged copy")
    scope = _scope_from(held) if space or any(key.startswith("scope_") for key in held) else None
    after = held["after"].float()
    before = held["before"].float() if "before" in held else torch.zeros_like(after)
    return LayerPatch(held["slots"], before, after, addressing, scope, space)


def _problem(held: dict[str, Tensor], space: str | None) -> str | None:
    """What is wrong with the tensors of a layer, or None."""
    if (
        not {"slots", "after"} <= held.keys()
        or held["slots"].dtype != torch.int64
        or held["slots"].dim() != 1
    ):
        return "slots or rows are missing or have the wrong dtype or shape"
    slots, after, before = held["slots"], held["after"], held.get("before", held["after"])
    if after.dim() != 2 or len(after) != len(slots) or before.shape != after.shape:
        return "slots and rows differ in number or shape"
    if len(slots) and (int(slots[0]) < 0 or not bool((slots[1:] > slots[:-1]).all())):
        return "slots are negative, not in order, or not unique"
    if not all(bool(t.isfinite().all()) for t in held.values() if t.is_floating_point()):
        return "contains NaN or infinite numbers"
    unknown = sorted(key for key in held if key.startswith("scope_") and key[6:] not in SCOPE_TENSORS)
    if unknown:
        return f"{unknown[0]} is no part of a scope; the patch was made by another version"
    if space and not any(key.startswith("scope_") for key in held):
        return "parts of the scope are missing"
    return _scope_problem(_scope_from(held), after.shape[1]) if space or "scope_mean" in held else None


def _scope_from(held: Mapping[str, Tensor]) -> Scope:
    """The scope of a layer's tensors in a file; parts that are not there are empty."""
    parts = {}
    for key in SCOPE_TENSORS:
        empty = empty_tensor(key)
        parts[key] = held[f"scope_{key}"].to(empty.dtype) if f"scope_{key}" in held else empty
    return Scope.from_tensors(parts)


def _scope_problem(scope: Scope, d_out: int) -> str | None:
    """What does not fit together in a scope, or None."""
    facts, wrong = scope.facts, "the shapes of the scope's parts do not fit together"
    centres, number = len(scope.centres), len(facts)
    if any(getattr(scope, key).shape != (centres,) for key in ("lo", "hi")) or not all(
        part.dim() == dims
        for part, dims in [(scope.centres, 2), (scope.task_known, 2), (facts.names, 2), (facts.rows, 2)]
    ):
        return wrong
    if number == 0:
        return None if not len(facts.answers) and not len(facts.rows) and not len(facts.names) else wrong
    dims = {
        "fact_ids": 1,
        "fact_keys": 2,
        "fact_states": 2,
        "fact_least": 2,
        "fact_openings": 2,
        "fact_sizes": 1,
    }
    if any(
        getattr(facts, key).dim() != dims[key] or len(getattr(facts, key)) != number for key in FACT_PARTS
    ):
        return wrong
    if facts.fact_least.shape[1] != 2 or facts.fact_openings.shape[1] != 2 or facts.answers.dim() != 1:
        return wrong
    if bool((facts.fact_sizes < 1).any()) or int(facts.fact_sizes.clamp(0, 1 << 40).sum()) != len(
        facts.answers
    ):
        return "the sizes of answers do not fit their tokens"
    if len(facts.rows) and facts.rows.shape != (len(facts.answers), d_out):
        return wrong
    if len(facts.fact_ids.unique()) < number or bool((facts.fact_ids == 0).any()):
        return "facts have no identity of their own"
    if len(facts.names) and not bool(torch.isin(facts.names[:, 0], facts.fact_ids).all()):
        return "a name belongs to no fact"
    if len(facts.names) and (facts.names.shape[1] < 2 or bool((facts.names[:, 1] < 0).any())):
        return "a name has no tokens"
    return None


def _scope_in(tensors: Mapping[str, Tensor], name: str) -> Scope | None:
    parts = {key: lookup(tensors, name, f"scope_{key}") for key in SCOPE_TENSORS}
    held = {key: part.cpu() for key, part in parts.items() if part is not None}
    scope = Scope.from_tensors({key: held.get(key, empty_tensor(key)) for key in SCOPE_TENSORS})
    return None if scope.is_empty else scope


def _as_ints(rows: Tensor) -> Tensor:
    return rows.contiguous().view({4: torch.int32, 2: torch.int16}[rows.element_size()])
