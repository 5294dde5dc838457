"""Text in pieces: together they are the text, whole characters only, nothing behind a stop string."""

import pytest

from sparsemem.serving.engine import AnswerText


def pieces(tokenizer, text, stop=()):
    answer, sent = AnswerText(tokenizer, stop), []
    for token in tokenizer(text).input_ids:
        sent.append(answer.add(token))
        if answer.stopped:
            break
    return [*sent, answer.rest()], answer


def test_pieces_are_the_text_and_whole_characters(tokenizer):
    sent, answer = pieces(tokenizer, "Zoë says: naïve 🦊!")
    assert "".join(sent) == answer.text == "Zoë says: naïve 🦊!"
    assert "🦊" in sent
    assert not any("�" in piece for piece in sent)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("one STO two", ["STOP"], "one STO two"),
        ("ends in ST", ["STOP"], "ends in ST"),
        ("a b\n\nc", ["\n\n", "b"], "a "),
    ],
)
def test_nothing_behind_a_stop_string(tokenizer, text, stop, expected):
    sent, answer = pieces(tokenizer, text, stop)
    assert "".join(sent) == answer.text == expected
    assert answer.stopped == (expected != text)


def test_the_token_that_ends_an_answer_has_no_text(tokenizer):
    answer = AnswerText(tokenizer)
    assert answer.add(tokenizer.eos_token_id) == ""
    assert answer.text == ""
