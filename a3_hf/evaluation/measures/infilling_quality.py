"""Measure of infilling: how well a middle sentence and a single word of a story are predicted and written."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from a3_hf.models.a3_llama.infilling_templates import decode_after, encode_piece, encode_prompt, special_token_ids
from a3_hf.training.base_trainer import row_generator

from .batching import NEXT_TOKEN_ARCHITECTURES, next_token_scores, pad_rows, span_mask
from .checks import check_counts, check_length
from .stories import BlankBatch, StoryBlank, read_stories
from .trained_run import Trained

WORD = re.compile(r"(?<=\s)[^\W\d_]{3,}(?=\s)")  # only letters, between white space
FEWEST_SENTENCES = 3
ROC_SENTENCES = 5


def measure_infilling(
    trained: Trained,
    *,
    data_dir: str | None = None,
    num_documents: int = 100,
    num_generated: int = 50,
    max_length: int = 256,
    seed: int = 21,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Measures infilling of held-out documents or of ROCStories: the middle sentence of each story (with an even number of
    sentences, the first after the middle), and one word of the story.

    A story is the first whole sentences of a document, as many as fit in `max_length` tokens with BOS and a line break;
    one of ROCStories has to fit whole, and its third sentence is blanked (paper §1). Stories, blanks and tokens are the same
    for every architecture and run.

    Each architecture sees both sides, as `StoryBlank.shown_by` arranges them. Plain LLaMA reads the text after the blank, a
    line break, then the text before it (as `a3_ar` with `infilling="suffix_prompt"`), or what the recipe's `fim` taught it;
    A3 reads as its `suffix_template` says, and without one, as the others, in the story's own order.

    Args:
        data_dir: the folder that holds `rocstories/cloze_test_val__spring2016.csv`; None: held-out documents.
        num_documents: number of stories, the first usable ones. A story of fewer than three sentences, or without a word to
            blank, is skipped.
        num_generated: number of stories whose sentence is written.
        max_length: tokens of a story.
        seed: seed of the choice of the word, together with the document's number.
        batch_size: stories per batch.

    Returns:
        A dict, whose names end in `_roc` with `data_dir`:

        - `nll_middle_sentence`: nats per token of the true sentence given both sides, left to right within the blank; exact
          for every architecture (masked diffusion needs a pass per token).
        - `nll_middle_sentence_prefix_only`: the same given only the text before, next token by next token, for plain LLaMA
          and A3's content stream.
        - `rouge1`, `rougeL`: F-measure × 100, unstemmed, of the sentence written greedily at its true number of tokens: left
          to right, or for masked diffusion the most confident token per pass. Special tokens are never written.
        - `exact_match_words`: percentage of stories where the word is written exactly, greedily at its true number of tokens.
          It is drawn from the words of three letters or more between white space.
        - `infilling_stories`, `infilling_tokens` (of the sentences), `infilling_generated`, `infilling_skipped` (stories
          skipped before the last one used).

    Raises:
        ValueError: numbers that are not whole or below 1, `num_generated` above `num_documents`, a `max_length` above the
            model's context, too few usable stories, a tokenizer without BOS, an absent or unreadable file.
    """
    from rouge_score.rouge_scorer import RougeScorer  # of the extra `eval`

    check_counts(num_documents=num_documents, num_generated=num_generated, batch_size=batch_size)
    check_length("max_length", max_length, trained.model.config, least=2)
    if num_generated > num_documents:
        raise ValueError(f"num_generated={num_generated}: expected at most num_documents={num_documents}")

    # 1. The blanks: a sentence and a word of each story.
    stories, source = read_stories(trained, data_dir)
    line = encode_piece(trained.tokenizer, "\n", is_start=False)
    fewest = FEWEST_SENTENCES if data_dir is None else ROC_SENTENCES
    sentences, words, skipped = _draw_blanks(
        trained.tokenizer, stories, num_documents, length=max_length - len(line), fewest_sentences=fewest, seed=seed
    )
    if len(sentences) < num_documents:
        raise ValueError(
            f"num_documents={num_documents}: only {len(sentences)} of {source} have {fewest} sentences within "
            f"max_length={max_length} tokens and a word to blank. Set it lower, or provide more documents"
        )

    # 2. Likelihood of the sentences.
    tokens = sum(len(blank.target) for blank in sentences)
    nats = _both_sides_nats(trained, sentences, line, batch_size=batch_size)
    result: dict[str, Any] = {"nll_middle_sentence": nats / tokens}
    if trained.architecture in NEXT_TOKEN_ARCHITECTURES:
        nats = _next_token_nats(trained, [blank.before for blank in sentences], sentences, batch_size=batch_size)
        result["nll_middle_sentence_prefix_only"] = nats / tokens

    # 3. Texts written into the blanks.
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    chosen = sentences[:num_generated]
    written = _write(trained, chosen, line, batch_size=batch_size, title="sentences")
    scores = [scorer.score(blank.text, text) for blank, text in zip(chosen, written, strict=True)]
    for name in ("rouge1", "rougeL"):
        result[name] = 100 * sum(score[name].fmeasure for score in scores) / num_generated
    written = _write(trained, words, line, batch_size=batch_size, title="words")
    matches = [blank.text == text for blank, text in zip(words, written, strict=True)]
    result |= {
        "exact_match_words": 100 * sum(matches) / num_documents,
        "infilling_stories": num_documents,
        "infilling_tokens": tokens,
        "infilling_generated": num_generated,
        "infilling_skipped": skipped,
    }
    return result if data_dir is None else {f"{name}_roc": value for name, value in result.items()}


def _draw_blanks(
    tokenizer: PreTrainedTokenizerBase,
    stories: Iterable[list[str]],
    number: int,
    *,
    length: int,
    fewest_sentences: int,
    seed: int,
) -> tuple[list[StoryBlank], list[StoryBlank], int]:
    """The blanked sentences and words of the first `number` usable stories, and how many stories were skipped."""
    sentences, words, skipped = [], [], 0
    for index, story in enumerate(stories):
        pair = _blanks_of(tokenizer, story, length, row_generator(seed, index), fewest_sentences)
        if pair is None:
            skipped += 1
            continue
        sentences.append(pair[0])
        words.append(pair[1])
        if len(sentences) == number:
            break
    return sentences, words, skipped


def _blanks_of(
    tokenizer: PreTrainedTokenizerBase,
    story: list[str],
    length: int,
    generator: torch.Generator,
    fewest_sentences: int,
) -> tuple[StoryBlank, StoryBlank] | None:
    """The story without its middle sentence and without a word, each of at most `length` tokens; None if unusable."""
    kept, used = 0, len(encode_prompt(tokenizer, ""))
    for sentence in story:
        used += len(encode_piece(tokenizer, sentence, is_start=not kept))
        if used > length:
            break
        kept += 1
    text = "".join(story[:kept])
    places = [match.span() for match in WORD.finditer(text)]
    if kept < fewest_sentences or not places:
        return None
    start = len("".join(story[: kept // 2]))
    end = start + len(story[kept // 2])
    sentence = StoryBlank.of(tokenizer, text[:start], text[start:end], text[end:])
    start, end = places[int(torch.randint(len(places), (), generator=generator))]
    start = len(text[:start].rstrip(" "))
    word = StoryBlank.of(tokenizer, text[:start], text[start:end], text[end:])
    return None if max(len(sentence.tokens), len(word.tokens)) > length else (sentence, word)


def _both_sides_nats(trained: Trained, blanks: Sequence[StoryBlank], line: list[int], *, batch_size: int) -> float:
    """−log p of all targets given both sides, nats."""
    blanks = [blank.shown_by(trained, line) for blank in blanks]
    if trained.architecture == "llama":
        return _next_token_nats(trained, [blank.before for blank in blanks], blanks, batch_size=batch_size)
    model, nats = trained.model, 0.0
    for start in tqdm(range(0, len(blanks), batch_size), desc="middle sentences", leave=False):
        nats -= BlankBatch.of(blanks[start : start + batch_size], model.device).log_likelihood(model)
    return nats


def _next_token_nats(
    trained: Trained, prompts: Sequence[list[int]], blanks: Sequence[StoryBlank], *, batch_size: int
) -> float:
    """−log p of all targets, each after its prompt, next token by next token, nats."""
    nats = 0.0
    for start in tqdm(range(0, len(blanks), batch_size), desc="middle sentences, next token", leave=False):
        part, given = blanks[start : start + batch_size], prompts[start : start + batch_size]
        ids, mask = pad_rows([[*prompt, *blank.target] for prompt, blank in zip(given, part, strict=True)])
        scored = span_mask([*map(len, given)], [len(blank.target) for blank in part], ids.shape[1])
        log_probs, _ = next_token_scores(trained.model, ids, mask, scored)
        nats -= log_probs.double().sum().item()
    return nats


def _write(
    trained: Trained, blanks: Sequence[StoryBlank], line: list[int], *, batch_size: int, title: str
) -> list[str]:
    """The text written greedily into each blank at its true number of tokens, without the white space around it."""
    by_length = sorted(range(len(blanks)), key=lambda index: len(blanks[index].target))  # a batch waits for its longest
    texts = [""] * len(blanks)
    for start in tqdm(range(0, len(blanks), batch_size), desc=f"writing {title}", leave=False):
        places = by_length[start : start + batch_size]
        part = [blanks[index].shown_by(trained, line) for index in places]
        written = (_continue if trained.architecture == "llama" else _fill)(trained, part)
        for index, blank, tokens in zip(places, part, written, strict=True):
            texts[index] = decode_after(trained.tokenizer, blank.before, tokens).strip()
    return texts


def _fill(trained: Trained, blanks: Sequence[StoryBlank]) -> list[list[int]]:
    """Tokens of each blank, by a model that writes between two sides."""
    ids, is_blank, mask = BlankBatch.of(blanks, trained.model.device)
    if trained.architecture == "masked_diffusion":
        strategy = {"strategy": "dynamic", "criterion": "confidence", "tokens_per_step": 1}
    else:
        strategy = {"strategy": "groupwise", "order": "left_to_right", "group_size": 1}
    sequences = trained.model.generate_any_order(
        ids.masked_fill(is_blank, 0),
        is_blank,
        attention_mask=mask,
        do_sample=False,
        suppress_tokens=special_token_ids(trained.tokenizer, trained.model.config.vocab_size),
        **strategy,
    ).sequences
    return [row[blank].tolist() for row, blank in zip(sequences, is_blank, strict=True)]


@torch.no_grad()
def _continue(trained: Trained, blanks: Sequence[StoryBlank]) -> list[list[int]]:
    """Tokens of each blank, by a plain LLaMA after a prompt that holds both sides."""
    model = trained.model
    ids, mask = pad_rows([blank.before for blank in blanks], side="left")
    longest = max(len(blank.target) for blank in blanks)
    sequences = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        max_new_tokens=longest,
        min_new_tokens=longest,
        suppress_tokens=special_token_ids(trained.tokenizer, trained.model.config.vocab_size),
        pad_token_id=0,
    )[:, ids.shape[1] :].tolist()
    return [row[: len(blank.target)] for row, blank in zip(sequences, blanks, strict=True)]
