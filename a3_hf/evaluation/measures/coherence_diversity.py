"""Measure of samples by temperature: the fraction of words that exist, and of words that are different."""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from a3_hf.data.packing import check_tokens, pack_rows
from a3_hf.data.tokenization import pad_id, tokenize

from .checks import check_counts, check_length
from .trained_run import Trained

TEMPERATURES = (0.5, 0.7, 0.85, 1.0)
TOKENS = 4096  # written at each temperature, if `num_samples` is not given
ORDERS = ("random", "left_to_right")
SHORTEST_WORD = 4  # letters
SHOWN = 200  # characters of a sample
LETTERS = re.compile(r"[^\W\d_]+")


def measure_samples(
    trained: Trained,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    num_samples: int | None = None,
    length: int | None = None,
    order: str = "random",
    diffusion_steps: int | None = 128,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures the coherence–diversity frontier (paper §2): rows of `length` tokens, sampled after BOS alone at each
    temperature.

    A3 and Decoupled RoPE write one token per pass, each row in its own random order; masked diffusion too, but in at most
    `diffusion_steps` passes; plain LLaMA writes from left to right, whatever `order`. Orders and random numbers are the same
    at every temperature. EOS does not end a row. The word list is the words of the training text (the paper's is of English).

    Diversity falls as more is written: compare equal numbers of tokens.

    Args:
        temperatures: above 0.
        num_samples: rows; None: as many as hold 4,096 tokens.
        length: tokens of a row, BOS included; None: the recipe's `block_size`.
        order: `"random"`, or `"left_to_right"`.
        diffusion_steps: passes in which masked diffusion writes a row, several tokens at once if it has more blanks. None: one
            token per pass.
        seed: seed of orders and samples.

    Returns:
        `samples`, a dict per temperature: `temperature`, `coherence`, `diversity` and `num_words` of
        `coherence_and_diversity`, `tokens_per_forward`, `order`, and `text`, the beginning of the first row.
        `held_out_coherence`, `held_out_diversity` and `held_out_num_words` are those of as many rows of held-out text; absent
        if there are too few.

    Raises:
        ValueError: no temperature or one that is not above 0; numbers that are not whole or below 1; a length above the
            model's context; another order; `diffusion_steps` with masked diffusion from left to right.
    """
    length = trained.recipe.data.block_size if length is None else length
    check_length("length", length, trained.model.config, least=2)
    num_samples = max(TOKENS // length, 1) if num_samples is None else num_samples
    check_counts(num_samples=num_samples, **({} if diffusion_steps is None else {"diffusion_steps": diffusion_steps}))
    if order not in ORDERS:
        raise ValueError(f"order={order!r}: expected one of {', '.join(ORDERS)}")
    if not temperatures or not all(0 < temperature < math.inf for temperature in temperatures):
        raise ValueError(f"temperatures={temperatures!r}: expected one or more numbers above 0")
    if trained.architecture == "masked_diffusion" and order == "left_to_right" and diffusion_steps is not None:
        raise ValueError(
            f"diffusion_steps={diffusion_steps} with order='left_to_right': expected None, because masked diffusion writes "
            "one token per pass from left to right"
        )

    vocabulary = {word for text in trained.training_documents for word in words(text)}
    samples = []
    for temperature in tqdm(temperatures, desc="samples", leave=False):
        rows, tokens_per_forward = _write(
            trained,
            num_samples=num_samples,
            length=length,
            temperature=temperature,
            order=order,
            diffusion_steps=diffusion_steps,
            seed=seed,
        )
        texts = [row_text(trained.tokenizer, row) for row in rows]
        samples.append(
            {
                "temperature": temperature,
                **coherence_and_diversity(texts, vocabulary),
                "tokens_per_forward": tokens_per_forward,
                "order": "left_to_right" if trained.architecture == "llama" else order,
                "text": texts[0][:SHOWN],
            }
        )
    held_out = held_out_rows(trained, length=length, count=num_samples)
    if len(held_out) < num_samples:
        return {"samples": samples}
    reference = coherence_and_diversity([row_text(trained.tokenizer, row) for row in held_out], vocabulary)
    return {"samples": samples, **{f"held_out_{name}": value for name, value in reference.items()}}


def words(text: str) -> list[str]:
    """The words of a text: runs of at least four letters, lower-cased.

    Example:
        >>> words("Don't STOP: abc, 4you_all")
        ['stop']
    """
    return [run.lower() for run in LETTERS.findall(text) if len(run) >= SHORTEST_WORD]


def coherence_and_diversity(texts: Sequence[str], vocabulary: Collection[str]) -> dict[str, float | int]:
    """Measures which words of sampled texts exist, and how many are different. Words are those of `words`, without runs of
    letters at either end of a text, which may be parts of words.

    Args:
        vocabulary: the words that exist, lower-cased.

    Returns:
        `coherence`, the fraction of the words that are in the vocabulary; `diversity`, the number of different words
        over the number of words of all texts; both absent if there is no word; and `num_words`.

    Example:
        >>> coherence_and_diversity(["... some word, some wrod."], {"some", "word"})
        {'coherence': 0.75, 'diversity': 0.75, 'num_words': 4}
    """
    written = [word for text in texts for word in _whole_words(text)]
    if not written:
        return {"num_words": 0}
    known = sum(word in vocabulary for word in written)
    return {
        "coherence": known / len(written),
        "diversity": len(set(written)) / len(written),
        "num_words": len(written),
    }


def _whole_words(text: str) -> Iterator[str]:
    for run in LETTERS.finditer(text):
        if run.start() > 0 and run.end() < len(text) and len(run.group()) >= SHORTEST_WORD:
            yield run.group().lower()


def row_text(tokenizer: PreTrainedTokenizerBase, row: Sequence[int]) -> str:
    """The text of a row that starts with BOS, with a line break for each later special token, so that it separates words."""
    special, pieces = set(tokenizer.all_special_ids), [[]]
    for token in row[1:]:
        if token in special:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return "\n".join(tokenizer.decode(piece) for piece in pieces)


def held_out_rows(trained: Trained, *, length: int, count: int) -> list[list[int]]:
    """The first `count` rows of `length` tokens, BOS included, of the held-out documents, packed as in training (never
    isolated); fewer if the documents fill fewer.
    """
    boundary_id = check_tokens(trained.recipe.data, trained.tokenizer)
    documents = (
        ids
        for text in trained.documents
        if text.strip()
        for ids in tokenize([text], trained.tokenizer, boundary_id=boundary_id)
    )
    rows = []
    for row, _ in pack_rows(
        documents, bos_id=trained.tokenizer.bos_token_id, pad_id=pad_id(trained.tokenizer), block_size=length
    ):
        if len(rows) == count or not all(row["attention_mask"]):
            break
        rows.append(row["input_ids"])
    return rows


@torch.no_grad()
def _write(
    trained: Trained,
    *,
    num_samples: int,
    length: int,
    temperature: float,
    order: str,
    diffusion_steps: int | None,
    seed: int,
) -> tuple[list[list[int]], float]:
    """Rows of `length` tokens, and the tokens written per pass."""
    model, tokenizer = trained.model, trained.tokenizer
    bos = torch.full((num_samples, 1), tokenizer.bos_token_id, device=model.device)
    if trained.architecture == "llama":
        settings = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length - 1,
            eos_token_id=[],  # none: with None generate would use the model's
            pad_token_id=pad_id(tokenizer),
        )
        with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]):
            torch.manual_seed(seed)
            sequences = model.generate(bos, attention_mask=torch.ones_like(bos), generation_config=settings)
        return sequences.tolist(), 1.0
    if trained.architecture != "masked_diffusion":
        how = {"strategy": "groupwise", "order": order, "group_size": 1}
    elif order == "left_to_right":
        how = {"strategy": "dynamic", "criterion": "random", "window": 1}
    else:
        how = {"strategy": "dynamic", "criterion": "random", "steps": diffusion_steps}
    output = model.generate_any_order(
        bos, max_new_tokens=length - 1, do_sample=True, temperature=temperature, seed=seed, eos_token_id=[], **how
    )
    return output.sequences.tolist(), output.tokens_per_forward
