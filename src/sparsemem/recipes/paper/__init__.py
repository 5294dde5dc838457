"""Paper: the protocol of 2605.03229; `compare paper` runs it."""

from .recipe import recipe
from .settings import SETTINGS

__all__ = ["SETTINGS", "recipe"]
