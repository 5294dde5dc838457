"""A new folder of a stream: the memory that holds nothing, its space, and an empty ledger."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..adapter.blocks import default_targets
from ..adapter.config import SparseMemoryConfig
from ..adapter.model import memory_layers
from ..background.background import Background
from ..background.calibration import calibrate
from ..background.own_space import own_space
from ..data.general import general_background, say_shipped
from ..data.records import batches, encode
from ..files import fingerprint_base
from ..patches.ledger import FILE, Ledger
from ..patches.space import memory_digest, save_spaces, space_digest
from ..provenance import environment
from .cached import TailHead

SPACE_FILE, PATCHES = "space.safetensors", "patches"
BATCH_SIZE = 8


def begin_stream(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    background: Sequence[dict[str, Any]] | None,
    seed: int,
) -> PeftModel:
    """A model with a memory that holds nothing, and its folder, whole or not at all.

    Raises:
        ValueError: a model that cannot be taught so, or a background without answers.
    """
    if background is None:
        say_shipped()
        background = general_background()
    set_seed(seed)
    # PEFT notes the paths in the config that it is given
    prepared: Any = get_peft_model(model, stream_config(model))
    pad = int(tokenizer.pad_token_id or 0)  # type: ignore[arg-type]
    examples = encode(background, tokenizer, max_length=context_length(model))
    head = TailHead(prepared, pad)
    if not head.agrees(examples[0]):
        raise ValueError(
            f"model: the logits of {type(model).__name__} are not those of final norm and head alone; "
            "learn needs a model whose are"
        )
    seen: Background = calibrate(prepared, batches(examples, BATCH_SIZE, pad), seed=seed)
    ((name, memory),) = memory_layers(prepared).items()
    space, thresholds = own_space(seen[name])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as part:
        made = Path(part) / "new"
        prepared.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / PATCHES).mkdir()
        save_spaces(made / SPACE_FILE, {name: space}, {"thresholds": list(thresholds)})
        about = {
            "format": 1,
            "model": getattr(model.config, "name_or_path", ""),
            "base": fingerprint_base(prepared),
            "space": space_digest(space),
            "memory": memory_digest(memory.state_dict()),
            "background": seen.corpus,
            "seed": seed,
            **environment(),
        }
        Ledger.begin(made / FILE, about)
        made.rename(folder)
    return prepared


def stream_config(model: PreTrainedModel) -> SparseMemoryConfig:
    """A memory that reads the deepest of the default layers; its own small table stays empty."""
    deepest = default_targets(model)[-1]
    sizes: dict[str, Any] = {"num_keys": 2, "num_heads": 1, "top_k": 1, "key_dim": 2}
    return SparseMemoryConfig(target_modules=[deepest], task_type="CAUSAL_LM", **sizes)


def context_length(model: Any) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 1 << 30


def write_to(path: Path, write: Any) -> None:
    """Raises:
    OSError: the disk is full, also where the writer calls it something else.
    """
    try:
        write(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error})") from error
