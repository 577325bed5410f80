"""Documents are text: what spells a special token in them is letters, and never BOS, EOS or a mask."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from a3_hf.data.arguments import DataArguments
from a3_hf.data.mixture import open_mixture
from a3_hf.data.packing import load_rows
from a3_hf.data.tokenization import encode_documents
from a3_hf.evaluation.measures.text_windows import cut_windows

SPECIAL = ["<unk>", "<s>", "</s>", "<mask>", "<|im_end|>"]
TEXT = "was <s>$10</s>, is $7 <mask> <|im_end|>"
CORPUS = [f"{TEXT} the dog ran home{number}" for number in range(60)]


def byte_level() -> Tokenizer:
    """As LLaMA 3's and GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return tokenizer


def llama_2() -> Tokenizer:
    """As LLaMA 2's: spaces are letters, and what is not in the vocabulary is bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=[*SPECIAL, *bytes_]))
    return tokenizer


def merging() -> Tokenizer:
    """One whose own merges make "</s>" of its letters: telling it to split special tokens is not enough."""
    model = json.loads(byte_level().to_str())
    vocabulary = model["model"]["vocab"]
    for piece in ("</", "s>"):
        vocabulary.setdefault(piece, len(vocabulary))
    first = [["<", "/"], ["s", ">"], ["</", "s>"]]
    model["model"]["merges"] = first + [merge for merge in model["model"]["merges"] if merge not in first]
    return Tokenizer.from_str(json.dumps(model))


@pytest.fixture(params=[byte_level, llama_2, merging], ids=lambda made: made.__name__)
def words(request, tmp_path):
    PreTrainedTokenizerFast(
        tokenizer_object=request.param(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        extra_special_tokens=["<|im_end|>"],
    ).save_pretrained(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def test_a_documents_special_tokens_are_letters(words):
    special = set(words.all_special_ids) - {words.unk_token_id}
    assert not special.isdisjoint(words(TEXT, add_special_tokens=False)["input_ids"]), "as text it is not special"
    (ids,) = encode_documents([TEXT], words)
    assert special.isdisjoint(ids) and words.unk_token_id not in ids
    assert words.decode(ids) == TEXT
    # Nothing else changes, and the tokenizer is as it was.
    assert encode_documents(["the dog ran"], words)[0] == words("the dog ran", add_special_tokens=False)["input_ids"]
    assert words("</s>", add_special_tokens=False)["input_ids"] == [words.eos_token_id]


def test_rows_hold_as_many_boundaries_as_documents(words, tmp_path):
    """400 documents with a literal <s> and </s> gave 800 labels of BOS and EOS; right are 400 boundaries."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"a <s>${number}</s> dog"}) + "\n" for number in range(400)))
    settings = {"block_size": 32, "cache_dir": str(tmp_path / "cache")}
    rows = load_rows(DataArguments(train_file=str(path), **settings), words, seed=0)[0].to_list()
    labels = [label for row in rows for label in row["labels"]]
    assert labels.count(words.eos_token_id) == 400 and labels.count(words.bos_token_id) == 0

    sources = {"a": {"path": str(path)}}
    mixture, held_out = open_mixture(
        DataArguments(sources=sources, num_shards=1, validation_documents=100, **settings), words, seed=0
    )
    labels = [label for row in held_out for label in row["labels"]]
    assert labels.count(words.eos_token_id) == 100 and labels.count(words.bos_token_id) == 0
    row = next(mixture.rows(0))[0]
    assert words.bos_token_id not in row["labels"]


def test_documents_that_are_measured_are_text_too(words):
    windows = cut_windows(words, [TEXT], 64)
    ids = [token for window in windows for token in window.scored]
    assert ids == encode_documents([TEXT], words)[0]


def test_a_tokenizer_that_can_do_no_other_is_refused():
    """A word of the vocabulary is its letters' only token."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "x": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="x")
    assert encode_documents(["a </s>"], words) == [[3, 2]]
    with pytest.raises(ValueError, match="a document holds 'x', which the tokenizer"):
        encode_documents(["a x"], words)
