import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from a3_hf import A3LlamaForCausalLM
from a3_hf.models.a3_llama.infilling_templates import Template, encode_piece, encode_template
from tests.conftest import tiny_model


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
        name, anchored = (tokenizer.encode(text, add_special_tokens=False) for text in ("Tom", "Tom" + piece))
        assert encode_piece(tokenizer, piece, is_start=False) == anchored[len(name) :]
    model = A3LlamaForCausalLM.from_pretrained(stories).eval()
    filled = model.infill(tokenizer, "Tom<blank:2>. The dog <blank:3> home.", strategy="dynamic")
    assert filled.startswith("Tom") and ". The dog " in filled and filled.endswith(" home.")


def test_texts_in_a_batch_are_as_alone(model, tokenizer):
    output = model.infill(tokenizer, TEXTS, return_outputs=True, strategy="dynamic", tokens_per_step=2)
    assert output.texts == [model.infill(tokenizer, text, strategy="dynamic", tokens_per_step=2) for text in TEXTS]
    assert (output.generation.commit_step >= 0).sum(1).tolist() == [6, 3, 3, 4, 3, 2, 4]


def test_what_the_model_writes_is_what_is_shown(model, tokenizer):
    output = model.infill(tokenizer, ["Tom was <blank:5> home."], return_outputs=True)
    written = output.generation.sequences[0][output.generation.commit_step[0] >= 0]
    shown = output.texts[0].removeprefix("Tom was ").removesuffix(" home.")
    assert output.written == [[shown]] and output.lengths == [(5,)] and output.length_scores == [[{}]]
    assert shown.strip() == tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    "text, message",
    [
        ("no blank here", "holds no blank marker"),
        ("The <blank:0> dog", "length 0"),
        ("The <blank:3 dog", "marker '<blank:3 dog': expected <blank:N>"),
        ("The <blank> dog", "marker '<blank>'"),
        ("The <blank:x> dog <blank:2>", "marker '<blank:x>'"),
        ("The <blank:-2> dog", "marker '<blank:-2>'"),
        ("The <blank:8..2> dog", "the range 8..2: expected 1 ≤ min ≤ max"),
        ("The <blank:0..2> dog", "the range 0..2"),
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
    assert torch.is_tensor(model.infill(tokenizer, ["The <blank:2>"], return_outputs=True).generation.sequences)


AUTO = "The dog <blank:1..4> home. Tom was <blank:2> and <blank:auto> his dog."


def test_a_chosen_length_is_the_best_of_its_exact_scores(model, tokenizer):
    """Each candidate by itself: filled up to the next unknown blank, then scored token by token, left to right."""
    output = model.infill(tokenizer, [AUTO], auto_lengths=(2, 3), return_outputs=True, strategy="dynamic")
    first, given, second = output.length_scores[0]
    assert set(first) == {1, 2, 3, 4} and given == {} and set(second) == {2, 3}
    assert output.lengths[0] == (max(first, key=first.get), 2, max(second, key=second.get))
    for length, score in first.items():
        ids, blanks = encode_template(tokenizer, Template(("The dog ", " home. Tom was ", " and"), (length, 2)))
        text = f"The dog <blank:{length}> home. Tom was <blank:2> and"
        filled = model.infill(tokenizer, [text], return_outputs=True, strategy="dynamic").generation.sequences
        assert filled.shape == (1, len(ids))
        total, first_place = 0.0, blanks.index(1)
        for place in range(first_place, filled.shape[1]):
            with torch.no_grad():
                logits = model(
                    filled[:, :place],
                    group_ids=torch.arange(place)[None],
                    target_position_ids=torch.tensor([[place]]),
                    target_group_ids=torch.tensor([[place]]),
                ).logits[0, 0]
            total += logits.log_softmax(-1)[filled[0, place]].item()
        assert score == pytest.approx(total, abs=1e-4)


def test_lengths_in_a_batch_are_as_alone(model, tokenizer):
    texts = [AUTO, "The <blank:2>", "<blank:auto> ran <blank:1..2>", "Tom <blank:3..3>."]
    output = model.infill(tokenizer, texts, auto_lengths=(1, 5), return_outputs=True, do_sample=True, seed=3)
    for index, text in enumerate(texts):
        alone = model.infill(tokenizer, [text], auto_lengths=(1, 5), return_outputs=True, do_sample=True, seed=3)
        assert alone.texts[0] == output.texts[index] and alone.lengths[0] == output.lengths[index]
    assert output.lengths[3] == (3,)
    assert output.texts[2].endswith(output.written[2][1]) and " ran " in output.texts[2]


def test_auto_with_an_empty_range_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="auto_lengths has the range 5..2"):
        model.infill(tokenizer, "The <blank:auto>", auto_lengths=(5, 2))
    with pytest.raises(ValueError, match="more than the model's context"):
        model.infill(tokenizer, "The <blank:100..130>")


@pytest.mark.parametrize("length", ["same", "auto", 3, (1, 4)])
def test_rewriting_keeps_the_rest(model, tokenizer, length):
    text = "The dog ran home. Tom was happy, and so was his dog."
    spans = [(text.index("happy"), text.index(", and")), (text.index("ran"), text.index(" home"))]
    output = model.rewrite(tokenizer, text, spans, length=length, auto_lengths=(1, 3), return_outputs=True)
    first, second = output.written[0]
    assert output.texts[0] == f"The dog {first} home. Tom was {second}, and so was his dog."
    if length == "same":
        in_text = [len(tokenizer.encode(word, add_special_tokens=False)) for word in (" ran", " happy")]
        assert list(output.lengths[0]) == in_text
    if length == 3:
        assert output.lengths[0] == (3, 3)
    assert model.rewrite(tokenizer, text, spans, length=length, auto_lengths=(1, 3)) == output.texts[0]


@pytest.mark.parametrize(
    "spans, length, message",
    [
        ([], "same", "spans is empty"),
        ([(0, 5), (3, 8)], "same", r"spans overlap: \(3, 8\) starts before 5"),
        ([(3, 3)], "same", r"spans holds \(3, 3\)"),
        ([(3, 99)], "same", "0 ≤ start < end ≤ 17"),
        ([(3, 6)], "long", "length='long': expected 'same', 'auto'"),
        ([(3, 6)], (4, 2), "length has the range 4..2"),
        ([(3, 6)], 0, "length=0"),
    ],
)
def test_bad_spans_are_refused(model, tokenizer, spans, length, message):
    with pytest.raises(ValueError, match=message):
        model.rewrite(tokenizer, "The dog ran home.", spans, length=length)


def test_the_pipeline_fills_blanks(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    fill = pipeline("infilling", model=str(tmp_path), strategy="dynamic")
    texts = ["The dog <blank:3> home.", "Tom <blank:auto>."]
    results = fill(texts, auto_lengths=(1, 3))
    assert [result["text"] for result in results] == model.infill(
        tokenizer, texts, auto_lengths=(1, 3), strategy="dynamic"
    )
    one = fill(texts[0], strategy="groupwise", group_size=3)
    assert one["text"] == model.infill(tokenizer, texts[0], group_size=3)
    assert one["lengths"] == [3] and one["log_likelihood"] < 0 and one["written"][0] in one["text"]
    with pytest.raises(ValueError, match="holds no blank marker"):
        fill("no blank")
