import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from a3_hf import A3LlamaForCausalLM
from a3_hf.infilling import Template, encode_piece, encode_template
from tests.conftest import tiny_model

CORPUS = ["The dog ran home. Tom was happy, and so was his dog.", "One day, the cat sat <b> on a mat!"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE tokenizer as LLaMA 3 has, with BOS and without a pad token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)


TEXTS = [
    "The dog <blank:6> home.",
    "The dog<blank:2>, Tom was<blank:1>happy.",
    "<blank:3> ran home.",
    "Tom was <blank:4>",
    "  Two  spaces <blank:2>  and\nlines\n<blank:1>\n",
    "<blank:2>",
    "Zoë said “<blank:3>” 🙂 <blank:1>!",
]


@pytest.mark.parametrize("text", TEXTS)
def test_given_text_comes_back_character_by_character(model, tokenizer, text):
    template = Template.parse(text)
    filled = model.infill(tokenizer, text)
    rest = filled
    assert filled.startswith(template.pieces[0]) and filled.endswith(template.pieces[-1])
    for piece in filter(None, template.pieces):
        _, found, rest = rest.partition(piece)
        assert found == piece


def test_a_template_of_a_text_has_the_texts_tokens(tokenizer):
    """Cut at a word, the pieces are tokenised as they are in the running text."""
    text = "The dog ran home. Tom was happy, and so was his dog."
    whole = tokenizer.encode(text, add_special_tokens=False)
    for word in (" ran", " home", " was", " happy", " dog"):
        start = text.index(word)
        template = Template((text[:start] + " ", text[start + len(word) :]), (1,))
        ids, blanks = encode_template(tokenizer, template)
        given = [token for token, blank in zip(ids[1:], blanks[1:], strict=True) if not blank]
        cut = tokenizer.encode(word, add_special_tokens=False)
        at = next(i for i in range(len(whole)) if whole[i : i + len(cut)] == cut)
        assert given == whole[:at] + whole[at + len(cut) :]
        assert ids[0] == tokenizer.bos_token_id and sum(b > 0 for b in blanks) == 1


def test_llama_style_pieces_get_no_space_of_their_own(stories):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    for piece in (".", " home.", "ed it", ", and"):
        anchored = tokenizer.encode("Tom" + piece, add_special_tokens=False)
        assert encode_piece(tokenizer, piece, is_start=False) == anchored[-len(anchored) + 2 :]
    model = A3LlamaForCausalLM.from_pretrained(stories).eval()
    filled = model.infill(tokenizer, "Tom<blank:2>. The dog <blank:3> home.", strategy="dynamic")
    assert filled.startswith("Tom") and ". The dog " in filled and filled.endswith(" home.")


def test_texts_in_a_batch_are_as_alone(model, tokenizer):
    together, output = model.infill(tokenizer, TEXTS, return_outputs=True, strategy="dynamic", tokens_per_step=2)
    assert together == [model.infill(tokenizer, text, strategy="dynamic", tokens_per_step=2) for text in TEXTS]
    assert (output.commit_step >= 0).sum(1).tolist() == [6, 3, 3, 4, 3, 2, 4]


def test_what_the_model_writes_is_what_is_shown(model, tokenizer):
    filled, output = model.infill(tokenizer, ["Tom was <blank:5> home."], return_outputs=True)
    written = output.sequences[0][output.commit_step[0] >= 0]
    shown = filled[0].removeprefix("Tom was ").removesuffix(" home.")
    assert shown.strip() == tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    "text, message",
    [
        ("no blank here", "holds no blank marker"),
        ("The <blank:0> dog", "length 0"),
        ("The <blank:3 dog", "marker '<blank:3 dog'; a marker reads <blank:N>"),
        ("The <blank> dog", "marker '<blank>'"),
        ("The <blank:x> dog <blank:2>", "marker '<blank:x>'"),
        ("The <blank:-2> dog", "marker '<blank:-2>'"),
        ([], "empty list"),
    ],
)
def test_bad_templates_are_refused(model, tokenizer, text, message):
    with pytest.raises(ValueError, match=message):
        model.infill(tokenizer, text)


def test_a_blank_longer_than_the_context_says_by_how_much(model, tokenizer):
    with pytest.raises(ValueError, match="more than the model's context"):
        model.infill(tokenizer, "The dog <blank:200> home.")


def test_a_tokenizer_without_bos_is_refused(model, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no BOS token"):
        model.infill(bare, "The <blank:2>")
    assert torch.is_tensor(model.infill(tokenizer, ["The <blank:2>"], return_outputs=True)[1].sequences)
