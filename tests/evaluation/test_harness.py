"""Compare our evaluators with lm-evaluation-harness, and run its tasks on our models."""

import json
import sys
from math import exp
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from sparsemem import SparseMemoryConfig, memory_layers, precision
from sparsemem.data import models
from sparsemem.evaluation.harness import evaluate_harness, find_task
from sparsemem.evaluation.items import read_items
from sparsemem.evaluation.likelihood import log_probs, split_tokens
from sparsemem.evaluation.probes import perplexity
from tiny import SMALL

lm_eval = pytest.importorskip("lm_eval")

pytestmark = pytest.mark.slow
DEFINITIONS = Path(lm_eval.__file__).parent / "tasks"
WORDS = ("fever", "of the left", "nerve", "acute", "is not", "renal", "a", "longest option of all")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No Hub, datasets cached in the test's own folder, and no autocast."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(precision, "fast_bf16", lambda device: False)


def definition(tmp_path, task, records, split="validation"):
    """The harness's own definition of a task, with its data in a file."""
    file = tmp_path / f"{task}.json"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    splits = {name: str(file) for name in ("train", "validation", "test")}
    own = {
        "include": str(DEFINITIONS / task / f"{task}.yaml"),
        "task": f"local_{task}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits},
    }
    path = tmp_path / f"{task}.yaml"
    # JSON is YAML
    path.write_text(json.dumps(own))
    return str(path)


def questions(num):
    generator = torch.Generator().manual_seed(0)

    def text(length):
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=generator))

    options = ("opa", "opb", "opc", "opd")
    return [
        {
            "question": text(2 + n % 7),
            **{name: text(1 + (n + i) % 3) for i, name in enumerate(options)},
            "cop": n % 4,
        }
        for n in range(num)
    ]


def requests(task):
    """The harness's own (context, continuation) texts, item by item."""
    (task,) = task["tasks"].values()
    task.build_all_requests()
    grouped = {}
    for one in task.instances:
        grouped.setdefault(one.doc_id, []).append(one.args)
    return [grouped[index] for index in sorted(grouped)]


def harness_likelihoods(model, tokenizer, asked):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    instances = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
        for pairs in asked
        for pair in pairs
    ]
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    return torch.tensor([score for score, _ in language_model.loglikelihood(instances, disable_tqdm=True)])


def our_likelihoods(model, tokenizer, asked):
    pairs = [split_tokens(tokenizer, item[0][0], [text for _, text in item]) for item in asked]
    scores = log_probs(model, *zip(*pairs, strict=True), batch_size=4, precision="float32")
    return [torch.stack([one.sum() for one in several]) for several in scores]


def assert_parity(model, tokenizer, path, records):
    asked = requests(find_task(path))
    ours = our_likelihoods(model, tokenizer, asked)
    torch.testing.assert_close(
        torch.cat(ours), harness_likelihoods(model, tokenizer, asked), rtol=1e-4, atol=0
    )
    found = evaluate_harness(model, tokenizer, find_task(path))
    right = [int(score.argmax()) == record["cop"] for score, record in zip(ours, records, strict=True)]
    assert found.correct == right
    assert found.metrics["acc"] == pytest.approx(sum(right) / len(right))
    assert found.n == len(records)
    return found


def test_medmcqa_likelihoods_and_accuracy_are_the_harnesses(tiny_llama, plain_tokenizer, tmp_path):
    records = questions(13)
    found = assert_parity(
        tiny_llama(max_position_embeddings=512),
        plain_tokenizer,
        definition(tmp_path, "medmcqa", records),
        records,
    )
    assert set(found.metrics) == {"acc", "acc_norm"}
    assert 0 < found.metrics["acc"] < 1


def test_the_papers_medmcqa_is_scored_as_the_harness_scores_it(tiny_llama, plain_tokenizer, tmp_path):
    """The harness uses the paper's prompt, and its requests give our accuracy by the sum."""
    from sparsemem.evaluation.tasks import evaluate

    records = questions(13)
    (tmp_path / "medmcqa.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = "\nA. {{opa}}\nB. {{opb}}\nC. {{opc}}\nD. {{opd}}\nAnswer:"
    own = {
        "task": "paper_medmcqa",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "medmcqa.json")}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "Medical exam question:\nQuestion: {{question}}" + options,
        "doc_to_target": "cop",
        "doc_to_choice": "{{['A. ' + opa, 'B. ' + opb, 'C. ' + opc, 'D. ' + opd]}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "paper.yaml").write_text(json.dumps(own))
    model = tiny_llama(max_position_embeddings=512)
    found = evaluate_harness(model, plain_tokenizer, find_task(str(tmp_path / "paper.yaml")))
    ours = evaluate(model, plain_tokenizer, "medmcqa", items=read_items("medmcqa", tmp_path / "medmcqa.json"))
    assert ours.metrics["acc_sum"] == found.metrics["acc"]
    assert 0 < ours.metrics["acc_sum"] < 1


@pytest.mark.parametrize("num_words", [12, 90])
def test_wikitext_perplexity_is_the_harnesses(tiny_llama, plain_tokenizer, tmp_path, num_words):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    model = tiny_llama()
    pages = [
        {"page": f" = Title {n} = \n {' '.join(WORDS[(n + i) % 8] for i in range(num_words))} . \n"}
        for n in range(3)
    ]
    path = definition(tmp_path, "wikitext", pages)
    found = evaluate_harness(model, plain_tokenizer, find_task(path))
    total, prefix = 0.0, plain_tokenizer.eos_token_id
    for ((text,),) in requests(find_task(path)):
        ids = plain_tokenizer(text).input_ids
        rolling = get_rolling_token_windows(ids, prefix, max_seq_len=256, context_len=1)
        windows = [make_disjoint_window(one) for one in rolling]
        contexts, continuations = zip(*windows, strict=True)
        scores = log_probs(model, contexts, [[one] for one in continuations], precision="float32")
        total += float(sum(one.sum() for (one,) in scores))
        if len(windows) == 1:
            whole = perplexity(model, torch.tensor([prefix, *ids]), precision="float32")
            assert whole == pytest.approx(exp(-float(scores[0][0].mean())), rel=1e-4)
    assert (len(windows) == 1) == (num_words == 12)
    num_words = sum(len(page["page"].split()) for page in pages)
    assert set(found.metrics) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert found.correct is None
    # the harness also counts the empty words at both ends of a page
    assert found.metrics["word_perplexity"] == pytest.approx(
        exp(-total / (num_words + 2 * len(pages))), rel=1e-4
    )


def test_a_generating_task_with_examples_and_chat(tiny_llama, tokenizer, tmp_path, capsys):
    file = tmp_path / "qa.json"
    file.write_text("".join(json.dumps({"q": f"q{n}", "a": f"a{n}"}) + "\n" for n in range(5)))
    own = {
        "task": "qa",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(file), "test": str(file)}},
        "output_type": "generate_until",
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "qa.yaml").write_text(json.dumps(own))
    for options in ({}, {"num_fewshot": 2, "limit": 3}, {"chat": True}):
        found = evaluate_harness(tiny_llama(), tokenizer, find_task(str(tmp_path / "qa.yaml")), **options)
        assert found.metrics == {"exact_match": 0.0}
        assert found.n == options.get("limit", 5)
    assert capsys.readouterr().out == ""


def test_an_adapter_is_seen_by_the_harness(tiny_llama, plain_tokenizer, tmp_path):
    model = get_peft_model(tiny_llama(max_position_embeddings=512), SparseMemoryConfig(**SMALL)).eval()
    records = questions(8)
    path = definition(tmp_path, "medmcqa", records)
    asked = requests(find_task(path))
    before = our_likelihoods(model, plain_tokenizer, asked)
    for memory in memory_layers(model).values():
        memory.values.data.normal_()
    assert not torch.allclose(torch.cat(our_likelihoods(model, plain_tokenizer, asked)), torch.cat(before))
    assert_parity(model, plain_tokenizer, path, records)
    with model.disable_adapter():
        assert_parity(model, plain_tokenizer, path, records)


def test_a_file_that_groups_tasks(tiny_llama, plain_tokenizer, tmp_path):
    data = tmp_path / "data.json"
    data.write_text("".join(json.dumps(record) + "\n" for record in questions(4)))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "cop",
        "metric_list": [{"metric": "acc"}],
    }
    inner = {"group": "inner", "task": [{**task, "task": "b"}], "aggregate_metric_list": [{"metric": "acc"}]}
    path = tmp_path / "both.yaml"
    path.write_text(f"group: both\ntask: {json.dumps([{**task, 'task': 'a'}, inner])}\n")
    found = evaluate_harness(tiny_llama(), plain_tokenizer, find_task(str(path)))
    assert set(found.metrics) == {"both::a/acc", "both::inner/acc", "both::inner::b/acc"}
    assert (found.n, found.correct) == (8, None)


def test_bad_tasks(tmp_path, tiny_llama, plain_tokenizer, monkeypatch):
    # a definition without data files makes `datasets` search the whole working folder for them
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: broken\ndataset_path: json\n")
    for task, message in [
        (str(tmp_path / "none.yaml"), "is not there"),
        (str(broken), "cannot be loaded"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_task(task)
    path = definition(tmp_path, "medmcqa", questions(2))
    with pytest.raises(ValueError, match="chat template"):
        evaluate_harness(tiny_llama(), plain_tokenizer, find_task(path), chat=True)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r'pip install "sparsemem\[eval\]"'):
        find_task(path)


def test_smollm2_answers_medmcqa_as_in_the_harness(tmp_path, shared_data):
    model, tokenizer = models.load_base("smollm2")
    items = read_items("medmcqa", shared_data / "medmcqa_dev.jsonl", limit=8)
    records = [
        {
            "question": item["question"],
            **dict(zip(("opa", "opb", "opc", "opd"), item["choices"], strict=True)),
            "cop": item["answer"],
        }
        for item in items
    ]
    assert_parity(model, tokenizer, definition(tmp_path, "medmcqa", records), records)
