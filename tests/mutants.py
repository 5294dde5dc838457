"""Damaged copies of real files, and a check that loading one gives the right content or a clear error."""

import json
import random
import resource
import shutil
import string
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparsemem import Background, RowPatch, memory_layers
from sparsemem.cli.config_file import read_config
from sparsemem.cli.main import main
from sparsemem.data.models import add_adapter
from sparsemem.data.reading import read_records
from sparsemem.saved.contents import read_contents
from sparsemem.stream.folder import status, verify
from sparsemem.stream.ledger import Ledger
from tiny import tiny_model

# Of processor time: a busy machine takes longer.
SECONDS = 2.0
# How much a load may add to the address space of the process: 500 MB.
MORE_BYTES = 500 * 10**6
# What loading a damaged file must never do.
_FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "pickle.find_class",
)


def mutant(data: bytes, rng: random.Random) -> bytes:
    """A copy with one to three damages, each of a random kind; may be the same as `data`."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(_DAMAGES)(out, rng)
    return bytes(out)


def _flip_bit(out: bytearray, rng: random.Random) -> None:
    if out:
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)


def _flip_early_bit(out: bytearray, rng: random.Random) -> None:
    """In the header of a safetensors file, or near the start of a text."""
    if out:
        out[rng.randrange(min(len(out), 600))] ^= 1 << rng.randrange(8)


def _set_length(out: bytearray, rng: random.Random) -> None:
    """A safetensors file begins with the length of its header."""
    number = rng.choice((0, 1, len(out), 2**31, 2**40, 2**63 - 1, 2**64 - 1, rng.randrange(2**20)))
    out[:8] = number.to_bytes(8, "little")


def _truncate(out: bytearray, rng: random.Random) -> None:
    del out[rng.randrange(len(out) + 1) :]


def _cut(out: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(out) + 1)
    del out[start : start + rng.choice((1, 8, 64, 4096))]


def _insert(out: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(out) + 1)
    out[start:start] = rng.choice((rng.randbytes(16), b"[" * 5000, b'{"a":' * 2000, b"\x00" * 64, b"1e999"))


def _repeat(out: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(out) + 1)
    out[start:start] = out[start : start + rng.choice((1, 16, 512))]


def _change_number(out: bytearray, rng: random.Random) -> None:
    """Replace one digit of a text by another, or by many."""
    places = [place for place, byte in enumerate(out[:20_000]) if chr(byte) in string.digits]
    if places:
        place = rng.choice(places)
        out[place : place + 1] = rng.choice((b"0", b"9", b"-1", b"99999999999", b"1.5", b"null"))


_DAMAGES = (_flip_bit, _flip_early_bit, _set_length, _truncate, _cut, _insert, _repeat, _change_number)


class Watched:
    """Within the block, what the process does beyond reading files, and writes outside a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.on = str(folder.resolve()), [], False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {args!r}"[:200])
        if event == "open" and isinstance(args[0], str) and isinstance(args[1], str):
            outside = not str(Path(args[0]).resolve()).startswith(self.folder) and args[0] != "/dev/null"
            if outside and set(args[1]) & set("wax+"):
                self.seen.append(f"{event} {args!r}"[:200])

    def __enter__(self) -> "Watched":
        self.on = True
        return self

    def __exit__(self, *_: Any) -> None:
        self.on = False


@contextmanager
def limited_memory() -> Iterator[None]:
    """Within, what would add more than MORE_BYTES to the process raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def loaded_patch(path: Path) -> dict[str, torch.Tensor]:
    patch = RowPatch.load(path)
    return {
        f"{n}.{k}": getattr(layer, k)
        for n, layer in patch.layers.items()
        for k in ("slots", "before", "after")
    }


def loaded_background(path: Path) -> dict[str, torch.Tensor]:
    layers = Background.load(path).layers
    return {f"{n}.{key}": value for n, layer in layers.items() for key, value in vars(layer).items()
            if isinstance(value, torch.Tensor)}  # fmt: skip


def loaded_adapter(path: Path) -> dict[str, torch.Tensor]:
    model = add_adapter(tiny_model(), str(path.parent))
    return {
        f"{n}.{k}": t for n, memory in memory_layers(model).items() for k, t in memory.state_dict().items()
    }


def loaded_records(path: Path) -> None:
    read_records(str(path))


def loaded_contents(path: Path) -> None:
    read_contents(path.parent)


def loaded_stream(path: Path) -> dict[str, torch.Tensor]:
    """The lines of a ledger whose folder is as it was written, by number."""
    folder = path.parent.parent if path.parent.name == "patches" else path.parent
    status(folder)
    verify(folder)
    lines = [json.dumps(entry).encode() for entry in Ledger(folder / "ledger.jsonl").entries]
    return {str(number): torch.frombuffer(bytearray(line), dtype=torch.uint8)
            for number, line in enumerate(lines)}  # fmt: skip


def loaded_config(path: Path) -> None:
    read_config(path, main.commands["train"])


# By kind: the file that is damaged, and how it is loaded. None: there is nothing to compare.
KINDS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "patch": ("patch.safetensors", loaded_patch),
    "background": ("background.safetensors", loaded_background),
    "adapter weights": ("adapter_model.safetensors", loaded_adapter),
    "adapter config": ("adapter_config.json", loaded_adapter),
    "records": ("taught.jsonl", loaded_records),
    "metrics": ("metrics.json", loaded_contents),
    "ledger": ("stream/ledger.jsonl", loaded_stream),
    "task's patch": ("stream/patches/000002.safetensors", loaded_stream),
    "space": ("stream/space.safetensors", loaded_stream),
    "stream's adapter": ("stream/adapter_model.safetensors", loaded_stream),
    "config file": ("train.yaml", loaded_config),
}


def try_mutants(source: Path, work: Path, kind: str, seeds: range, watched: Watched) -> dict[str, int]:
    """Load damaged copies of one file of a folder; returns how many were refused, right, or the same.

    Args:
        source: an undamaged folder that train made.
        work: where copies are made.
        kind: of KINDS.
        seeds: one mutant for each.

    Raises:
        AssertionError: a mutant loaded with other content, raised no ValueError, took more than SECONDS
            or MORE_BYTES, or did something forbidden. The message has kind and seed.
    """
    name, load = KINDS[kind]
    original = (source / name).read_bytes()
    shutil.copytree(source, work, dirs_exist_ok=True)
    expected, counts = load(work / name), {"refused": 0, "right": 0, "same": 0}
    for seed in seeds:
        data = mutant(original, random.Random(f"{kind} {seed}"))
        if data == original:
            counts["same"] += 1
            continue
        (work / name).write_bytes(data)
        begun = time.process_time()
        try:
            with watched, limited_memory():
                found = load(work / name)
        except ValueError:
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{kind} {seed}: {type(error).__name__}: {error}") from error
        else:
            if expected is not None and not _without_digests(kind, work / name):
                assert found.keys() == expected.keys(), f"{kind} {seed}: other tensors"
                assert all(torch.equal(found[key], expected[key]) for key in expected), (
                    f"{kind} {seed}: changed"
                )
            counts["right"] += 1
        taken = time.process_time() - begun
        assert taken < SECONDS, f"{kind} {seed}: {taken:.1f} s"
        assert not watched.seen, f"{kind} {seed}: {watched.seen}"
    (work / name).write_bytes(original)
    return counts


def _without_digests(kind: str, path: Path) -> bool:
    """Whether a damaged config has lost both its digests and its own: it then loads with a warning."""
    text = path.read_bytes() if kind == "adapter config" else b'"sha256"'
    return b'"sha256"' not in text and b'"digests"' not in text
