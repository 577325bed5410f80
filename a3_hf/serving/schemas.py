"""Requests: OpenAI's and llama.cpp's fields, and those beyond them. It imports neither a server nor a model, so that every
engine takes the same requests.

Fields that OpenAI or llama.cpp have, but no engine here, are refused by name; fields that change no token (`user`, prompt
caching, …) are taken and have no effect.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_CHOICES = 16
MOST_TOKENS = 1 << 20
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
MOST_FIELDS = 100
MOST_ITEMS = 1024
StopText = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(max_length=MOST_TOKENS, fail_fast=True)]
Texts = Annotated[list[str], Field(max_length=MOST_ITEMS, fail_fast=True)]
NoPenalty = Annotated[float | None, Field(ge=0, le=0, description="Only 0 is supported.")]


class Checked(BaseModel):
    """A part of a request whose unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, body: Any) -> Any:
        if isinstance(body, dict) and len(body) > MOST_FIELDS:
            raise ValueError(f"the body has {len(body)} fields: expected at most {MOST_FIELDS} in each object")
        return body


class Request(Checked):
    """A request whose unknown fields are errors."""

    model: str | None = Field(None, description="Name of the served model; None: the one that is served.")

    @model_validator(mode="before")
    @classmethod
    def _check_characters(cls, body: Any) -> Any:
        try:
            json.dumps(body, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise ValueError("the body holds half of a surrogate pair, which is no character") from None
        return body


class Sampling(Request):
    """How tokens are chosen."""

    temperature: float | None = Field(1.0, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: Probability | None = 1.0
    top_k: int | None = Field(None, ge=0, le=MOST_TOKENS, description="Beyond OpenAI. 0: off.")
    min_p: Probability | None = Field(None, description="Beyond OpenAI.")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="Beyond OpenAI.")
    seed: Seed | None = Field(None, description="The same request with the same seed has the same answer.")


class Orders(BaseModel):
    """In which order, and how many at a time, tokens are written. Beyond OpenAI; fields of `A3GenerationConfig`."""

    strategy: Literal["groupwise", "dynamic", "speculative", "refine"] | None = Field(
        None, description="Default: groupwise for blanks; without blanks, left to right as the plain LLaMA."
    )
    order: Literal["left_to_right", "right_to_left", "random", "spans"] | None = None
    group_size: Count | None = Field(None, description="Groupwise: tokens per pass.")
    span_length: Count | None = None
    criterion: Literal["confidence", "entropy", "margin", "random"] | None = None
    tokens_per_step: Count | None = Field(None, description="Dynamic: tokens per pass.")
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    entropy_budget: Annotated[float, Field(ge=0, le=1e6)] | None = None
    window: Count | None = None
    draft_tokens: Annotated[int, Field(ge=1, le=64)] | None = None
    refine_rounds: Annotated[int, Field(ge=1, le=64)] | None = None
    refine_fraction: Annotated[float, Field(gt=0, le=1)] | None = None

    def order_settings(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: getattr(self, name) for name in Orders.model_fields if getattr(self, name) is not None}


class StreamOptions(Checked):
    include_usage: bool = False


class Choices(Sampling):
    """What completions and chat have in common."""

    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    presence_penalty: NoPenalty = 0
    frequency_penalty: NoPenalty = 0
    user: str | None = Field(None, description="No effect.")

    def stops(self) -> list[str]:
        """The stop sequences, as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @model_validator(mode="after")
    def _check_stream(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected only with stream=true")
        return self


class CompletionRequest(Choices, Orders):
    """`POST /v1/completions`."""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(max_length=MOST_ITEMS, fail_fast=True)] = Field(
        "", description="Text, token ids, or a list of either."
    )
    suffix: str | None = Field(None, description="Text after the blank of max_tokens that is filled.")
    blanks: bool = Field(
        False,
        description="Beyond OpenAI. The prompt's markers <blank:N>, <blank:MIN..MAX> and <blank:auto> are blanks; the text "
        "of the answer is the whole text.",
    )
    max_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = Field(
        16, description="With suffix, the length of the blank. 0 only with echo. Not with blanks."
    )
    auto_length: bool = Field(
        False,
        description="Beyond OpenAI. With suffix: the blank has the likeliest length up to max_tokens, 16 at most.",
    )
    suffix_template: str | None = Field(
        None,
        description="Beyond OpenAI. Words that bring the text after the last blank to the front; '': it stays in place.",
    )
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = False
    commits: bool = Field(
        False, description="Beyond OpenAI. Report each written token: its blank, position, step and log-probability."
    )
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(None, description="Not supported.")

    @model_validator(mode="after")
    def _check(self):
        if self.suffix is not None and self.blanks:
            raise ValueError("suffix: expected None with blanks=true, whose text has its own end")
        has_blanks = self.blanks or self.suffix is not None
        if self.suffix is not None and not isinstance(self.prompt, str):
            raise ValueError("prompt: expected one text with a suffix")
        if self.blanks and not isinstance(self.prompt, str):
            raise ValueError("prompt: expected one text with blanks")
        if self.auto_length and self.suffix is None:
            raise ValueError("auto_length: expected only with a suffix")
        if self.suffix_template is not None and not has_blanks:
            raise ValueError("suffix_template: expected only with a suffix or blanks")
        if self.blanks and "max_tokens" in self.model_fields_set and self.max_tokens is not None:
            raise ValueError("max_tokens: expected None with blanks=true, whose markers say the lengths")
        if self.max_tokens == 0 and (has_blanks or not self.echo):
            raise ValueError("max_tokens=0: expected 1 or more, or echo=true without a suffix or blanks")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of={self.best_of}: expected at least n={self.n}")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise ValueError(f"best_of={self.best_of}: expected n with stream=true")
        if self.stop and self.blanks:
            raise ValueError("stop: expected None with blanks=true")
        if self.echo and has_blanks:
            raise ValueError("echo: expected false with a suffix or blanks")
        return self


class TextPart(Checked):
    type: Literal["text"]
    text: str


class Message(Checked):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MOST_ITEMS, fail_fast=True)]
    name: str | None = Field(None, description="No effect.")

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Choices):
    """`POST /v1/chat/completions`: the next message, left to right."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_ITEMS, fail_fast=True)]
    max_tokens: Count | None = Field(None, description="Default: what is left of the context, 1,024 at most.")
    max_completion_tokens: Count | None = Field(None, description="OpenAI's newer name of max_tokens.")
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(None, description="Not supported.")

    @model_validator(mode="after")
    def _check(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: expected only with logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_completion_tokens: expected None beside max_tokens")
        return self


class Extra(Checked):
    """A file that an editor sends along."""

    model_config = ConfigDict(extra="ignore")

    text: str
    filename: str = ""


class InfillRequest(Request):
    """llama.cpp's `POST /infill`, as llama.vim and llama.vscode send it; before a suffix, the likeliest length is found. As
    there, unknown fields have no effect: editors send new ones.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = Field(None, description="No effect; inside vLLM, the name of an adapter.")

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: Annotated[list[Extra], Field(max_length=MOST_ITEMS, fail_fast=True)] = Field(
        [], description="Text that stands before the prefix."
    )
    prompt: str = Field("", description="Text between the prefix and the blank: the line up to the cursor.")
    n_predict: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] = Field(
        -1, description="Most tokens; 0 writes none and answers at once; −1: 16. Lengths up to 16 are tried."
    )
    temperature: float = Field(0.8, ge=0, le=2)
    top_k: int = Field(40, ge=0, le=MOST_TOKENS)
    top_p: Probability = 0.95
    min_p: Probability = 0.05
    repeat_penalty: float = Field(1.0, gt=0, le=10)
    seed: int = Field(-1, ge=-1, lt=2**63, description="−1: another one for each request.")
    stop: Annotated[list[StopText], Field(max_length=16, fail_fast=True)] = []
    stream: bool = False
    response_fields: Texts = Field([], description="Only these fields; a/b is field b of a, under the name a/b.")
    t_max_predict_ms: int = Field(0, ge=0, description="No effect.")
    # Of llama.cpp's own cache, sampler and decoding, without effect on which text is likeliest here.
    t_max_prompt_ms: int = Field(0, ge=0, description="No effect.")
    cache_prompt: bool = Field(True, description="No effect.")
    samplers: Texts | str = Field([], description="No effect; the order is top_k, top_p, min_p.")
    n_indent: int = Field(0, ge=0, description="No effect.")
    n_keep: int = Field(0, description="No effect.")
    n_cache_reuse: int = Field(0, description="No effect.")
    id_slot: int = Field(-1, description="No effect.")
    penalty_last_n: int = Field(0, description="No effect.")
    repeat_last_n: int = Field(0, description="No effect.")
    return_tokens: bool = False
    presence_penalty: NoPenalty = 0
    frequency_penalty: NoPenalty = 0
    lora: Annotated[list[Any], Field(max_length=0)] = Field([], description="Not supported.")


class ScoreRequest(Request):
    """`POST /v1/score`: exact log-probabilities of a text in one or several orders."""

    text: Annotated[str, Field(min_length=1)]
    order: Literal["left_to_right", "right_to_left", "random", "spans"] = "left_to_right"
    group_size: Count = 1
    span_length: Count | None = None
    num_orders: Annotated[int, Field(ge=1, le=64)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**43)] = 0
