"""Save an adapter so that a kill leaves the old or the new one; load one after its tensors were verified.

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

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from ..artifacts import ArtifactError, comparable_base, fingerprint_base, fits_base
from ..atomic import read_json, save_into, write_json
from .config import SparseMemoryConfig, config_digest
from .digests import saved_digests, verify_tensors, weights_stamp
from .memories import check_bare

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
    folder = Path(model_id, kwargs.get("subfolder") or "")
    # PEFT reads the config of a new adapter, and of a local one that verifies the tensors
    stamp = weights_stamp(folder) if held is None else vars(held).pop("_verified", None)
    if not stamp or stamp != weights_stamp(folder):
        hub, _ = model._split_kwargs(dict(kwargs))  # type: ignore[attr-defined]
        saved: Any = PeftConfig.from_pretrained(str(model_id), **hub)
        if isinstance(saved, SparseMemoryConfig):
            verify_tensors(model_id, saved.digests, **hub)
    loaded = type(model).load_adapter(model, model_id, adapter_name, *args, **kwargs)
    vars(model.peft_config[adapter_name]).pop("_verified", None)
    return loaded


def load_onto(
    model: PreTrainedModel | PeftModel, name: str | Path, adapter: str = "default", *, trainable: bool = False
) -> PeftModel:
    """Add a saved adapter to its base model, in eval mode, and make it the active one.

    Args:
        model: the base model, or one with adapters already; changed in place.
        name: the adapter's folder or Hub name.
        adapter: what the adapter is called in the model.
        trainable: whether it can be trained further.

    Raises:
        ArtifactError: the adapter is damaged or was made for another base model. No tensor was loaded.
        ValueError: there is no such adapter.
    """
    unfit = (
        f"adapter {str(name)!r} does not fit the base model {getattr(model.config, 'name_or_path', '')!r}; "
        "give the base model that it was trained on, after `resize_token_embeddings` a saved copy of that"
    )
    held = set(model.peft_config) if isinstance(model, PeftModel) else set()
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(name), adapter_name=adapter, is_trainable=trainable)
            model.set_adapter(adapter)
            adapted = model
        else:
            check_bare(model)
            adapted = PeftModel.from_pretrained(
                model, str(name), adapter_name=adapter, is_trainable=trainable
            )
        made_on = getattr(adapted.peft_config[adapter], "base_fingerprint", None)
        if made_on is not None and comparable_base(adapted) and not fits_base(adapted, made_on):
            raise ArtifactError(unfit)
    except _LOADING as error:
        if isinstance(model, PeftModel) and adapter in set(model.peft_config) - held:
            model.delete_adapter(adapter)
        raise _told(str(name), error, unfit) from error
    return adapted.eval()


# What PEFT and safetensors raise for files that are missing, damaged, or made for other models.
_LOADING = (
    OSError,
    ValueError,
    SafetensorError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    MemoryError,
)


def _told(name: str, error: Exception, unfit: str) -> ValueError:
    """What went wrong when an adapter was loaded, in one sentence."""
    line = " ".join(str(error).split())
    if isinstance(error, ArtifactError):
        return ArtifactError(line if name in line else f"adapter {name!r}: {line}")
    if isinstance(error, SafetensorError):
        return ArtifactError(f"the weights of adapter {name!r} are damaged ({line}); get an undamaged copy")
    if isinstance(error, RuntimeError | MemoryError):
        return ArtifactError(unfit)
    if Path(name).is_dir() and not weights_stamp(name):
        return ArtifactError(f"adapter {name!r} has no {SAFETENSORS_WEIGHTS_NAME}; get a complete copy")
    if isinstance(error, OSError | ValueError):
        return ValueError(f"adapter {name!r} cannot be loaded ({line}); give a folder or Hub name of one")
    # PEFT trusts the types of what an adapter's config says
    return ArtifactError(f"adapter {name!r} has a config that cannot be used ({line}); get an undamaged copy")


def _add_digests(model: PeftModel, path: Path) -> None:
    """Add digests and the base's fingerprint to a config that PEFT wrote beside its weights."""
    content = read_json(path)
    content["digests"] = saved_digests(path.parent)
    if content.get("base_fingerprint") is None and comparable_base(model):
        content["base_fingerprint"] = fingerprint_base(model)
    content["sha256"] = config_digest(content)
    write_json(path, content)
