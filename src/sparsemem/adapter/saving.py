"""Save an adapter so that a kill leaves the old or the new one, and verify it when it is loaded.

PEFT writes the weights in place and checks nothing. `guard` gives a PeftModel with a sparse memory a
`save_pretrained` and a `load_adapter` of its own, which use PEFT's and add this:

- The files of an adapter are written to a hidden folder and replace the old ones together (`writing`).
- adapter_config.json gets the SHA-256 of each tensor and of what it says itself, and the base's fingerprint.
- Before tensors are loaded they are compared with these digests. The base is compared when the memory is
  added to it (`model`).

The tuner is created inside `PeftModel.__init__`, and nothing hands it the PeftModel. So `guard_owner` waits
for the one call of torch's registration hook in which the PeftModel takes the tuner as its `base_model`.
"""

import os
import shutil
import weakref
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..artifacts import comparable_base, fingerprint_base
from ..atomic import read_json, save_into, write_json
from .config import SparseMemoryConfig, config_digest
from .digests import saved_digests, verify_tensors, weights_stamp

_OTHER_FORMAT = {SAFETENSORS_WEIGHTS_NAME: WEIGHTS_NAME, WEIGHTS_NAME: SAFETENSORS_WEIGHTS_NAME}
_CARD = "README.md"


def guard_owner(tuner: nn.Module) -> None:
    """Guard the PeftModel that takes this tuner as its `base_model`, when it does."""
    waited_for = weakref.ref(tuner)

    def seen(owner: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is waited_for() or waited_for() is None:
            handle.remove()
        if module is not None and module is waited_for() and isinstance(owner, PeftModel):
            guard(owner)

    handle = register_module_module_registration_hook(seen)  # type: ignore[arg-type]
    weakref.finalize(tuner, handle.remove)


def guard(model: PeftModel) -> None:
    """Give a model the functions of this module instead of PEFT's. A copy of the model has them too."""
    vars(model)["save_pretrained"] = partial(save_pretrained, model)
    vars(model)["load_adapter"] = partial(load_adapter, model)


def save_pretrained(model: PeftModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """`PeftModel.save_pretrained`, but each adapter's folder gets all new files or keeps the old ones.

    Raises:
        OSError: the files cannot be written, for example to a full disk. The old ones are unchanged.
    """
    folder = Path(save_directory)
    if not kwargs.get("is_main_process", True) or folder.is_file():
        type(model).save_pretrained(model, str(folder), *args, **kwargs)
        return

    def write(part: Path) -> None:
        if (folder / _CARD).is_file():
            # PEFT keeps what the user added to the card
            shutil.copyfile(folder / _CARD, part / _CARD)
        type(model).save_pretrained(model, str(part), *args, **kwargs)
        for config in part.glob(f"**/{CONFIG_NAME}"):
            _add_digests(model, config)

    try:
        save_into(folder, write, instead_of=_OTHER_FORMAT)
    except SafetensorError as error:
        raise OSError(
            f"{folder}: the adapter cannot be written ({error}); the files there are unchanged; check the "
            "free space and save again"
        ) from error


def load_adapter(
    model: PeftModel, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """`PeftModel.load_adapter`, after a check of all tensors.

    Raises:
        ArtifactError: the adapter is damaged, or was made for another base model. Nothing was loaded.
    """
    held: Any = model.peft_config.get(adapter_name)
    # `PeftModel.from_pretrained` has loaded the config, which verified the tensors
    verified = held is not None and vars(held).pop("_verified", None)
    if not verified or verified != weights_stamp(Path(model_id, kwargs.get("subfolder") or "")):
        hub, _ = model._split_kwargs(dict(kwargs))  # type: ignore[attr-defined]
        saved: Any = SparseMemoryConfig.from_pretrained(str(model_id), **hub)
        if vars(saved).pop("_verified", None) is None:
            verify_tensors(model_id, saved.digests, **hub)
    return type(model).load_adapter(model, model_id, adapter_name, *args, **kwargs)


def _add_digests(model: PeftModel, path: Path) -> None:
    """Add digests and the base's fingerprint to a config that PEFT wrote beside its weights."""
    content = read_json(path)
    content["digests"] = saved_digests(path.parent)
    if content.get("base_fingerprint") is None and comparable_base(model):
        content["base_fingerprint"] = fingerprint_base(model)
    content["sha256"] = config_digest(content)
    write_json(path, content)
