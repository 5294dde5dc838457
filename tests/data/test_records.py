import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_tokenizer
from sparsemem.data import conversations
from sparsemem.data.records import (
    batches,
    collate,
    conversation_ids,
    encode,
    opening_ids,
    prompt_ids,
    question_ids,
    truncate,
)

PAIR = {"prompt": "Capital of Velmora?", "completion": "Ostrinth."}
TALK = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Bye"},
    ]
}
CHOICE = {"question": "Which?", "choices": ["this", "that"], "answer": 1}


def learnt(example, tokenizer):
    return tokenizer.decode([label for label in example["labels"] if label != -100])


def test_completion_and_its_end_are_learnt_and_nothing_follows(tokenizer):
    (example,) = encode([PAIR], tokenizer)
    assert learnt(example, tokenizer) == "Ostrinth.<|im_end|>"
    assert example["labels"][-1] == tokenizer.eos_token_id
    prompt = prompt_ids(PAIR["prompt"], tokenizer)
    assert example["input_ids"][: len(prompt)] == prompt
    assert example["labels"][: len(prompt)] == [-100] * len(prompt)


def test_every_assistant_turn_is_learnt(tokenizer):
    (example,) = encode([TALK], tokenizer)
    assert learnt(example, tokenizer) == "Ho<|im_end|>Bye<|im_end|>"
    whole = tokenizer.apply_chat_template(TALK["messages"], tokenize=False)
    assert tokenizer.decode(example["input_ids"]) == whole.rstrip()


def test_multiple_choice_teaches_the_right_option(tokenizer, plain_tokenizer):
    (example,) = encode([CHOICE], tokenizer)
    assert learnt(example, tokenizer) == "that<|im_end|>"
    (example,) = encode([CHOICE], plain_tokenizer)
    assert plain_tokenizer.decode(example["input_ids"]).endswith("B. that\nAnswer: that<|im_end|>")


def test_text_is_taken_as_it_is(tokenizer):
    (example,) = encode([{"text": "As it is.\n"}], tokenizer)
    assert tokenizer.decode(example["input_ids"]) == "As it is.\n"
    assert example["labels"] == example["input_ids"]


def test_loss_on_all(tokenizer):
    (example,) = encode([PAIR], tokenizer, loss_on="all")
    assert example["labels"] == example["input_ids"]
    with pytest.raises(ValueError, match="allowed are completion, all"):
        encode([PAIR], tokenizer, loss_on="prompt")


@given(prompt=st.text(max_size=20), completion=st.text(max_size=20))
def test_without_template_a_prompt_stays_as_it_is_and_a_space_follows(plain_tokenizer, prompt, completion):
    (example,) = encode([{"prompt": prompt, "completion": completion}], plain_tokenizer)
    space = " " if prompt[-1:].strip() and completion[:1].strip() else ""
    assert plain_tokenizer.decode(example["input_ids"]) == prompt + space + completion + "<|im_end|>"
    assert learnt(example, plain_tokenizer) == space + completion + "<|im_end|>"
    ids = prompt_ids(prompt, plain_tokenizer)
    assert example["input_ids"][: len(ids)] == ids


def test_messages_without_template_are_questions_and_answers(plain_tokenizer):
    talk = [{"role": "system", "content": "Be brief."}, *TALK["messages"]]
    (example,) = encode([{"messages": talk}], plain_tokenizer)
    assert plain_tokenizer.decode(example["input_ids"]) == (
        "Be brief.\n\nQuestion: Hi\nAnswer: Ho<|im_end|>\n\nQuestion: And?\nAnswer: Bye<|im_end|>"
    )
    assert learnt(example, plain_tokenizer) == " Ho<|im_end|> Bye<|im_end|>"


def test_the_missing_template_is_said_once(plain_tokenizer, caplog):
    conversations.say_plain.cache_clear()
    encode([TALK, PAIR, TALK], plain_tokenizer)
    question_ids("Who?", plain_tokenizer)
    assert [record.message for record in caplog.records] == [
        "the tokenizer has no chat template: messages and questions become 'Question: ...\\nAnswer: ...', "
        "prompts stay as they are written"
    ]


@pytest.mark.parametrize("kind", ["tokenizer", "plain_tokenizer", "bos_tokenizer", "plain_bos_tokenizer"])
def test_an_answer_is_generated_from_the_tokens_that_it_was_taught_behind(kind, request):
    tokenizer = request.getfixturevalue(kind)
    turns = TALK["messages"]
    for end in (1, 3):
        (example,) = encode([{"messages": turns[: end + 1]}], tokenizer)
        prompt = conversation_ids(turns[:end], tokenizer)
        assert example["input_ids"][: len(prompt)] == prompt
        assert [label == -100 for label in example["labels"][len(prompt) - 1 : len(prompt) + 1]] == [
            True,
            False,
        ]
        assert prompt[: len(opening_ids(tokenizer))] == opening_ids(tokenizer)
        assert example["input_ids"][-1] == tokenizer.eos_token_id
    assert question_ids("Hi", tokenizer) == conversation_ids(turns[:1], tokenizer)


@pytest.mark.parametrize("kind", ["bos_tokenizer", "plain_bos_tokenizer"])
def test_every_record_begins_with_bos_once_where_the_tokenizer_adds_one(kind, request, tokenizer):
    bos_tokenizer = request.getfixturevalue(kind)
    bos = bos_tokenizer.bos_token_id
    assert (opening_ids(bos_tokenizer), opening_ids(tokenizer)) == ([bos], [])
    for record in (PAIR, TALK, CHOICE, {"text": "As it is."}, {"text": "<s>As it is."}):
        (example,) = encode([record], bos_tokenizer)
        assert example["input_ids"].count(bos) == 1
        assert example["input_ids"][0] == bos
    (example,) = encode([{"text": "As it is."}], bos_tokenizer)
    assert example["input_ids"] == bos_tokenizer("As it is.").input_ids


def test_a_template_that_rewrites_turns_gives_an_example_for_each_answer(tokenizer):
    forgetful = tokenizer.chat_template.replace("for m in messages", "for m in messages[-2:]")
    forgetful = make_tokenizer(forgetful)
    examples = encode([TALK], forgetful)
    assert [learnt(example, forgetful) for example in examples] == ["Ho<|im_end|>", "Bye<|im_end|>"]
    for end, example in zip((1, 3), examples, strict=True):
        prompt = conversation_ids(TALK["messages"][:end], forgetful)
        assert example["input_ids"][: len(prompt)] == prompt


def test_truncation_counts_and_leaves_out_what_lost_its_loss(tokenizer, caplog):
    long = {"prompt": "x" * 100, "completion": "y"}
    examples = encode([PAIR, long], tokenizer)
    length = len(examples[0]["input_ids"])
    kept, num_cut = truncate(examples, length)
    assert (kept, num_cut) == ([examples[0]], 1)
    assert f"1 of 2 records truncated to {length} tokens, 1 left out" in caplog.text
    assert encode([PAIR, long], tokenizer, max_length=length) == kept
    with pytest.raises(ValueError, match="max_length is 5"):
        truncate(examples, 5)


def test_collate_pads_right():
    examples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = collate(examples, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert [len(batch["input_ids"]) for batch in batches(examples * 3, 4, 9)] == [4, 2]
