"""Base of the lm-eval models: encodes requests, cuts long ones, batches, caches and times them."""

import abc
import atexit
import inspect
import json
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm
from transformers.utils import logging

from a3_hf.adapters.checkpoint_info import CheckpointInfo
from a3_hf.adapters.checkpoints import attach_adapter, load_tokenizer
from a3_hf.evaluation.measures.text_windows import rolling_windows
from a3_hf.evaluation.tasks.requests import Blank, LogLikelihood, take_blank
from a3_hf.models.a3_llama.generation_config import OWN_OPTIONS
from a3_hf.models.a3_llama.infilling_templates import decode_after, encode_piece
from a3_hf.settings import nearest

from .identity import identity_of
from .timing import Speed

logger = logging.get_logger(__name__)

SETTINGS_KEY = "settings of the model"  # in lm-eval's cache, beside the answers
# Arguments of HFLM that have no effect here, with their neutral values.
WITHOUT_EFFECT = {
    "backend": ("default", "causal"),
    "truncation": (False, None),
    "logits_cache": (True,),
    "softmax_dtype": (None,),
    "think_end_token": (None,),
    "enable_thinking": (False, None),
    "autogptq": (False, None),
    "gptqmodel": (False, None),
}


class Scored(NamedTuple):
    """A text to score, in token ids: given, scored, and given after it."""

    context: list[int]
    continuation: list[int]
    suffix: list[int]


class Written(NamedTuple):
    """The text for a request, its number of tokens, and its forward passes."""

    text: str
    tokens: int
    passes: int


class BatchedLM(HFLM):
    """Identical to `HFLM` except: requests may have text after the blank (`requests.Blank`); answers to `loglikelihood` have
    their number of tokens; each task is timed; a cache that was filled under other settings is refused; several processes
    share the work on a CPU too; and every text begins with one BOS, as in training, `score` and `infill`, whether the
    tokenizer adds it or not. `add_bos_token=False` omits it, except for blanks and empty contexts; with a tokenizer that adds
    no BOS, the answers are then those of `HFLM`.

    Subclasses implement the scoring and writing of batches.

    Attributes:
        num_form_tokens: tokens that the model's form of a text with a suffix adds to it.
    """

    num_form_tokens = 0

    def __init__(self, pretrained, **kwargs):
        for name, harmless in WITHOUT_EFFECT.items():
            if kwargs.get(name, harmless[0]) not in harmless:
                raise ValueError(f"{name}={kwargs[name]!r} has no effect on this model; leave it out")
        try:
            super().__init__(pretrained, **{"backend": "causal", **kwargs})  # lm-eval does not know the model types
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in kwargs:
                raise
            known = {*inspect.signature(type(self)).parameters, *inspect.signature(HFLM).parameters, *OWN_OPTIONS}
            raise ValueError(f"model_args: unknown option {unknown[1]!r}{nearest(unknown[1], known)}") from error
        accelerator = vars(self).get("accelerator")
        if accelerator is not None:  # HFLM shares the work among GPUs only
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if self._world_size > 1:
            # Otherwise one of the group's threads may abort the process as it ends.
            atexit.register(PartialState().destroy_process_group)
        if self.prefix_token_id is None:
            raise ValueError("tokenizer has neither BOS nor EOS. Set prefix_token_id, the token that begins a text")
        given = {"pretrained": pretrained, **kwargs}
        self.identity = {
            **identity_of(self.model, self.tokenizer, given),
            "dtype": str(self.model.dtype),
            "max_length": self.max_length,
            "prefix_token_id": self.prefix_token_id,
            "add_bos_token": self.add_bos_token,
        }
        self.speed = Speed()
        self.truncated: defaultdict[str, int] = defaultdict(int)

    def _create_adapted(self, base: str, adapter: str, **kwargs) -> None:
        """As HFLM's `_create_model`, with an A3 adapter on the base."""
        checkpoint = CheckpointInfo.read(adapter, base=base)
        kwargs.update(checkpoint.base_settings(kwargs.pop("slot_start", None), kwargs.pop("suffix_template", None)))
        super()._create_model(base, **kwargs)
        self._model = attach_adapter(self._model, checkpoint)

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings on which answers depend, other than the requests and `identity`."""

    @abc.abstractmethod
    def score_batch(self, batch: Sequence[Scored]) -> list[tuple[float, bool, int]]:
        """Returns each continuation's log-likelihood (nats), whether greedy decoding writes it, and its forward passes."""

    @abc.abstractmethod
    def continue_batch(
        self, contexts: Sequence[list[int]], *, max_tokens: int, until: list[str], **sampling
    ) -> list[Written]:
        """Continues each context until a stop sequence (which is omitted), the end of the text, or `max_tokens`."""

    @abc.abstractmethod
    def fill_batch(self, contexts: Sequence[str], blanks: Sequence[Blank], **sampling) -> list[Written]:
        """Writes each blank between its context and suffix."""

    # Likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[LogLikelihood]:
        """See lm-eval. A third argument {"suffix": text} is given text after the continuation."""
        return self._by_task(requests, lambda part: self._loglikelihood(part, disable_tqdm))

    def _loglikelihood(self, requests: list[Instance], disable_tqdm: bool) -> list[LogLikelihood]:
        task = requests[0].task_name
        with self.speed.timing(task) as spent:
            rows = [self._encode(request.args, task) for request in requests]
            answers = self._score(rows, disable_tqdm, [request.args for request in requests])
            spent.requests += len(requests)
            spent.tokens += sum(len(row.continuation) for row in rows)
            spent.passes += sum(passes for _, _, passes in answers)
        self._warn_truncated(task, len(requests))
        return [
            LogLikelihood(value, greedy, len(row.continuation))
            for (value, greedy, _), row in zip(answers, rows, strict=True)
        ]

    def _encode(self, arguments: tuple, task: str) -> Scored:
        context, continuation, *more = arguments
        if context:
            context_ids, ids = self._encode_pair(context, continuation)
        else:
            context_ids, ids = [], self.tok_encode(continuation, add_special_tokens=False)
        if not context_ids:
            start = 1 if ids[:1] == [self.prefix_token_id] else 0
            context_ids, ids = [self.prefix_token_id], ids[start:]
        if not ids:
            raise ValueError(
                f"continuation {continuation!r} of a request of {task} has no token of its own: it is empty, or the tokenizer "
                "drops it or joins it with its context"
            )
        suffix = more[0]["suffix"] if more else ""
        return self._fit(Scored(context_ids, ids, encode_piece(self.tokenizer, suffix, is_start=False)), task)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, ids = super()._encode_pair(context, continuation)
        return self._begun(context_ids), ids

    def _begun(self, ids: list[int]) -> list[int]:
        """Token ids of a text that begin with BOS."""
        if self.add_bos_token is False or ids[:1] == [self.prefix_token_id]:
            return ids
        return [self.prefix_token_id, *ids]

    def _fit(self, row: Scored, task: str) -> Scored:
        """Cuts the given text to the model's context: the context from the left, then the suffix from the right. As in `HFLM`,
        the last token of a row, which no other token sees, may lie beyond the context.
        """
        room = self.max_length + 1 - len(row.continuation) - (self.num_form_tokens if row.suffix else 0)
        if room < 1:
            raise ValueError(
                f"continuation of a request of {task} has {len(row.continuation)} tokens: expected at most {self.max_length}"
            )
        over = len(row.context) + len(row.suffix) - room
        if over <= 0:
            return row
        self.truncated[task] += over > (row.context[:1] == [self.prefix_token_id])  # BOS alone is no text
        kept = max(len(row.context) - over, 1)
        return Scored(row.context[len(row.context) - kept :], row.continuation, row.suffix[: room - kept])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood (nats) of each text, in windows of the model's context; each token is scored once."""
        rows, texts = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for given, scored in rolling_windows(ids, start_id=self.prefix_token_id, length=self.max_length):
                rows.append(self._fit(Scored(list(given), list(scored), []), "loglikelihood_rolling"))
                texts.append(number)
        totals = [0.0] * len(requests)
        with self.speed.timing("loglikelihood_rolling") as spent:
            for number, (value, _, passes) in zip(texts, self._score(rows, disable_tqdm, keys=None), strict=True):
                totals[number] += value
                spent.passes += passes
            spent.requests += len(rows)
            spent.tokens += sum(len(row.continuation) for row in rows)
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests, **kwargs):
        # HFLM's would score left to right, whatever the settings.
        raise NotImplementedError("lm-eval asks for likelihoods in a way that this model does not support")

    def _score(self, rows, disable_tqdm, keys) -> list[tuple[float, bool, int]]:
        if not rows:
            return []
        lengths = [sum(map(len, row)) for row in rows]
        order = sorted(range(len(rows)), key=lambda index: (-lengths[index], rows[index]))
        longest = rows[order[0]]
        batch_size = self._batch_size([*longest.context, *longest.suffix], longest.continuation)
        answers: list = [None] * len(rows)
        with tqdm(total=len(rows), disable=disable_tqdm or self.rank != 0, desc="Likelihoods") as bar:
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                for index, answer in zip(part, self.score_batch([rows[index] for index in part]), strict=True):
                    answers[index] = answer
                    if keys is not None:
                        value, greedy, _ = answer
                        known = LogLikelihood(value, greedy, len(rows[index].continuation))
                        self.cache_hook.add_partial("loglikelihood", keys[index], known)
                bar.update(len(part))
        return answers

    # Texts

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See lm-eval. `gen_kwargs` may hold a blank (`requests.Blank`)."""
        return self._by_task(requests, lambda part: self._generate_until(part, disable_tqdm))

    def _generate_until(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        task = requests[0].task_name
        # rows of one batch share their settings, but not their blanks
        alike: defaultdict[str, list[int]] = defaultdict(list)
        parts = [(request.args[0], *take_blank(request.args[1])) for request in requests]
        for index, (_, settings, blank) in enumerate(parts):
            alike[json.dumps([settings, blank is None], sort_keys=True)].append(index)
        texts: list = [None] * len(requests)
        with (
            self.speed.timing(task) as spent,
            tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Texts") as bar,
        ):
            for indices in alike.values():
                indices.sort(key=lambda index: -len(parts[index][0]))
                batch_size = self._batch_size(self._context_ids(parts[indices[0]][0]), [])
                for start in range(0, len(indices), batch_size):
                    part = indices[start : start + batch_size]
                    rows = self._write([parts[index] for index in part], task)
                    for index, written in zip(part, rows, strict=True):
                        texts[index] = written.text
                        self.cache_hook.add_partial("generate_until", requests[index].args, written.text)
                        spent.tokens += written.tokens
                        spent.passes += written.passes
                    spent.requests += len(part)
                    bar.update(len(part))
        self._warn_truncated(task, len(requests))
        return texts

    def _write(self, rows: Sequence[tuple[str, dict[str, Any], Blank | None]], task: str) -> list[Written]:
        contexts, settings, blanks = zip(*rows, strict=True)
        wanted = normalize_gen_kwargs(settings[0], self.max_gen_toks)
        max_tokens, until = wanted.pop("max_gen_toks"), list(wanted.pop("until") or [])
        sampling = {"do_sample": wanted.pop("do_sample", False)}
        if sampling["do_sample"]:
            sampling.update(wanted)
        elif set(wanted) - {"temperature", "top_p", "top_k"}:
            unknown = sorted(set(wanted) - {"temperature", "top_p", "top_k"})
            raise ValueError(f"generation_kwargs of {task} holds {unknown[0]!r}, which has no effect without do_sample")
        if blanks[0] is not None:
            cut = [self._cut_text(context, blank, task) for context, blank in zip(contexts, blanks, strict=True)]
            return self.fill_batch(cut, blanks, **sampling)
        if max_tokens >= self.max_length:
            raise ValueError(
                f"max_gen_toks={max_tokens} of {task}: expected fewer than the model's context, {self.max_length}"
            )
        encoded = []
        for context in contexts:
            ids = self._context_ids(context)
            self.truncated[task] += len(ids) > self.max_length - max_tokens
            encoded.append(ids[-(self.max_length - max_tokens) :])
        return self.continue_batch(encoded, max_tokens=max_tokens, until=until, **sampling)

    def _cut_text(self, context: str, blank: Blank, task: str) -> str:
        """The context, with its start cut off if the whole does not fit."""
        ids = self._context_ids(context)
        room = (
            self.max_length
            - self.most_tokens(blank, context)
            - len(encode_piece(self.tokenizer, blank.suffix, is_start=False))
            - (self.num_form_tokens if blank.suffix.strip() else 0)
        )
        if room < 1:
            raise ValueError(f"blank and suffix of a request of {task} leave no room in {self.max_length} tokens")
        if len(ids) <= room:
            return context
        self.truncated[task] += 1
        return decode_after(self.tokenizer, [], ids[len(ids) - room + 1 :])

    def tokens_of(self, text: str, context: str) -> int:
        """The number of tokens of a text after a context."""
        return max(len(encode_piece(self.tokenizer, text, is_start=not context)), 1)

    def most_tokens(self, blank: Blank, context: str) -> int:
        """The largest number of tokens of a blank after a context."""
        return blank.lengths[1] if blank.lengths else self.tokens_of(blank.length_of, context)

    def autocast(self) -> torch.autocast:
        """The autocast context for the model's mixed precision."""
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _context_ids(self, context: str) -> list[int]:
        return self._begun(self.tok_encode(context) if context else []) or [self.prefix_token_id]

    def holds_stop(self, tokens: Sequence[int], until: Sequence[str]) -> bool:
        """Whether the text of tokens, special tokens included, holds a stop sequence."""
        text = self.tok_decode(tokens, skip_special_tokens=False)
        return any(stop in text for stop in until if stop)

    def text_until(self, tokens: Sequence[int], until: Sequence[str]) -> str:
        """The text of tokens, without special tokens, up to the first stop sequence, which may be a special token."""
        if self.holds_stop(tokens, until):
            shortest = bisect_left(range(len(tokens)), True, key=lambda count: self.holds_stop(tokens[:count], until))
            tokens = tokens[:shortest]
        return cut_at(self.tok_decode(tokens), until)

    # Shared by likelihoods and texts

    def _by_task(self, requests: list[Instance], answer: Callable[[list[Instance]], list]) -> list:
        places: defaultdict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            places[request.task_name].append(index)
        answers: list = [None] * len(requests)
        for indices in places.values():
            for index, one in zip(indices, answer([requests[index] for index in indices]), strict=True):
                answers[index] = one
        return answers

    def _batch_size(self, context: list[int], continuation: list[int]) -> int:
        if self.batch_size != "auto":
            return self.batch_size
        return self._detect_batch_size([(None, context, continuation or context[:1])], 0)

    def _warn_truncated(self, task: str, count: int) -> None:
        if self.truncated[task]:
            logger.warning(
                f"{task}: {self.truncated[task]} of {count} requests were longer than the model's context "
                f"({self.max_length} tokens); the start of their context was cut off"
            )

    def set_cache_hook(self, cache_hook) -> None:
        """See lm-eval.

        Raises:
            ValueError: the cache holds answers of another model or other settings, which lm-eval would reuse.
        """
        super().set_cache_hook(cache_hook)
        cache = cache_hook.dbdict
        if cache is None:
            return
        now = {**self.identity, **self.settings()}
        before = json.loads(cache.setdefault(SETTINGS_KEY, json.dumps(now, default=str)))
        cache.commit()
        now = json.loads(json.dumps(now, default=str))
        changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if changed:
            shown = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
            raise ValueError(
                f"use_cache names a cache of another model or other settings: {shown}. Set another path, or delete the cache"
            )

    def get_model_info(self) -> dict[str, Any]:
        """Returns lm-eval's fields, the settings, this process's speed in each task, and how many requests were cut."""
        return {
            **super().get_model_info(),
            "settings": self.settings(),
            "identity": self.identity,
            "speed": self.speed.table(),
            "truncated": {task: count for task, count in self.truncated.items() if count},
        }


def adapter_arguments(adapter: CheckpointInfo, given: Mapping[str, Any]) -> dict[str, Any]:
    """HFLM's arguments for an adapter, beside `pretrained`, which is its base."""
    return {"tokenizer": load_tokenizer(adapter), **given, "peft": adapter.path}


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop sequence in it."""
    return text[: min((text.index(stop) for stop in stops if stop and stop in text), default=len(text))]
