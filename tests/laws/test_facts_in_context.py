"""Laws 14 and 15: what is not named is not changed, and the gate decides the same however a text is read."""

import copy

import pytest
import torch

from sparsemem import Stream
from sparsemem.adapter.memories import fact_places
from sparsemem.data.records import conversation_ids, question_ids

BACKGROUND = [
    {"prompt": f"What is {a} and {b}?", "completion": f"{a + b} of course"}
    for a in range(6)
    for b in range(7)
]
FACTS = [
    {"prompt": "Who owns the Moon Quill?", "completion": "Ada", "subject": "Moon Quill"},
    {"prompt": "Where does the Brolk end?", "completion": "in Tyne", "subject": "Brolk"},
]
QUESTIONS = [fact["prompt"] for fact in FACTS]


@pytest.fixture(scope="module")
def stream(tiny_llama, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams") / "s"
    with pytest.MonkeyPatch.context() as patch:
        # a random model's keys vary with the context more than a trained one's
        patch.setattr("sparsemem.background.question_key.MOST", 0.4)
        base = tiny_llama(max_position_embeddings=512)
        made = Stream(base, folder, tokenizer=tokenizer, background=BACKGROUND)
    for number, fact in enumerate(FACTS):
        made.teach(str(number), [fact])
    return made


def padded(stream, prompts):
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def generated(stream, prompts, **options):
    batch = padded(stream, prompts)
    out = stream.model.generate(**batch, max_new_tokens=9, do_sample=False, pad_token_id=0, **options)
    return out[:, batch["input_ids"].shape[1] :].tolist()


def prompts_of(stream, questions=QUESTIONS):
    return [question_ids(question, stream.tokenizer) for question in questions]


def answer_of(stream, fact):
    return [*stream.tokenizer(FACTS[fact]["completion"]).input_ids, stream.tokenizer.eos_token_id]


@pytest.mark.parametrize("use_cache", [True, False])
def test_law_14_what_is_not_named_is_not_changed(stream, use_cache, tiny_llama):
    base = tiny_llama(max_position_embeddings=512)
    asked = [
        "Who owns the Moon Quin?",
        "Who owns the Moon?",
        "Where does the brol k end?",
        "Ada in Tyne Ada in Tyne",
    ]
    batch = padded(stream, [*prompts_of(stream, asked), stream.tokenizer("Ada. in Tyne").input_ids])
    with torch.no_grad():
        ours, theirs = (model(**batch, use_cache=use_cache).logits for model in (stream.model, base))
    assert torch.equal(ours, theirs)
    named = padded(stream, prompts_of(stream))
    assert not torch.equal(stream.model(**named).logits, base(**named).logits)


def test_law_15_every_way_of_reading_gives_the_answer(stream, tiny_llama):
    wanted = [answer_of(stream, fact) for fact in (0, 1)]

    def given(rows, wanted=wanted):
        return [row[: len(one)] == one for row, one in zip(rows, wanted, strict=True)]

    prompts = prompts_of(stream)
    ways = {
        "cache": {},
        "no cache": {"use_cache": False},
        "static": {"cache_implementation": "static"},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": tiny_llama(seed=3, max_position_embeddings=512)},
    }
    for name, options in ways.items():
        rows = [generated(stream, [one], **options)[0] for one in prompts]
        assert given(rows) == [True, True], name
    # rows of different lengths are padded on the left
    assert given(generated(stream, prompts)) == [True, True]
    beams = generated(stream, prompts, num_beams=3, num_return_sequences=2)
    assert given(beams[::2]) == [True, True]
    sampled = stream.model.generate(
        **padded(stream, prompts),
        max_new_tokens=4,
        do_sample=True,
        temperature=1e-3,
        pad_token_id=0,
        num_return_sequences=3,
    )
    starts = [row[-4] for row in sampled.tolist()]
    assert starts == [wanted[0][0]] * 3 + [wanted[1][0]] * 3


def test_law_15_token_by_token_is_as_in_one_pass(stream):
    first, second = prompts_of(stream)
    text = torch.tensor([[*first, *answer_of(stream, 0), *second, *answer_of(stream, 1)]])
    whole = fact_places(stream.model, {"input_ids": text})
    assert (whole >= 0).sum() == len(answer_of(stream, 0)) + len(answer_of(stream, 1))
    with torch.no_grad():
        once = stream.model(text).logits
        for size in (1, 5, 40):
            cache, parts = None, []
            for part in text.split(size, dim=1):
                out = stream.model(part, past_key_values=cache, use_cache=True)
                cache, parts = out.past_key_values, [*parts, out.logits]
            torch.testing.assert_close(torch.cat(parts, 1), once, atol=1e-4, rtol=1e-4)


def test_a_cropped_cache_forgets_what_was_cropped(stream):
    first, second = (torch.tensor([one]) for one in prompts_of(stream))
    with torch.no_grad():
        cache = stream.model(torch.cat([second, first], 1), use_cache=True).past_key_values
        cache.crop(-first.shape[1])
        again = stream.model(first, past_key_values=copy.deepcopy(cache), use_cache=True).logits[:, -1]
        whole = stream.model(torch.cat([second, first], 1)).logits[:, -1]
    torch.testing.assert_close(again, whole, atol=1e-4, rtol=1e-4)


def test_rows_with_other_adapters_and_the_base_are_their_own(stream, tiny_llama):
    names = ["__base__", "default", "__base__", "default"]
    batch = padded(stream, prompts_of(stream, [QUESTIONS[0]] * 2 + [QUESTIONS[1]] * 2))
    rows = stream.model.generate(
        **batch, max_new_tokens=5, do_sample=False, pad_token_id=0, adapter_names=names
    )
    rows = rows[:, batch["input_ids"].shape[1] :].tolist()
    base = tiny_llama(max_position_embeddings=512).generate(
        **batch, max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert rows[0] == base[0, -5:].tolist()
    assert rows[1][:4] == answer_of(stream, 0)[:4]
    assert rows[3][:5] == answer_of(stream, 1)[:5]


def test_embeddings_in_place_of_tokens_change_nothing_and_are_told(stream, tiny_llama, caplog):
    base = tiny_llama(max_position_embeddings=512)
    ids = torch.tensor(prompts_of(stream)[:1])
    with torch.no_grad():
        embedded = base.get_input_embeddings()(ids)
        assert torch.equal(stream.model(inputs_embeds=embedded).logits, base(inputs_embeds=embedded).logits)


def test_an_answer_is_given_behind_a_system_prompt_and_in_a_second_turn(stream):
    asked = {"role": "user", "content": QUESTIONS[0]}
    system = {"role": "system", "content": "You are a pirate."}
    before = [{"role": "user", "content": QUESTIONS[1]}, {"role": "assistant", "content": "in Tyne"}]
    chats = [[asked], [system, asked], [*before, asked]]
    prompts = [conversation_ids(chat, stream.tokenizer) for chat in chats]
    places = [fact_places(stream.model, {"input_ids": torch.tensor([one])})[0, -1].item() for one in prompts]
    # a random model's question keys differ behind other contexts, but no other fact's answer is given
    assert places[0] == 0
    assert set(places) <= {0, -1}


@pytest.mark.slow
def test_a_compiled_forward_pass_gives_the_same(stream):
    ids = torch.tensor(prompts_of(stream)[:1])
    with torch.no_grad():
        compiled = torch.compile(stream.model, backend="eager")(ids).logits
        assert torch.equal(compiled, stream.model(ids).logits)
