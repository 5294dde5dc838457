"""Rows of a task's own: for each supervised position the row that makes its token the likeliest.

A row is fitted alone, to the base's last residual at its position, so that what a task writes depends on the
task and the base and on nothing else. It must also win where the residual is weaker or stronger, since an
unseen wording's differs.

Reference: ours; one key and one value a taught position is GRACE's form (2211.11031), in whitened space and
fitted through norm and head alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .cached import TailHead

STEPS, STEP_SIZE, MOMENTUM = 8, 0.5, 0.5
# The row must win on so many times the residual.
STRENGTHS = (0.5, 1.0, 2.0)
# Positions that are fitted at once; each row's result does not depend on the others.
AT_ONCE = 64


def own_rows(
    head: TailHead,
    residuals: Tensor,
    labels: Tensor,
    progress: Callable[[int, int], object] = lambda _done, _of: None,
) -> Tensor:
    """Rows [n, width] float32 to add to last residuals [n, width], rounded to bfloat16.

    Args:
        labels: [n] int64, the token that each position is to predict.
        progress: gets the number of positions that are done, and n.
    """
    rows = []
    for start in range(0, len(labels), AT_ONCE):
        progress(start, len(labels))
        chosen = slice(start, start + AT_ONCE)
        rows.append(_fitted(head, residuals[chosen], labels[chosen]))
    return torch.cat(rows).to(torch.bfloat16).float()


def _fitted(head: TailHead, residuals: Tensor, labels: Tensor) -> Tensor:
    """Normalised gradient descent with a falling rate; a step is measured by the residual's length."""
    size = residuals.norm(dim=1, keepdim=True)
    rows, moment = torch.zeros_like(residuals), torch.zeros_like(residuals)
    wanted = labels.repeat(len(STRENGTHS))
    for step in range(STEPS):
        with torch.enable_grad():
            rows.requires_grad_(True)
            tried = torch.cat([residuals * strength + rows for strength in STRENGTHS])
            loss = functional.cross_entropy(head.logits_of(tried).float(), wanted, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, rows)
        direction = gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
        moment = torch.lerp(moment, direction, 1 - MOMENTUM)
        rows = rows.detach() - STEP_SIZE * 2 * (1 - step / STEPS) * size * moment
    return rows
