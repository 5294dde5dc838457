"""The SHA-256 of an adapter's saved tensors, and the check of them."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import load_peft_weights
from safetensors import SafetensorError

from ..artifacts import ArtifactError, digest_tensor

logger = logging.getLogger(__name__)


def saved_digests(model_id: str | os.PathLike, **hub: Any) -> dict[str, str]:
    """SHA-256 of an adapter's saved tensors, by name.

    Args:
        model_id: folder of the adapter, or its Hub name.
        hub: options of `hf_hub_download`.
    """
    tensors = load_peft_weights(str(model_id), device="cpu", **hub)
    return {name: digest_tensor(tensor) for name, tensor in sorted(tensors.items())}


def weights_stamp(folder: str | os.PathLike) -> list[tuple[str, int, int]]:
    """Name, time of change and size of an adapter's weight files; empty for a Hub name."""
    paths = sorted(Path(folder).glob("adapter_model.*"))
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]


def verify_tensors(model_id: str | os.PathLike, digests: Mapping[str, str], **hub: Any) -> None:
    """Compare the saved tensors of an adapter with digests.

    Args:
        model_id, hub: as for `saved_digests`.
        digests: from the adapter's config. Without any, there is only a warning: the adapter comes from an
            earlier version or another program.

    Raises:
        ArtifactError: the tensors cannot be read, or differ from the digests.
    """
    if not digests:
        logger.warning(
            "%s has no digests, so damage cannot be found; save the adapter again to add them", model_id
        )
        return
    try:
        found = saved_digests(model_id, **hub)
    except (SafetensorError, EOFError, RuntimeError) as error:
        line = " ".join(str(error).split())
        raise ArtifactError(f"{model_id}: cannot be read ({line}); get an undamaged copy") from error
    wrong = sorted(name for name in {*found, *digests} if found.get(name) != digests.get(name))
    if wrong:
        raise ArtifactError(
            f"{model_id}: {len(wrong)} of its tensors are damaged, missing or from another save (SHA-256 "
            f"differs, first {wrong[0]}); get an undamaged copy"
        )
