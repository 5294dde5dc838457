"""How a memory enters a Hugging Face model, as a PEFT method.

Importing anything of this folder registers the method with PEFT.
"""

from . import registration  # noqa: F401
