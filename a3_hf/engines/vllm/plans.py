"""Plans for vLLM: the same requests as our own server's, as prompts and parameters of vLLM's engine."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from a3_hf.models.a3_llama.configuration_a3_llama import A3LlamaConfig
from a3_hf.models.a3_llama.generation_config import A3GenerationConfig
from a3_hf.models.a3_llama.generation_decoder import row_seed
from a3_hf.models.a3_llama.infilling import A3InfillingMixin, encode_rows
from a3_hf.models.a3_llama.infilling_lengths import choose_lengths
from a3_hf.models.a3_llama.infilling_templates import Template, encode_prompt
from a3_hf.models.a3_llama.orders import GroupOrder
from a3_hf.serving.engine import Ticket
from a3_hf.serving.plans import MOST_AUTO, Plan, Planner, at_most, sampling_settings, seed_of_request
from a3_hf.serving.schemas import MOST_ITEMS, CompletionRequest, InfillRequest
from a3_hf.serving.schemas import Sampling as SamplingFields
from a3_hf.serving.texts import Commit, ContinuedRow, FilledRow, Row

from .engine_jobs import EngineJob, EngineJobs, EngineRow, delta_params, final_params
from .requests import Blanks, Dynamic, OneRowScript, Sampling
from .scoring import Scorer

PLAIN_DRAFTS = 4  # of continuations in an engine that writes groups
ONE_TOKEN = {"strategy": "groupwise", "order": "left_to_right", "group_size": 1}
TO_START_GROUPS = "start vLLM with --hf-overrides '{\"canvas_length\": 32}'"


class _Infilling(A3InfillingMixin):
    """The checks of `infill` for a configuration without its model."""

    def __init__(self, config: A3LlamaConfig):
        self.config = config


class EnginePlanner(Planner):
    """Plans requests for vLLM.

    Args:
        config: of the served model.
        context: vLLM's `max_model_len`.
        canvas_length: None: the engine writes one token a step.
        adapter_of: vLLM's `LoRARequest` of a model's name, and the fields of its `adapter_config.json`.
    """

    def __init__(
        self,
        tokenizer,
        *,
        config: A3LlamaConfig,
        context: int,
        ends: Sequence[int],
        canvas_length: int | None,
        engine: EngineJobs,
        adapter_of: Callable[[str | None], tuple[Any, dict[str, Any]]],
    ):
        super().__init__(
            tokenizer,
            vocab_size=config.vocab_size,
            context=context,
            ends=ends,
            max_tokens=16 * context,
            max_prompts=MOST_ITEMS,
        )
        self.config, self.canvas_length, self.engine, self.adapter_of = config, canvas_length, engine, adapter_of
        self.from_left = getattr(config, "slot_start", "left_token") == "left_token"

    def infill(self, request: InfillRequest, ticket: Ticket) -> Plan:
        """As everywhere; with `n_predict: 0`, which writes nothing, vLLM caches the text before the blank."""
        plan = super().infill(request, ticket)
        if request.n_predict == 0:
            before = "".join(f"{extra.text}\n" for extra in request.input_extra) + request.input_prefix + request.prompt
            asked = [(encode_prompt(self.tokenizer, before), final_params(max_tokens=1))]
            self.engine.ask(asked, ticket, self.adapter_of(request.model)[0])
        return plan

    # Continuations.

    def add_continuation(
        self,
        plan: Plan,
        request: SamplingFields,
        ids: list[int],
        new: int,
        order: dict[str, Any],
        *,
        number: int,
        num_rows: int,
        stops: Sequence[str] | None = None,
    ) -> None:
        settings, adapter = sampling_settings(request), self._adapter(request)
        num_rows = num_rows if settings.get("do_sample") else 1
        seed = seed_of_request(request) + number
        A3GenerationConfig(**settings, **order, seed=seed, max_new_tokens=new)
        if order.get("order", "left_to_right") != "left_to_right" or order.get("strategy") in ("dynamic", "refine"):
            raise ValueError(f"{_named(order)}: expected the order left_to_right without blanks, on this engine")
        blanks = Blanks((len(ids), 0), (new,), is_text=False)
        text = torch.tensor([*ids, *[-1] * new])
        stops = request.stops() if stops is None else stops
        rows = [ContinuedRow(self.tokenizer, ids, ends=frozenset(self.ends), stops=stops) for _ in range(num_rows)]
        shared = {"stop_token_ids": self.ends, "ignore_eos": False, "logprobs": self._num_log_probs(plan, request)}
        self._check_speculation(order, adapter)
        if (
            not order and self.canvas_length is not None and self.from_left
        ):  # content rows, which no adapter of slots changes
            drafts = (min(self.canvas_length, self.context - blanks.size) - 1) // 2  # as many as have room
            order = {"strategy": "speculative", "draft_tokens": min(PLAIN_DRAFTS, drafts)} if drafts > 0 else {}
        asked = [
            self._asked(blanks, ids, request, order, row_seed(seed, text, copy), shared) for copy in range(num_rows)
        ]
        plan.jobs.append(EngineJob(plan.ticket, list(rows), asked, len(ids) + new, adapter[0]))

    # Blanks.

    def add_filling(
        self, plan: Plan, request: SamplingFields, template: Template, *, whole: bool, stops: Sequence[str]
    ) -> None:
        order = request.order_settings() if isinstance(request, CompletionRequest) else {}
        settings, adapter = sampling_settings(request), self._adapter(request)
        self._check_speculation(order, adapter)
        seed = seed_of_request(request)
        config = A3GenerationConfig(**settings | order, seed=seed)
        of_adapter = {"suffix_template": adapter[1]["suffix_template"]} if "suffix_template" in adapter[1] else {}
        shape = {
            "max_position_embeddings": self.context,
            "suffix_template": getattr(self.config, "suffix_template", None),
        }
        checks = _Infilling(A3LlamaConfig(**shape | of_adapter))
        suffix_template = checks.checked_suffix_template(getattr(request, "suffix_template", None))
        for one in (template, template.with_suffix_first(suffix_template)):
            checks.check_templates(self.tokenizer, [one], config)
        for length in template.lengths:
            if not isinstance(length, int):
                at_most("prompt", length[1] - length[0] + 1, MOST_AUTO, "lengths of one blank")
        if any(not isinstance(length, int) for length in template.lengths):
            template = self._with_lengths(plan.ticket, template, request, order, seed, adapter)
        arranged = template.with_suffix_first(suffix_template)
        num_rows = (getattr(request, "best_of", None) or plan.choices) if "do_sample" in settings else 1
        log_probs = self._num_log_probs(plan, request)
        asked, (ids, numbers) = self._asked_of(arranged, request, order, seed, num_rows, log_probs)
        plan.prompt_tokens += numbers.count(0)
        rows = [FilledRow(self.tokenizer, template, arranged, ids, numbers, stops=stops, whole=whole) for _ in asked]
        plan.jobs.append(EngineJob(plan.ticket, list(rows), asked, len(ids), adapter[0]))

    def _asked_of(
        self, template: Template, request: SamplingFields, order: dict[str, Any], seed: int, copies: int, log_probs
    ) -> tuple[list[EngineRow], tuple[list[int], list[int]]]:
        """Returns what vLLM is asked for copies of a template, and its tokens and their blanks' numbers."""
        input_ids, numbers, is_spaced = encode_rows(self.tokenizer, [template])
        ids, numbers = input_ids[0].tolist(), numbers[0].tolist()
        blanks = _blanks_of(numbers, template.lengths, is_spaced[0].tolist())
        text = input_ids[0].masked_fill(torch.tensor(numbers) > 0, -1)
        given = [token for token, number in zip(ids, numbers, strict=True) if number == 0]
        shared = {"ignore_eos": True, "logprobs": log_probs}
        asked = [
            self._asked(blanks, given, request, order, row_seed(seed, text, copy), shared) for copy in range(copies)
        ]
        return asked, (ids, numbers)

    def _with_lengths(
        self,
        ticket: Ticket,
        template: Template,
        request: SamplingFields,
        order: dict[str, Any],
        seed: int,
        adapter: tuple[Any, dict[str, Any]],
    ) -> Template:
        """Returns the template with the likeliest lengths. Candidates run side by side, and vLLM caches their prefix once."""
        if not self._speculates(adapter):
            raise ValueError(
                "prompt: lengths that are to be found need slots that start as the token on their left, without an adapter "
                "of slots, on this engine; give <blank:N>"
            )

        def fill(candidates: list[Template]) -> tuple[torch.Tensor, torch.Tensor]:
            rows, jobs, width = [], [], 0
            for candidate in candidates:
                asked, (ids, numbers) = self._asked_of(candidate, request, order, seed, 1, None)
                row = _KeptRow(self.tokenizer)
                jobs.append(EngineJob(ticket, [row], asked, len(ids), adapter[0], is_answer=False))
                rows.append((row, numbers))
                width = max(width, len(ids))
            self.engine.submit(*jobs)
            for job in jobs:
                job.done.result()
            tokens = torch.zeros(len(rows), width, dtype=torch.long)
            blanks = torch.full_like(tokens, -1)
            for number, (row, numbers) in enumerate(rows):
                tokens[number, width - len(numbers) :] = torch.tensor(row.token_ids)
                blanks[number, width - len(numbers) :] = torch.tensor(numbers)
            return tokens, blanks

        scorer = Scorer(self.engine, ticket, adapter[0], self.canvas_length)
        return choose_lengths(scorer, template, fill, end_token_id=self.tokenizer.eos_token_id)[0]

    # Their parts.

    def score_prompt(self, plan: Plan, request: SamplingFields, ids: list[int], num_top: int) -> list[Commit]:
        if len(ids) < 2:
            return []
        scorer = Scorer(self.engine, plan.ticket, self._adapter(request)[0], self.canvas_length)
        return scorer.commits([(ids, 1)], num_top)[0]

    def _adapter(self, request: SamplingFields) -> tuple[Any, dict[str, Any]]:
        adapter, settings = self.adapter_of(request.model)
        start = settings.get("slot_start")
        own = "left_token" if self.from_left else "query_embed"
        if start not in (None, own):
            raise ValueError(f"model={request.model!r} was trained with slot_start={start!r}: the server has {own!r}")
        return adapter, settings

    def _check_speculation(self, order: dict[str, Any], adapter: tuple[Any, dict[str, Any]]) -> None:
        if order.get("strategy") != "speculative" or self.canvas_length is None:
            return
        if not self._speculates(adapter) or order.get("order", "left_to_right") != "left_to_right":
            raise ValueError(
                "strategy='speculative': expected the order left_to_right, and slots that start as the token on their left, "
                "without an adapter of slots, on this engine"
            )

    def _speculates(self, adapter: tuple[Any, dict[str, Any]]) -> bool:
        """Whether content rows predict the next token as slots do."""
        return self.from_left and adapter[1].get("a3_rows") != "slots"

    def _num_log_probs(self, plan: Plan, request: SamplingFields) -> int | None:
        """How many alternatives vLLM reports of each token; None: not even its own log-probability is wanted."""
        wants = ("commits", "best_of")
        is_wanted = getattr(request, "logprobs", None) not in (None, False)
        return plan.num_top if is_wanted or any(getattr(request, name, None) for name in wants) else None

    def _asked(
        self,
        blanks: Blanks,
        given: list[int],
        request: SamplingFields,
        order: dict[str, Any],
        seed: int,
        shared: dict[str, Any],
    ) -> EngineRow:
        columns = dict(zip(blanks.given_columns(), given, strict=True))
        if self.canvas_length is None:
            return self._asked_one_token(blanks, given, request, order, seed, shared, columns)
        blanks, steps = self._in_groups(blanks, request, order, seed)
        if request.repetition_penalty not in (None, 1.0):
            raise ValueError(
                f"repetition_penalty={request.repetition_penalty}: expected 1 on an engine that writes groups"
            )
        width = blanks.width()
        if width > self.canvas_length:
            raise ValueError(
                f"{_named(order)}: needs {width} rows in a step: expected at most {self.canvas_length}, vLLM's canvas_length"
            )
        if blanks.size + width > self.context:
            raise ValueError(
                f"prompt: the text has {blanks.size} tokens: expected at most {self.context - width}, with steps of {width}"
            )
        params = delta_params(
            max_tokens=sum(blanks.lengths),
            extra_args={**blanks.extra_args(), "diffusion_canvas_length": width},
            **shared,
        )
        return EngineRow(given, params, steps, columns, is_whole=blanks.is_text)

    def _asked_one_token(self, blanks, given, request, order, seed, shared, columns) -> EngineRow:
        for name, value in order.items():
            if ONE_TOKEN.get(name) != value:
                raise ValueError(f"{name}={value!r}: this engine writes one token a step; {TO_START_GROUPS}")
        if not self.from_left:
            raise ValueError(f"prompt: this model's slots start as query_embed: expected groups; {TO_START_GROUPS}")
        script = OneRowScript(blanks)
        places = script.num_prompt + script.num_outputs
        if places > self.context:
            raise ValueError(
                f"prompt: the text takes {places} places, with those where slots begin: expected at most {self.context}"
            )
        temperature = 1.0 if request.temperature is None else request.temperature
        settings = {name: getattr(request, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
        settings = {name: value for name, value in settings.items() if value is not None}
        if request.seed is not None:
            settings["seed"] = seed
        extra = blanks.extra_args() if blanks.is_text else {}  # a continuation is plain, and cached as such
        params = delta_params(
            temperature=temperature, max_tokens=script.num_outputs, extra_args=extra, **settings, **shared
        )
        steps, found = 0, []
        for column in script.columns:
            found.append(None if column is None else (column, steps))
            steps += column is not None
        return EngineRow(script.prompt(given), params, found, columns, is_whole=blanks.is_text)

    def _in_groups(
        self, blanks: Blanks, request: SamplingFields, order: dict[str, Any], seed: int
    ) -> tuple[Blanks, list[tuple[int, int]]]:
        """Returns the blanks with their way of writing, and for each token that vLLM reports its column and step."""
        temperature = 1.0 if request.temperature is None else request.temperature
        own = {} if temperature == 0 else {name: getattr(request, name) for name in ("top_k", "top_p", "min_p")}
        sampling = Sampling(temperature, **own, seed=seed)
        strategy = order.get("strategy", "groupwise")
        if strategy == "refine":
            raise ValueError("strategy='refine': expected groupwise, dynamic or speculative on this engine")
        if strategy == "dynamic":
            names = ("criterion", "tokens_per_step", "threshold", "entropy_budget", "window")
            blanks = replace(blanks, sampling=sampling, dynamic=Dynamic(*(order.get(name) for name in names)))
            return blanks, [(column, -1) for column in blanks.open_columns()]
        if strategy == "speculative":
            most = max((self.canvas_length - 1) // 2, 1)
            blanks = replace(blanks, sampling=sampling, drafts=min(order.get("draft_tokens") or PLAIN_DRAFTS, most))
            return blanks, [(column, -1) for column in blanks.open_columns()]
        is_blank = torch.zeros(1, blanks.size, dtype=torch.bool)
        is_blank[0, blanks.open_columns()] = True
        groups = GroupOrder.infilling(
            is_blank,
            order=order.get("order") or "left_to_right",
            group_size=order.get("group_size") or 1,
            span_length=order.get("span_length"),
            generator=[torch.Generator().manual_seed(seed)],
        ).group_ids[0]
        by_group: dict[int, list[int]] = {}
        for column in blanks.open_columns():
            by_group.setdefault(int(groups[column]), []).append(column)
        steps = tuple(tuple(by_group[group]) for group in sorted(by_group))
        columns = [(column, number) for number, step in enumerate(steps) for column in step]
        return replace(blanks, sampling=sampling, steps=steps), columns


class _KeptRow(Row):
    """A row of which only the tokens are wanted."""

    def close(self, token_ids: list[int]) -> None:
        super().close(token_ids)
        self.token_ids = token_ids

    def text(self) -> str:
        return ""


def _blanks_of(numbers: list[int], lengths: Sequence[int], is_spaced: list[bool]) -> Blanks:
    """Returns the blanks of a row whose tokens have these blanks' numbers, from 1; 0: given."""
    pieces, last, spaced = [0], 0, []
    for column, number in enumerate(numbers):
        if number == 0:
            pieces[-1] += 1
        elif number != last:
            pieces.append(0)
            if is_spaced[column]:
                spaced.append(number - 1)
        last = number or last
    return Blanks(tuple(pieces), tuple(lengths), spaced=tuple(spaced))


def _named(order: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in order.items()) or "max_tokens"
