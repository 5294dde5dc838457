"""The PEFT method that adds memories to a Hugging Face model.

Importing any module of this folder registers the method with PEFT.
"""

from . import registration  # noqa: F401
