"""The lifelong benchmark: facts taught strictly one at a time, and what answers say after 1, 10, 100, 1,000.

Data: `zsre.jsonl`, `counterfact.jsonl` or `pokemqa.jsonl` in the data folder; every fact has one wording that
is taught, others that are not, and a question about something else: in zsRE and CounterFact one that has
nothing to do with it, in PokeMQA the same question about a subject that was not taught. Answers are generated
greedily through the chat template, and right when they are the expected text, whole. In contexts (a system
prompt, a later turn, a longer message; `evaluation.neighbours`) 20 of them are asked again. Locality: the
answer is the base's own, to the same question in a batch of the same questions, since bfloat16 rounds by the
batch.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...atomic import read_json, write_atomically, write_json
from ..compare import BASE, PARTIAL, Recipe
from .editors import Editor, editor_of
from .edits import DATA, HALVES, Edit, read_edits
from .questions import general_items
from .runs import precision_setting, read_prose

METHODS = ("smf", "smf-shared", "smf-own-write", "lora", "lora-each", "full", "retrieval")


@dataclass(frozen=True)
class LifelongSettings:
    """Settings of a run.

    Attributes:
        counts: numbers of edits after which everything is asked.
        limit: of edits, by method: rivals that would take hours stop earlier.
        steps, stop_loss, lr: of methods that train a model on each edit.
        locality_tokens: of the answers that must stay.
        half: of PokeMQA, the one that "report"s or the one that may "choose" settings.
        subjects: whether each fact's subject is given to the methods.
    """

    model: str = "smollm2"
    precision: str = "auto"
    data: str = "zsre"
    half: str = "report"
    subjects: bool = True
    counts: tuple[int, ...] = (1, 10, 100, 300, 1000)
    limit: dict[str, int] = field(
        default_factory=lambda: {
            "smf": 1000,
            "retrieval": 1000,
            "smf-shared": 100,
            "smf-own-write": 10,
            "lora": 100,
            "lora-each": 10,
            "full": 100,
        }
    )
    steps: dict[str, int] = field(
        default_factory=lambda: {
            "smf-shared": 12,
            "smf-own-write": 12,
            "lora": 30,
            "lora-each": 30,
            "full": 30,
        }
    )
    lr: dict[str, float] = field(
        default_factory=lambda: {
            "smf-shared": 0.4,
            "smf-own-write": 0.4,
            "lora": 2e-4,
            "lora-each": 1e-3,
            "full": 5e-5,
        }
    )
    stop_loss: float = 0.02
    locality_tokens: int = 10
    knowledge_tokens: int = 12
    prose_tokens: int = 1024


SETTINGS = LifelongSettings()
_ABOUT = (
    "A language model was taught {number:,} facts of {data} strictly one at a time, each in one wording. "
    "Then all that it had been taught so far was asked, in the taught words and in others, with questions "
    "about something else; answers were generated and compared as a whole."
)


def recipe(
    *, model: str | None = None, data_dir: Path | None = None, settings: LifelongSettings | None = None
) -> Recipe:
    """The benchmark as `compare` runs it.

    Raises:
        ValueError: no data folder, one without the data, or an unknown data set.
    """
    chosen = settings or SETTINGS
    chosen = replace(chosen, model=model or chosen.model)
    if chosen.data not in DATA:
        raise ValueError(f"data={chosen.data!r} is unknown; allowed are {', '.join(DATA)}")
    if data_dir is None:
        raise ValueError(f"lifelong needs --data-dir, the folder that holds {chosen.data}.jsonl")
    if chosen.half not in HALVES:
        raise ValueError(f"half={chosen.half!r} is unknown; allowed are {', '.join(HALVES)}")
    edits = read_edits(data_dir / f"{chosen.data}.jsonl", chosen.data, chosen.half)[: max(chosen.counts)]
    if not chosen.subjects:
        edits = [edit._replace(subject="") for edit in edits]
    return Recipe(
        name="lifelong",
        model=chosen.model,
        precision=precision_setting(chosen.precision),
        about=_ABOUT.format(number=len(edits), data=chosen.data),
        methods=METHODS,
        settings=lambda method, _seed: method_settings(chosen, method, edits),
        run=lambda method, seed, base, stage, folder: run(chosen, method, seed, base, stage, folder, edits),
        stages=lambda method: dict.fromkeys(_stages(chosen, method, len(edits)), 300.0),
        learnt=("reliability",),
        lost=("locality", "knowledge", "drift"),
        figures=draw,
    )


def method_settings(settings: LifelongSettings, method: str, edits: Sequence[Edit]) -> dict[str, Any]:
    """The settings that decide this method's outcome."""
    kept = {key: getattr(settings, key) for key in ("data", "locality_tokens", "knowledge_tokens")}
    if settings.data == "pokemqa":
        kept["half"] = settings.half
    kept |= {"prose_tokens": settings.prose_tokens, "counts": _counts(settings, method, len(edits))}
    if method in settings.steps:
        kept |= {"steps": settings.steps[method], "lr": settings.lr[method], "stop_loss": settings.stop_loss}
    digest = hashlib.sha256(json.dumps([list(edit) for edit in edits[: kept["counts"][-1]]]).encode())
    return {**kept, "edits": digest.hexdigest()[:16]}


def run(
    settings: LifelongSettings,
    method: str,
    seed: int | None,
    base: dict[str, Any] | None,
    stage: Callable[[str], None],
    folder: Path,
    edits: Sequence[Edit],
) -> dict[str, Any]:
    """Teach the edits one at a time and ask after each count; `folder` keeps what is measured."""
    from ...data.models import load_base
    from ...precision import precision_of

    stage("load the model")
    model, tokenizer = load_base(settings.model)
    held = folder / PARTIAL / "points.json"
    points: list[dict[str, Any]] = read_json(held) if held.is_file() else []
    options: dict[str, Any] = {}
    if method in settings.steps:
        options = {"max_steps": settings.steps[method], "lr": settings.lr[method], "seed": seed or 0}
        options["stop_loss"] = settings.stop_loss
    editor = editor_of(method, model, tokenizer, folder / PARTIAL, seed or 0, options)
    done = {point["edits"] for point in points}
    for count in _counts(settings, method, len(edits)):
        if count in done:
            continue
        stage(f"teach {count} edits")
        editor.teach_until(edits, count)
        stage(f"ask after {count}")
        # the base knows after any number of edits what it knew before
        former = points[-1] if method == BASE and points else None
        points.append(measure(settings, method, editor, tokenizer, edits[:count], base, former))
        write_json(held, points)
    last = points[-1]
    row = {key: last[key] for key in last if key not in _DETAILS}
    shown = last["examples"]
    return {
        "row": {**row, "precision": precision_of(model)},
        "points": [{key: value for key, value in point.items() if key != "examples"} for point in points],
        "examples": shown,
    }


# facts that are asked in contexts
NUM_IN_CONTEXTS = 20
_DETAILS = ("locality_answers", "knowledge_right", "right", "right_rephrased", "examples", "in_contexts")


def measure(
    settings: LifelongSettings,
    method: str,
    editor: Editor,
    tokenizer: Any,
    edits: Sequence[Edit],
    base: dict[str, Any] | None,
    former: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All figures after these edits; of the base the answers too, which the others' must be.

    Args:
        former: an earlier point whose knowledge and prose still hold.
    """
    from ...evaluation.neighbours import context_questions
    from ...evaluation.probes import is_right

    number, before = len(edits), _point(base, len(edits))
    asked = general_items()
    local = editor.ask([edit.locality for edit in edits], settings.locality_tokens)
    if former is not None:
        return {**former, "edits": number, "locality_answers": local}
    general = editor.ask([item["question"] for item in asked], settings.knowledge_tokens)
    right = [is_right(text, item["answer"]) for text, item in zip(general, asked, strict=True)]
    point: dict[str, Any] = {"edits": number}
    if before is None:
        point |= {"locality_answers": local, "knowledge_right": right, "locality": 1.0, "knowledge": 1.0}
        point |= {"reliability": 0.0, "generality": 0.0, "untaught_changed": 0.0, "untaught_taught": 0.0}
        point["examples"] = []
    else:
        length = 2 + max(len(ids) for ids in tokenizer([edit.answer for edit in edits]).input_ids)
        texts = editor.ask([edit.question for edit in edits], length)
        others = [(place, text) for place, edit in enumerate(edits) for text in edit.rephrases]
        reworded = editor.ask([text for _, text in others], length)
        embedded = context_questions([edit.record for edit in edits], NUM_IN_CONTEXTS)
        spoken = editor.ask([one.turns for one in embedded], length)
        inside = [text.strip() == one.answer for text, one in zip(spoken, embedded, strict=True)]
        parts = {
            kind: _share([right for right, one in zip(inside, embedded, strict=True) if one.kind == kind])
            for kind in dict.fromkeys(one.kind for one in embedded)
        }
        taught = [text.strip() == edit.answer for text, edit in zip(texts, edits, strict=True)]
        again: list[list[bool]] = [[] for _ in edits]
        for (place, _), text in zip(others, reworded, strict=True):
            again[place].append(text.strip() == edits[place].answer)
        general_too = [_share(one) for one in again]
        kept = [a == b for a, b in zip(local, before["locality_answers"], strict=True)]
        answers = {edit.answer for edit in edits}
        given = [
            any(is_right(a, answer) and not is_right(b, answer) for answer in answers)
            for a, b in zip(local, before["locality_answers"], strict=True)
        ]
        known = [now for now, was in zip(right, before["knowledge_right"], strict=True) if was]
        point |= {
            "reliability": _share(taught),
            "generality": _share([right for one in again for right in one]),
            "contexts": _share(inside),
            "worst_context": min(parts.values()),
            "in_contexts": parts,
            "locality": _share(kept),
            "untaught_changed": 1 - _share(kept),
            "untaught_taught": _share(given),
            "knowledge": _share(known),
            "first_tenth": _share(taught[: max(1, number // 10)]),
            "right": taught,
            "right_rephrased": general_too,
            "examples": _examples(edits, others, reworded),
        }
    if editor.model is not None:
        kind = "smf" if method.startswith("smf") else method
        prose = read_prose(editor.model, tokenizer, settings.model, kind, settings.prose_tokens, 256)
        point |= prose
    point |= {"seconds": editor.seconds, "seconds_per_edit": editor.seconds / number}
    return {**point, "bytes_per_edit": editor.bytes / number}


def _point(base: dict[str, Any] | None, number: int) -> dict[str, Any] | None:
    if base is None:
        return None
    return next(point for point in base["points"] if point["edits"] == number)


def _examples(
    edits: Sequence[Edit], others: Sequence[tuple[int, str]], texts: Sequence[str]
) -> list[dict[str, Any]]:
    return [
        {
            "question": others[index][1],
            "expected": edits[others[index][0]].answer,
            "answer": texts[index],
            "right": texts[index].strip() == edits[others[index][0]].answer,
        }
        for index in range(0, len(others), max(1, len(others) // 5))
    ]


def _counts(settings: LifelongSettings, method: str, number: int) -> list[int]:
    most = min(number, number if method == BASE else settings.limit.get(method, number))
    return [count for count in sorted(settings.counts) if count <= most] or [most]


def _stages(settings: LifelongSettings, method: str, number: int) -> list[str]:
    parts = [(f"teach {n} edits", f"ask after {n}") for n in _counts(settings, method, number)]
    return ["load the model", *(stage for pair in parts for stage in pair)]


def _share(flags: Sequence[float]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


_PANELS = (
    ("reliability", "taught wording, right"),
    ("generality", "other wording, right"),
    ("locality", "unrelated answers unchanged"),
    ("knowledge", "general questions still right"),
)
_TENTHS = 10


def draw(out: Path) -> None:
    """Write `edits.png` and `age.png` into `out`, from the finished runs in it."""
    runs = [read_json(path) for path in sorted(out.glob("runs/*/result.json"))]
    runs = [run for run in runs if run["method"] != "base"]
    if runs:
        _save(out / "edits.png", _over_edits(runs))
        _save(out / "age.png", _by_age(runs))


def _over_edits(runs: list[dict[str, Any]]) -> Any:
    figure = _figure(4.0 * len(_PANELS), 3.4)
    for axes, (key, label) in zip(figure.subplots(1, len(_PANELS), sharey=True), _PANELS, strict=True):
        for run in runs:
            points = [(point["edits"], point[key]) for point in run["points"]]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=run["method"])
        axes.set_xscale("log")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("edits, taught one at a time")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share")
    figure.axes[0].legend(fontsize=8)
    return figure


def _by_age(runs: list[dict[str, Any]]) -> Any:
    """Of each run's last point: the share that is right in each tenth of the edits, the oldest first."""
    figure = _figure(9.0, 3.4)
    panels = (("right", "taught wording"), ("right_rephrased", "other wording"))
    for axes, (key, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for run in runs:
            right = run["points"][-1][key]
            if len(right) >= _TENTHS:
                bounds = [round(i * len(right) / _TENTHS) for i in range(_TENTHS + 1)]
                parts = [right[a:b] for a, b in pairwise(bounds)]
                shares = [sum(part) / len(part) for part in parts]
                axes.plot(range(1, _TENTHS + 1), shares, marker="o", markersize=4,
                          label=f"{run['method']}, {len(right):,} edits")  # fmt: skip
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("tenth of the edits, the first-taught first")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share right at the end")
    if figure.axes[0].lines:
        figure.axes[0].legend(fontsize=8)
    return figure


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(path: Path, figure: Any) -> None:
    write_atomically(path, lambda part: figure.savefig(part, format="png"))
