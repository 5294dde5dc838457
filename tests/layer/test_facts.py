"""Which taught answer is given at a token: two keys, and the answer's own tokens."""

from dataclasses import replace

import pytest
import torch

from sparsemem.layer.facts import Context, given_at, noted
from sparsemem.layer.space import plain_space
from tiny import facts_with

# token ids are their own classes; odd ones may continue a word
VOCABULARY = 40
ASK, OTHER = torch.eye(4)[0], torch.eye(4)[1]


@pytest.fixture
def space():
    plain = plain_space(torch.zeros(4), torch.eye(4), torch.zeros(0, 4), 0.5)
    edges = torch.tensor([3 if token >= 30 else 0 for token in range(VOCABULARY)])
    return replace(
        plain,
        key_mean=torch.zeros(4),
        key_projection=torch.eye(4),
        classes=torch.arange(VOCABULARY),
        edges=edges,
        turn=torch.tensor([1, 2]),
    )


def places(facts, space, rows, asked, past=0, given=None, late=None):
    """Places of rows of tokens, whose question key is ASK at the positions `asked` and OTHER elsewhere."""
    ids = torch.tensor(rows)
    given = torch.zeros(len(ids), past, 2, dtype=torch.int64) if given is None else given
    middle = OTHER.expand(*ids.shape, 4).clone()
    for position in asked:
        middle[:, position] = ASK
    late = middle if late is None else late
    return given_at(facts, space, Context(ids, given), late[:, past:], middle[:, past:])


def test_an_answer_begins_where_its_subject_is_named_and_its_question_is_asked(space):
    facts = facts_with([[20, 21]], [[1.0, 0, 0, 0]], [(0, [10, 11])])
    named, not_named = [5, 10, 11, 6, 20, 21, 7], [5, 10, 12, 6, 20, 21, 7]
    assert places(facts, space, [named, not_named], [3]).tolist() == [[-1, -1, -1, 0, 1, -1, -1], [-1] * 7]
    # another question, and the question before the name
    assert places(facts, space, [named], []).eq(-1).all()
    assert places(facts, space, [named], [1]).eq(-1).all()


def test_an_answer_goes_on_with_its_own_tokens_alone(space):
    facts = facts_with([[20, 21, 22]], [[1.0, 0, 0, 0]], [(0, [10])])
    assert places(facts, space, [[10, 6, 20, 21, 9, 22]], [1]).tolist() == [[-1, 0, 1, 2, -1, -1]]
    assert places(facts, space, [[10, 6, 9, 20, 21, 22]], [1]).tolist() == [[-1, 0, -1, -1, -1, -1]]
    # its tokens without its beginning
    assert places(facts, space, [[10, 6, 20, 21, 9, 22]], []).eq(-1).all()


def test_a_name_must_be_whole_words(space):
    facts = facts_with([[20]], [[1.0, 0, 0, 0]], [(0, [31])])
    goes_on, comes_on, alone = [5, 31, 32, 6], [5, 30, 31, 6], [5, 31, 7, 6]
    assert places(facts, space, [goes_on, comes_on, alone], [3])[:, 3].tolist() == [-1, -1, 0]
    # at the end of the context nobody knows yet whether the word continues
    assert places(facts, space, [[5, 31]], [1])[0, 1] == 0


def test_only_the_last_turn_says_whom_a_question_is_about(space):
    facts = facts_with([[20]], [[1.0, 0, 0, 0]], [(0, [10])])
    first, last = [1, 2, 10, 6, 9, 1, 2, 5, 6], [1, 2, 5, 6, 9, 1, 2, 10, 6]
    assert places(facts, space, [first, last], [8])[:, 8].tolist() == [-1, 0]


def test_the_subject_that_was_named_last_wins_then_the_longer_one_then_the_nearer_question(space):
    keys = [[1.0, 0, 0, 0]] * 3
    facts = facts_with([[20], [21], [22]], keys, [(0, [10]), (1, [11]), (2, [12, 11])])
    rows = [[10, 11, 6], [11, 10, 6], [10, 12, 11, 6]]
    assert [int(places(facts, space, [row], [len(row) - 1])[0, -1]) for row in rows] == [1, 0, 2]
    near = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.4, 0, 0], [1.0, 0, 0, 0], [1.0, 0, 0, 0]]), dim=-1
    )
    facts = facts_with([[20], [21], [22]], near, [(0, [10]), (1, [10]), (2, [10])])
    # of equals the later one
    assert places(facts, space, [[10, 6]], [1])[0, 1] == 2


def test_a_fact_without_a_subject_needs_a_near_state(space):
    facts = facts_with([[20]], [[1.0, 0, 0, 0]], least=(0.5, 0.9))
    near, far = torch.eye(4)[:1].expand(1, 2, 4), torch.eye(4)[1:2].expand(1, 2, 4)
    assert places(facts, space, [[5, 6]], [1], late=near)[0, 1] == 0
    assert places(facts, space, [[5, 6]], [1], late=far)[0, 1] == -1


def test_the_tokens_before_an_answer_are_compared_where_a_template_makes_them(space):
    facts = facts_with([[20]], [[1.0, 0, 0, 0]], [(0, [10])], openings=[[8, 9]])
    assert places(facts, space, [[10, 8, 9], [10, 7, 9]], [2])[:, 2].tolist() == [0, -1]


@pytest.mark.parametrize("cut", range(1, 6))
def test_token_by_token_is_as_in_one_pass(space, cut):
    facts = facts_with([[20, 21, 22], [23]], [[1.0, 0, 0, 0]] * 2, [(0, [10]), (1, [11])])
    rows = [[10, 6, 20, 21, 22, 9], [-1, 11, 6, 23, 9, 9]]
    whole = places(facts, space, rows, [1, 2])
    before = [row[:cut] for row in rows]
    first = places(facts, space, before, [one for one in (1, 2) if one < cut])
    rest = places(facts, space, rows, [1, 2], past=cut, given=noted(facts, first))
    assert torch.equal(torch.cat([first, rest], 1), whole)
    assert whole.tolist() == [[-1, 0, 1, 2, 3, -1][:6], [-1, -1, 3, -1, -1, -1]] or whole[0, 1] == 0


def test_many_facts_of_one_name_are_found(space):
    facts = facts_with([[20]] * 5, torch.eye(4)[[0, 1, 2, 3, 1]], [(place, [10, 11]) for place in range(5)])
    found = facts.index.found(*space.classes_of(torch.tensor([3, 10, 11, 4, 10, 11])))
    assert sorted({one.fact for one in found}) == [0, 1, 2, 3, 4]
    assert {one.end for one in found} == {2, 5}
