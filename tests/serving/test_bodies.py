"""What a chat template gets of a request: tools, their calls and answers, variables of its own."""

import json

import pytest

from conftest import make_tokenizer
from sparsemem.serving.bodies import ApiError, ChatBody, CompletionBody, parse

TOOLS = (
    "{% for tool in tools or [] %}[tool {{ tool.function.name }}]{% endfor %}"
    "{% for turn in messages %}<|im_start|>{{ turn.role }}: {{ turn.content }}"
    "{% for call in turn.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments.city }}]"
    "{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{{ ' !' if loud }}{% endif %}"
)
BROKEN = "{{ messages[0].content.nothing.more }}"
LOOPS = "{% for number in range(10**12) %}{{ number }}{% endfor %}"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASKS = {"role": "user", "content": "Rain?"}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Tarsipol"}'}}


def text_of(tokenizer, **fields):
    body = parse(ChatBody, json.dumps({"model": "base", **fields}).encode())
    return tokenizer.decode(body.prompts(tokenizer)[0])


def test_tools_their_calls_and_answers_go_into_the_template():
    turns = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}],
        },
        ASKS,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "content": "dry", "tool_call_id": "1"},
    ]
    found = text_of(make_tokenizer(TOOLS), messages=turns, tools=[WEATHER], tool_choice="auto")
    assert found == (
        "[tool weather]<|im_start|>system: Be brief<|im_end|><|im_start|>user: Rain?<|im_end|>"
        "<|im_start|>assistant: [weather Tarsipol]<|im_end|><|im_start|>tool: dry<|im_end|>"
        "<|im_start|>assistant:"
    )


def test_no_tool_is_named_where_none_may_be_called():
    found = text_of(make_tokenizer(TOOLS), messages=[ASKS], tools=[WEATHER], tool_choice="none")
    assert "weather" not in found


def test_variables_of_the_template():
    found = text_of(make_tokenizer(TOOLS), messages=[ASKS], chat_template_kwargs={"loud": True})
    assert found.endswith("assistant: !")


@pytest.mark.parametrize(
    ("template", "fields", "message"),
    [
        (BROKEN, {}, "messages: the model's chat template refuses the text: .* no attribute 'nothing'"),
        (LOOPS, {}, "messages: the model's chat template refuses the text: Range too big"),
        (BROKEN, {"tools": [WEATHER]}, "takes no tools; leave them out"),
        (TOOLS, {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template cannot be set"),
        (TOOLS, {"chat_template_kwargs": {"turns": []}}, "turns cannot be set"),
        (TOOLS, {"messages": [{"role": "assistant", "tool_calls": [3]}]}, r"tool_calls\[0\]=3: must be"),
        (TOOLS, {"messages": [{"role": "assistant", "tool_calls": [
            {"function": {"arguments": "{"}}]}]}, "arguments must be JSON"),
    ],
)  # fmt: skip
def test_what_a_template_refuses_is_a_clear_400(template, fields, message):
    with pytest.raises(ApiError, match=message) as raised:
        text_of(make_tokenizer(template), **{"messages": [ASKS], **fields})
    assert raised.value.status == 400


@pytest.mark.parametrize(
    "content",
    ['{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}', '{"model": NaN}', "[]", "3"],
)
def test_what_is_no_text_is_refused(content):
    with pytest.raises(ApiError) as raised:
        parse(ChatBody, content.encode())
    assert raised.value.status == 400


def test_prompts_that_are_none(tokenizer):
    for prompt in ([], [[]], [[1], [True]], [10**6], [-1], 3, [None]):
        with pytest.raises(ApiError, match="prompt"):
            parse(CompletionBody, json.dumps({"model": "base", "prompt": prompt}).encode()).prompts(tokenizer)
