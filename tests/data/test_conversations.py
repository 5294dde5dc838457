"""Chat templates of many models: what an answer is taught behind, what is taught, and what ends it."""

import re
from types import SimpleNamespace

import pytest
from templates import SHAPES, tokenizer_for

from conftest import make_tokenizer
from sparsemem.data.conversations import end_tokens, prompt_text
from sparsemem.data.reading import read_records
from sparsemem.data.records import conversation_ids, encode, text_ids

HI = [{"role": "user", "content": "Hi"}]
HO = {"role": "assistant", "content": "Ho"}
TALK = [*HI, HO, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye"}]
BRIEF = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ost"}}}


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


@pytest.fixture
def tokenizer(shape):
    return tokenizer_for(shape)


def learnt(example, tokenizer):
    """The text of each run of tokens with loss."""
    runs, before = [], -100
    for label in example["labels"]:
        if label != -100:
            runs[-1:] = [[*runs[-1], label]] if before != -100 else [*runs[-1:], [label]]
        before = label
    return [tokenizer.decode(run) for run in runs]


def examples_of(turns, tokenizer, **fields):
    return encode(read_records([{"messages": turns, **fields}]), tokenizer)


def check(turns, tokenizer, tools=None):
    """Every answer is learnt behind exactly the tokens that it is generated from."""
    examples = examples_of(turns, tokenizer, **({"tools": tools} if tools else {}))
    places = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    starts = [
        example["input_ids"][:place]
        for example in examples
        for place in range(1, len(example["labels"]))
        if example["labels"][place - 1] == -100 != example["labels"][place]
    ]
    assert starts == [conversation_ids(turns[:place], tokenizer, tools=tools) for place in places]
    return examples


def test_one_turn(shape, tokenizer):
    (example,) = check([*HI, HO], tokenizer)
    whole = tokenizer.decode(example["input_ids"])
    whole = re.sub(r"Today Date: .*", "Today Date: DATE", whole)
    assert (whole, learnt(example, tokenizer)) == (shape.prompt + shape.answer, [shape.answer])
    assert example["input_ids"][-1] in end_tokens(None, tokenizer)
    pair = encode(read_records([{"prompt": "Hi", "completion": "Ho"}]), tokenizer)
    assert pair == [example]


def test_two_turns(shape, tokenizer):
    examples = check(TALK, tokenizer)
    answers = [text for example in examples for text in learnt(example, tokenizer)]
    assert answers == [shape.answer, shape.answer.replace("Ho", "Bye")]
    assert len(examples) == shape.examples


def test_system_prompt(shape, tokenizer):
    turns = [BRIEF, *HI, HO]
    if shape.system == "refused":
        with pytest.raises(ValueError, match=r"^record 1: the model's chat template refuses .*: System role"):
            examples_of(turns, tokenizer)
        return
    (example,) = check(turns, tokenizer)
    assert learnt(example, tokenizer) == [shape.answer]
    assert "Be brief." in tokenizer.decode(example["input_ids"])


def test_tools(shape, tokenizer):
    turns = [*HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    turns += [{"role": "tool", "content": "rain"}, HO]
    if shape.tools == "refused":
        with pytest.raises(ValueError, match="record 1: the model's chat template takes no tools; leave"):
            examples_of(turns, tokenizer, tools=TOOLS)
        return
    examples = check([{**turn, "content": turn["content"] or ""} for turn in turns], tokenizer, TOOLS)
    call, answer = [text for example in examples for text in learnt(example, tokenizer)]
    assert re.search(r'weather.*"city": "Ost"', call)
    assert call.endswith(shape.answer.partition("Ho")[2].strip())
    assert answer == shape.answer
    assert '"name": "weather", "parameters"' in tokenizer.decode(examples[0]["input_ids"])


def test_a_first_turn_of_the_assistant_is_not_learnt_or_refused(shape, tokenizer):
    turns = [{"role": "assistant", "content": "Welcome"}, *HI, HO]
    if "must alternate" in shape.template:
        with pytest.raises(ValueError, match=r"^record 1: .* template refuses the text: .* must alternate"):
            examples_of(turns, tokenizer)
        return
    (example,) = examples_of(turns, tokenizer)
    assert learnt(example, tokenizer) == [shape.answer]


def test_indentation_is_kept_and_one_space_before_an_answer_is_not(shape, tokenizer):
    for completion, kept in (("    return 1\n", "    return 1"), (" Ho", "Ho"), ("\n\nHo  ", "Ho")):
        (example,) = encode(read_records([{"prompt": "Hi", "completion": completion}]), tokenizer)
        assert learnt(example, tokenizer) == [shape.answer.replace("Ho", kept)]


def test_thinking_is_on_where_the_answer_thinks_or_the_caller_says_so():
    thoughts = "<think>\nA greeting.\n</think>\n\nHo"
    for name, learns in (("qwen3", thoughts), ("r1", thoughts.removeprefix("<think>\n"))):
        tokenizer = tokenizer_for(SHAPES[name])
        (example,) = examples_of([*HI, {**HO, "content": thoughts}], tokenizer)
        assert learnt(example, tokenizer) == [learns + SHAPES[name].specials[0]]
        prompt = prompt_text(HI, tokenizer, enable_thinking=True)
        assert tokenizer.decode(example["input_ids"]) == prompt + learns + SHAPES[name].specials[0]


def test_a_turn_of_weight_0_is_not_learnt(plain_tokenizer):
    tokenizer = tokenizer_for(SHAPES["chatml"])
    turns = [TALK[0], {**HO, "weight": 0}, *TALK[2:]]
    (example,) = examples_of(turns, tokenizer)
    assert learnt(example, tokenizer) == ["Bye<|im_end|>"]
    (example,) = examples_of(turns, plain_tokenizer)
    assert learnt(example, plain_tokenizer) == [" Bye<|im_end|>"]


def test_an_answer_ends_at_the_models_the_tokenizers_or_the_templates_end():
    tokenizer = tokenizer_for(SHAPES["chatml"])
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 8]))
    assert end_tokens(model, tokenizer) == {0, 2, 7, 8}
    model.generation_config.eos_token_id = 7
    assert end_tokens(model, tokenizer) == {0, 2, 7}
    tokenizer.chat_template = None
    assert end_tokens(SimpleNamespace(), tokenizer) == {0}


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt():
    from tokenizers.processors import TemplateProcessing

    for template in (None, SHAPES["chatml"].template):
        tokenizer = make_tokenizer(template)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 0)]
        )
        assert tokenizer("a").input_ids[-1] == 0
        (example,) = encode([{"prompt": "Hi", "completion": "Ho"}], tokenizer)
        first = next(place for place, label in enumerate(example["labels"]) if label != -100)
        assert 0 not in example["input_ids"][first:-1]
        assert example["input_ids"][-1] == 0
        assert 0 not in text_ids("Hi", tokenizer)
        assert template or 0 not in example["input_ids"][:first]


@pytest.mark.parametrize(
    "broken",
    ["{{ messages[9].content }}", "{{ messages + 1 }}", "{% for %}", "{{ raise_exception('no\n\nway') }}"],
)
def test_any_error_of_a_template_is_one_sentence(broken):
    with pytest.raises(
        ValueError, match=r"^record 1: the model's chat template refuses the text: .*\S"
    ) as error:
        examples_of([*HI, HO], make_tokenizer(broken))
    assert "\n" not in str(error.value)


def test_any_error_of_a_tokenizer_is_one_sentence(tokenizer):
    with pytest.raises(ValueError, match="the model's tokenizer refuses the text: "):
        encode([{"text": "\ud800"}], tokenizer)


def test_a_template_that_hides_answers_is_refused():
    with pytest.raises(ValueError, match="leaves out what the assistant says"):
        examples_of([*HI, HO], make_tokenizer("{{ messages[0].content }}"))
