"""Measure of draft heads: how often their guesses are right, and how many tokens a pass writes with them."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from a3_hf.data.collator import IGNORED_LABEL
from a3_hf.data.written import load_written
from a3_hf.models.a3_llama.generation_config import A3GenerationConfig
from a3_hf.settings import check_keys
from a3_hf.training.draft_head_trainer import Row, measure_guesses

from .checks import check_counts
from .trained_run import Trained

# `draft_tokens` and `draft_width` of the trees, by the name in tables.
TREES: Mapping[str, Mapping[str, int]] = {
    "chain_3": {"draft_tokens": 3, "draft_width": 1},
    **{f"tree_{nodes}": {"draft_tokens": nodes} for nodes in (4, 8, 16)},
}
SOURCES = {"head": "head", "lookup": "ngram+head"}  # `draft`, by the name in tables


def measure_drafts(
    trained: Trained,
    *,
    num_prompts: int = 8,
    length: int = 48,
    batch_size: int = 8,
    trees: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, Any]:
    """Measures a draft head on the recipe's evaluation documents, those that begin with a question of a chat and the others
    ("stories") apart. Texts are written greedily, one at a time, after the openings of the first documents of each kind; on a
    CPU with packed weights, as they are served.

    Args:
        num_prompts: texts of each kind that are written.
        length: tokens of a text, at most.
        batch_size: documents per batch, for the guesses.
        trees: `draft_tokens` and `draft_width` by name; None: `TREES`.

    Returns:
        - `guesses`: a dict for each kind and distance (from 2): `prompts`, `distance`, `right` (fraction of tokens whose
          likeliest guess is right, given the true tokens before), `nats` (per token), `tokens` (number of tokens).
        - `passes`: a dict for each kind, source and tree: `prompts`, `draft` ("head", or "lookup": guesses from the text so
          far first), `tree`, `tokens_per_pass` (tokens written by passes of the model).
        - the same as numbers: `right_2_stories`, `nats_2_stories`, `tokens_per_pass_stories_head_tree_8`, …
        - `head_parameters`: number of the head's parameters.

    Raises:
        ValueError: a model without a draft head; numbers below 1; settings that are no tree; no evaluation documents, or fewer
            of a kind than `num_prompts`.
    """
    check_counts(num_prompts=num_prompts, length=length, batch_size=batch_size)
    if trained.architecture != "draft_head":
        raise ValueError(f"architecture={trained.architecture!r}: expected 'draft_head', which has guesses to measure")
    trees = TREES if trees is None else trees
    for name, settings in trees.items():
        _check_tree(name, settings)
    model, head = trained.model, trained.model.drafter.head
    _, rows = load_written(trained.recipe.data, vocab_size=model.config.vocab_size)
    if rows is None:
        raise ValueError("the recipe has no evaluation documents. Set validation_file or validation_documents")
    kinds = _by_kind(rows, trained.tokenizer)
    for kind, chosen in kinds.items():
        if len(chosen) < num_prompts:
            raise ValueError(
                f"num_prompts={num_prompts}: expected at most the {len(chosen)} documents of kind {kind!r}"
            )
    guesses = [
        {"prompts": kind, **one}
        for kind, chosen in kinds.items()
        for one in measure_guesses(head, chosen, batch_size=batch_size)
    ]
    if (model.device.type, model.dtype) == ("cpu", torch.float32):
        model.pack_weights()
    passes = []
    for kind, source, tree in tqdm(list(product(kinds, SOURCES, trees)), desc="drafts", leave=False):
        openings = [_opening(row) for row in kinds[kind][:num_prompts]]
        rate = _tokens_per_pass(model, openings, length, draft=SOURCES[source], **trees[tree])
        passes.append({"prompts": kind, "draft": source, "tree": tree, "tokens_per_pass": rate})
    numbers = {f"{name}_{one['distance']}_{one['prompts']}": one[name] for name in ("right", "nats") for one in guesses}
    numbers |= {
        f"tokens_per_pass_{one['prompts']}_{one['draft']}_{one['tree']}": one["tokens_per_pass"] for one in passes
    }
    return {"guesses": guesses, "passes": passes, **numbers, "head_parameters": head.num_parameters()}


def _check_tree(name: str, settings: Mapping[str, int]) -> None:
    if not isinstance(settings, Mapping):
        raise ValueError(f"trees: {name!r} is {settings!r}: expected draft_tokens and draft_width")
    check_keys(f"trees: {name!r}", settings, ("draft_tokens", "draft_width"))
    try:
        A3GenerationConfig(strategy="speculative", verify="content", draft="head", **settings)
    except ValueError as error:
        raise ValueError(f"trees: {name!r}: {error}") from error


def _opening(row: Row) -> Sequence[int]:
    return row["input_ids"][: row["labels"].count(IGNORED_LABEL)]


def _by_kind(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Row]]:
    """The documents of each kind that there is. The question of a chat ends with EOS, which no other opening holds."""
    kinds: dict[str, list[Row]] = {"stories": [], "chat": []}
    for row in rows:
        kinds["chat" if tokenizer.eos_token_id in _opening(row) else "stories"].append(row)
    return {kind: chosen for kind, chosen in kinds.items() if chosen}


def _tokens_per_pass(model, openings: Sequence[Sequence[int]], length: int, **settings: Any) -> float:
    tokens = passes = 0
    for opening in openings:
        ids = torch.tensor([opening], device=model.device)
        output = model.generate_any_order(
            ids, max_new_tokens=length, strategy="speculative", verify="content", **settings
        )
        tokens += int((output.group_ids[0, ids.shape[1] :] >= 0).sum())
        passes += output.num_forward_passes
    return tokens / passes
