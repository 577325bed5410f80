"""Rows of one blank: every piece comes back from its row, and settings that can't work are refused."""

from collections import Counter

import pytest

from a3_hf.data.arguments import DataArguments
from a3_hf.data.fim import FimArguments, FimRows
from a3_hf.data.packing import load_rows
from tests.conftest import CORPUS

WORDS = "dog{suffix}, cat."
DOCUMENTS = [list(range(100, 100 + length)) for length in (40, 3, 9, 17, 5, 4)]
TOKENS = ["on", "an", "og"]


def rows_of(tokenizer, *, block_size: int = 24, seed: int = 0, documents=DOCUMENTS, **fim):
    made = FimRows(FimArguments(**fim), tokenizer, block_size=block_size, seed=seed, suffix_template=WORDS)
    return list(made.rows(documents)), made


def pieces(documents, room: int) -> list[list[int]]:
    return [document[start : start + room] for document in documents for start in range(0, len(document), room)]


def undone(row: dict, form: str, made: FimRows) -> tuple[list[int], list[int], list[int]]:
    """Prefix, middle and suffix of a row, found by its marks or words and by what is scored."""
    ids = row["input_ids"][1:]
    if form == "suffix_template":
        before, after = made.words
        scored = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        given = ids[: len(ids) - len(scored)]
        suffix = []
        if given[: len(before)] == before and before:
            end = next(i for i in range(len(before), len(given)) if given[i : i + len(after)] == after)
            suffix, given = given[len(before) : end], given[end + len(after) :]
        return given, scored, suffix
    to_prefix, to_suffix, to_middle = made.marks
    assert ids[0] == to_prefix and ids[-1] == made.eos
    first, second = ids.index(to_suffix), ids.index(to_middle)
    if form == "psm":
        return ids[1:first], ids[second + 1 : -1], ids[first + 1 : second]
    return None, ids[second + 1 : -1], ids[first + 1 : second]  # spm: prefix and middle side by side


@pytest.mark.parametrize("middle", [None, [1, 4]])
@pytest.mark.parametrize("form", ["psm", "spm", "suffix_template"])
def test_every_piece_comes_back_from_its_row(tokenizer, form, middle):
    fim = {"rate": 1.0, form: 1.0, "middle": middle, "score": "middle" if form == "suffix_template" else "all"}
    if form != "suffix_template":
        fim["tokens"] = [tokenizer.convert_ids_to_tokens(index) for index in (3, 4, 5)]
    rows, made = rows_of(tokenizer, **fim)
    expected = pieces(DOCUMENTS, made.room)
    assert len(rows) == len(expected) and any(len(piece) == made.room for piece in expected)
    for row, piece in zip(rows, expected, strict=True):
        assert row["input_ids"][0] == tokenizer.bos_token_id and len(row["input_ids"]) <= 24
        if len(piece) < 4:
            assert row["input_ids"][1:] == piece == row["labels"][1:]
            continue
        prefix, blank, suffix = undone(row, form, made)
        assert (blank if prefix is None else [*prefix, *blank]) + suffix == piece
        if prefix is not None and middle:
            assert prefix and 1 <= len(blank) <= 4


STORY = "Tom ran. The cat sat! One day, the dog ran home. So it was. The end"


def test_whole_sentences_are_blanked(tokenizer):
    document = tokenizer.encode(STORY, add_special_tokens=False)
    blanks = set()
    for seed in range(20):
        fim = {"suffix_template": 1.0, "rate": 1.0, "middle": "sentence", "score": "middle"}
        (row,), made = rows_of(tokenizer, documents=[document], block_size=len(document) + 30, seed=seed, **fim)
        prefix, blank, suffix = undone(row, "suffix_template", made)
        assert prefix + blank + suffix == document
        blanks.add(tokenizer.decode(blank))
    assert blanks == {" The cat sat!", " One day, the dog ran home.", " So it was."}


def test_pieces_without_an_inner_sentence_are_cut_at_random(tokenizer):
    fim = {"suffix_template": 1.0, "rate": 1.0, "score": "middle"}
    assert rows_of(tokenizer, middle="sentence", **fim)[0] == rows_of(tokenizer, **fim)[0]


def test_a_tokenizer_without_ends_of_sentences(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "convert_tokens_to_string", lambda self, tokens: "x")
    with pytest.raises(ValueError, match="no tokens that end sentences"):
        rows_of(tokenizer, suffix_template=1.0, middle="sentence")


def test_what_is_scored(tokenizer):
    marks = [tokenizer.convert_ids_to_tokens(index) for index in (3, 4, 5)]
    whole, _ = rows_of(tokenizer, rate=1.0, psm=1.0, tokens=marks)
    middles, made = rows_of(tokenizer, rate=1.0, psm=1.0, tokens=marks, score="middle")
    for one, other in zip(whole, middles, strict=True):
        assert one["input_ids"] == other["input_ids"] and one["labels"] == [-100, *one["input_ids"][1:]]
        if len(one["input_ids"]) > 5:
            scored = [label for label in other["labels"] if label != -100]
            assert scored == [*undone(other, "psm", made)[1], made.eos] == other["input_ids"][-len(scored) :]


def test_rate_and_weights_are_frequencies_and_the_seed_decides(tokenizer):
    marks = [tokenizer.convert_ids_to_tokens(index) for index in (3, 4, 5)]
    documents = [list(range(100, 112))] * 2000
    settings = {"rate": 0.6, "psm": 1.0, "spm": 3.0, "tokens": marks, "documents": documents}
    rows, _ = rows_of(tokenizer, **settings)
    # psm: a prefix (or the suffix's mark) is between the first two marks; spm: they are side by side
    kinds = Counter(
        "plain" if row["input_ids"][1] != 3 else "spm" if row["input_ids"][2] == 4 else "psm" for row in rows
    )
    assert abs(kinds["plain"] - 800) < 100 and abs(kinds["spm"] - 900) < 110  # psm without a prefix looks like spm
    assert rows == rows_of(tokenizer, **settings)[0] != rows_of(tokenizer, seed=1, **settings)[0]


@pytest.mark.parametrize(
    "fim, message",
    [
        ({"rate": 0.0, "psm": 1.0, "tokens": TOKENS}, "rate=0.0"),
        ({"rate": 0.5}, "no form has a weight"),
        ({"psm": -1.0, "tokens": TOKENS}, "psm=-1.0"),
        ({"psm": 1.0}, "tokens=None: needed by psm and spm"),
        ({"suffix_template": 1.0, "tokens": TOKENS}, "needed by psm and spm, and by no other form"),
        ({"psm": 1.0, "tokens": ["a", "a", "b"]}, "expected three tokens"),
        ({"suffix_template": 1.0, "middle": [0, 4]}, r"middle=\[0, 4\]"),
        ({"suffix_template": 1.0, "middle": [5, 4]}, r"middle=\[5, 4\]"),
        ({"suffix_template": 1.0, "middle": "sentences"}, r"middle='sentences': .* or sentence"),
    ],
)
def test_settings_out_of_range_are_refused(fim, message):
    with pytest.raises(ValueError, match=message):
        FimArguments(**fim)


def test_what_the_tokenizer_or_the_model_lacks_is_refused(tokenizer):
    with pytest.raises(ValueError, match="tokens holds '<fim>', which the tokenizer lacks"):
        FimRows(FimArguments(psm=1.0, tokens=["<fim>", "a", "b"]), tokenizer, block_size=32, seed=0)
    with pytest.raises(ValueError, match="set suffix_template"):
        FimRows(FimArguments(suffix_template=1.0), tokenizer, block_size=32, seed=0)
    with pytest.raises(ValueError, match="block_size=8: too few tokens"):
        rows_of(tokenizer, block_size=8, suffix_template=1.0)


def test_a_recipe_makes_them(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in CORPUS[:10]))
    arguments = DataArguments(
        train_file=str(path),
        validation_documents=2,
        block_size=40,
        cache_dir=str(tmp_path / "cache"),
        fim={"rate": 1.0, "suffix_template": 1.0, "score": "middle"},
    )
    train, held_out = load_rows(arguments, tokenizer, seed=0, suffix_template=WORDS)
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in CORPUS[:10]]
    made = FimRows(arguments.fim, tokenizer, block_size=40, seed=0, suffix_template=WORDS)
    assert train.to_list() == list(made.rows(texts[:8])) and held_out.to_list() == list(made.rows(texts[8:]))
    for wrong, message in (
        ({"documents": "isolated"}, "documents='isolated' has no effect with fim"),
        ({"fim": 5}, "fim: expected a mapping"),
        ({"fim": {"rat": 1.0}}, "fim: unknown key 'rat'; did you mean 'rate'"),
        ({"fim": {"rate": "x"}}, "fim: rate: expected a number"),
        ({"train_file": None, "sources": {"a": {"path": "x.txt"}}, "validation_documents": 0}, "fim and sources"),
    ):
        settings = {"train_file": str(path), "fim": {"psm": 1.0, "tokens": TOKENS}, **wrong}
        with pytest.raises(ValueError, match=message):
            DataArguments(**settings)
