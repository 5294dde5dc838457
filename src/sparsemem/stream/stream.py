"""Stream: a model that is taught task after task, and untaught at will.

Every task has fact rows of its own: each answer has a question key and a subject, and each of its tokens a
row (see `layer.facts`). So no task can change another's rows, and taking a task back leaves what would be
there without it, to the bit (law 13). What a task's patch holds depends on the task, the base model and the
space alone.

A folder holds the ledger, the space, one patch a task, and the adapter that follows from them, which `load`
takes. The ledger decides what was taught: whenever a process is killed, the folder can be opened again.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..adapter.blocks import default_targets
from ..adapter.config import SparseMemoryConfig
from ..adapter.memories import check_bare, key_layers_of, memory_layers
from ..adapter.saving import load_onto
from ..artifacts import FORMAT, ArtifactError, fingerprint_base
from ..atomic import save_into
from ..background.background import Background, addressing_fingerprint
from ..background.calibration import calibrate
from ..background.question_key import key_layers
from ..data.asked import question_key
from ..data.general import general_background, say_shipped
from ..data.gguf import packaged_name
from ..data.models import context_length, load_base, tokenizer_of
from ..data.naming import opening_tokens, token_classes, turn_tokens
from ..data.reading import read_records
from ..data.records import batches, encode
from ..patches.facts import composed, origins
from ..patches.patch import RowPatch
from ..patches.space import load_spaces, memory_digest, save_spaces, space_digest
from ..provenance import environment
from ..training.cached import TailHead
from .documents import data_digest, held_sources, note_sources, sources_of, spelled_out
from .fact_rows import Place, fact_patch, late_space
from .ledger import FILE, LEARN, UNDO, Ledger, checked_patch
from .tasks import fact_of, names_of

SPACE_FILE, PATCHES = "space.safetensors", "patches"
BATCH_SIZE = 8


class Stream:
    """A base model and a folder of what it was taught.

    Attributes:
        folder: where the ledger lies.
        ledger: what was taught and taken back.
        tokenizer: the base model's.
        layer: name of the memory layer that holds all tasks.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        folder: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        background: Sequence[dict[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        """Begin a folder, or continue the one that is there.

        Args:
            model: a base model, which gets a memory in place, or its name.
            tokenizer: None: the one that the model's name leads to.
            background: records of general text, questions with answers among them, of a new folder; None:
                `general_background`.
            seed: of a new folder's addresses, which no task uses, kept in the ledger.

        Raises:
            ValueError: a model that cannot be taught so, or a background without answers.
            ArtifactError: the folder belongs to another base model, or was altered.
        """
        self.folder = Path(folder)
        if isinstance(model, str):
            model, tokenizer = load_base(model)
        if isinstance(model, PeftModel):
            raise ValueError("model: has an adapter already; give the base model")
        check_bare(model)
        self.tokenizer = tokenizer or tokenizer_of(model)
        if (self.folder / FILE).exists():
            self.ledger = Ledger(self.folder / FILE)
            if (found := self.ledger.about.get("format")) != FORMAT:
                raise ArtifactError(
                    f"{self.folder}: has format {found}, this version reads {FORMAT}; teach its records "
                    "again in a new folder"
                )
            self._model = self._continued(model)
        else:
            self._model = begin_stream(self.folder, model, self.tokenizer, background, seed)
            self.ledger = Ledger(self.folder / FILE)
        ((self.layer, memory),) = memory_layers(self._model).items()
        spaces, header = load_spaces(self.folder / SPACE_FILE)
        if space_digest(spaces[self.layer]) != self.ledger.about["space"]:
            raise ArtifactError(f"{self.folder / SPACE_FILE}: is not the ledger's; get an undamaged copy")
        self._space = spaces[self.layer]
        self._place = Place(
            name=self.layer,
            addressing=addressing_fingerprint(memory),
            base=self.ledger.about["base"],
            space=self._space,
            key_layers=key_layers_of(self._model),
            key_least=header["key_least"],
            late_least=header["late_least"],
            opening=opening_tokens(self.tokenizer),
            tokenizer=self.tokenizer,
        )
        self._head = TailHead(self._model, int(self.tokenizer.pad_token_id or 0))  # type: ignore[arg-type]
        self._versions = environment()["versions"]
        self._patches: dict[str, RowPatch] = {}
        self._only: set[str] | None = None
        self._stale = True

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that the model holds, in the order of teaching."""
        return [entry["task"] for entry in self.ledger.active()]

    @property
    def model(self) -> PeftModel:
        """The base model with all that it holds, or with what `select` chose of it."""
        if self._stale:
            patches = [self.patch(entry) for entry in self._selected()]
            memory_layers(self._model)[self.layer].scope = composed(self.layer, patches, self._space)
            self._stale = False
        return self._model

    def select(self, tasks: Iterable[str] | None) -> None:
        """Let the model hold these tasks alone, until another call; None: all. The folder stays as it is.

        Raises:
            ValueError: a task that the ledger does not hold.
        """
        chosen = None if tasks is None else set(tasks)
        if missing := sorted((chosen or set()) - set(self.tasks)):
            raise ValueError(f"tasks: {', '.join(missing[:5])} not taught; see Stream.tasks")
        self._only, self._stale = chosen, True

    def sources_at(self, places: Tensor) -> list[dict[str, Any] | None]:
        """Where the answers at places [tokens], as from `fact_places`, come from; None: no taught answer.

        Each is {"task", "question"}, with "file" and "lines" or "pages" where the record had a `source`.
        """
        scope, selected = memory_layers(self._model)[self.layer].scope, self._selected()
        if scope is None:
            return [None] * len(places)
        of_fact = origins(self.layer, [self.patch(entry) for entry in selected])
        sources: dict[int, dict[str, Any]] = {}
        found: list[dict[str, Any] | None] = []
        for place in places.tolist():
            if place < 0:
                found.append(None)
                continue
            of_patch, question = of_fact[int(scope.facts.fact_of_token[place])]
            entry = selected[of_patch]
            if of_patch not in sources:
                sources[of_patch] = held_sources(self.folder, entry)
            found.append({"task": entry["task"], "question": question, **sources[of_patch].get(question, {})})
        return found

    def teach(
        self,
        task: str,
        records: Sequence[dict[str, Any]],
        progress: Callable[[int, int], object] = lambda _done, _of: None,
    ) -> dict[str, Any]:
        """Teach a task; returns the ledger's line, which is on the disk then, and the task's patch too.

        Args:
            task: a name that the model does not hold yet.
            records: whatever `read_records` takes. The loss is on their completions. A record may have
                `wordings`, other questions with the same answer, and a `source`, see `sources_at`.
            progress: gets the number of tokens that are learnt, and of all.

        Raises:
            ValueError: the name is taken, or nothing in the records is to be learnt.
            ArtifactError: another process has changed the folder since it was opened.
            OSError: the disk is full; the folder is as it was.
        """
        if self.ledger.holds(task):
            raise ValueError(f"task {task!r} is taught already; undo it first, or give another name")
        began = time.perf_counter()
        records = read_records(records, mixed=True)
        sources = sources_of(records)
        patch = self._patch_of(task, spelled_out(records), progress)
        name = f"{PATCHES}/{len(self.ledger.entries):06d}.safetensors"
        file = self.folder / name
        with self.ledger.alone():
            write_to(file, patch.save)
            entry = self.ledger.append(
                {
                    "op": LEARN,
                    "task": task,
                    "data": data_digest(records),
                    "records": len(records),
                    "patch": name,
                    "patch_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                    "bytes": file.stat().st_size,
                    "seed": self.ledger.about["seed"],
                    "seconds": round(time.perf_counter() - began, 3),
                    "versions": self._versions,
                }
            )
        self._patches[name] = RowPatch.load(file)
        self._stale = True
        note_sources(self.folder, entry, sources)
        return entry

    def undo(self, task: str) -> dict[str, Any]:
        """Take a task back: the model is what it would be had the others alone been taught.

        Returns the ledger's line. The task's patch stays in the folder.

        Raises:
            ValueError: the model does not hold this task.
            ArtifactError: another process has changed the folder since it was opened.
        """
        if not self.ledger.holds(task):
            held = ", ".join(self.tasks[-5:]) or "none"
            raise ValueError(f"task {task!r} is not taught; the last ones that are: {held}")
        with self.ledger.alone():
            entry = self.ledger.append({"op": UNDO, "task": task, "versions": self._versions})
        self._stale = True
        return entry

    def redo(self, entry: dict[str, Any]) -> None:
        """Teach a task that was taken back again, with the same patch; it is the newest one then.

        Args:
            entry: the ledger's line that taught it; no task of its name is taught.

        Raises:
            ArtifactError: its patch is missing or was altered, or another process has changed the folder.
        """
        assert not self.ledger.holds(entry["task"])
        self.patch(entry)
        with self.ledger.alone():
            self.ledger.append({key: entry[key] for key in entry if key not in ("sha256", "parent")})
        self._stale = True

    def save(self) -> None:
        """Write the adapter that follows from the ledger into the folder.

        Raises:
            ArtifactError: another process has changed the folder since it was opened.
            OSError: the disk is full; the former adapter is still there.
        """
        self.select(None)
        model = self.model

        def write(part: Path) -> None:
            # the page may have another adapter beside the stream's
            write_to(part, partial(model.save_pretrained, selected_adapters=["default"]))
            for path in part.iterdir():
                if path.name not in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
                    path.unlink()

        with self.ledger.alone():
            save_into(self.folder, write)

    def _continued(self, model: PreTrainedModel) -> PeftModel:
        if fingerprint_base(model) != self.ledger.about["base"]:
            named = self.ledger.about["model"]
            raise ArtifactError(
                f"{self.folder}: belongs to another base model; give "
                f"{packaged_name(Path(named).name) or named!r}"
            )
        adapted = load_onto(model, self.folder)
        ((_, memory),) = memory_layers(adapted).items()
        if memory_digest(memory.state_dict()) != self.ledger.about["memory"]:
            raise ArtifactError(
                f"{self.folder / SAFETENSORS_WEIGHTS_NAME}: is damaged; get an undamaged copy"
            )
        return adapted

    def _selected(self) -> list[dict[str, Any]]:
        """The ledger's lines of the tasks that the model holds now."""
        return [e for e in self.ledger.active() if self._only is None or e["task"] in self._only]

    def patch(self, entry: dict[str, Any]) -> RowPatch:
        """The patch of a line of the ledger that taught a task.

        Raises:
            ArtifactError: its file is missing or was altered.
        """
        name = entry["patch"]
        if name not in self._patches:
            self._patches[name] = checked_patch(self.folder, entry)
        return self._patches[name]

    def _patch_of(
        self, task: str, records: Sequence[dict[str, Any]], progress: Callable[[int, int], object]
    ) -> RowPatch:
        examples = encode(records, self.tokenizer)
        longest, context = max(len(one["input_ids"]) for one in examples), context_length(self._model)
        if longest > context:
            raise ValueError(f"task {task!r}: has a record of {longest} tokens, the model reads {context}")
        names = names_of(records)
        facts = [fact_of(record, one) for record, one in zip(records, names, strict=True)]
        return fact_patch(self._head, self._place, examples, names, {"task": task, "facts": facts}, progress)


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
    if prepared.active_peft_config.write != "last":
        raise ValueError(
            f"model: {type(model).__name__} has no norm after its last decoder block, where learn writes; "
            "teach it with finetune, or give another model"
        )
    pad = int(tokenizer.pad_token_id or 0)  # type: ignore[arg-type]
    examples = encode(read_records(background, mixed=True), tokenizer, max_length=context_length(model))
    head = TailHead(prepared, pad)
    if not head.agrees(examples[0]):
        raise ValueError(
            f"model: the logits of {type(model).__name__} are not those of final norm and head alone; "
            "learn cannot teach such a model"
        )
    seen: Background = calibrate(prepared, batches(examples, BATCH_SIZE, pad), seed=seed)
    ((name, memory),) = memory_layers(prepared).items()
    space, late_least = late_space(seen[name])
    key = question_key(prepared, tokenizer, key_layers_of(prepared))
    classes = token_classes(tokenizer)
    space = replace(
        space,
        key_mean=key.mean,
        key_projection=key.projection,
        classes=classes.classes,
        edges=classes.edges,
        turn=turn_tokens(tokenizer),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as part:
        made = Path(part) / "new"
        prepared.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / PATCHES).mkdir()
        save_spaces(made / SPACE_FILE, {name: space}, {"key_least": key.least, "late_least": late_least})
        about = {
            "format": FORMAT,
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
    return prepared.eval()


def stream_config(model: PreTrainedModel) -> SparseMemoryConfig:
    """A memory that reads the deepest of the default layers; its own small table stays empty."""
    deepest = default_targets(model)[-1]
    sizes: dict[str, Any] = {"num_keys": 2, "num_heads": 1, "top_k": 1, "key_dim": 2}
    return SparseMemoryConfig(
        target_modules=[deepest], key_layers=key_layers(model), task_type="CAUSAL_LM", **sizes
    )


def write_to(path: Path, write: Any) -> None:
    """Raises:
    OSError: the disk is full, also where the writer calls it something else.
    """
    try:
        write(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error})") from error
