"""lm-eval's model `a3`: exact likelihoods under any order, and texts by any decoding strategy."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from transformers import PreTrainedModel

from a3_hf.adapters.checkpoint_info import CheckpointInfo
from a3_hf.evaluation.measures.batching import order_inputs, pad_rows, span_mask
from a3_hf.evaluation.tasks.requests import Blank
from a3_hf.models.a3_llama.generation_config import OWN_OPTIONS, A3GenerationConfig
from a3_hf.models.a3_llama.infilling_templates import Template, decode_after
from a3_hf.models.a3_llama.orders import ORDERS, RANDOM_ORDERS, GroupOrder, seed_of
from a3_hf.models.auto import ARCHITECTURES

from .batched_lm import BatchedLM, Scored, Written, adapter_arguments

MOST_ORDERS = 10_000  # a request's orders are scored in one batch
# Options of A3GenerationConfig that have a name of their own here.
SHARED = ("order", "group_size", "span_length")


@register_model("a3")
class A3LM(BatchedLM):
    """An A3 model, a LLaMA used as one, Decoupled RoPE or masked diffusion (by the checkpoint's architecture), for lm-eval:
    `--model a3 --model_args pretrained=…,order=random,num_orders=8`.

    `loglikelihood` needs one forward pass per request, in any order; the given text, on one side or both, is encoded first, as
    singletons in text order. Masked diffusion needs one pass per group, or `num_samples` passes for the bound.

    Args:
        pretrained: folder or hub id of a model or an adapter; or a model, together with `tokenizer`.
        order: `"left_to_right"`, `"right_to_left"`, `"random"` or `"spans"` (needs `span_length`): the order in which tokens
            are scored, and written by `groupwise` and `speculative`.
        group_size: tokens scored together, and written together by `groupwise`.
        num_orders: number of random orders; the likelihood is the mean over them (log-mean-exp of the log-likelihoods: itself
            a proper likelihood; not specified in the paper).
        seed: seed of random orders and sampling. A request's orders depend only on it, the given text, and the number of
            scored tokens.
        decoding: a strategy of `A3GenerationConfig`; None: `"groupwise"`, or `"dynamic"` with masked diffusion. Masked
            diffusion supports no other, Decoupled RoPE only `"groupwise"` with one token per group.
        num_samples: number of masks of masked diffusion's Monte Carlo bound, which replaces the likelihood under `order`; no
            answer is then greedy.
        block_length: tokens per block of a continuation, which ends after the block with a stop sequence. Left to right the
            result does not depend on it; `dynamic` and `refine` choose within a block.
        base: folder or hub id of an adapter's base, if it is not the recorded one.
        **kwargs: options of the strategy by their own names (`criterion`, `threshold`, `draft_tokens`, …), and arguments of
            `HFLM` (`dtype`, `revision`, `peft`, `max_length`, …).

    Raises:
        ValueError: an unknown order or strategy; an option of another strategy; several orders of a kind that is not random;
            groups, a strategy or samples that the architecture does not support.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        order: str = "left_to_right",
        group_size: int = 1,
        span_length: int | None = None,
        num_orders: int = 1,
        seed: int = 0,
        decoding: str | None = None,
        num_samples: int | None = None,
        block_length: int = 32,
        base: str | None = None,
        **kwargs: Any,
    ):
        checkpoint = CheckpointInfo.read(pretrained, base=base) if isinstance(pretrained, str) else None
        if checkpoint is not None and checkpoint.is_draft_head:
            raise ValueError(
                f"pretrained={pretrained!r} holds a draft head, which changes no likelihood and no text: expected a model or "
                "an adapter"
            )
        architecture = _architecture(pretrained) if checkpoint is None else checkpoint.architecture
        is_diffusion = architecture == "masked_diffusion"
        if decoding is None:
            decoding = "dynamic" if is_diffusion else "groupwise"
        _check_architecture(architecture, decoding=decoding, group_size=group_size, num_samples=num_samples)
        if num_samples is not None and (num_orders, order, group_size) != (1, "left_to_right", 1):
            raise ValueError(
                f"num_samples={num_samples} with order={order!r}, group_size={group_size}, num_orders={num_orders}: the bound "
                "is over all orders of single tokens. Leave the others out"
            )
        self.AUTO_MODEL_CLASS = ARCHITECTURES[architecture].model
        self._num_samples, self._pass_per_group = num_samples, is_diffusion
        own = {name: kwargs.pop(name) for name in OWN_OPTIONS if name in kwargs and name not in SHARED}
        if order not in ORDERS:
            raise ValueError(f"order={order!r}: expected one of {', '.join(ORDERS)}")
        if not 1 <= num_orders <= MOST_ORDERS or (num_orders > 1 and order not in RANDOM_ORDERS):
            raise ValueError(
                f"num_orders={num_orders} with order={order!r}: expected 1, or up to {MOST_ORDERS} with "
                f"{' and '.join(RANDOM_ORDERS)}"
            )
        if block_length < 1:
            raise ValueError(f"block_length={block_length}: expected at least 1 token")
        GroupOrder.infilling(torch.ones(1, 2).bool(), order=order, group_size=group_size, span_length=span_length)
        self._orders = {"order": order, "group_size": group_size, "span_length": span_length}
        self._num_orders, self._seed, self._block_length = num_orders, seed, block_length
        self._decoding = {"strategy": decoding, **own}
        # `dynamic` and `refine` have no order of their own
        if decoding in ("groupwise", "speculative"):
            self._decoding.update(order=order, span_length=span_length)
        if decoding == "groupwise":
            self._decoding.update(group_size=group_size)
        A3GenerationConfig(**self._decoding)
        if checkpoint is not None and checkpoint.adapter_config is not None:
            kwargs = adapter_arguments(checkpoint, kwargs)
            pretrained = checkpoint.base
        elif base is not None:
            raise ValueError(f"base={base!r}: pretrained is not an adapter and needs no base; leave it out")
        super().__init__(pretrained, **kwargs)

    def _create_model(self, pretrained: str, *, peft: str | None = None, **kwargs) -> None:
        if peft is None:
            super()._create_model(pretrained, **kwargs)
        else:
            self._create_adapted(pretrained, peft, **kwargs)

    def settings(self) -> dict[str, Any]:
        likelihood = {**self._orders, "num_orders": self._num_orders, "seed": self._seed}
        likelihood["num_samples"] = self._num_samples
        return {
            "model": "a3",
            **{key: value for key, value in likelihood.items() if value is not None},
            "decoding": {key: value for key, value in self._decoding.items() if value is not None},
            "block_length": self._block_length,
        }

    def score_batch(self, batch: Sequence[Scored]) -> list[tuple[float, bool, int]]:
        """See `BatchedLM`. Greedy means greedy under every order that was drawn."""
        copies = self._num_orders
        rows = [row for row in batch for _ in range(copies)]
        ids, real = pad_rows([[*row.context, *row.continuation, *row.suffix] for row in rows])
        scored = span_mask(*([len(row[part]) for row in rows] for part in (0, 1)), ids.shape[1])
        if self._num_samples is not None:
            inputs = (one.to(self.device) for one in (ids, real, real.bool() & ~scored))
            with self.autocast():
                bounds = self.model.log_likelihood_bound(*inputs, num_samples=self._num_samples, seed=self._seed)
            return [(value, False, self._num_samples) for value in bounds.double().tolist()]
        # An order must not depend on the scored tokens: only then do the probabilities of all continuations sum to 1.
        generators = [
            torch.Generator().manual_seed(
                seed_of(self._seed, row.context, row.suffix, len(row.continuation), number % copies)
            )
            for number, row in enumerate(rows)
        ]
        inputs = order_inputs(ids, real, scored, self.device, generator=generators, **self._orders)
        with self.autocast():
            log_probs, greedy = self.model.log_likelihood_and_greedy(**inputs)
        totals = log_probs.double().sum(dim=1).view(-1, copies).logsumexp(dim=1) - math.log(copies)
        is_greedy = (greedy.sum(dim=1).cpu() == scored.sum(dim=1)).view(-1, copies).all(dim=1)
        passes = [1] * len(batch)
        if self._pass_per_group:
            groups = inputs["group_ids"].cpu()[::copies]
            passes = [len(row[own].unique()) for row, own in zip(groups, scored[::copies], strict=True)]
        answers = zip(totals.tolist(), is_greedy.tolist(), passes, strict=True)
        return [(value, flag, number * copies) for value, flag, number in answers]

    def continue_batch(
        self, contexts: Sequence[list[int]], *, max_tokens: int, until: list[str], **sampling
    ) -> list[Written]:
        """See `BatchedLM`. Rows that are done leave the batch after each block."""
        written: list[list[int]] = [[] for _ in contexts]
        passes = [0] * len(contexts)
        open_rows = list(range(len(contexts)))
        ends = self._end_token_ids()
        while open_rows:
            texts = [[*contexts[row], *written[row]] for row in open_rows]
            ids, real = pad_rows(texts, side="left")
            width = ids.shape[1]
            block = min(self._block_length, max_tokens - len(written[open_rows[0]]))
            output = self.model.generate_any_order(
                ids.to(self.device),
                max_new_tokens=block,
                attention_mask=real.to(self.device),
                eos_token_id=ends,
                pad_token_id=self.tokenizer.pad_token_id,
                seed=self._seed,
                **self._decoding,
                **sampling,
            )
            unfinished = []
            for place, row in enumerate(open_rows):
                fresh = output.sequences[place, width:][output.commit_step[place, width:] >= 0].tolist()
                written[row] += fresh
                passes[row] += int(output.commit_step[place].max()) + 1
                ended = len(fresh) < block or fresh[-1] in ends or len(written[row]) >= max_tokens
                if not ended and not self.holds_stop(written[row], until):
                    unfinished.append(row)
            open_rows = unfinished
        return [
            Written(self.text_until(tokens, until), len(tokens), spent)
            for tokens, spent in zip(written, passes, strict=True)
        ]

    def _end_token_ids(self) -> list[int]:
        """Tokens that end a continuation, as in `generate`: EOS of the tokenizer and of the model's generation config."""
        named = self.model.generation_config.eos_token_id
        named = named if isinstance(named, (list, tuple)) else [] if named is None else [named]
        return sorted({self.eot_token_id, *named})

    def fill_batch(self, contexts: Sequence[str], blanks: Sequence[Blank], **sampling) -> list[Written]:
        """See `BatchedLM`. A length that is not given is chosen by exact likelihood; its passes are not counted."""
        templates = [
            Template((context, blank.suffix), (blank.lengths or self.tokens_of(blank.length_of, context),))
            for context, blank in zip(contexts, blanks, strict=True)
        ]
        output = self.model.fill_templates(self.tokenizer, templates, seed=self._seed, **self._decoding, **sampling)
        done = output.generation
        texts = []
        for tokens, steps, groups in zip(done.sequences, done.commit_step, done.group_ids, strict=True):
            tokens, is_written = tokens[groups >= 0], steps[groups >= 0] >= 0
            before = tokens[: int(is_written.long().argmax())].tolist()
            texts.append(decode_after(self.tokenizer, before, tokens[is_written].tolist()))
        lengths = [length for (length,) in output.lengths]
        return [Written(text, length, done.num_forward_passes) for text, length in zip(texts, lengths, strict=True)]


def _architecture(pretrained: PreTrainedModel) -> str:
    names = [name for name in ARCHITECTURES if name not in ("llama", "draft_head")]
    types = {ARCHITECTURES[name].config.model_type: name for name in names}
    model_type = pretrained.config.model_type
    if model_type not in types:
        raise ValueError(
            f"pretrained is a model of type {model_type!r}: expected {', '.join(types)} (for a LLaMA use a3_ar, or give "
            "its path to use it as an A3 model)"
        )
    return types[model_type]


def _check_architecture(architecture: str, *, decoding: str, group_size: int, num_samples: int | None) -> None:
    if architecture == "decoupled_rope" and (group_size > 1 or decoding != "groupwise"):
        raise ValueError(
            f"group_size={group_size}, decoding={decoding!r}: expected group_size=1, decoding='groupwise' with Decoupled RoPE"
        )
    if architecture == "masked_diffusion" and decoding != "dynamic":
        raise ValueError(f"decoding={decoding!r}: expected 'dynamic' with masked diffusion")
    if num_samples is not None and architecture != "masked_diffusion":
        raise ValueError(
            f"num_samples={num_samples}: with architecture {architecture!r} likelihoods are exact; leave it out"
        )
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: expected at least 1")
