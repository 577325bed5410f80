"""Measure of decoding strategies: how well each fills a middle sentence, and in how many passes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from time import perf_counter
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from a3_hf.models.a3_llama.generation_config import OWN_OPTIONS, SAMPLING_OPTIONS, A3GenerationConfig
from a3_hf.models.a3_llama.infilling_templates import decode_after, special_token_ids
from a3_hf.models.a3_llama.orders import seed_of
from a3_hf.settings import check_keys

from .checks import check_counts
from .judge_perplexity import judged_nats
from .stories import BlankBatch, StoryBlank, read_stories
from .trained_run import Trained

# Settings of `generate_any_order`, by the name in tables and plots.
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
JudgeNats = Callable[[Sequence[str]], float]


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
    """Fills the third of five sentences at its true number of tokens, given the other four, by every strategy. Decoding is
    greedy unless a strategy's settings sample. Special tokens are never written. Needs the extra `eval`.

    Args:
        judge: folder or hub id of a plain LLaMA whose perplexity of the texts is measured; None: no judge.
        num_stories: number of stories, the first ones.
        strategies: settings of `generate_any_order` by name: `strategy`, its own options, `use_cache` and those of
            sampling; None: `STRATEGIES`. Each architecture is measured with those it supports: `"a3"` with all,
            `"decoupled_rope"` with `groupwise` one token at a time, `"masked_diffusion"` with `dynamic`, `"llama"` with none.
        data_dir: the folder that holds ROCStories (paper §1); None: the first five sentences of those held-out documents
            that have five, if they fit the model's context (not specified in the paper).
        seed: seed of random choices, together with a story's number.
        batch_size: stories per batch.

    Returns:
        `{}` for an architecture that supports none of the strategies; else

        - `decoding`: a dict per strategy: `strategy`; `tokens_per_forward`, over the passes that each text would need alone;
          `tokens_per_second`, of all rows of a batch together; `nll_model`, nats per token of the written text under the
          model itself, exact, left to right given both sides; `nll_judge`, nats per token of the judge, of the written
          text and the text after it given the text before; `rouge1` and `rougeL` against the true sentence, F × 100.
        - `decoding_true_nll_model` and `decoding_true_nll_judge`: the same of the true sentences.

        Without a judge, its figures are absent.

    Raises:
        ValueError: numbers below 1, no strategies, settings that are unknown or not of that strategy, a judge or a file that
            can't be read, too few stories, a story that is too long for the model or for the judge.
    """
    check_counts(num_stories=num_stories, batch_size=batch_size)
    strategies = STRATEGIES if strategies is None else strategies
    configs = {name: _checked(name, settings) for name, settings in strategies.items()}
    if not configs:
        raise ValueError("strategies is empty: expected at least one, settings of generate_any_order by name")
    taken = {name: strategies[name] for name, config in configs.items() if _takes(trained.architecture, config)}
    if not taken:
        return {}
    model = trained.model
    judging = None if judge is None else _load_judge(judge, model.device)
    stories, source = _blanked(trained, data_dir)
    stories = list(islice(stories, num_stories))
    if len(stories) < num_stories:
        raise ValueError(
            f"num_stories={num_stories}: {source} give {len(stories)} stories of five sentences that fit. Ask for fewer"
        )
    nll_judge = None if judging is None else _judge_of(stories, judging)

    # The true sentences are judged first: a story too long for the judge raises before anything is written.
    batches = [
        BlankBatch.of(stories[first : first + batch_size], model.device, side="left")
        for first in range(0, num_stories, batch_size)
    ]
    total = sum(len(story.target) for story in stories)
    true_nats = -sum(batch.log_likelihood(model) for batch in batches)
    results: dict[str, Any] = {"decoding": [], "decoding_true_nll_model": true_nats / total}
    if nll_judge is not None:
        results["decoding_true_nll_judge"] = nll_judge([story.texts[1] for story in stories])

    from a3_hf.evaluation.tasks.functions import rouge

    written, spent = _write(trained, stories, batches, taken, seed=seed, batch_size=batch_size)
    for name, texts in written.items():
        scores = [rouge({"target": story.texts[1]}, [text]) for story, text in zip(stories, texts, strict=True)]
        results["decoding"].append(
            {
                "strategy": name,
                "tokens_per_forward": total / spent[name]["passes"],
                "tokens_per_second": total / spent[name]["seconds"],
                "nll_model": spent[name]["nats"] / total,
                **({} if nll_judge is None else {"nll_judge": nll_judge(texts)}),
                **{kind: sum(score[kind] for score in scores) / len(scores) for kind in ("rouge1", "rougeL")},
            }
        )
    return results


def _write(
    trained: Trained,
    stories: Sequence[StoryBlank],
    batches: Sequence[BlankBatch],
    strategies: Mapping[str, Mapping[str, Any]],
    *,
    seed: int,
    batch_size: int,
) -> tuple[dict[str, list[str]], dict[str, dict[str, float]]]:
    """By strategy, the text written into each story; and the passes, seconds and nats (under the model) of them all."""
    model, suppressed = trained.model, special_token_ids(trained.tokenizer, trained.model.config.vocab_size)
    texts: dict[str, list[str]] = {name: [] for name in strategies}
    spent = {name: {"passes": 0, "seconds": 0.0, "nats": 0.0} for name in strategies}
    _fill(model, batches[0])  # the first call is slower
    # strategies alternate on each batch, so that a busy machine slows all of them alike
    for number, batch in enumerate(tqdm(batches, desc="decoding", leave=False)):
        seeds = [seed_of(seed, number * batch_size + row) for row in range(len(batch.input_ids))]
        for name, settings in strategies.items():
            start = perf_counter()
            sequences, passes = _fill(model, batch, seed=seeds, suppress_tokens=suppressed, **settings)
            spent[name]["seconds"] += perf_counter() - start
            spent[name]["passes"] += sum(passes)
            spent[name]["nats"] -= batch.log_likelihood(model, sequences)
            for ids, blank in zip(sequences, batch.blank_mask, strict=True):
                before = stories[len(texts[name])].before
                texts[name].append(decode_after(trained.tokenizer, before, ids[blank].tolist()))
    return texts, spent


def _checked(name: str, settings: Mapping[str, Any]) -> A3GenerationConfig:
    if not isinstance(settings, Mapping):
        raise ValueError(f"strategies: {name!r} is {settings!r}: expected settings of generate_any_order")
    check_keys(f"strategies: {name!r}", settings, SETTINGS)
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
            raise ValueError(f"model_type={kind!r}: expected a plain LLaMA")
        return LlamaForCausalLM.from_pretrained(path).to(device).eval(), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"judge={path!r} can't be loaded: {error}") from error


def _judge_of(stories: Sequence[StoryBlank], judging: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> JudgeNats:
    """Returns a function of sentences for the blanks: the judge's nats per token of them and the texts after them."""

    def nll(middles: Sequence[str]) -> float:
        ends = [middle + story.texts[2] for middle, story in zip(middles, stories, strict=True)]
        nats, tokens = judged_nats(*judging, [story.texts[0] for story in stories], ends)
        return nats / tokens

    return nll


def _blanked(trained: Trained, data_dir: str | None) -> tuple[Iterator[StoryBlank], str]:
    """Stories of five sentences without the third; and a description of them for messages."""
    context = trained.model.config.max_position_embeddings
    stories, source = read_stories(trained, data_dir)

    def blank_each() -> Iterator[StoryBlank]:
        for number, sentences in enumerate(stories, start=1):
            if len(sentences) < SENTENCES:
                continue
            sides = "".join(sentences[:MIDDLE]), "".join(sentences[MIDDLE + 1 : SENTENCES])
            story = StoryBlank.of(trained.tokenizer, sides[0], sentences[MIDDLE], sides[1])
            if len(story.tokens) <= context:
                yield story
            elif data_dir is not None:
                raise ValueError(
                    f"data_dir={data_dir!r}: story {number} has {len(story.tokens)} tokens, more than the model's context "
                    f"(max_position_embeddings={context})"
                )

    return blank_each(), source


def _fill(model, batch: BlankBatch, **settings: Any) -> tuple[torch.Tensor, list[int]]:
    """The tokens (B, S), and the passes that each row would need alone: those that wrote in it, and those that wrote in no
    row, which score.
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
