"""One run of the paper's comparison: train one arm with one seed and evaluate it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..compare import BASE, PARTIAL
from .runs import UNTRAINED, costs, keep_metrics, precision_setting


@dataclass(frozen=True)
class Arm:
    """One arm with sparse memory: its retrofit, its mode, what is trained, and the rule that selects rows."""

    retrofit: str
    mode: str
    trainable: str
    rule: str


_RULES = ("kl", "tfidf")
ARMS = {
    **{f"replacement-{rule}": Arm("dense", "replacement", "values", rule) for rule in _RULES},
    **{f"additive-{rule}": Arm("dense", "additive", "values", rule) for rule in _RULES},
    **{f"additive-scale-{rule}": Arm("dense", "additive", "values+scale", rule) for rule in _RULES},
    **{f"calibrated-{rule}": Arm("calibrate", "additive", "values", rule) for rule in _RULES},
}
METHODS = (BASE, *ARMS, "smf", "lora", "full")


@dataclass(frozen=True)
class PaperSettings:
    """The settings of the recipe; the defaults are the paper's."""

    model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    # "float32", "bfloat16", or "auto": the faster one on this machine
    precision: str = "auto"
    train_items: int = 60_000
    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 4
    accumulation: int = 4
    max_length: int = 1024
    warmup_steps: int = 100
    top_t: int = 512
    smf_background: int = 300
    lr: Mapping[str, float] = field(
        default_factory=lambda: {"sparse": 5e-4, "smf": 0.8, "lora": 2e-4, "full": 5e-5}
    )
    stage1_epochs: int = 2
    stage1_max_steps: int | None = None
    stage1_batch_size: int = 4
    stage1_accumulation: int = 4
    limit: int = 1000
    fewshot: int = 0
    quirks: bool = False


SETTINGS = PaperSettings()
HUB = {
    "train": "openlifescienceai/medmcqa, train",
    "medmcqa": "openlifescienceai/medmcqa, validation",
    "wikitext": "Salesforce/wikitext wikitext-103-raw-v1, test",
    "triviaqa": "mandarjoshi/trivia_qa rc.nocontext, validation",
    "general": "hub:OpenAssistant/oasst1",
}


def method_settings(settings: PaperSettings, method: str, data: Mapping[str, str]) -> dict[str, Any]:
    """The settings that decide this method's result."""
    kept: dict[str, Any] = {"limit": settings.limit, "fewshot": settings.fewshot}
    kept["data"] = {name: data[name] for name in ("medmcqa", "wikitext", "triviaqa")}
    if method == BASE:
        return kept
    names = ("train_items", "epochs", "max_steps", "batch_size", "accumulation", "max_length", "warmup_steps")
    kept |= {name: getattr(settings, name) for name in names}
    kept["lr"] = settings.lr["sparse" if method in ARMS else method]
    kept["data"]["train"] = data["train"]
    if method in ARMS or method == "smf":
        kept["data"]["general"] = data["general"]
    if method == "smf":
        kept["smf_background"] = settings.smf_background
    if method in ARMS:
        kept |= {**asdict(ARMS[method]), "top_t": settings.top_t, "quirks": settings.quirks}
        if ARMS[method].retrofit == "dense":
            kept["stage1"] = stage1_options(settings)
    return kept


def stage1_options(settings: PaperSettings) -> dict[str, Any]:
    """Options of the dense retrofit's training run."""
    return {
        "lr": 5e-4,
        "epochs": settings.stage1_epochs,
        "max_steps": settings.stage1_max_steps,
        "batch_size": settings.stage1_batch_size,
        "gradient_accumulation_steps": settings.stage1_accumulation,
    }


def run(
    settings: PaperSettings,
    files: Mapping[str, list[Path]] | None,
    method: str,
    seed: int | None,
    stage: Callable[[str], None],
    folder: Path,
) -> dict[str, Any]:
    """Train the model by one arm (not for the base) and evaluate it; continues an interrupted training."""
    from ...data.models import load, load_base
    from ...evaluation.items import read_items
    from ...evaluation.tasks import evaluate
    from ...precision import precision_of

    cost = UNTRAINED
    stage("load the model")
    # read the evaluation data first: a missing file must not be found after hours of training
    asked = {
        task: read_items(
            task,
            None if files is None else files[task][0],
            limit=settings.limit,
            num_fewshot=settings.fewshot if task == "triviaqa" else 0,
        )
        for task in ("medmcqa", "wikitext", "triviaqa")
    }
    if method == BASE:
        model, tokenizer = load_base(settings.model)
    else:
        arm = ARMS.get(method)
        start = settings.model
        if arm is not None:
            options = stage1_options(settings)
            start = str(
                grafted(settings.model, _general(files), arm, folder.parents[1], settings.max_length, options)
            )
        model, tokenizer = load(start)
        stage("teach")
        done = _taught(settings, files, method, seed or 0, model, tokenizer, Path(start), folder)
        model, cost = done.model, costs(done, settings.batch_size * settings.accumulation)
    found = {}
    for task, items in asked.items():
        stage(task)
        found[task] = evaluate(
            model, tokenizer, task, items=items, precision=precision_setting(settings.precision) or "float32"
        )
    return {
        "row": {
            "medmcqa": found["medmcqa"].metrics["acc"],
            "wikitext": found["wikitext"].metrics["ppl"],
            "triviaqa": found["triviaqa"].metrics["contains_acc"],
            **cost,
            "precision": precision_of(model),
        },
        "items": {task: found[task].correct for task in ("medmcqa", "triviaqa")},
        "examples": [],
    }


def _taught(
    settings: PaperSettings,
    files: Mapping[str, list[Path]] | None,
    method: str,
    seed: int,
    model: Any,
    tokenizer: Any,
    start: Path,
    folder: Path,
) -> Any:
    from ...evaluation.tasks import medmcqa_prompt, medmcqa_text
    from ...optim.release import QUIRKS
    from ...training.finetune import finetune
    from ...training.retrofit import general_records

    options: dict[str, Any] = {"schedule": "cosine"}
    items, arm = _training_items(settings, files), ARMS.get(method)
    records = [{"text": medmcqa_text(item)} for item in items]
    if arm is not None:
        options = arm_options(model, arm, start)
        options |= {"top_t": settings.top_t, "quirks": QUIRKS if settings.quirks else ()}
    elif method == "smf":
        options["background"] = general_records(_general(files))[: settings.smf_background]
        records = [
            {"prompt": medmcqa_prompt(item), "completion": f" {'ABCD'[item['answer']]}. {_right(item)}"}
            for item in items
        ]
    done = finetune(
        model,
        records,
        "smf-open" if arm is not None else method,
        tokenizer=tokenizer,
        lr=settings.lr["sparse" if arm is not None else method],
        # the paper trains alpha with the learning rate of the rows
        rest_lr=settings.lr["sparse"],
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_length=settings.max_length,
        warmup_steps=settings.warmup_steps,
        seed=seed,
        output_dir=folder / PARTIAL,
        resume=True,
        **options,
    )
    keep_metrics(folder)
    return done


def grafted(
    model: str, general: str, arm: Arm, out: Path, max_length: int, options: Mapping[str, Any]
) -> Path:
    """The adapter that arms of the same retrofit and mode start from; made once, resumable, checked.

    Args:
        model: the base model's name.
        general: file or Hub name of general text.
        out: folder of the comparison; the adapter goes into `stage1` there.
        options: of `dense_retrofit`'s training.
    """
    from ...adapter.config import PAPER
    from ...data.models import load_base
    from ...saved.making import graft
    from ...training.methods import paper_layers

    folder = out / "stage1" / f"{arm.retrofit}-{arm.mode}"
    memory: dict[str, Any] = {"mode": arm.mode}
    if arm.retrofit == "calibrate":
        # the same table size in the same blocks, so that only the retrofit differs
        memory |= {key: PAPER[key] for key in ("num_keys", "num_heads", "top_k", "key_dim", "write")}
        memory["layers_to_transform"] = paper_layers(load_base(model)[0])
    # arms of one comparison may run at the same time
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".stage1.lock"):
        graft(
            model,
            general,
            folder,
            seed=0,
            max_length=max_length,
            memory=memory,
            retrofit=arm.retrofit,
            resume=True,
            options=dict(options) if arm.retrofit == "dense" else None,
        )
    return folder


def arm_options(model: Any, arm: Arm, start: Path) -> dict[str, Any]:
    """What `finetune` needs to teach an arm from the adapter in `start`; sets what of the memory trains."""
    from ...adapter.memories import set_trainable
    from ...background.background import Background
    from ...saved.contents import BACKGROUND_FILE

    set_trainable(model, arm.trainable)
    background = Background.load(start / BACKGROUND_FILE)
    return {"background": background, "rule": arm.rule, "moments": "element", "schedule": "cosine"}


def _general(files: Mapping[str, list[Path]] | None) -> str:
    return HUB["general"] if files is None else str(files["general"][0])


def _right(item: dict[str, Any]) -> str:
    return item["choices"][item["answer"]]


def _training_items(settings: PaperSettings, files: Mapping[str, list[Path]] | None) -> list[dict[str, Any]]:
    """The paper's training items: the first `train_items` questions with a single right answer."""
    from ...evaluation.items import read_items

    def single(record: Any) -> bool:
        return not isinstance(record, dict) or record.get("choice_type", "single") == "single"

    items: list[Any] = []
    for source in [None] if files is None else files["train"]:
        if left := settings.train_items - len(items):
            split = "train" if source is None else None
            items += read_items("medmcqa", source, split=split, keep=single, limit=left)
    return items
