"""Experiment 5's measure: how well each decoding strategy fills a middle sentence, and in how many passes."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from time import perf_counter
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from a3_hf.evaluation.tasks.datasets import rocstories
from a3_hf.models.a3_llama.generation_config import OWN_OPTIONS, SAMPLING_OPTIONS, A3GenerationConfig
from a3_hf.models.a3_llama.infilling_templates import decode_after, encode_piece, encode_prompt
from a3_hf.models.a3_llama.orders import GroupOrder, seed_of

from .infilling_quality import split_sentences
from .next_token import check_counts, padded
from .trained_run import Trained

# Settings of `generate_any_order` by the name that stands in tables and plots.
STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    **{f"groupwise {size}": {"group_size": size} for size in (1, 2, 4, 8)},
    **{f"dynamic {number}": {"strategy": "dynamic", "tokens_per_step": number} for number in (1, 2, 4)},
    **{f"threshold {share}": {"strategy": "dynamic", "threshold": share} for share in (0.7, 0.5, 0.3)},
    **{f"entropy {nats}": {"strategy": "dynamic", "entropy_budget": float(nats)} for nats in (2, 8)},
    **{f"speculative {source}": {"strategy": "speculative", "draft": source} for source in ("model", "ngram")},
    **{f"refine {number}": {"strategy": "refine", "tokens_per_step": number} for number in (1, 4)},
}
SETTINGS = ("strategy", "use_cache", "do_sample", *SAMPLING_OPTIONS, *OWN_OPTIONS)
SENTENCES, MIDDLE = 5, 2


class Blanked(NamedTuple):
    """A story without its third sentence: the text before, that sentence, the text behind, each with the white space in
    front of it; and the same in tokens, BOS first.
    """

    texts: tuple[str, str, str]
    tokens: tuple[list[int], list[int], list[int]]


def measure_decoding(
    trained: Trained,
    *,
    judge: str | None = None,
    num_stories: int = 100,
    strategies: Mapping[str, Mapping[str, Any]] | None = None,
    data_dir: str | None = None,
    seed: int = 0,
    batch_size: int = 20,
) -> dict[str, Any]:
    """Fills the third of five sentences, given the other four and its number of tokens, by every strategy: the likeliest
    token unless a strategy's settings sample.

    The passes are those that a text would have taken alone: in a batch the slowest row decides when all are done. Special
    tokens are never written. Needs the extra `eval`.

    Args:
        judge: the folder or hub id of a plain LLaMA that tells how likely it finds what was written; None: none does.
        num_stories: how many are filled, the first ones.
        strategies: settings of `generate_any_order` by name: `strategy`, its own options, `use_cache` and those of
            sampling; None: `STRATEGIES`. An architecture is measured with those that it takes and no others: `"a3"` with
            all, `"decoupled_rope"` with `groupwise` one token at a time, `"masked_diffusion"` with `dynamic`, `"llama"`
            with none.
        data_dir: the folder that holds ROCStories, as in `a3_hf.evaluation.tasks.datasets` (paper §1); None: the first five
            sentences of those held-out documents that have five, and whose five fit the model's context (not specified
            there).
        seed: of what a strategy draws; a text's draws come from it and the number of its story.
        batch_size: stories filled side by side.

    Returns:
        `{}` for an architecture that takes none of the strategies; else

        - `decoding`: a dict for each: `strategy`; `tokens_per_forward`; `tokens_per_second` (of all rows of a batch together;
          it depends on the machine); `nll_model`, what was written under the model itself, exactly, one token at a time from
          left to right given the text on both sides, in nats per token, whatever the order of writing; `nll_judge`, what was
          written and the text behind it under the judge given the text before, in nats per token of the judge's own; `rouge1`
          and `rougeL` against the true sentence, F × 100.
        - `decoding_true_nll_model` and `decoding_true_nll_judge`: the same of the true sentences.

        Without a judge, its figures are missing.

    Raises:
        ValueError: numbers below 1, no strategies, settings that are not known or not of that strategy, a judge or a file that
            can't be read, too few stories, one that is too long for the model or for the judge.
    """
    check_counts(num_stories=num_stories, batch_size=batch_size)
    strategies = STRATEGIES if strategies is None else strategies
    configs = {name: _checked(name, settings) for name, settings in strategies.items()}
    if not configs:
        raise ValueError("strategies is empty; it takes at least one, settings of generate_any_order by name")
    taken = {name: strategies[name] for name, config in configs.items() if _takes(trained.architecture, config)}
    if not taken:
        return {}
    model, tokenizer = trained.model, trained.tokenizer
    judging = None if judge is None else _load_judge(judge, model.device)
    stories = list(islice(_blanked(trained, data_dir), num_stories))
    if len(stories) < num_stories:
        source = f"the {len(trained.documents)} held-out documents" if data_dir is None else "ROCStories"
        raise ValueError(
            f"num_stories={num_stories}: {source} give {len(stories)} stories of five sentences that fit; ask for fewer"
        )

    def nll_judge(middles: Sequence[str]) -> float:
        from .judge_perplexity import judged_nats

        befores = [story.texts[0] for story in stories]
        ends = [middle + story.texts[2] for middle, story in zip(middles, stories, strict=True)]
        nats, tokens = judged_nats(*judging, befores, ends)
        return nats / tokens

    batches = [_Batch.of(stories[first : first + batch_size], model) for first in range(0, num_stories, batch_size)]
    total = sum(len(story.tokens[1]) for story in stories)
    true_nats = -sum(_log_likelihood(model, batch, batch.input_ids) for batch in batches)
    results: dict[str, Any] = {"decoding": [], "decoding_true_nll_model": true_nats / total}
    if judging is not None:  # before anything is written: a story may be too long for the judge
        results["decoding_true_nll_judge"] = nll_judge([story.texts[1] for story in stories])

    from a3_hf.evaluation.tasks.functions import rouge

    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    suppressed = sorted(special | set(tokenizer.all_special_ids))
    texts: dict[str, list[str]] = {name: [] for name in taken}
    passes, seconds, nats = dict.fromkeys(taken, 0), dict.fromkeys(taken, 0.0), dict.fromkeys(taken, 0.0)
    _fill(model, batches[0])  # the first call is slower, whatever it does
    # the strategies side by side at each batch, so that a machine that is busy for a while slows all of them
    for number, batch in enumerate(tqdm(batches, desc="decoding", leave=False)):
        seeds = [seed_of(seed, number * batch_size + row) for row in range(len(batch.input_ids))]
        for name, settings in taken.items():
            start = perf_counter()
            sequences, took = _fill(model, batch, seed=seeds, suppress_tokens=suppressed, **settings)
            seconds[name] += perf_counter() - start
            passes[name] += sum(took)
            nats[name] -= _log_likelihood(model, batch, sequences)
            for ids, blank in zip(sequences, batch.blank_mask, strict=True):
                before = stories[len(texts[name])].tokens[0]
                texts[name].append(decode_after(tokenizer, before, ids[blank].tolist()))
    for name, written in texts.items():
        scores = [rouge({"target": story.texts[1]}, [text]) for story, text in zip(stories, written, strict=True)]
        results["decoding"].append(
            {
                "strategy": name,
                "tokens_per_forward": total / passes[name],
                "tokens_per_second": total / seconds[name],
                "nll_model": nats[name] / total,
                **({} if judging is None else {"nll_judge": nll_judge(written)}),
                **{kind: sum(score[kind] for score in scores) / len(scores) for kind in ("rouge1", "rougeL")},
            }
        )
    return results


def _checked(name: str, settings: Mapping[str, Any]) -> A3GenerationConfig:
    if not isinstance(settings, Mapping):
        raise ValueError(f"strategies: {name!r} is {settings!r}; it takes settings of generate_any_order")
    for setting in settings:
        if setting not in SETTINGS:
            raise ValueError(f"strategies: {name!r} has {setting!r}; it takes {', '.join(SETTINGS)}")
    try:
        return A3GenerationConfig(**settings)
    except ValueError as error:
        raise ValueError(f"strategies: {name!r}: {error}") from error


def _takes(architecture: str, config: A3GenerationConfig) -> bool:
    if architecture == "decoupled_rope":
        return config.strategy == "groupwise" and not config.writes_in_parallel()
    if architecture == "masked_diffusion":
        return config.strategy == "dynamic"
    return architecture == "a3"


def _load_judge(path: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        if kind != "llama":
            raise ValueError(f"it is a {kind}, and takes a plain LLaMA")
        return LlamaForCausalLM.from_pretrained(path).to(device).eval(), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"judge={path!r} can't be loaded: {error}") from error


def _blanked(trained: Trained, data_dir: str | None) -> Iterator[Blanked]:
    tokenizer, context = trained.tokenizer, trained.model.config.max_position_embeddings
    if data_dir is None:
        stories = (split_sentences(document)[:SENTENCES] for document in trained.documents)
    else:
        told = rocstories(data_dir=data_dir)["validation"]["sentences"]
        stories = ([first, *(f" {sentence}" for sentence in others)] for first, *others in told)
    for number, sentences in enumerate(stories, start=1):
        if len(sentences) < SENTENCES:
            continue
        texts = "".join(sentences[:MIDDLE]), sentences[MIDDLE], "".join(sentences[MIDDLE + 1 :])
        before = encode_prompt(tokenizer, texts[0])
        middle, behind = (encode_piece(tokenizer, text, is_start=False) for text in texts[1:])
        length = len(before) + len(middle) + len(behind)
        if length <= context:
            yield Blanked(texts, (before, middle, behind))
        elif data_dir is not None:
            raise ValueError(
                f"data_dir={data_dir!r}: story {number} has {length} tokens, more than the model's context "
                f"(max_position_embeddings={context})"
            )


class _Batch(NamedTuple):
    """Stories, padded on the left: each (B, S)."""

    input_ids: torch.Tensor
    blank_mask: torch.Tensor
    attention_mask: torch.Tensor

    @classmethod
    def of(cls, stories: Sequence[Blanked], model: PreTrainedModel) -> "_Batch":
        ids, real = padded([[token for part in story.tokens for token in part] for story in stories], side="left")
        places = [[int(part == 1) for part, tokens in enumerate(story.tokens) for _ in tokens] for story in stories]
        blanks, _ = padded(places, side="left")
        return cls(ids.to(model.device), blanks.bool().to(model.device), real.bool().to(model.device))


def _fill(model, batch: _Batch, **settings: Any) -> tuple[torch.Tensor, list[int]]:
    """The tokens (B, S), and the passes that each row would have taken alone: those that wrote something in it, and those
    that wrote nothing in any row, which score.
    """
    wrote: list[torch.Tensor] = []
    output = model.generate_any_order(
        batch.input_ids.masked_fill(batch.blank_mask, 0),
        batch.blank_mask,
        attention_mask=batch.attention_mask,
        commit_hook=lambda step, sequences, committed: wrote.append(committed.any(dim=1)),
        **settings,
    )
    scoring = output.num_forward_passes - len(wrote)
    return output.sequences, (torch.stack(wrote).sum(dim=0) + scoring).tolist()


def _log_likelihood(model, batch: _Batch, sequences: torch.Tensor) -> float:
    """Nats of all blanks together, each row's from left to right given the text on both sides."""
    groups = GroupOrder.infilling(batch.blank_mask, attention_mask=batch.attention_mask).group_ids
    log_probs = model.log_likelihood(sequences, groups, batch.attention_mask, scored_mask=batch.blank_mask)
    return log_probs[batch.blank_mask].double().sum().item()
