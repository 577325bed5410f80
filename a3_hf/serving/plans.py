"""From requests to jobs of the engine: tokens, settings and seeds, so that each answer is what the model gives alone."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from a3_hf.models.a3_llama.generation_config import A3GenerationConfig
from a3_hf.models.a3_llama.infilling import AUTO_LENGTHS, SpaceFirst, begins_with_space_mask, encode_rows
from a3_hf.models.a3_llama.infilling_lengths import choose_lengths
from a3_hf.models.a3_llama.infilling_templates import Template, encode_prompt, special_token_ids
from a3_hf.models.a3_llama.likelihood import likeliest_tokens, token_log_probs

from .engine import Engine, Job, Ticket
from .schemas import ChatRequest, CompletionRequest, InfillRequest, Message, Sampling, ScoreRequest
from .texts import Commit, ContinuedRow, FilledRow, Row

MOST_NEW = 1024  # tokens of a message without max_tokens
MOST_AUTO = AUTO_LENGTHS[1]
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


@dataclass
class Plan:
    """The jobs of a request, and what its answer needs.

    Attributes:
        jobs: one for each prompt; with greedy choices it has one row, which serves all choices.
        choices: of each prompt.
        prompt_tokens: of all prompts.
        prompts: the given text of each prompt, for `echo`.
        offsets: the characters of each prompt before its first scored token.
        scored: for each prompt the commits of its own tokens, for `echo` with `logprobs`.
        num_top: alternatives of each token that the answer shows.
    """

    ticket: Ticket
    jobs: list[Job] = field(default_factory=list)
    choices: int = 1
    prompt_tokens: int = 0
    prompts: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    scored: list[list[Commit]] = field(default_factory=list)
    num_top: int = 0


class _KeptRow(Row):
    """A row of which only the tokens are wanted."""

    def close(self, token_ids: list[int]) -> None:
        super().close(token_ids)
        self.token_ids = token_ids

    def text(self) -> str:
        return ""


class Planner:
    """Plans requests for one model.

    Args:
        model: an `A3LlamaForCausalLM`.
        engine: decodes candidates where a length must be found, and scores prompts.
    """

    def __init__(self, model, tokenizer: PreTrainedTokenizerBase, engine: Engine):
        self.model, self.tokenizer, self.engine = model, tokenizer, engine
        self.vocab_size, self.context = model.config.vocab_size, model.config.max_position_embeddings
        self.special = special_token_ids(tokenizer, self.vocab_size)
        self.begins = begins_with_space_mask(tokenizer, self.vocab_size).to(model.device)
        own = model.generation_config.eos_token_id
        own = tokenizer.eos_token_id if own is None else own
        ends = [] if own is None else own if isinstance(own, list) else [own]
        self.ends = sorted({one for one in ends if 0 <= one < self.vocab_size})

    # Requests.

    def completion(self, request: CompletionRequest, ticket: Ticket) -> Plan:
        """Plans a completion. It may wait for the engine, to choose lengths or to score a prompt.

        Raises:
            ValueError: prompts that are too long, blanks or settings that the model does not take.
        """
        plan = Plan(ticket, choices=request.n or 1, num_top=request.logprobs or 0)
        if request.suffix is not None or request.blanks:
            if request.blanks:
                try:
                    template = Template.parse(request.prompt).with_range(AUTO_LENGTHS)
                except ValueError as error:
                    raise ValueError(str(error).replace("text", "prompt", 1)) from error
            else:
                most = 16 if request.max_tokens is None else request.max_tokens
                length = (
                    (1, _at_most("max_tokens", most, MOST_AUTO, "with auto_length")) if request.auto_length else most
                )
                template = Template((request.prompt, request.suffix), (length,))
            self._add_filling(plan, request, template, whole=request.blanks, stops=request.stops())
            return plan
        prompts = self._prompts(request.prompt)
        given = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        new = 16 if request.max_tokens is None else request.max_tokens
        for number, ids in enumerate(prompts):
            self._check_length("prompt", len(ids), new)
            plan.prompt_tokens += len(ids)
            if request.echo:
                text = given[number] if isinstance(given[number], str) else None
                plan.prompts.append(self.tokenizer.decode(ids, skip_special_tokens=True) if text is None else text)
                plan.offsets.append(len(self.tokenizer.decode(ids[:1], skip_special_tokens=True)))
                if request.logprobs is not None:
                    plan.scored.append(self._score_prompt(ids, request.logprobs, ticket))
            if new:
                rows = request.best_of or plan.choices
                self._add_continuation(plan, request, ids, new, request.order_settings(), number=number, num_rows=rows)
        return plan

    def chat(self, request: ChatRequest, ticket: Ticket) -> Plan:
        """Plans a message.

        Raises:
            ValueError: no chat template, messages that it does not take, or a text that is too long.
        """
        plan = Plan(ticket, choices=request.n or 1, num_top=request.top_logprobs or 0)
        ids = self._message_ids(request.messages)
        left = min(self.context, self.engine.max_tokens // plan.choices) - len(ids)
        new = request.max_tokens or request.max_completion_tokens or max(min(left, MOST_NEW), 1)
        self._check_length("messages", len(ids), new)
        plan.prompt_tokens = len(ids)
        self._add_continuation(plan, request, ids, new, {}, number=0, num_rows=plan.choices)
        return plan

    def infill(self, request: InfillRequest, ticket: Ticket) -> Plan:
        """Plans llama.cpp's infill: blanks of unknown length before a suffix, else a continuation.

        Raises:
            ValueError: a text that is too long.
        """
        plan = Plan(ticket)
        before = "".join(f"{extra.text}\n" for extra in request.input_extra) + request.input_prefix + request.prompt
        if request.n_predict == 0:
            plan.prompt_tokens = len(encode_prompt(self.tokenizer, before))
            return plan
        sampling = Sampling(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repeat_penalty,
            seed=None if request.seed == -1 else request.seed,
        )
        most = MOST_AUTO if request.n_predict == -1 else request.n_predict
        if request.input_suffix:
            template = Template((before, request.input_suffix), ((1, min(most, MOST_AUTO)),))
            self._add_filling(plan, sampling, template, whole=False, stops=request.stop)
        else:
            ids = encode_prompt(self.tokenizer, before)
            self._check_length("input_prefix", len(ids), most)
            plan.prompt_tokens = len(ids)
            self._add_continuation(plan, sampling, ids, most, {}, number=0, num_rows=1, stops=request.stop)
        return plan

    def score(self, request: ScoreRequest, ticket: Ticket):
        """Returns the model's `score` of a text.

        Raises:
            ValueError: as the model's `score`; more tokens than the engine decodes at once.
        """
        length = len(encode_prompt(self.tokenizer, request.text))
        _at_most("num_orders", request.num_orders, max(self.engine.max_tokens // length, 1), f"for {length} tokens")
        self._check_length("text", length, 0)
        settings = request.model_dump(exclude={"model", "text"})
        return self.engine.call(lambda: self.model.score(self.tokenizer, request.text, **settings), ticket).result()

    # Their parts.

    def _prompts(self, prompt) -> list[list[int]]:
        if isinstance(prompt, str):
            prompt = [prompt]
        if not prompt:
            raise ValueError("prompt is an empty list: expected at least one text or token id")
        if isinstance(prompt[0], int):
            prompt = [prompt]
        _at_most("prompt", len(prompt), self.engine.max_batch, "texts in a list")
        ids = [encode_prompt(self.tokenizer, one) if isinstance(one, str) else list(one) for one in prompt]
        for one in ids:
            if not one:
                raise ValueError("prompt holds an empty list: expected at least one token id")
            if max(one) >= self.vocab_size:
                raise ValueError(f"prompt holds {max(one)}: expected token ids below {self.vocab_size}")
        return ids

    def _message_ids(self, messages: Sequence[Message]) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise ValueError("messages: the served model has no chat template; use /v1/completions")
        plain = [{"role": one.role, "content": one.text()} for one in messages]
        try:
            text = self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"messages: the chat template refuses them: {error}") from error
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids or encode_prompt(self.tokenizer, text)

    def _check_length(self, name: str, given: int, new: int) -> None:
        most = min(self.context, self.engine.max_tokens)
        if given + new > most:
            raise ValueError(f"{name} has {given} tokens, {given + new} with those to write: expected at most {most}")

    def _add_continuation(
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
        """Adds the continuation of one prompt; left to right as the plain LLaMA, unless `order` says another way."""
        settings = _sampling_settings(request) | {"num_top_log_probs": plan.num_top or None}
        if order:
            settings |= order
        else:
            draft = "ngram" if self.model.drafter is None else "ngram+head"
            settings |= {"strategy": "speculative", "verify": "content", "draft": draft}
        joins = not order or _strategy(settings) in JOINING
        num_rows = num_rows if settings.get("do_sample") else 1
        seed = _seed(request) + number
        A3GenerationConfig(**settings, seed=seed, max_new_tokens=new)
        _at_most(
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

    def _add_filling(
        self, plan: Plan, request: Sampling, template: Template, *, whole: bool, stops: Sequence[str]
    ) -> None:
        """Adds the job of a text with blanks, after choosing their lengths."""
        order = request.order_settings() if isinstance(request, CompletionRequest) else {}
        settings = _sampling_settings(request) | order | {"suppress_tokens": tuple(self.special)}
        seed, tokenizer, model = _seed(request), self.tokenizer, self.model
        own = getattr(request, "suffix_template", None)
        suffix_template = model.checked_suffix_template(own)
        config = A3GenerationConfig(**settings | {"suppress_tokens": self.special}, seed=seed)
        for one in (template, template.with_suffix_first(suffix_template)):
            model.check_templates(tokenizer, [one], config)
        for length in template.lengths:
            if not isinstance(length, int):
                _at_most("prompt", length[1] - length[0] + 1, MOST_AUTO, "lengths of one blank")
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
        _at_most("prompt", tokens, self.engine.max_tokens, "tokens of all choices with their prompts")
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

    def _score_prompt(self, ids: list[int], num_top: int, ticket: Ticket) -> list[Commit]:
        """The tokens of a prompt after the first, with the log-probabilities that the plain LLaMA gives them."""
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

        return self.engine.call(score, ticket).result()


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


def _sampling_settings(request: Sampling) -> dict[str, Any]:
    """The fields of `A3GenerationConfig` that a request's sampling asks for."""
    temperature = 1.0 if request.temperature is None else request.temperature
    settings: dict[str, Any] = {}
    if temperature > 0:
        settings = {"do_sample": True, "temperature": temperature}
        settings |= {name: getattr(request, name) for name in ("top_p", "top_k", "min_p")}
    if request.repetition_penalty is not None:
        settings["repetition_penalty"] = request.repetition_penalty
    return {name: value for name, value in settings.items() if value is not None}


def _seed(request: Sampling) -> int:
    return secrets.randbelow(2**62) if request.seed is None else request.seed


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


def _at_most(name: str, value: int, most: int, what: str) -> int:
    if value > most:
        raise ValueError(f"{name}={value}: expected at most {most}, {what}")
    return value
