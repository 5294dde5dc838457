"""Where a result comes from (versions, machine, commit), and how two sets of settings differ."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("sparsemem", "torch", "transformers", "peft")


def environment() -> dict[str, Any]:
    """Versions of the packages, the machine, and the commit of the source (None outside a git checkout)."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    processor = f"{platform.system()} {platform.machine()}, {_processor()}"
    return {
        "versions": versions,
        "machine": f"{processor}, {os.cpu_count()} CPUs, {threads} threads",
        "commit": _commit(),
    }


def differences(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Describe the first three settings that differ, as a text for an error message. Empty if none differs.

    Args:
        there: the settings of an earlier run.
        now: the settings of this run.
    """
    there, now = flat(there), flat(now)
    names = [name for name in {**now, **there} if there.get(name) != now.get(name)]
    return "; ".join(f"{name} {there.get(name)!r} there, {now.get(name)!r} now" for name in names[:3])


def flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Turn nested settings into one dict whose keys are joined by dots."""
    if not isinstance(settings, dict):
        return {name: settings}
    parts = [flat(value, f"{name}.{key}" if name else key) for key, value in settings.items()]
    return {key: value for part in parts for key, value in part.items()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _commit() -> str | None:
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # a virtual environment may be inside another repository, so check that git tracks this file
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True)
        describe = [*git, "describe", "--always", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
        # results that a run before has written beside the source do not count
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True).returncode
        return f"{commit}-dirty" if changed else commit
    except (OSError, subprocess.CalledProcessError):
        return None
