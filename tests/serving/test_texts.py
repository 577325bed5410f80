"""Text that grows token by token, and where it stops."""

import random

import pytest

from a3_hf.models.a3_llama.infilling_templates import decode_after, encode_prompt
from a3_hf.serving.texts import RunningText, Stops

TEXTS = ["The dog ran home.", "中文 😀 and é", "  spaces \n\n x", "👩‍👩‍👧‍👦 family", "a\ufffdb"]


@pytest.fixture(params=["bytes", "pieces"])
def any_tokenizer(request, tokenizer, stories):
    if request.param == "bytes":
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories)


@pytest.mark.parametrize("text", TEXTS)
def test_parts_are_the_whole(any_tokenizer, text):
    before = encode_prompt(any_tokenizer, "One day")
    ids = encode_prompt(any_tokenizer, text * 8)[1:]
    running = RunningText(any_tokenizer, before)
    parts = [running.add(token) for token in ids]
    assert "".join(parts) + running.close() == decode_after(any_tokenizer, before, ids)
    assert sum(map(bool, parts)) > 2


def test_any_tokens_at_all(any_tokenizer):
    """Broken characters and bytes in any order come out as when they are decoded at once."""
    draw = random.Random(0)
    for _ in range(40):
        before = encode_prompt(any_tokenizer, draw.choice(TEXTS))
        ids = [draw.randrange(3, len(any_tokenizer)) for _ in range(draw.randrange(1, 60))]
        running = RunningText(any_tokenizer, before)
        text = "".join(running.add(token) for token in ids) + running.close()
        whole = decode_after(any_tokenizer, before, ids)
        assert text == whole


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop sequence that is complete first."""
    ends = [(end, stop) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    end, stop = min(ends, key=lambda one: (one[0], -len(one[1])), default=(len(text), ""))
    return text[: end - len(stop)]


def test_stops_in_any_parts():
    draw = random.Random(1)
    for _ in range(500):
        text = "".join(draw.choice("ab\n") for _ in range(12))
        stops = ["".join(draw.choice("ab\n") for _ in range(draw.randrange(1, 4))) for _ in range(draw.randrange(3))]
        found, place, shown = Stops(stops), 0, ""
        while place < len(text) and found.found is None:
            size = draw.randrange(1, 4)
            found.add(text[place : place + size])
            place += size
            assert found.certain().startswith(shown)
            shown = found.certain()
        assert found.text == cut(text, stops) and found.text.startswith(shown)
        assert (found.found is not None) == (found.text != text)
