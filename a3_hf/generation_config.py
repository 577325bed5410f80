"""Settings of any-order generation, checked when they are made."""

import math
import time
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from .decoding import CRITERIA, DRAFTS
from .orders import ORDERS

DYNAMIC_OPTIONS = ("criterion", "criterion_temperature", "tokens_per_step", "threshold", "entropy_budget", "window")
# The options of each strategy; giving one to another strategy is an error.
OPTIONS_OF = {
    "groupwise": ("order", "group_size", "span_length"),
    "dynamic": DYNAMIC_OPTIONS,
    "speculative": ("order", "span_length", "draft", "draft_tokens"),
    "refine": (*DYNAMIC_OPTIONS, "refine_rounds", "refine_fraction", "refine_keep"),
}
STRATEGIES = tuple(OPTIONS_OF)
OWN_OPTIONS = tuple(dict.fromkeys(option for options in OPTIONS_OF.values() for option in options))
REFINE_KEEPS = ("better", "all")
# Fields of transformers' GenerationConfig that are obeyed, by their own names.
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff")
PROCESSOR_OPTIONS = ("repetition_penalty", "bad_words_ids", "suppress_tokens", "forced_eos_token_id")
SHARED_OPTIONS = (
    "strategy",
    "use_cache",
    "seed",
    "do_sample",
    "max_new_tokens",
    "max_time",
    "num_return_sequences",
    "eos_token_id",
    "pad_token_id",
    "output_logits",
    "output_history",
    "cache_implementation",
    "compile_config",
    "disable_compile",
    *SAMPLING_OPTIONS,
    *PROCESSOR_OPTIONS,
)
INERT_OPTIONS = ("bos_token_id", "transformers_version")


class A3GenerationConfig(GenerationConfig):
    """Settings of `generate_any_order`. Identical to `GenerationConfig` except: the fields below, and a field that
    any-order generation does not support raises instead of being ignored. Fields of `GenerationConfig` that it takes:
    `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`, `epsilon_cutoff`, `repetition_penalty`,
    `bad_words_ids`, `suppress_tokens`, `forced_eos_token_id`, `max_new_tokens`, `max_time`, `num_return_sequences`
    (with `do_sample`), `eos_token_id`, `pad_token_id`, `output_logits`, `use_cache`, `cache_implementation` (`"static"`,
    with strategy `groupwise`; compiled on a GPU, and on a CPU where `compile_config` is given), `disable_compile`.

    Args:
        strategy: `"groupwise"` (paper, Algorithm 1: groups fixed beforehand), `"dynamic"` (Algorithm 2: at every step ask
            the open blanks and commit the best), `"speculative"` (ASSD, paper §3: writes what one token at a time in the
            same order would, exactly, in fewer passes) or `"refine"` (not in the paper: `dynamic`, then rounds in which
            the least likely tokens are written again).
        order: groupwise, speculative. `"left_to_right"` (default), `"right_to_left"`, `"random"`, `"spans"` (needs
            `span_length`), or a tensor (B, S) of group ids, lower = earlier (S counts `max_new_tokens`).
        group_size: groupwise. Tokens written per pass, 1 by default.
        span_length: with `order="spans"`.
        criterion: dynamic, refine. What is committed first: `"confidence"` (default), `"entropy"` (default with
            `entropy_budget`), `"margin"` or `"random"`.
        criterion_temperature: dynamic, refine. Gumbel noise of this scale on the criterion, so that which blanks are
            committed is sampled in proportion to exp(criterion / temperature); not with `threshold`.
        tokens_per_step: dynamic, refine. Tokens committed per pass, 1 by default.
        threshold: instead of `tokens_per_step`. Commit every blank whose largest probability exceeds it (and the best one
            always); in (0, 1].
        entropy_budget: instead of `tokens_per_step`. Commit blanks, best first, while the sum of their entropies (nats)
            stays within it (and the best one always).
        window: dynamic, refine. Only the next `window` open blanks, in text order, are asked and compete.
        draft: speculative. `"model"` (default: from slots of the same pass) or `"ngram"` (what followed the same words
            earlier in the text).
        draft_tokens: speculative. Drafts checked per pass, 4 by default.
        refine_rounds: refine. 4 by default.
        refine_fraction: refine. Share of the written tokens that a round opens again, 0.25 by default; in (0, 1].
        refine_keep: refine. `"better"` (default): a row keeps a round only if its exact log-likelihood rose; `"all"`.
        use_cache: True by default: committed groups stay in the key/value cache, exactly. False encodes everything again
            each step (the same result), but for `dynamic` and `refine`, which then take the paper's variant: all filled
            tokens encoded as one bidirectional group.
        eos_token_id: an id or several; none by default. The continuation (the columns of `max_new_tokens`) ends at the
            first one written, whatever the order: what stands after it is `pad_token_id`, with commit step −1. In blanks
            with given text around, where a text cannot end, it is never written.
        max_time: seconds, checked before each pass. When they have passed, the continuation ends before its first token
            not yet written, and the blanks still open are written in one last pass.
        bad_words_ids: as in `generate`, against the text on both sides. A sequence of several ids needs a strategy that
            writes one token at a time.
        output_history: also return the text after each step.
        seed: of sampling and random orders: an integer (a row's draws come from it, the row's own text and how many equal
            rows stand before it, not from its neighbours or padding) or a list with one per row. None: from torch's
            global generator.

    Raises:
        ValueError: an unknown or unsupported field, a value out of range, or an option of another strategy.
    """

    def __init__(self, **kwargs):
        self.strategy = kwargs.pop("strategy", "groupwise")
        for option in (*OWN_OPTIONS, "seed", "output_history"):
            setattr(self, option, kwargs.pop(option, None))
        kwargs.setdefault("use_cache", True)
        unknown = sorted(set(kwargs) - set(GenerationConfig().__dict__))
        if unknown:
            raise ValueError(
                f"{unknown[0]}={kwargs[unknown[0]]!r} is not an option of any-order generation; it takes "
                f"{', '.join((*SHARED_OPTIONS, *OWN_OPTIONS))}"
            )
        super().__init__(**kwargs)
        self.check_any_order()

    def check_any_order(self) -> None:
        """Raises a ValueError for what any-order generation would otherwise ignore."""
        _check_choice("strategy", self.strategy, STRATEGIES)
        mine = OPTIONS_OF[self.strategy]
        for option in OWN_OPTIONS:
            if getattr(self, option) is not None and option not in mine:
                raise ValueError(
                    f"{option}={getattr(self, option)!r} has no meaning for strategy={self.strategy!r}, which takes "
                    f"{', '.join(mine)}"
                )
        for option, value in self.__dict__.items():
            known = option in (*SHARED_OPTIONS, *INERT_OPTIONS, *OWN_OPTIONS) or option.startswith("_")
            if not known and value is not None and value is not False:
                raise ValueError(
                    f"{option}={value!r} is not supported by any-order generation, which takes "
                    f"{', '.join((*SHARED_OPTIONS, *mine))}"
                )
        for option in (
            "max_new_tokens",
            "num_return_sequences",
            "group_size",
            "span_length",
            "tokens_per_step",
            "window",
            "draft_tokens",
            "refine_rounds",
        ):
            _check_count(option, getattr(self, option))
        self._check_order()
        self._check_commit_rules()
        for option, choices in (("draft", DRAFTS), ("refine_keep", REFINE_KEEPS)):
            if getattr(self, option) is not None:
                _check_choice(option, getattr(self, option), choices)
        _check_share("refine_fraction", self.refine_fraction)
        if self.max_time is not None and not self.max_time > 0:
            raise ValueError(f"max_time={self.max_time!r}; it takes seconds, more than 0")
        if self.forced_eos_token_id is not None and self.max_new_tokens is None:
            raise ValueError("forced_eos_token_id ends a continuation; it needs max_new_tokens")
        if self.writes_in_parallel() and any(len(words) > 1 for words in self.bad_words_ids or []):
            raise ValueError(
                "bad_words_ids holds a sequence of several tokens, which tokens written together could complete unseen; it "
                "takes single tokens here, or one token a step (group_size=1, tokens_per_step=1, speculative)"
            )
        if self.strategy == "speculative" and self.eos_token_ids() and self.order not in (None, "left_to_right"):
            raise ValueError(
                f"eos_token_id with strategy='speculative' takes order='left_to_right', not {self.order!r}"
            )
        self._check_cache()

    def _check_order(self) -> None:
        if self.order is not None and not isinstance(self.order, torch.Tensor):
            _check_choice("order", self.order, ORDERS)
        if (self.span_length is not None) != (isinstance(self.order, str) and self.order == "spans"):
            raise ValueError(
                f"span_length={self.span_length} with order={self.order!r}; order='spans' needs it, others don't take it"
            )
        if isinstance(self.order, torch.Tensor) and self.group_size is not None:
            raise ValueError("group_size has no meaning where order gives the group of every token")

    def _check_commit_rules(self) -> None:
        if self.criterion is not None:
            _check_choice("criterion", self.criterion, CRITERIA)
        rules = [rule for rule in ("tokens_per_step", "threshold", "entropy_budget") if getattr(self, rule) is not None]
        if len(rules) > 1:
            raise ValueError(f"{' and '.join(rules)} are two rules for what to commit; give one")
        _check_share("threshold", self.threshold)
        if self.entropy_budget is not None and not self.entropy_budget >= 0:
            raise ValueError(f"entropy_budget={self.entropy_budget!r}; it takes nats, at least 0")
        if self.criterion_temperature is not None:
            if not self.criterion_temperature >= 0:
                raise ValueError(f"criterion_temperature={self.criterion_temperature!r}; it takes at least 0")
            if self.threshold is not None or self.criterion == "random":
                raise ValueError("criterion_temperature has no meaning with threshold or criterion='random'")
        if self.window is not None and self.window < (self.tokens_per_step or 1):
            raise ValueError(
                f"window={self.window} is smaller than the step, tokens_per_step={self.tokens_per_step}; it takes at "
                "least that"
            )

    def _check_cache(self) -> None:
        if self.cache_implementation is None:
            return
        _check_choice("cache_implementation", self.cache_implementation, ("dynamic", "static"))
        if self.cache_implementation == "static" and (self.strategy != "groupwise" or not self.use_cache):
            raise ValueError(
                "cache_implementation='static' needs steps of one shape: it takes strategy='groupwise' with use_cache=True"
            )

    def writes_in_parallel(self) -> bool:
        """Whether tokens may be written together, without seeing each other."""
        if self.strategy == "groupwise":
            return (self.group_size or 1) > 1 or isinstance(self.order, torch.Tensor)
        if self.strategy == "speculative":
            return False
        return (self.tokens_per_step or 1) > 1 or self.threshold is not None or self.entropy_budget is not None

    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-text tokens, as a tuple."""
        ids = self.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)

    def deadline(self) -> float:
        """The `time.perf_counter()` at which `max_time`, from now, is over."""
        return math.inf if self.max_time is None else time.perf_counter() + self.max_time

    def filler(self, model_config: PreTrainedConfig) -> int:
        """The token that stands behind the end of a continuation."""
        candidates = (self.pad_token_id, model_config.pad_token_id, *self.eos_token_ids(), 0)
        return next(token_id for token_id in candidates if token_id is not None)


def resolve_config(
    config: A3GenerationConfig | None, max_new_tokens: int | None, overrides: dict[str, Any]
) -> A3GenerationConfig:
    """A config in which `max_new_tokens` and `overrides` replace the fields of `config`."""
    if config is not None and not isinstance(config, A3GenerationConfig):
        raise ValueError(f"generation_config is a {type(config).__name__}; it takes an A3GenerationConfig")
    fields = {} if config is None else {name: value for name, value in config.__dict__.items() if value is not None}
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    fields.update(overrides)
    if max_new_tokens is not None:
        fields["max_new_tokens"] = max_new_tokens
    return A3GenerationConfig(**fields)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; it takes one of {', '.join(choices)}")


def _check_count(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name}={value!r}; it takes a whole number of at least 1")


def _check_share(name: str, value: Any) -> None:
    if value is not None and not 0.0 < value <= 1.0:
        raise ValueError(f"{name}={value!r}; it takes a number in (0, 1]")
