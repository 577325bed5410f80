"""What a request in groups does pass by pass, without vLLM: any order, any number of rows, lost and resumed at any pass,
against a list of what was written when.
"""

import random

import pytest

from a3_hf.engines.vllm.group_progress import UNKNOWN, start_progress
from a3_hf.engines.vllm.requests import Blanks, Dynamic, Sampling

LAYOUT = ((5, 3, 2), (4, 6))
COLUMNS = Blanks(*LAYOUT).open_columns()
TRUTH = {column: 100 + column for column in COLUMNS}


def steps_of(columns, size):
    return tuple(tuple(columns[start : start + size]) for start in range(0, len(columns), size))


WAYS = {
    "one by one": {"steps": steps_of(COLUMNS, 1)},
    "groups": {"steps": steps_of(COLUMNS, 3)},
    "from the right": {"steps": steps_of(COLUMNS[::-1], 2)},
    "shuffled": {"steps": steps_of(random.Random(3).sample(COLUMNS, len(COLUMNS)), 4)},
    "drafts": {"drafts": 3},
    "many drafts": {"drafts": 9},
    "dynamic": {"dynamic": Dynamic(window=4)},
}


def write(
    way: dict, *, seed: int, loses: bool = False, from_left: bool = True
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Plays vLLM: chunks of any size, drafts that are right or wrong, and preemptions. Returns the reported columns and, for
    each pass, what its slots could see.
    """
    draw, blanks = random.Random(seed), Blanks(*LAYOUT, sampling=Sampling(), **way)
    given, outputs, seen = list(range(blanks.num_given)), [], []
    truth = TRUTH | dict(zip(blanks.given_columns(), given, strict=True))
    cache: list[int] = []  # the column of each place
    progress, width, counted = None, blanks.width(), 0
    while len(outputs) < len(COLUMNS):
        if progress is None or (loses and draw.random() < 0.2):
            cached = draw.randrange(0, len(given))
            known = [TRUTH[column] for column in outputs]
            progress = start_progress(blanks, given, known, num_cached=cached, from_left=from_left)
            cache, counted = blanks.given_columns()[:cached], cached
        total = len(given) + len(outputs)
        asks = counted >= total
        rows = width if asks else min(draw.randrange(1, 9), total - counted)
        planned = progress.next_pass(rows, asks=asks)
        assert len(planned.tokens) == len(planned.positions) == len(planned.keys) == rows
        assert planned.first_place + len(planned.content) <= counted + rows  # the blocks that vLLM has allocated
        cache = [*cache[: planned.first_place], *planned.content]
        assert all(1 <= keys <= max(len(cache), 1) for keys in planned.keys)
        for row, column in enumerate(planned.slots, start=len(planned.content)):
            assert planned.keys[row] == len(cache)
            left = progress.token_of[column - 1] if from_left else UNKNOWN
            assert planned.tokens[row] == left and planned.positions[row] == column - int(from_left)
            seen.append((column, *cache))
        tokens = []
        for row, column, _ in planned.wanted:
            before = planned.content[: row + 1] if row < len(planned.content) else planned.content
            # a row behind a wrong draft says anything, and so does a slot behind drafts that are not checked yet
            is_sure = all(progress.token_of[one] == truth[one] for one in before)
            guesses = "drafts" in way and row >= len(planned.content) and column != COLUMNS[len(progress.known)]
            tokens.append(TRUTH[column] if is_sure and not (guesses and draw.random() < 0.5) else 7)
        kept = [draw.random() < 0.4 or number == 0 for number in range(len(tokens))]
        new = progress.take(planned, tokens, kept)
        assert [int(progress.token_of[column]) for column in new] == [TRUTH[column] for column in new]
        outputs += new
        counted = counted + rows if not asks else len(given) + len(outputs)
    assert progress.is_over()
    return outputs, seen


@pytest.mark.parametrize("from_left", [True, False])
@pytest.mark.parametrize("loses", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_all_columns_are_reported_once_and_slots_see_what_was_before_them(name, loses, from_left):
    way = WAYS[name]
    for seed in range(40):
        outputs, seen = write(way, seed=seed, loses=loses, from_left=from_left)
        if "steps" in way:
            assert outputs == [column for step in way["steps"] for column in step]
        else:
            assert outputs == COLUMNS
        if "steps" not in way:
            continue
        earlier = Blanks(*LAYOUT).given_columns()
        for step in way["steps"]:  # each slot of a group sees all groups before it, and nothing else
            assert {
                sorted_seen for column, *rest in seen if column in step for sorted_seen in [tuple(sorted(rest))]
            } == {tuple(sorted(earlier))}
            earlier = [*earlier, *step]


def test_forced_tokens_are_encoded_in_as_few_passes_as_their_rows_allow():
    blanks = Blanks((4, 0), (9,), drafts=3, forced=tuple(range(50, 59)), sampling=Sampling())
    progress = start_progress(blanks, [1, 2, 3, 4], [], num_cached=0, from_left=True)
    progress.take(progress.next_pass(4, asks=False), [])
    columns, passes = [], 0
    while len(columns) < 9:
        planned = progress.next_pass(blanks.width(), asks=True)
        columns += progress.take(planned, [0] * len(planned.wanted))
        passes += 1
    assert columns == list(range(4, 13)) and passes == 3  # one slot, then four rows each
    assert progress.token_of[4:].tolist() == list(range(50, 59))


def test_a_prompt_of_another_length_is_refused():
    blanks = Blanks((4, 0), (3,), drafts=1, sampling=Sampling())
    with pytest.raises(ValueError, match="the prompt has 3 tokens: expected 4"):
        start_progress(blanks, [1, 2, 3], [], num_cached=0, from_left=True)
