"""Infilling of stories against slow and obvious forms: one story, one token, one candidate at a time."""

import csv

import pytest
import torch
from torch import nn

from a3_hf.data.fim import FimArguments
from a3_hf.evaluation.measures import infilling_quality as infilling
from a3_hf.evaluation.measures.infilling_quality import measure_infilling
from a3_hf.evaluation.measures.stories import StoryBlank
from a3_hf.evaluation.tasks.sentences import split_sentences
from a3_hf.models.a3_llama.infilling_templates import encode_piece
from a3_hf.training.base_trainer import row_generator
from tests.experiments.test_order_losses import ARCHITECTURES, trained

STORIES = (
    "The dog ran home. Tom was happy, and so was his dog. One day, the cat sat on a mat!",
    "One day, Tom sat home.\n\nSo was the dog. So happy!",
    "Tom ran. The cat was so happy. One day, the dog sat. So was Tom.",
)
TOO_SHORT, NO_WORD = "The dog ran home. Tom sat.", "Tom. Dog! Cat."
SMALL = {"num_documents": 3, "num_generated": 2, "max_length": 60, "batch_size": 2, "seed": 3}


def measure(subject, **changes) -> dict:
    return measure_infilling(subject, **{**SMALL, **changes})


@pytest.fixture
def captured(monkeypatch) -> dict[str, list[StoryBlank]]:
    """The blanks of the sentences and of the words, as the measurement writes them."""
    seen, write = {}, infilling._write

    def spy(subject, blanks, line, *, title, **settings):
        seen[title] = list(blanks)
        return write(subject, blanks, line, title=title, **settings)

    monkeypatch.setattr(infilling, "_write", spy)
    return seen


def blanks_of(architecture: str, tokenizer, captured, documents=STORIES, **changes):
    result = measure(trained(architecture, tokenizer, documents), **{**changes, "num_generated": 3})
    return captured["sentences"], captured["words"], result


# Stories


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("A b. C d! E?", ["A b.", " C d!", " E?"]),
        ('"Hi!" said “Tom.”\n\nHe ran', ['"Hi!"', " said “Tom.”", "\n\nHe ran"]),
        ("  It cost 3.50 now... Yes?! (So.) \n", ["It cost 3.50 now...", " Yes?!", " (So.)"]),
        ("no end", ["no end"]),
        ("", []),
    ],
)
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences
    assert "".join(split_sentences(text)) == text.strip()


def test_the_middle_sentence_and_an_inner_word_are_blanked(tokenizer, captured):
    sentences, words, result = blanks_of("a3", tokenizer, captured)
    assert [blank.text for blank in sentences] == [
        "Tom was happy, and so was his dog.",
        "So was the dog.",
        "One day, the dog sat.",
    ]
    for story, word in zip(STORIES, words, strict=True):
        inner = story.split()[1:-1]
        assert word.text in inner and word.text.isalpha() and len(word.text) >= 3
        assert tokenizer.decode(word.target) == f" {word.text}", "the space before a word belongs to it"
    for story, blank in zip(STORIES * 2, sentences + words, strict=True):
        assert blank.before[0] == tokenizer.bos_token_id
        assert tokenizer.decode([*blank.before[1:], *blank.target, *blank.after]) == story
        assert tokenizer.decode(blank.target).strip() == blank.text
    assert result["infilling_tokens"] == sum(len(blank.target) for blank in sentences)
    assert (result["infilling_stories"], result["infilling_skipped"]) == (3, 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_blanks_are_the_same_for_all(architecture, tokenizer, captured):
    expected = blanks_of("a3", tokenizer, captured)[:2]
    assert blanks_of(architecture, tokenizer, captured)[:2] == expected
    assert blanks_of(architecture, tokenizer, captured, batch_size=1)[:2] == expected
    assert any(blanks_of("llama", tokenizer, captured, seed=seed)[1] != expected[1] for seed in range(4, 8))


def test_a_words_draw_depends_on_its_document_alone(tokenizer, captured):
    subject = trained("llama", tokenizer, (TOO_SHORT, *STORIES))
    inner = [word for word in STORIES[0].split()[1:-1] if word.isalpha() and len(word) >= 3]
    drawn = []
    for seed in range(4):
        measure(subject, num_documents=1, num_generated=1, seed=seed)
        drawn.append(captured["words"][0].text)
    expected = [int(torch.randint(len(inner), (), generator=row_generator(seed, 1))) for seed in range(4)]
    assert drawn == [inner[place] for place in expected] and len(set(drawn)) > 1


def test_a_story_is_cut_after_a_whole_sentence_and_unusable_ones_are_counted(tokenizer, captured):
    four = STORIES[2]
    line = len(encode_piece(tokenizer, "\n", is_start=False))
    whole = 1 + line + len(tokenizer.encode(four, add_special_tokens=False))
    documents = (TOO_SHORT, NO_WORD, four)
    for spare, text in ((0, "One day, the dog sat."), (-1, "The cat was so happy.")):
        subject = trained("llama", tokenizer, documents)
        result = measure(subject, num_documents=1, num_generated=1, max_length=whole + spare)
        assert [blank.text for blank in captured["sentences"]] == [text]
        assert result["infilling_skipped"] == 2
    assert not tokenizer.decode(captured["sentences"][0].after).endswith("So was Tom.")
    with pytest.raises(ValueError, match="num_documents=1: only 0 of 3 held-out documents have 3 sentences"):
        measure(subject, num_documents=1, num_generated=1, max_length=8)


# How likely the sentence is


def given_first(length: int, start: int, end: int) -> torch.Tensor:
    """Group ids (1, S): what stands before and after, token by token, then the blank, token by token."""
    return torch.tensor([[*range(start), *range(end, length), *range(start, end)]]).argsort(dim=1)


def slow_nats(subject, blank, *, sees_after: bool = True) -> float:
    """−log p of a blank's tokens, one story and one token at a time."""
    model, nats = subject.model, 0.0
    text = torch.tensor([[*blank.before, *blank.target, *blank.after]])
    start, end = len(blank.before), len(blank.before) + len(blank.target)
    if subject.architecture == "llama" or not sees_after:
        line = encode_piece(subject.tokenizer, "\n", is_start=False)
        prompt = [*blank.before[:1], *blank.after, *line, *blank.before[1:]] if sees_after else blank.before
        ids = torch.tensor([[*prompt, *blank.target]])
        with torch.no_grad():
            logits = trained("llama", subject.tokenizer).model(ids).logits[0, len(prompt) - 1 : -1]
        return nn.functional.cross_entropy(logits, torch.tensor(blank.target), reduction="sum").item()
    for column in range(start, end):
        if subject.architecture == "masked_diffusion":
            ids = text.clone()
            ids[0, column:end] = model.config.mask_token_id
            with torch.no_grad():
                logits = model(input_ids=ids, target_columns=torch.tensor([[column]])).logits[0, 0]
            nats -= logits.log_softmax(dim=-1)[text[0, column]].item()
        else:
            nats -= model.log_likelihood(text, given_first(text.shape[1], start, end))[0, column].item()
    return nats


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_of_the_middle_sentence_sees_both_sides(architecture, tokenizer, captured):
    sentences, _, result = blanks_of(architecture, tokenizer, captured)
    subject, tokens = trained(architecture, tokenizer, STORIES), result["infilling_tokens"]
    expected = sum(slow_nats(subject, blank) for blank in sentences) / tokens
    assert result["nll_middle_sentence"] == pytest.approx(expected, abs=1e-5)
    assert ("nll_middle_sentence_prefix_only" in result) == (architecture in ("a3", "llama"))
    if architecture in ("a3", "llama"):
        expected = sum(slow_nats(subject, blank, sees_after=False) for blank in sentences) / tokens
        assert result["nll_middle_sentence_prefix_only"] == pytest.approx(expected, abs=1e-5)
        assert result["nll_middle_sentence_prefix_only"] != pytest.approx(result["nll_middle_sentence"], abs=1e-2)


SHOWN = {
    "a3": "<s>Tom ran|. The cat sat|. One day.",
    "a3 with words": "<s>Later: . One day.\nTom ran|. The cat sat|",
    "llama": "<s>. One day.\nTom ran|. The cat sat|",
    "psm": "<s><P>Tom ran<S>. One day.<M>|. The cat sat|",
    "spm": "<s><P><S>. One day.<M>Tom ran|. The cat sat|",
}


@pytest.mark.parametrize("way", SHOWN)
def test_a_blank_is_shown_as_its_model_has_learnt_it(way, tokenizer):
    tokenizer.add_tokens(["<P>", "<S>", "<M>"])
    architecture = way if way == "llama" else "llama" if way in ("psm", "spm") else "a3"
    subject = trained(architecture, tokenizer, STORIES)
    if way in ("psm", "spm"):
        subject.recipe.data.fim = FimArguments(**{way: 1.0}, tokens=["<P>", "<S>", "<M>"])
    if way == "a3 with words":
        subject.model.config.suffix_template = "Later: {suffix}\n"
    blank = StoryBlank.of(tokenizer, "Tom ran", ". The cat sat", ". One day.")
    seen = blank.shown_by(subject, encode_piece(tokenizer, "\n", is_start=False))
    text = "|".join(tokenizer.decode(ids) for ids in (seen.before, seen.target, seen.after))
    assert text == SHOWN[way]


def test_the_loss_of_the_middle_sentence_under_the_words_of_a_template(tokenizer):
    subject = trained("a3", tokenizer, STORIES, slot_start="left_token")
    subject.model.config.suffix_template = "Later: {suffix}\n"
    result, nats = measure(subject), 0.0
    for blank in infilling._draw_blanks(
        tokenizer, map(split_sentences, STORIES), 3, length=60, fewest_sentences=3, seed=3
    )[0]:
        words = [tokenizer.encode(one, add_special_tokens=False) for one in ("Later: ", "\n")]
        before = [*blank.before[:1], *words[0], *blank.after, *words[1], *blank.before[1:]]
        ids = torch.tensor([[*before, *blank.target]])
        with torch.no_grad():
            logits = subject.model(ids).logits[0, len(before) - 1 : -1]
        nats += nn.functional.cross_entropy(logits, torch.tensor(blank.target), reduction="sum").item()
    assert result["nll_middle_sentence"] == pytest.approx(nats / result["infilling_tokens"], abs=1e-5)


# What is written


def slow_fill(subject, blank) -> list[int]:
    """The likeliest token at each step, by the probability of every candidate, a story at a time."""
    model, known = subject.model, torch.tensor([[*blank.before, *blank.target, *blank.after]])
    start, words = len(blank.before), model.config.vocab_size
    never = [*subject.tokenizer.all_special_ids]
    if subject.architecture == "masked_diffusion":
        never.append(model.config.mask_token_id)
    allowed = sorted(set(subject.tokenizer.get_vocab().values()) - set(never))
    order = given_first(known.shape[1], start, start + len(blank.target))
    is_blank = torch.zeros_like(known).bool()
    is_blank[0, start : start + len(blank.target)] = True
    if subject.architecture == "llama":
        line, written = encode_piece(subject.tokenizer, "\n", is_start=False), []
        for _ in blank.target:
            ids = torch.tensor([[*blank.before[:1], *blank.after, *line, *blank.before[1:], *written]])
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            written.append(max(allowed, key=logits.tolist().__getitem__))
        return written
    left = is_blank.nonzero()[:, 1].tolist()
    while left:
        open_now = torch.zeros_like(is_blank)
        open_now[0, left] = True
        best = None
        for column in left if subject.architecture == "masked_diffusion" else left[:1]:
            if subject.architecture == "masked_diffusion":
                ids = known.masked_fill(open_now, model.config.mask_token_id)
                with torch.no_grad():
                    scores = model(input_ids=ids, target_columns=torch.tensor([[column]])).logits[0, 0]
            else:
                candidates = known.repeat(words, 1)
                candidates[:, column] = torch.arange(words)
                scores = model.log_likelihood(candidates, order.expand_as(candidates))[:, column]
            barred = torch.full_like(scores, -torch.inf)
            barred[allowed] = scores[allowed]
            scores = barred.log_softmax(dim=-1)
            if best is None or scores.max() > best[0]:
                best = scores.max(), column, int(scores.argmax())
        known[0, best[1]] = best[2]
        left.remove(best[1])
    return known[is_blank].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_writes_the_likeliest_at_the_true_length(architecture, tokenizer, captured):
    blanks = blanks_of(architecture, tokenizer, captured)
    subject = trained(architecture, tokenizer, STORIES)
    with torch.no_grad():  # a special token would often be the likeliest
        subject.model.lm_head.weight[tokenizer.eos_token_id] *= 30
    line = encode_piece(tokenizer, "\n", is_start=False)
    for chosen in blanks[:2]:
        texts = infilling._write(subject, chosen, line, batch_size=3, title="x")
        assert texts == infilling._write(subject, chosen, line, batch_size=1, title="x")
        shortest = min(range(3), key=lambda index: len(chosen[index].before) + len(chosen[index].target))
        assert texts[shortest] == tokenizer.decode(slow_fill(subject, chosen[shortest])).strip()


@pytest.mark.parametrize("is_llama", [True, False])
def test_what_stood_there_scores_100_and_nothing_of_it_0(is_llama, tokenizer, monkeypatch):
    subject = trained("llama" if is_llama else "a3", tokenizer, STORIES)
    name = "_continue" if is_llama else "_fill"
    monkeypatch.setattr(infilling, name, lambda subject, blanks, *line: [blank.target for blank in blanks])
    result = measure(subject)
    assert (result["rouge1"], result["rougeL"], result["exact_match_words"]) == (100, 100, 100)
    assert result["infilling_generated"] == 2
    other = tokenizer.encode("xyz", add_special_tokens=False)
    monkeypatch.setattr(infilling, name, lambda subject, blanks, *line: [other for _ in blanks])
    result = measure(subject)
    assert (result["rouge1"], result["rougeL"], result["exact_match_words"]) == (0, 0, 0)


def test_rouge_is_of_the_first_stories_and_unstemmed(tokenizer, monkeypatch):
    # of "Tom was happy, and so was his dog." and "So was the dog."
    written = iter([["Tom was his dogs, so happy.", "So the cat"], ["Tom", "dog", "x"]])
    monkeypatch.setattr(infilling, "_write", lambda *given, **settings: next(written))
    result = measure(trained("a3", tokenizer, STORIES))
    shared, in_order = (5, 2), (3, 2)
    for name, counts in (("rouge1", shared), ("rougeL", in_order)):
        shares = [2 * count / words for count, words in zip(counts, (8 + 6, 4 + 3), strict=True)]
        assert result[name] == pytest.approx(100 * sum(shares) / 2)


# ROCStories


def write_csv(folder, stories) -> str:
    columns = ["InputStoryid", *(f"InputSentence{n}" for n in range(1, 5))]
    columns += ["RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2", "AnswerRightEnding"]
    path = folder / "rocstories" / "cloze_test_val__spring2016.csv"
    path.parent.mkdir()
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        for number, sentences in enumerate(stories):
            rows.writerow([f"story{number}", *sentences[:4], "Not this.", sentences[4], 2])
    return str(folder)


def test_rocstories_lack_their_third_sentence(tokenizer, captured, tmp_path):
    five = ["Tom was happy.", "So was his dog.", "The cat sat on a mat!", "The dog ran home.", "One day, the cat ran."]
    long = [*five[:4], " ".join(["The cat sat on the mat and so the dog ran home"] * 4) + "."]
    data_dir = write_csv(tmp_path, [long, five])
    settings = {"num_documents": 1, "num_generated": 1, "max_length": 50}
    subject = trained("a3", tokenizer)
    result = measure_infilling(subject, data_dir=data_dir, **settings)
    assert [blank.text for blank in captured["sentences"]] == ["The cat sat on a mat!"]
    blank = captured["sentences"][0]
    assert tokenizer.decode([*blank.before[1:], *blank.target, *blank.after]) == " ".join(five)
    assert result["infilling_skipped_roc"] == 1, "a story that does not fit whole has no third sentence of five"
    plain = measure(trained("a3", tokenizer, STORIES))
    assert set(result) == {f"{name}_roc" for name in plain}
    expected = slow_nats(subject, blank) / len(blank.target)
    assert result["nll_middle_sentence_roc"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="num_documents=2: only 1 of 2 stories of ROCStories have 5 sentences"):
        measure_infilling(subject, data_dir=data_dir, **{**settings, "num_documents": 2})
    with pytest.raises(ValueError, match="no such file"):
        measure_infilling(subject, data_dir=str(tmp_path / "elsewhere"), **settings)


def test_a_whole_file_of_rocstories(tokenizer, captured, made_data):
    subject = trained("llama", tokenizer, max_position_embeddings=512)
    settings = {"num_documents": 3, "num_generated": 1, "max_length": 512}
    result = measure_infilling(subject, data_dir=str(made_data), **settings)
    assert result["infilling_stories_roc"] == 3 and len(captured["words"]) == 3
    assert captured["sentences"][0].text.endswith((".", "!", "?"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_documents": 0}, "num_documents=0"),
        ({"num_documents": 4}, "num_documents=4: only 3 of 3 held-out documents have 3 sentences"),
        ({"num_generated": 4}, "num_generated=4: expected at most num_documents=3"),
        ({"num_generated": True}, "num_generated=True"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 129}, "max_length=129"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        measure(trained("a3", tokenizer, STORIES), **changes)
