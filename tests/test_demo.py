"""The demo: what its language claims, by brute force, and the script from end to end at a few steps."""

import importlib
import math
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def language():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("story_language")
    sys.path.remove(str(EXAMPLES))


def blanked(story, positions) -> tuple:
    return tuple(None if at in positions else word for at, word in enumerate(story.tokens))


def test_the_language_is_as_large_as_it_says(language):
    assert all(len(words) == len(set(words)) >= 12 for words in language.SLOTS.values())
    words = [word for words in language.SLOTS.values() for word in words]
    assert len(words) == len(set(words)), "a word belongs to one slot"
    assert language.NUM_FACTS == math.prod(len(words) for words in language.SLOTS.values()) > 1_000_000

    stories = list(language.all_stories(2))
    assert len({story.tokens for story in stories}) == len(stories) == 2**5 * language.NUM_STORIES / language.NUM_FACTS
    assert {len(story.tokens) for story in stories} == {32}
    assert {len(story.right_settled) for story in stories} == {len(story.left_settled) for story in stories} == {5}


def test_before_a_right_settled_blank_every_value_is_equally_frequent(language):
    """Over all stories of the language with three words a slot: given all the tokens before it, exactly uniform."""
    following = defaultdict(Counter)
    for story in language.all_stories(3):
        for at in story.right_settled:
            following[story.tokens[:at]][story.tokens[at]] += 1
    assert len(following) > 500
    assert all(len(values) == 3 and len(set(values.values())) == 1 for values in following.values())


def test_after_a_right_settled_blank_comes_its_value(language):
    value_of = defaultdict(set)
    for story in language.all_stories(3):
        for at in story.right_settled:
            value_of[story.tokens[at + 1 :]].add(story.tokens[at])
    assert all(len(values) == 1 for values in value_of.values())


def test_before_a_left_settled_blank_comes_its_value(language):
    value_of = defaultdict(set)
    for story in language.all_stories(3):
        for at in story.left_settled:
            value_of[story.tokens[:at]].add(story.tokens[at])
    assert all(len(values) == 1 for values in value_of.values())


@pytest.mark.parametrize("side", ["right_settled", "left_settled"])
def test_all_blanks_of_a_side_are_settled_at_once(language, side):
    stories = list(language.all_stories(3))
    assert len({blanked(story, getattr(story, side)) for story in stories}) == len(stories)


def test_sampled_values_are_uniform_and_independent_of_those_before(language):
    """χ² over pairs of values of the whole language: that of one slot, and that of the next right-settled blank."""
    stories = language.sample_stories(20_000, seed=1)
    pairs = defaultdict(Counter)
    for story in stories:
        for before, after in zip(story.right_settled, story.right_settled[1:], strict=False):
            template = blanked(story, story.right_settled)[:after], before
            pairs[template][story.tokens[before], story.tokens[after]] += 1
    for counts in pairs.values():
        expected = counts.total() / 16**2
        chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
        chi_squared += expected * (16**2 - len(counts))
        # mean 255, standard deviation 22.6: five of them
        assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)


def test_no_two_sampled_stories_share_their_facts(language):
    stories = language.sample_stories(40_000, seed=0)
    held_out, training = stories[:500], stories[500:]
    read = {story.facts for story in training}
    assert len(read) == len(training)
    assert not any(story.facts in read for story in held_out)
    assert language.sample_stories(10, seed=0) != language.sample_stories(10, seed=1)
    assert language.sample_stories(10, seed=3) == language.sample_stories(10, seed=3)


def test_the_tokenizer_knows_every_word(language):
    tokenizer = language.build_tokenizer()
    for story in language.sample_stories(2000, seed=0):
        input_ids = tokenizer(story.text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(input_ids) == list(story.tokens)
        assert tokenizer.unk_token_id not in input_ids
        assert tokenizer.decode(input_ids, skip_special_tokens=True) == story.text
    batch = tokenizer(["mia asked tom", "mia"], padding=True)
    assert batch["attention_mask"] == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert tokenizer.bos_token_id == batch["input_ids"][0][0]


def test_the_demo_runs(tmp_path):
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), "--smoke", "--output-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    for said in ("blanks settled", "tokens/s", "A3, groups of 8", "the true story", "a3 adapt recipes/"):
        assert said in run.stdout
    assert len((tmp_path / "stories.txt").read_text().splitlines()) == 24
    for name in ("base", "a3"):
        assert (tmp_path / name / "model.safetensors").exists()
        assert (tmp_path / name / "tokenizer.json").exists()
