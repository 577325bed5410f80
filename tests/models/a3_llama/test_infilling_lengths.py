"""The measurement of how well lengths are found, as a user runs it."""

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import tiny_model
from tests.models.a3_llama.test_infilling_templates import kind

SCRIPT = Path(__file__).parents[3] / "eval" / "auto_length.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("auto_length", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts() -> list[str]:
    draw = random.Random(0)
    words = "The dog ran home . Tom was happy , and so his dog's bone".split()
    return [" ".join(draw.choices(words, k=40)) for _ in range(30)]


def test_blanks_are_whole_words_of_the_text_with_their_length_in_tokens(script, tmp_path):
    tokenizer = kind("byte_level")
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(texts()[:15]) + "\n\n" + "\n\n".join(texts()[15:]))
    documents = script.read_documents(tmp_path / "text.txt")
    assert documents == texts()
    drawn = list(script.draw_blanks(tokenizer, documents, [1, 2, 5], before=8, after=4, seed=1))
    assert len(drawn) > 20 and [blank[3] for blank in drawn[:4]] == [1, 2, 5, 1]
    for before, words, after, length in drawn:
        assert any(before + words + after in document for document in documents)
        assert words.startswith(" ") and len(tokenizer.encode(words)) == length
        assert 8 in (len(tokenizer.encode(before)), len(tokenizer.encode(" " + before)))  # a space at its start is cut
        assert len(tokenizer.encode(after)) == 4


def test_stories_of_the_cloze_test_are_read(script, tmp_path):
    names = [*(f"InputSentence{i}" for i in range(1, 5)), "RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"]
    header = ",".join([*names, "AnswerRightEnding"])
    (tmp_path / "cloze.csv").write_text(header + '\nA.,"B, c.",C.,D.,E.,F.,2\n')
    assert script.read_documents(tmp_path / "cloze.csv") == ["A. B, c. C. D. F."]


def test_the_table_counts_every_blank(tmp_path):
    tokenizer = kind("byte_level")
    tiny_model(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, slot_start="left_token").save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(texts()))
    command = [sys.executable, SCRIPT, tmp_path, tmp_path / "text.txt", "--slot-start", "left_token"]
    small = ["--lengths", "1..3", "--candidates", "1..4", "--before", "8", "--after", "4"]
    done = subprocess.run([*command, *small, "--count", "9"], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("| ")
    ]
    assert [row[:2] for row in rows[1:]] == [["1", "3"], ["2", "3"], ["3", "3"], ["all", "9"]]
    shares = [float(row[2].rstrip("%")) for row in rows[1:]]
    assert shares[3] == pytest.approx(sum(shares[:3]) / 3, abs=0.1)
    assert sum(int(part.split()[-2]) for part in done.stdout.split("chosen: ")[1].split("\n")[0].split(",")) == 9
    done = subprocess.run([*command, "--count", "99"], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert done.returncode == 1 and "documents that are long enough" in done.stderr
