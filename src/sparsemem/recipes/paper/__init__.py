"""Paper: the experiment of 2605.03229; `sparsemem compare paper` runs it."""

from .recipe import recipe
from .settings import SETTINGS

__all__ = ["SETTINGS", "recipe"]
