"""lm-eval's model `a3_ar`: a causal LM, the baseline for the requests that A3 answers."""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from peft import PeftModel
from transformers import LlamaForCausalLM

from a3_hf.adapters.checkpoint_info import CheckpointInfo, read_adapter_config
from a3_hf.adapters.checkpoints import content_llama
from a3_hf.data.fim import fim_prompt
from a3_hf.evaluation.measures.batching import next_token_scores, pad_rows, span_mask
from a3_hf.evaluation.tasks.requests import Blank
from a3_hf.evaluation.tasks.sentences import sentence_ends
from a3_hf.models.a3_llama.infilling_templates import decode_after, encode_piece, special_token_ids
from a3_hf.models.a3_llama.modeling_a3_llama import A3LlamaForCausalLM
from a3_hf.models.a3_llama.orders import seed_of

from .batched_lm import BatchedLM, Scored, Written, adapter_arguments

INFILLING = ("prefix", "suffix_prompt", "best_of", "psm", "spm")


@register_model("a3_ar")
class CausalLM(BatchedLM):
    """A LLaMA, or the content stream of an A3 checkpoint or adapter read as a LLaMA, for lm-eval. Without text after the blank
    its answers are those of lm-eval's `hf` for texts that begin with BOS (see `BatchedLM`). An adapter with `rows: slots`
    answers as its base, one with `rows: all` as its merged checkpoint.

    Args:
        pretrained: folder or hub id of a LLaMA, an A3 checkpoint or an adapter; or a model without adapters, together with
            `tokenizer`.
        infilling: use of the text after a blank. `"prefix"`: ignored (as in the paper's baseline). `"suffix_prompt"`: put
            before the context, on a line of its own. `"best_of"`: `num_samples` texts are written without it, and the one with
            the highest likelihood followed by it is chosen; likelihoods of continuations include it. `"psm"` and `"spm"`: the
            forms of a model that has learnt to fill in the middle (`FimArguments`); a blank whose length the model chooses
            ends at its EOS.
        fim_tokens: with `psm` and `spm`, the three tokens of prefix, suffix and middle: a list, or a text with spaces between.
        num_samples: number of samples, with `best_of`.
        temperature: temperature of these samples.
        seed: seed of these samples, together with the text.
        base: folder or hub id of an adapter's base, if it is not the recorded one.
        **kwargs: arguments of `HFLM`.

    Raises:
        ValueError: an unknown `infilling`; `fim_tokens` without such a form, or not three tokens of the vocabulary; a base of
            a model that is no adapter; a model with adapters that is no checkpoint.
    """

    AUTO_MODEL_CLASS = LlamaForCausalLM

    def __init__(
        self,
        pretrained: str | LlamaForCausalLM,
        *,
        infilling: str = "prefix",
        fim_tokens: str | Sequence[str] | None = None,
        num_samples: int = 8,
        temperature: float = 1.0,
        seed: int = 0,
        base: str | None = None,
        **kwargs: Any,
    ):
        if infilling not in INFILLING:
            raise ValueError(f"infilling={infilling!r}: expected one of {', '.join(INFILLING)}")
        if num_samples < 1 or temperature <= 0:
            raise ValueError(f"num_samples={num_samples}, temperature={temperature}: expected at least 1, and above 0")
        if isinstance(pretrained, PeftModel):
            raise ValueError("pretrained is a model with adapters: expected its folder, or a model without adapters")
        self._adapter = None
        if isinstance(pretrained, str) and read_adapter_config(pretrained) is not None:
            self._adapter, self.AUTO_MODEL_CLASS = pretrained, A3LlamaForCausalLM
            checkpoint = CheckpointInfo.read(pretrained, base=base)
            pretrained, kwargs = checkpoint.base, adapter_arguments(checkpoint, kwargs)
        elif base is not None:
            raise ValueError(f"base={base!r}: pretrained is not an adapter and needs no base; leave it out")
        self._infilling, self._num_samples, self._temperature, self._seed = infilling, num_samples, temperature, seed
        self._fim_tokens = fim_tokens.split() if isinstance(fim_tokens, str) else list(fim_tokens or ())
        if (infilling in ("psm", "spm")) != (len(self._fim_tokens) == 3) or len(set(self._fim_tokens)) not in (0, 3):
            raise ValueError(
                f"fim_tokens={fim_tokens!r} with infilling={infilling!r}: expected three different tokens, of prefix, suffix "
                "and middle, with psm and spm alone"
            )
        self.num_form_tokens = len(self._fim_tokens)
        super().__init__(pretrained, **kwargs)
        self._fim_ids = self.tokenizer.convert_tokens_to_ids(self._fim_tokens)
        absent = [token for token in self._fim_tokens if token not in self.tokenizer.get_vocab()]
        if absent:
            raise ValueError(f"fim_tokens: the tokenizer has no token {', '.join(map(repr, absent))}")

    def _create_model(self, pretrained: str, **kwargs) -> None:
        if self._adapter is None:
            super()._create_model(pretrained, **kwargs)
        else:
            self._create_adapted(pretrained, kwargs.pop("peft"), **kwargs)
            self._model = content_llama(self._model)

    def settings(self) -> dict[str, Any]:
        sampling = {"num_samples": self._num_samples, "temperature": self._temperature, "seed": self._seed}
        own = {"model": "a3_ar", "infilling": self._infilling}
        if self._fim_tokens:
            own["fim_tokens"] = " ".join(self._fim_tokens)
        return own | (sampling if self._infilling == "best_of" else {})

    def score_batch(self, batch: Sequence[Scored]) -> list[tuple[float, bool, int]]:
        rows = [self._without_suffix(row) for row in batch]
        # The last token, which nothing sees, may lie beyond the model's context.
        ids, mask = pad_rows([[*row.context, *row.continuation] for row in rows])
        scored = span_mask(*([len(row[part]) for row in rows] for part in (0, 1)), ids.shape[1])
        with self.autocast():
            log_probs, greedy = next_token_scores(self.model, ids, mask, scored)
        totals = log_probs.double().sum(dim=1).tolist()
        return [(value, flag, 1) for value, flag in zip(totals, greedy.all(dim=1).tolist(), strict=True)]

    def _without_suffix(self, row: Scored) -> Scored:
        if not row.suffix or self._infilling == "prefix":
            return Scored(row.context, row.continuation, [])
        if self._infilling == "best_of":
            return Scored(row.context, [*row.continuation, *row.suffix], [])
        if self._fim_ids:
            return Scored(self._fim_context(row.context, row.suffix), row.continuation, [])
        start = 1 if row.context[:1] == [self.prefix_token_id] else 0
        line = encode_piece(self.tokenizer, "\n", is_start=False)
        return Scored(
            [*row.context[:start], *row.suffix, *line, *row.context[start:]][-self.max_length :], row.continuation, []
        )

    def _fim_context(self, context: list[int], suffix: list[int]) -> list[int]:
        """The form of `infilling` before a middle."""
        start = 1 if context[:1] == [self.prefix_token_id] else 0
        return [*context[:start], *fim_prompt(self._infilling, context[start:], suffix, self._fim_ids)]

    def continue_batch(
        self, contexts: Sequence[list[int]], *, max_tokens: int, until: list[str], **sampling
    ) -> list[Written]:
        ids, real = pad_rows(contexts, side="left")
        width = ids.shape[1]
        output = self._model_generate(
            context=ids.to(self.device),
            attention_mask=real.to(self.device),
            max_length=width + max_tokens,
            stop=[*until, self.tok_decode(self.eot_token_id, skip_special_tokens=False)],
            **sampling,
        )[:, width:].tolist()
        written = []
        for tokens in output:
            if self.eot_token_id in tokens:
                tokens = tokens[: tokens.index(self.eot_token_id) + 1]
            written.append(Written(self.text_until(tokens, until), len(tokens), len(output[0])))
        return written

    def fill_batch(self, contexts: Sequence[str], blanks: Sequence[Blank], **sampling) -> list[Written]:
        most = [self.most_tokens(blank, context) for context, blank in zip(contexts, blanks, strict=True)]
        ids = []
        for context, blank, length in zip(contexts, blanks, most, strict=True):
            if self._fim_ids and blank.suffix.strip():
                suffix = encode_piece(self.tokenizer, blank.suffix, is_start=False)
                ids.append(self._fim_context(self._context_ids(context), suffix))
                continue
            if self._infilling == "suffix_prompt" and blank.suffix.strip():
                context = f"{blank.suffix.strip()}\n{context}"
            ids.append(self._context_ids(context)[-(self.max_length - length) :])
        if self._infilling == "best_of" and any(blank.suffix for blank in blanks):
            return [self._best(*row) for row in zip(ids, most, blanks, strict=True)]
        may_end = [bool(self._fim_ids and blank.suffix.strip() and blank.lengths) for blank in blanks]
        written: list = [None] * len(ids)
        for ends in sorted(set(may_end)):
            part = [row for row, flag in enumerate(may_end) if flag == ends]
            rows = self._generate([ids[row] for row in part], max(most[row] for row in part), may_end=ends, **sampling)
            for row, tokens in zip(part, rows, strict=True):
                written[row] = tokens
        texts = [
            self._ended(prompt, tokens[:length], blank)
            for prompt, tokens, length, blank in zip(ids, written, most, blanks, strict=True)
        ]
        return [Written(text, len(tokens), length) for (text, tokens), length in zip(texts, most, strict=True)]

    def _generate(
        self, prompts: Sequence[list[int]], length: int, *, may_end: bool = False, **sampling
    ) -> list[list[int]]:
        """`length` tokens after each prompt; with `may_end`, those before an EOS, which is not the first one."""
        ids, real = pad_rows(prompts, side="left")
        end = self.eot_token_id
        special = special_token_ids(self.tokenizer, self.model.config.vocab_size)
        with torch.no_grad():
            output = self.model.generate(
                ids.to(self.device),
                attention_mask=real.to(self.device),
                max_new_tokens=length,
                min_new_tokens=1 if may_end else length,
                suppress_tokens=[token for token in special if not (may_end and token == end)] or None,
                eos_token_id=end,
                pad_token_id=end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
                **sampling,
            )
        written = output[:, ids.shape[1] :].tolist()
        return [row[: row.index(end)] if may_end and end in row else row for row in written]

    def _best(self, ids: list[int], most: int, blank: Blank) -> Written:
        """The likeliest of several samples."""
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(self._seed, ids))
            samples = self._generate(
                [ids],
                most,
                do_sample=True,
                temperature=self._temperature,
                top_k=0,
                num_return_sequences=self._num_samples,
            )
        texts = [self._ended(ids, tokens, blank) for tokens in samples]
        best = self._likeliest(ids, texts, blank)
        return Written(texts[best][0], len(texts[best][1]), len(samples) * (most + 1))

    def _ended(self, ids: list[int], tokens: list[int], blank: Blank) -> tuple[str, list[int]]:
        """The text and its tokens; if the model chooses the length, up to the end of the blank's last sentence."""
        text = decode_after(self.tokenizer, ids, tokens)
        if blank.lengths is None or blank.sentences is None:
            return text, tokens
        ends = sentence_ends(text)
        if len(ends) < blank.sentences:
            return text, tokens
        text = text[: ends[blank.sentences - 1]]
        kept = next(n for n in range(len(tokens) + 1) if decode_after(self.tokenizer, ids, tokens[:n]).startswith(text))
        return text, tokens[:kept]

    def _likeliest(self, ids: list[int], texts: list[tuple[str, list[int]]], blank: Blank) -> int:
        """The index of the text with the highest log-likelihood per token, the suffix included."""
        suffix = encode_piece(self.tokenizer, blank.suffix, is_start=False)
        rows = [
            Scored(ids[-(self.max_length - len(suffix) - len(tokens)) :], [*tokens, *suffix], []) for _, tokens in texts
        ]
        scores = [
            score / len(row.continuation) for (score, _, _), row in zip(self.score_batch(rows), rows, strict=True)
        ]
        return scores.index(max(scores))
