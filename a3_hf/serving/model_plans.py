"""Plans for a model in this process: rows of a filling, so that each answer is what the model gives alone."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from a3_hf.models.a3_llama.generation_config import A3GenerationConfig
from a3_hf.models.a3_llama.infilling import SpaceFirst, begins_with_space_mask, encode_rows
from a3_hf.models.a3_llama.infilling_lengths import choose_lengths
from a3_hf.models.a3_llama.infilling_templates import Template, encode_prompt, special_token_ids
from a3_hf.models.a3_llama.likelihood import likeliest_tokens, token_log_probs

from .engine import Engine, Job, Ticket
from .plans import MOST_AUTO, Plan, Planner, at_most, sampling_settings, seed_of_request
from .schemas import CompletionRequest, Sampling, ScoreRequest
from .texts import Commit, ContinuedRow, FilledRow, Row

SMALL = (
    255  # columns of rows that are decoded together whatever their width; of wider ones, the widest has 4 times as many
)
LOGITS_AT_ONCE = 256  # tokens of a prompt whose logits are held at once
JOINING = ("groupwise", "dynamic")  # strategies whose batches rows may join
PER_ROW = (
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "order",
    "span_length",
)  # may differ between their rows


class _KeptRow(Row):
    """A row of which only the tokens are wanted."""

    def close(self, token_ids: list[int]) -> None:
        super().close(token_ids)
        self.token_ids = token_ids

    def text(self) -> str:
        return ""


class ModelPlanner(Planner):
    """Plans requests for one model.

    Args:
        model: an `A3LlamaForCausalLM`.
        engine: decodes candidates where a length must be found, and scores prompts.
    """

    def __init__(self, model, tokenizer: PreTrainedTokenizerBase, engine: Engine):
        own = model.generation_config.eos_token_id
        own = tokenizer.eos_token_id if own is None else own
        super().__init__(
            tokenizer,
            vocab_size=model.config.vocab_size,
            context=model.config.max_position_embeddings,
            ends=[] if own is None else own if isinstance(own, list) else [own],
            max_tokens=engine.max_tokens,
            max_prompts=engine.max_batch,
        )
        self.model, self.engine = model, engine
        self.special = special_token_ids(tokenizer, self.vocab_size)
        self.begins = begins_with_space_mask(tokenizer, self.vocab_size).to(model.device)

    def score(self, request: ScoreRequest, ticket: Ticket):
        """Returns the model's `score` of a text.

        Raises:
            ValueError: as the model's `score`; more tokens than the engine decodes at once.
        """
        length = len(encode_prompt(self.tokenizer, request.text))
        at_most("num_orders", request.num_orders, max(self.engine.max_tokens // length, 1), f"for {length} tokens")
        self.check_length("text", length, 0)
        settings = request.model_dump(exclude={"model", "text"})
        return self.engine.call(lambda: self.model.score(self.tokenizer, request.text, **settings), ticket).result()

    def add_continuation(
        self,
        plan: Plan,
        request: Sampling,
        ids: list[int],
        new: int,
        order: dict[str, Any],
        *,
        number: int,
        num_rows: int,
        stops: Sequence[str] | None = None,
    ) -> None:
        settings = sampling_settings(request) | {"num_top_log_probs": plan.num_top or None}
        if order:
            settings |= order
        else:
            draft = "ngram" if self.model.drafter is None else "ngram+head"
            settings |= {"strategy": "speculative", "verify": "content", "draft": draft}
        joins = not order or _strategy(settings) in JOINING
        num_rows = num_rows if settings.get("do_sample") else 1
        seed = seed_of_request(request) + number
        A3GenerationConfig(**settings, seed=seed, max_new_tokens=new)
        at_most(
            "max_tokens",
            num_rows * (len(ids) + new),
            self.engine.max_tokens,
            "tokens of all choices with their prompts",
        )
        rows = [
            ContinuedRow(
                self.tokenizer,
                ids,
                ends=frozenset(self.ends),
                stops=request.stops() if stops is None else stops,
            )
            for _ in range(num_rows)
        ]

        def begin():
            return self.model.begin_filling(
                torch.tensor([ids], device=self.model.device),
                max_new_tokens=new,
                eos_token_id=self.ends,
                seed=seed,
                num_return_sequences=num_rows if num_rows > 1 else None,
                **settings,
            )

        columns = len(ids) + new
        plan.jobs.append(Job(plan.ticket, begin, rows, _key("continue", settings, columns), joins, columns))

    def add_filling(
        self, plan: Plan, request: Sampling, template: Template, *, whole: bool, stops: Sequence[str]
    ) -> None:
        order = request.order_settings() if isinstance(request, CompletionRequest) else {}
        settings = sampling_settings(request) | order | {"suppress_tokens": tuple(self.special)}
        seed, tokenizer, model = seed_of_request(request), self.tokenizer, self.model
        own = getattr(request, "suffix_template", None)
        suffix_template = model.checked_suffix_template(own)
        config = A3GenerationConfig(**settings | {"suppress_tokens": self.special}, seed=seed)
        for one in (template, template.with_suffix_first(suffix_template)):
            model.check_templates(tokenizer, [one], config)
        for length in template.lengths:
            if not isinstance(length, int):
                at_most("prompt", length[1] - length[0] + 1, MOST_AUTO, "lengths of one blank")
        if any(not isinstance(length, int) for length in template.lengths):

            def fill(candidates: list[Template]) -> tuple[torch.Tensor, torch.Tensor]:
                return self._fill_candidates(candidates, plan.ticket, settings, seed)

            template, _ = choose_lengths(
                _Caller(model, self.engine, plan.ticket), template, fill, end_token_id=tokenizer.eos_token_id
            )
        arranged = template.with_suffix_first(suffix_template)
        input_ids, blanks, is_spaced = encode_rows(tokenizer, [arranged])
        num_rows = (getattr(request, "best_of", None) or plan.choices) if "do_sample" in settings else 1
        tokens = num_rows * input_ids.shape[1]
        at_most("prompt", tokens, self.engine.max_tokens, "tokens of all choices with their prompts")
        plan.prompt_tokens += int((blanks == 0).sum())
        rows = [
            FilledRow(
                tokenizer,
                template,
                arranged,
                input_ids[0].tolist(),
                blanks[0].tolist(),
                stops=stops,
                whole=whole,
            )
            for _ in range(num_rows)
        ]
        settings = settings | {"num_top_log_probs": plan.num_top or None}
        plan.jobs.append(self._filling_job(plan.ticket, rows, input_ids, blanks, is_spaced, settings, seed))

    def _filling_job(
        self,
        ticket: Ticket,
        rows: Sequence[Row],
        input_ids: torch.Tensor,
        blanks: torch.Tensor,
        is_spaced: torch.Tensor,
        settings: dict[str, Any],
        seed: int,
        *,
        is_answer: bool = True,
    ) -> Job:
        """Returns the job of `rows`, which are as many copies of each text (B, S)."""
        copies, device = len(rows) // len(input_ids), self.model.device

        def begin():
            return self.model.begin_filling(
                input_ids.to(device),
                (blanks > 0).to(device),
                attention_mask=(blanks >= 0).to(device),
                logits_hook=SpaceFirst(is_spaced.repeat_interleave(copies, dim=0).to(device), self.begins),
                seed=seed,
                num_return_sequences=copies if copies > 1 else None,
                **settings | {"suppress_tokens": self.special},
            )

        joins, columns = _strategy(settings) in JOINING, input_ids.shape[1]
        # with a draft head, texts that end with their blanks are written by the content stream
        has_end = bool(((blanks > 0).cumsum(dim=1) > 0).logical_and(blanks == 0).any())
        key = _key("fill" if has_end else "fill an end", settings, columns)
        return Job(ticket, begin, rows, key, joins, columns, is_answer=is_answer)

    def _fill_candidates(
        self, candidates: list[Template], ticket: Ticket, settings: dict[str, Any], seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids, blanks, is_spaced = encode_rows(self.tokenizer, candidates)
        width = input_ids.shape[1]
        rows, jobs = [_KeptRow(self.tokenizer) for _ in candidates], []
        at_once = max(self.engine.max_tokens // width, 1)
        for start in range(0, len(rows), at_once):
            part = slice(start, start + at_once)
            tensors = (input_ids[part], blanks[part], is_spaced[part])
            jobs.append(self._filling_job(ticket, rows[part], *tensors, settings, seed, is_answer=False))
        self.engine.submit(*jobs)
        for job in jobs:
            job.done.result()
        # rows may have been padded beside longer ones
        return torch.tensor([row.token_ids[:width] for row in rows]), blanks

    def score_prompt(self, plan: Plan, request: Sampling, ids: list[int], num_top: int) -> list[Commit]:
        model = self.model

        def score() -> list[Commit]:
            tokens = torch.tensor([ids], device=model.device)
            hidden = model.model(tokens, use_cache=False).last_hidden_state[0]
            found = []
            for start in range(0, len(ids) - 1, LOGITS_AT_ONCE):
                targets = tokens[0, start + 1 : start + 1 + LOGITS_AT_ONCE]
                logits = model.lm_head(hidden[start : start + len(targets)])
                values, tops = token_log_probs(logits, targets).tolist(), [()] * len(targets)
                if num_top:
                    likely, which = likeliest_tokens(logits, num_top)
                    tops = [
                        tuple(zip(*pair, strict=True)) for pair in zip(which.tolist(), likely.tolist(), strict=True)
                    ]
                found += [
                    Commit(start + 1 + number, token, value, -1, top)
                    for number, (token, value, top) in enumerate(zip(targets.tolist(), values, tops, strict=True))
                ]
            return found

        return self.engine.call(score, plan.ticket).result()


class _Caller:
    """The model, as `choose_lengths` uses it, in the engine's thread."""

    def __init__(self, model, engine: Engine, ticket: Ticket):
        self.model, self.engine, self.ticket = model, engine, ticket

    def log_likelihood(self, token_ids: torch.Tensor, *others: torch.Tensor, scored_mask: torch.Tensor) -> torch.Tensor:
        device = self.model.device

        def score() -> torch.Tensor:
            moved = (one.to(device) for one in (token_ids, *others))
            return self.model.log_likelihood(*moved, scored_mask=scored_mask.to(device)).cpu()

        return self.engine.call(score, self.ticket).result()


def _strategy(settings: dict[str, Any]) -> str:
    return settings.get("strategy") or "groupwise"


def _key(kind: str, settings: dict[str, Any], columns: int) -> tuple:
    """What must be the same for rows to be decoded together: of joining strategies neither the sampling nor the order. Rows
    are padded to the widest, so those of very different widths are kept apart.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if _strategy(given) in JOINING or given.get("verify") == "content":
        given = {name: value for name, value in given.items() if name not in PER_ROW}
    if _strategy(given) == "groupwise":
        given |= {"strategy": "groupwise", "group_size": given.get("group_size", 1)}
    return kind, frozenset(given.items()), max(columns - 1, SMALL).bit_length() // 2
