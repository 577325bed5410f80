"""Settings of any-order generation, validated on construction."""

import math
import sys
import time
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from .generation_sampling import CRITERIA, DRAFTS, HEAD_DRAFTS, VERIFIERS
from .input_validation import check_integers
from .orders import ORDERS

DYNAMIC_OPTIONS = ("criterion", "criterion_temperature", "tokens_per_step", "threshold", "entropy_budget", "window")
# Options of each strategy; any other strategy's option is an error.
OPTIONS_OF = {
    "groupwise": ("order", "group_size", "span_length"),
    "dynamic": DYNAMIC_OPTIONS,
    "speculative": ("order", "span_length", "draft", "draft_tokens", "draft_width", "verify"),
    "refine": (*DYNAMIC_OPTIONS, "refine_rounds", "refine_fraction"),
}
STRATEGIES = tuple(OPTIONS_OF)
OWN_OPTIONS = tuple(dict.fromkeys(option for options in OPTIONS_OF.values() for option in options))
# Supported fields of transformers' GenerationConfig.
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
    "num_top_log_probs",
    "cache_implementation",
    "compile_config",
    "disable_compile",
    *SAMPLING_OPTIONS,
    *PROCESSOR_OPTIONS,
)
INERT_OPTIONS = ("bos_token_id", "transformers_version")
MOST = sys.float_info.max
# Minimum and maximum of each number, and their description in messages. Below a temperature of 1e-30, fp32 logits overflow.
NUMBERS = {
    "temperature": (1e-30, MOST, "a finite number, at least 1e-30 (do_sample=False takes the likeliest token)"),
    "top_k": (0, MOST, "a whole number, at least 0 (0: off)"),
    "top_p": (0.0, 1.0, "a number from 0 to 1"),
    "min_p": (0.0, 1.0, "a number from 0 to 1"),
    "typical_p": (math.ulp(0.0), 1.0, "a number in (0, 1]"),
    "epsilon_cutoff": (0.0, math.nextafter(1.0, 0.0), "a number in [0, 1)"),
    "repetition_penalty": (1e-30, MOST, "a finite number, more than 0"),
    "max_time": (math.ulp(0.0), math.inf, "seconds, more than 0"),
    "entropy_budget": (0.0, math.inf, "nats, at least 0"),
    "criterion_temperature": (0.0, MOST, "a finite number, at least 0"),
}


class A3GenerationConfig(GenerationConfig):
    """Settings of `generate_any_order`. Identical to `GenerationConfig` except: it adds the fields below, and an unsupported
    field raises instead of being ignored. Supported fields of `GenerationConfig`:
    `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`, `epsilon_cutoff`, `repetition_penalty`,
    `bad_words_ids`, `suppress_tokens`, `forced_eos_token_id`, `max_new_tokens`, `max_time`, `num_return_sequences`
    (with `do_sample`), `eos_token_id`, `pad_token_id`, `output_logits`, `use_cache`, `cache_implementation` (`"static"`,
    with strategy `groupwise`; compiled on a GPU, and on a CPU with `compile_config`), `disable_compile`.

    Args:
        strategy: `"groupwise"` (paper, Algorithm 1: predefined groups), `"dynamic"` (Algorithm 2: each step predicts all
            open blanks and commits the best), `"speculative"` (ASSD, paper §3: the exact distribution of one token at a
            time in the same order, in fewer passes) or `"refine"` (not in the paper: `dynamic`, then rounds that rewrite
            the least likely tokens).
        order: groupwise, speculative. `"left_to_right"` (default), `"right_to_left"`, `"random"`, `"spans"` (needs
            `span_length`), or a tensor (B, S) of group ids, lower = earlier (S counts `max_new_tokens`).
        group_size: groupwise. Tokens written per pass, 1 by default.
        span_length: tokens per span, with `order="spans"`.
        criterion: dynamic, refine. What is committed first: `"confidence"` (default), `"entropy"` (default with
            `entropy_budget`), `"margin"` or `"random"`.
        criterion_temperature: dynamic, refine. Scale of Gumbel noise on the criterion, so that blanks are committed with
            probability proportional to exp(criterion / temperature); not with `threshold`.
        tokens_per_step: dynamic, refine. Tokens committed per pass, 1 by default.
        threshold: instead of `tokens_per_step`. Commit every blank whose largest probability exceeds it, and always the
            best one; in (0, 1].
        entropy_budget: instead of `tokens_per_step`. Commit blanks, best first, while the sum of their entropies (nats)
            stays within it, and always the best one.
        window: dynamic, refine. Only the next `window` open blanks, in text order, are predicted.
        draft: speculative. `"model"` (default: from slots of the same pass), `"ngram"` (the continuation of the same two or
            more tokens elsewhere in the text, and no draft where there is none), `"head"` (the model's draft head; with
            `verify="content"`) or `"ngram+head"` (the head's where the text gives none; default with
            `verify="content"` if the model has a head that can serve the call: from left to right, with a cache of its own).
        draft_tokens: speculative. Drafts checked per pass at most; 4 by default, from the text 7, from a head 8.
        draft_width: speculative, with a head. Drafts after the same token at most, 4 by default; 1 makes chains. Processors
            that read the text (`repetition_penalty`, bad words of several tokens, your own) always make it 1.
        verify: speculative. What checks drafts, and so decides the text. `"slots"` (default: the text is that of `groupwise`)
            or `"content"` (default with a draft head, as above): the content stream, so that the text is that of a plain
            LLaMA, with `rows: slots` the untouched base's, and `log_probs` are its. It needs left to right, no given text
            after a blank, and a new last token where a cache is passed; fewer rows are encoded. Sampled texts are those of
            one token at a time with the same seed, except with `draft="model"`, where they have the same distribution.
        refine_rounds: refine. Number of rounds, 4 by default.
        refine_fraction: refine. Fraction of the written tokens that a round reopens, 0.25 by default; in (0, 1].
        use_cache: True (default): committed groups stay in the key/value cache, exactly. False encodes the whole text at
            each step, with the same result, except that `dynamic` and `refine` then encode all filled tokens as one
            bidirectional group (the paper's variant).
        eos_token_id: one id or several. None: with `max_new_tokens`, those of the model's `generation_config`, as in
            `generate`; `[]`: none. The continuation (the columns of `max_new_tokens`) ends at the first EOS; columns after
            it get `pad_token_id` and commit step −1. An EOS is never written before a given or written token, so no token
            that others have seen is ever removed.
        max_time: seconds, checked before each pass. After that, the continuation ends with its last written token, and
            blanks before it are filled in one final pass.
        bad_words_ids: as in `generate`, matched against the text on both sides. Sequences of several ids need a strategy
            that writes one token at a time.
        output_history: also return the text after each step.
        num_top_log_probs: also return this many highest log-probabilities at each written token.
        seed: seed of sampling and random orders: an integer (a row's draws depend on it, the row's text and the number of
            equal rows before it, not on other rows or padding) or a list with one per row. None: drawn from torch's
            global generator.

    Raises:
        ValueError: an unknown or unsupported field, a value out of range, or an option of another strategy.

    Examples:
        >>> config = A3GenerationConfig(strategy="dynamic", tokens_per_step=4)
        >>> config.strategy, config.tokens_per_step
        ('dynamic', 4)
        >>> A3GenerationConfig(strategy="groupwise", threshold=0.9)
        Traceback (most recent call last):
        ValueError: ...
    """

    def __init__(self, **kwargs):
        self.strategy = kwargs.pop("strategy", "groupwise")
        for option in (*OWN_OPTIONS, "seed", "output_history", "num_top_log_probs"):
            setattr(self, option, kwargs.pop(option, None))
        kwargs.setdefault("use_cache", True)
        unknown = sorted(set(kwargs) - set(GenerationConfig().__dict__))
        if unknown:
            raise ValueError(
                f"{unknown[0]}={kwargs[unknown[0]]!r} is not an option of any-order generation: expected one of "
                f"{', '.join((*SHARED_OPTIONS, *OWN_OPTIONS))}"
            )
        super().__init__(**kwargs)

    def validate(self, *args, **kwargs) -> None:
        """Runs the checks of any-order generation, then transformers', which assume that values are numbers."""
        self.check_any_order()
        super().validate(*args, **kwargs)

    def check_any_order(self) -> None:
        """Raises a ValueError for invalid values, and for options that any-order generation would ignore."""
        _check_choice("strategy", self.strategy, STRATEGIES)
        mine = OPTIONS_OF[self.strategy]
        for option in OWN_OPTIONS:
            if getattr(self, option) is not None and option not in mine:
                raise ValueError(
                    f"{option}={getattr(self, option)!r} has no effect with strategy={self.strategy!r}: expected one of "
                    f"{', '.join(mine)}"
                )
        for option, value in self.__dict__.items():
            known = option in (*SHARED_OPTIONS, *INERT_OPTIONS, *OWN_OPTIONS) or option.startswith("_")
            if not known and value is not None and value is not False:
                raise ValueError(
                    f"{option}={value!r} is not supported by any-order generation: expected one of "
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
            "draft_width",
            "refine_rounds",
            "num_top_log_probs",
        ):
            _check_count(option, getattr(self, option))
        self._check_values()
        self._check_order()
        self._check_commit_rules()
        if self.draft is not None:
            _check_choice("draft", self.draft, DRAFTS)
        if self.verify is not None:
            _check_choice("verify", self.verify, VERIFIERS)
        if self.draft in HEAD_DRAFTS and (self.verify != "content" or not self.use_cache):
            raise ValueError(
                f"draft={self.draft!r} with verify={self.verify!r} and use_cache={self.use_cache}: expected verify='content' "
                "and use_cache=True, as a draft head starts from the content stream and its cache"
            )
        if self.draft_width is not None and self.draft in ("model", "ngram"):
            raise ValueError(
                f"draft_width={self.draft_width} has no effect with draft={self.draft!r}: expected a draft head"
            )
        _check_fraction("refine_fraction", self.refine_fraction)
        if self.forced_eos_token_id is not None and self.max_new_tokens is None:
            raise ValueError("forced_eos_token_id needs max_new_tokens")
        if self.writes_in_parallel():
            self.check_single_bad_words(
                "one token a step (group_size=1, tokens_per_step=1 or strategy='speculative', without max_time)"
            )
        self._check_cache()

    def check_single_bad_words(self, remedy: str) -> None:
        """Raises a ValueError for bad words of several tokens, which tokens written in one pass could complete unseen."""
        if any(len(words) > 1 for words in self.bad_words_ids or []):
            raise ValueError(
                "bad_words_ids holds a sequence of several tokens, which tokens written in one pass could complete unseen: "
                f"expected single tokens, or {remedy}"
            )

    def check_vocabulary(self, vocab_size: int, *, has_blanks: bool, never: tuple[int, ...] = ()) -> None:
        """Checks that all token ids are in the vocabulary, and that some token can be written.

        Args:
            has_blanks: there are blanks before given text or a continuation, where EOS is excluded.
            never: ids that the model never writes.

        Raises:
            ValueError: an id outside 0 .. `vocab_size` − 1, or no token that can be written.
        """
        forced = self.forced_eos_token_id
        ids = {
            "eos_token_id": self.eos_token_ids(),
            "pad_token_id": () if self.pad_token_id is None else (self.pad_token_id,),
            "suppress_tokens": self.suppress_tokens or (),
            "forced_eos_token_id": () if forced is None else forced if isinstance(forced, list) else (forced,),
            "bad_words_ids": [token_id for words in self.bad_words_ids or [] for token_id in words],
        }
        for name, token_ids in ids.items():
            for token_id in token_ids:
                if not 0 <= token_id < vocab_size:
                    none = "; [] for none" if name == "eos_token_id" else ""
                    raise ValueError(
                        f"{name} holds {token_id}: expected ids of the model's vocabulary, 0 to {vocab_size - 1}{none}"
                    )
        left_out = {
            *never,
            *ids["suppress_tokens"],
            *(words[0] for words in self.bad_words_ids or [] if len(words) == 1),
        }
        if len(left_out | set(ids["eos_token_id"] if has_blanks else ())) == vocab_size:
            raise ValueError(
                f"suppress_tokens and bad_words_ids exclude all of the model's {vocab_size} tokens"
                f"{' (EOS is not written into blanks)' if has_blanks else ''}: expected at least one left"
            )

    def _check_values(self) -> None:
        """Checks values that transformers' processors accept silently, or reject only during generation."""
        for option, (at_least, at_most, takes) in NUMBERS.items():
            value = getattr(self, option)
            if value is None:
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not at_least <= value <= at_most:
                raise ValueError(f"{option}={value!r}: expected {takes}")
        if self.top_k is not None and not isinstance(self.top_k, int):
            raise ValueError(f"top_k={self.top_k!r}: expected {NUMBERS['top_k'][2]}")
        for option in ("do_sample", "use_cache", "output_logits", "output_history"):
            if getattr(self, option) not in (None, True, False):
                raise ValueError(f"{option}={getattr(self, option)!r}: expected True or False")
        forced = self.forced_eos_token_id
        for option, ids in (
            ("eos_token_id", list(self.eos_token_ids())),
            ("pad_token_id", [] if self.pad_token_id is None else [self.pad_token_id]),
            ("forced_eos_token_id", [] if forced is None else forced if isinstance(forced, list) else [forced]),
            ("suppress_tokens", self.suppress_tokens),
        ):
            if ids is not None and not _are_ids(ids):
                raise ValueError(f"{option}={getattr(self, option)!r}: expected token ids, whole numbers")
        words = self.bad_words_ids
        if words is not None and not (
            isinstance(words, (list, tuple)) and all(each and _are_ids(each) for each in words)
        ):
            raise ValueError(f"bad_words_ids={words!r}: expected a list of lists of token ids")
        seeds = self.seed if isinstance(self.seed, (list, tuple)) else [0 if self.seed is None else self.seed]
        if not _are_ids(list(seeds)):
            raise ValueError(f"seed={self.seed!r}: expected a whole number, or a list with one per row")

    def _check_order(self) -> None:
        if isinstance(self.order, torch.Tensor):
            check_integers("order", self.order, dimensions=2)
        elif self.order is not None:
            _check_choice("order", self.order, ORDERS)
        if (self.span_length is not None) != self._is_order("spans"):
            raise ValueError(
                f"span_length={self.span_length} with order={self.order!r}: expected a number with order='spans', else None"
            )
        if self.verify == "content" and not (self.order is None or self._is_order("left_to_right")):
            raise ValueError(
                f"verify='content' with order={self.order!r}: expected left_to_right, in which a LLaMA writes"
            )
        if isinstance(self.order, torch.Tensor) and self.group_size is not None:
            raise ValueError("group_size has no effect if order is a tensor of groups. Leave it out.")

    def _is_order(self, name: str) -> bool:
        return isinstance(self.order, str) and self.order == name

    def _check_commit_rules(self) -> None:
        if self.criterion is not None:
            _check_choice("criterion", self.criterion, CRITERIA)
        rules = [rule for rule in ("tokens_per_step", "threshold", "entropy_budget") if getattr(self, rule) is not None]
        if len(rules) > 1:
            raise ValueError(f"{' and '.join(rules)} exclude each other: expected one of them")
        _check_fraction("threshold", self.threshold)
        if self.criterion_temperature is not None:
            if self.threshold is not None or self.criterion == "random":
                raise ValueError("criterion_temperature has no effect with threshold or criterion='random'")
        if self.window is not None and self.window < (self.tokens_per_step or 1):
            raise ValueError(f"window={self.window}: expected at least tokens_per_step={self.tokens_per_step}")

    def _check_cache(self) -> None:
        if self.cache_implementation is None:
            return
        _check_choice("cache_implementation", self.cache_implementation, ("dynamic", "static"))
        if self.cache_implementation == "static" and (self.strategy != "groupwise" or not self.use_cache):
            raise ValueError(
                "cache_implementation='static' needs steps of one shape: expected strategy='groupwise' and use_cache=True"
            )

    def writes_in_parallel(self) -> bool:
        """True if one pass may write several tokens, which don't see each other."""
        if self.max_time is not None:
            return True
        if self.strategy == "groupwise":
            return (self.group_size or 1) > 1 or isinstance(self.order, torch.Tensor)
        if self.strategy == "speculative":
            return False
        return (self.tokens_per_step or 1) > 1 or self.threshold is not None or self.entropy_budget is not None

    def eos_token_ids(self) -> tuple[int, ...]:
        """Returns the end-of-text tokens as a tuple."""
        ids = self.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)

    def deadline(self) -> float:
        """Returns the `time.perf_counter()` at which `max_time` ends, counted from now."""
        return math.inf if self.max_time is None else time.perf_counter() + self.max_time

    def filler(self, model_config: PreTrainedConfig) -> int:
        """Returns the token that pads a continuation after its end."""
        candidates = (self.pad_token_id, model_config.pad_token_id, *self.eos_token_ids(), 0)
        return next(token_id for token_id in candidates if token_id is not None and token_id >= 0)


def resolve_config(
    config: A3GenerationConfig | None,
    max_new_tokens: int | None,
    overrides: dict[str, Any],
    models_own: GenerationConfig | None,
) -> A3GenerationConfig:
    """Returns `config` with fields replaced by `max_new_tokens` and `overrides`. If neither sets `eos_token_id`, a
    continuation uses that of `models_own`; an override of None means no EOS.
    """
    if config is not None and not isinstance(config, A3GenerationConfig):
        raise ValueError(f"generation_config is a {type(config).__name__}: expected an A3GenerationConfig")
    fields = {} if config is None else {name: value for name, value in config.__dict__.items() if value is not None}
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    fields.update(overrides)
    if max_new_tokens is not None:
        fields["max_new_tokens"] = max_new_tokens
    ids = None if models_own is None else models_own.eos_token_id
    if "eos_token_id" not in fields and ids is not None and fields.get("max_new_tokens") is not None:
        # As in `generate`, negative ids mean no EOS.
        fields["eos_token_id"] = [token_id for token_id in (ids if isinstance(ids, list) else [ids]) if token_id >= 0]
    return A3GenerationConfig(**fields)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}")


def _check_count(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")


def _check_fraction(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and 0.0 < value <= 1.0):
        raise ValueError(f"{name}={value!r}: expected a number in (0, 1]")


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, (list, tuple)) and all(isinstance(one, int) and not isinstance(one, bool) for one in ids)
