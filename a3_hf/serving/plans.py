"""From requests to jobs of an engine: what all engines read alike."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from a3_hf.models.a3_llama.infilling import AUTO_LENGTHS
from a3_hf.models.a3_llama.infilling_templates import Template, encode_prompt

from .engine import Ticket
from .schemas import ChatRequest, CompletionRequest, InfillRequest, Message, Sampling
from .texts import Commit

MOST_NEW = 1024  # tokens of a message without max_tokens
MOST_AUTO = AUTO_LENGTHS[1]


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
    jobs: list[Any] = field(default_factory=list)
    choices: int = 1
    prompt_tokens: int = 0
    prompts: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    scored: list[list[Commit]] = field(default_factory=list)
    num_top: int = 0


class Planner:
    """Plans requests. An engine's own planner says how a text is continued, how blanks are filled and how a prompt is scored.

    Args:
        vocab_size: token ids below it are taken.
        context: most tokens of a text.
        ends: token ids that end a continuation.
        max_tokens: most tokens of all rows of a request.
        max_prompts: most texts in a request.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        context: int,
        ends: Sequence[int],
        max_tokens: int,
        max_prompts: int,
    ):
        self.tokenizer, self.vocab_size, self.context = tokenizer, vocab_size, context
        self.ends = sorted({one for one in ends if 0 <= one < vocab_size})
        self.max_tokens, self.max_prompts = max_tokens, max_prompts

    # What an engine's planner does.

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
        """Adds the job of the continuation of one prompt, in `num_rows` rows if it is sampled, else in one.

        Args:
            order: fields of `Orders`; empty: left to right, as the plain LLaMA.
            number: of the prompt in its request.
            stops: default: the request's.
        """
        raise NotImplementedError

    def add_filling(
        self, plan: Plan, request: Sampling, template: Template, *, whole: bool, stops: Sequence[str]
    ) -> None:
        """Adds the job of a text with blanks, after choosing their lengths.

        Args:
            whole: the answer is the whole text.
        """
        raise NotImplementedError

    def score_prompt(self, plan: Plan, request: Sampling, ids: list[int], num_top: int) -> list[Commit]:
        """Returns the tokens of a prompt after the first, with the log-probabilities that the plain LLaMA gives them."""
        raise NotImplementedError

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
                    (1, at_most("max_tokens", most, MOST_AUTO, "with auto_length")) if request.auto_length else most
                )
                template = Template((request.prompt, request.suffix), (length,))
            self.add_filling(plan, request, template, whole=request.blanks, stops=request.stops())
            return plan
        prompts = self._prompts(request.prompt)
        given = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        new = 16 if request.max_tokens is None else request.max_tokens
        for number, ids in enumerate(prompts):
            self.check_length("prompt", len(ids), new)
            plan.prompt_tokens += len(ids)
            if request.echo:
                text = given[number] if isinstance(given[number], str) else None
                plan.prompts.append(self.tokenizer.decode(ids, skip_special_tokens=True) if text is None else text)
                plan.offsets.append(len(self.tokenizer.decode(ids[:1], skip_special_tokens=True)))
                if request.logprobs is not None:
                    plan.scored.append(self.score_prompt(plan, request, ids, request.logprobs))
            if new:
                rows = request.best_of or plan.choices
                self.add_continuation(plan, request, ids, new, request.order_settings(), number=number, num_rows=rows)
        return plan

    def chat(self, request: ChatRequest, ticket: Ticket) -> Plan:
        """Plans a message.

        Raises:
            ValueError: no chat template, messages that it does not take, or a text that is too long.
        """
        plan = Plan(ticket, choices=request.n or 1, num_top=request.top_logprobs or 0)
        ids = self.message_ids(request.messages)
        left = min(self.context, self.max_tokens // plan.choices) - len(ids)
        new = request.max_tokens or request.max_completion_tokens or max(min(left, MOST_NEW), 1)
        self.check_length("messages", len(ids), new)
        plan.prompt_tokens = len(ids)
        self.add_continuation(plan, request, ids, new, {}, number=0, num_rows=plan.choices)
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
            model=request.model,
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
            self.add_filling(plan, sampling, template, whole=False, stops=request.stop)
        else:
            ids = encode_prompt(self.tokenizer, before)
            self.check_length("input_prefix", len(ids), most)
            plan.prompt_tokens = len(ids)
            self.add_continuation(plan, sampling, ids, most, {}, number=0, num_rows=1, stops=request.stop)
        return plan

    # Their parts.

    def _prompts(self, prompt) -> list[list[int]]:
        if isinstance(prompt, str):
            prompt = [prompt]
        if not prompt:
            raise ValueError("prompt is an empty list: expected at least one text or token id")
        if isinstance(prompt[0], int):
            prompt = [prompt]
        at_most("prompt", len(prompt), self.max_prompts, "texts in a list")
        ids = [encode_prompt(self.tokenizer, one) if isinstance(one, str) else list(one) for one in prompt]
        for one in ids:
            if not one:
                raise ValueError("prompt holds an empty list: expected at least one token id")
            if max(one) >= self.vocab_size:
                raise ValueError(f"prompt holds {max(one)}: expected token ids below {self.vocab_size}")
        return ids

    def message_ids(self, messages: Sequence[Message]) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise ValueError("messages: the served model has no chat template; use /v1/completions")
        plain = [{"role": one.role, "content": one.text()} for one in messages]
        try:
            text = self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"messages: the chat template refuses them: {error}") from error
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids or encode_prompt(self.tokenizer, text)

    def check_length(self, name: str, given: int, new: int) -> None:
        most = min(self.context, self.max_tokens)
        if given + new > most:
            raise ValueError(f"{name} has {given} tokens, {given + new} with those to write: expected at most {most}")


def sampling_settings(request: Sampling) -> dict[str, Any]:
    """The fields of `A3GenerationConfig` that a request's sampling asks for."""
    temperature = 1.0 if request.temperature is None else request.temperature
    settings: dict[str, Any] = {}
    if temperature > 0:
        settings = {"do_sample": True, "temperature": temperature}
        settings |= {name: getattr(request, name) for name in ("top_p", "top_k", "min_p")}
    if request.repetition_penalty is not None:
        settings["repetition_penalty"] = request.repetition_penalty
    return {name: value for name, value in settings.items() if value is not None}


def seed_of_request(request: Sampling) -> int:
    return secrets.randbelow(2**62) if request.seed is None else request.seed


def at_most(name: str, value: int, most: int, what: str) -> int:
    if value > most:
        raise ValueError(f"{name}={value}: expected at most {most}, {what}")
    return value
