"""Load pretrained models: a Hub name, a folder, a `.gguf` file, an adapter, `smollm2` or `gemma3-270m`.

The last two come as Python packages. GGUF files, these two's among them, are in `gguf`.
"""

import contextlib
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub.constants
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from ..adapter.saving import load_onto
from ..artifacts import ArtifactError
from .gguf import cache_folder, dequantised, gguf_file, packaged_name
from .names import MODEL_NAMES, check_model


def load_base(
    name: str, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and tokenizer of a packaged model, a folder, a `.gguf` file or a Hub name.

    The model is in eval mode and, as in Trainer, on the accelerator where there is one.

    Raises:
        ValueError: no model can be loaded by this name, or its weights are damaged.
    """
    folder = _folder(name)
    try:
        offline = {"local_files_only": not hub_reachable()}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, adapter_kwargs=offline, **offline)
        tokenizer = AutoTokenizer.from_pretrained(folder, **offline)
    except SafetensorError as error:
        raise _damaged(name, error) from error
    except (OSError, ValueError) as error:
        raise _not_found(name, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device: Any = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.eval().to(device), tokenizer


def load(
    name: str, *, base: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Like `load_base`, and also for an adapter's folder or Hub name.

    An adapter is loaded together with the base model that it names, or with `base`.

    Raises:
        ValueError: no model can be loaded by this name, or the adapter was made for another base model.
    """
    config_file = _adapter_config(name)
    if config_file is None:
        return load_base(name, dtype=dtype)
    folder = Path(name).expanduser()
    base = base or _here(str(_read_adapter_config(name, config_file).get("base_model_name_or_path")))
    model, tokenizer = load_base(base, dtype=dtype)
    return add_adapter(model, str(folder) if folder.is_dir() else name), tokenizer


def add_adapter(model: PreTrainedModel, name: str) -> PeftModel:
    """Add a saved adapter to its base model, in eval mode and ready to be trained further.

    Args:
        model: the base model, changed in place.
        name: the adapter's folder or Hub name.

    Raises:
        ArtifactError: the adapter is damaged or was made for another base model.
        ValueError: there is no such adapter.
    """
    config_file = _adapter_config(name)
    if config_file is None:
        raise ValueError(f"adapter {name!r} was not found; give a folder with an adapter_config.json")
    _read_adapter_config(name, config_file)
    return load_onto(model, name, trainable=True)


def context_length(model: PreTrainedModel | PeftModel) -> int:
    """How many tokens the model can read; a number without effect where its config names none."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    return next((length for name in names if (length := getattr(config, name, None) or 0) > 0), 1 << 30)


def tokenizer_of(model: PreTrainedModel | PeftModel) -> PreTrainedTokenizerBase:
    """The tokenizer that is found by the model's own name.

    Raises:
        ValueError: there is none; the caller has to give one.
    """
    name = getattr(model.config, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer is found by the model's name {name!r}; pass tokenizer=") from error


@contextlib.contextmanager
def cache_without_hub():
    """Within the block, the Hub's client uses only its cache if the Hub's host name does not resolve."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        huggingface_hub.constants.HF_HUB_OFFLINE = before or not hub_reachable()
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def hub_reachable() -> bool:
    """Whether the Hub's host name resolves. Without a network its client would retry for most of a minute."""
    if getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, None))
    except OSError:
        return False


def _adapter_config(name: str) -> Path | None:
    """Path of the adapter's config, in a folder or from the Hub; None for a base model."""
    path = Path(name).expanduser()
    if path.exists() or name.count("/") != 1 or name.startswith((".", "~", "/")):
        file = path / "adapter_config.json"
        return file if file.is_file() else None
    found = find_adapter_config_file(name, local_files_only=not hub_reachable())
    return None if found is None else Path(found)


def _read_adapter_config(name: str, path: Path) -> dict[str, Any]:
    """Raises:
    ArtifactError: it is not the JSON of an adapter.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"adapter {name!r} has a config that cannot be read ({error}); get an undamaged copy"
        ) from error
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if kind not in list(PEFT_TYPE_TO_CONFIG_MAPPING):
        raise ArtifactError(
            f"adapter {name!r} has a config of the unknown kind {kind!r}; get an undamaged copy"
        )
    return content


def _here(base: str) -> str:
    """Where this machine has an adapter's base model; the adapter may name another machine's cache folder."""
    copy = Path(base)
    if copy.is_dir() or ".gguf-" not in copy.name:
        return base
    if packaged := packaged_name(copy.name):
        return packaged
    if not (cache_folder() / copy.name).is_dir():
        gguf = copy.name.rpartition("-")[0]
        raise ValueError(
            f"the adapter's base model is a copy of {gguf}, which is not in {cache_folder()}; "
            f"load that file once, for example with `sparsemem chat {gguf}`, and try again"
        )
    return str(cache_folder() / copy.name)


def _folder(name: str) -> str:
    """The local folder that a name stands for, or the name itself where it is a Hub name."""
    if gguf := gguf_file(name):
        return dequantised(gguf)
    check_model(name)
    path = Path(name).expanduser()
    return str(path) if path.is_dir() else name


def _damaged(name: str, error: Exception) -> ValueError:
    return ValueError(f"the weights of model {name!r} are damaged ({error}); download or copy it again")


def _not_found(name: str, error: Exception) -> ValueError:
    first_line = str(error).strip().split("\n")[0]
    return ValueError(f"model {name!r} was not found ({first_line}); give {MODEL_NAMES}")
