"""How requests with blanks travel, and the rows of those that are written one token a step; without vLLM."""

import json

import pytest

from a3_hf.engines.vllm.requests import Blanks, Dynamic, OneRowScript, Row, Sampling


class Params:
    def __init__(self, extra_args):
        self.extra_args = extra_args


WAYS = [
    Blanks((3, 2), (4,)),
    Blanks((3, 0, 2), (4, 1), spaced=(1,), is_text=False),
    Blanks((3, 2), (4,), steps=((3, 6), (4,), (5,)), sampling=Sampling(0.5, 3, 0.9, 0.1, 7)),
    Blanks((3, 2), (4,), drafts=3, sampling=Sampling()),
    Blanks((3, 0), (2,), drafts=3, forced=(5, 6), sampling=Sampling()),
    Blanks((3, 2), (4,), dynamic=Dynamic("margin", 2), sampling=Sampling(1.0)),
]


@pytest.mark.parametrize("blanks", WAYS)
def test_they_arrive_as_they_were_sent(blanks):
    assert Blanks.of(Params(json.loads(json.dumps(blanks.extra_args())))) == blanks


def test_plain_requests_have_none():
    for params in (None, Params(None), Params({}), Params({"other": 1})):
        assert Blanks.of(params) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": [4]}, "pieces"),
        ({"pieces": [3, 2], "lengths": []}, "at least one blank"),
        ({"pieces": [0, 2], "lengths": [4]}, "given tokens before"),
        ({"pieces": [3, 2], "lengths": [0]}, "lengths holds 0"),
        ({"pieces": [3, -1], "lengths": [4]}, "pieces holds -1"),
        ({"pieces": [3, True], "lengths": [4]}, "pieces holds True"),
        ({"pieces": [3, 2], "lengths": ["4"]}, "lengths holds '4'"),
        ({"pieces": [3, 2], "lengths": [4], "spaced": [1]}, "spaced holds 1"),
        ({"pieces": [3, 2], "lengths": [4], "group": 2}, "'group'"),
        ({"pieces": [3, 2], "lengths": [4], "steps": [[3], [4], [5]], "sampling": {}}, "each column"),
        ({"pieces": [3, 2], "lengths": [4], "steps": [[3, 4, 5, 6], []], "sampling": {}}, "empty step"),
        ({"pieces": [3, 2], "lengths": [4], "steps": [[3, 4, 5, 6]]}, "sampling: expected with steps"),
        ({"pieces": [3, 2], "lengths": [4], "sampling": {}}, "sampling: expected with steps"),
        ({"pieces": [3, 2], "lengths": [4], "drafts": 2, "dynamic": {}, "sampling": {}}, "at most one"),
        ({"pieces": [3, 2], "lengths": [4], "drafts": 2, "forced": [1], "sampling": {}}, "forced has 1 tokens"),
        ({"pieces": [3, 2], "lengths": [4], "drafts": 2, "sampling": {"heat": 1}}, "heat"),
        ({"pieces": [3, 2], "lengths": [4], "dynamic": {"criterion": "x"}, "sampling": {}}, "criterion='x'"),
        ({"pieces": [3, 2], "lengths": [4], "dynamic": {"window": 0}, "sampling": {}}, "window holds 0"),
        ({"pieces": [3, 2], "lengths": [4], "dynamic": {"threshold": 2}, "sampling": {}}, "threshold=2"),
        ({"pieces": [3, 2], "lengths": [4], "drafts": 2, "sampling": {"temperature": "hot"}}, "temperature='hot'"),
        ({"pieces": [3, 2], "lengths": [4], "drafts": 2, "sampling": {"top_k": -5}}, "top_k holds -5"),
        ({"pieces": [3, 2], "lengths": [4], "drafts": 2, "sampling": {"seed": 2**63}}, "seed holds"),
        ({"pieces": [3, 2], "lengths": [4], "is_text": "no"}, "is_text='no'"),
        ({"pieces": 3, "lengths": [4]}, "extra_args"),
        ([3, 2], "expected the fields of Blanks"),
    ],
)
def test_what_is_wrong_is_said(fields, message):
    with pytest.raises(ValueError, match=message):
        Blanks.of(Params({"a3": fields}))


def test_rows_of_two_blanks():
    script = OneRowScript(Blanks((2, 2, 1), (2, 3), is_text=False))  # a b _ _ c d _ _ _ e
    assert script.prompt([10, 11, 12, 13, 14]) == [10, 11, 12, 13, 14, 11]
    given = [Row(0), Row(1), Row(4), Row(5), Row(9)]
    written = [Row(2), Row(3), Row(5, is_slot=True), Row(6), Row(7), Row(8)]
    assert script.rows == [*given, Row(1, is_slot=True), *written]
    assert script.columns == [2, 3, None, 6, 7, 8]
    assert script.forced == [None, None, 3, None, None, None]  # d, the fourth given token
    assert script.starts == [0, None, None, 1, None, None]


@pytest.mark.parametrize(
    ("pieces", "lengths", "repeats", "forced"),
    [((3, 0), (4,), 0, 0), ((3, 0, 0), (4, 2), 0, 0), ((3, 2, 0), (4, 2), 1, 1), ((3, 0, 2), (4, 2), 1, 0)],
)
def test_a_slot_of_its_own_is_there_only_where_it_must(pieces, lengths, repeats, forced):
    script = OneRowScript(Blanks(pieces, lengths))
    assert len(script.repeats) == repeats and sum(one is not None for one in script.forced) == forced
    assert script.num_outputs == sum(lengths) + forced


def test_widths():
    assert [blanks.width() for blanks in WAYS[2:]] == [3, 7, 4, 4]
