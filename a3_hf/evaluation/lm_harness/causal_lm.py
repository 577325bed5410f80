"""lm-eval's model `a3_ar`: a causal LM under the requests that A3 answers, the baseline that sees as much as it can."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from transformers import LlamaForCausalLM

from a3_hf.adapters.checkpoint_info import read_adapter_config
from a3_hf.evaluation.measures.text_windows import pad_left, pad_right
from a3_hf.evaluation.tasks.requests import Blank
from a3_hf.models.a3_llama.infilling_templates import decode_after, encode_piece, special_token_ids
from a3_hf.models.a3_llama.likelihood import token_log_probs
from a3_hf.models.a3_llama.orders import seed_of

from .batched_lm import BatchedLM, Scored, Written

INFILLING = ("prefix", "suffix_prompt", "best_of")
SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")


@register_model("a3_ar")
class CausalLM(BatchedLM):
    """A LLaMA for lm-eval, or the content stream of an A3 checkpoint, which is one. Without text behind what is asked its
    answers are those of lm-eval's `hf` for texts that begin with BOS (see `BatchedLM`).

    Args:
        pretrained: a folder or a hub id of a LLaMA or A3 checkpoint; or a model, beside `tokenizer`.
        infilling: what becomes of text behind a blank. `"prefix"`: it is not seen (as in the paper's baseline).
            `"suffix_prompt"`: it stands before the context, on a line of its own. `"best_of"`: `num_samples` texts are
            written without it, and the one is taken which, followed by it, is likeliest; a continuation to be scored is
            scored together with it.
        num_samples: with `best_of`.
        temperature: of these samples.
        seed: of these samples; a text's samples come from it and the text alone.
        **kwargs: the arguments of `HFLM`.

    Raises:
        ValueError: an unknown `infilling` (says which there are), an adapter.
    """

    AUTO_MODEL_CLASS = LlamaForCausalLM

    def __init__(
        self,
        pretrained: str | LlamaForCausalLM,
        *,
        infilling: str = "prefix",
        num_samples: int = 8,
        temperature: float = 1.0,
        seed: int = 0,
        **kwargs: Any,
    ):
        if infilling not in INFILLING:
            raise ValueError(f"infilling={infilling!r} is not known; it takes one of {', '.join(INFILLING)}")
        if num_samples < 1 or temperature <= 0:
            raise ValueError(f"num_samples={num_samples}, temperature={temperature}; they take at least 1 and above 0")
        if isinstance(pretrained, str) and read_adapter_config(pretrained) is not None:
            raise ValueError(f"pretrained={pretrained!r} is an adapter; make one checkpoint of it first: a3 merge")
        self._infilling, self._num_samples, self._temperature, self._seed = infilling, num_samples, temperature, seed
        super().__init__(pretrained, **kwargs)

    def settings(self) -> dict[str, Any]:
        """What decides the answers, beside the requests."""
        sampling = {"num_samples": self._num_samples, "temperature": self._temperature, "seed": self._seed}
        return {
            "model": "a3_ar",
            "pretrained": self.pretrained if isinstance(self.pretrained, str) else self.pretrained.name_or_path,
            "dtype": str(self.model.dtype),
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
            "infilling": self._infilling,
            **(sampling if self._infilling == "best_of" else {}),
        }

    def score_batch(self, batch: Sequence[Scored]) -> list[tuple[float, bool, int]]:
        """See `BatchedLM`."""
        rows = [self._without_suffix(row) for row in batch]
        inputs = [[*row.context, *row.continuation][:-1] for row in rows]
        ids, _ = pad_right(inputs)
        with (
            torch.no_grad(),
            torch.autocast(
                self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ),
        ):
            hidden_states = self.model.model(ids.to(self.device), use_cache=False).last_hidden_state
            answers = []
            for row, tokens, hidden in zip(rows, inputs, hidden_states, strict=True):
                wanted = torch.tensor(row.continuation, device=self.device)
                logits = self.model.lm_head(hidden[len(tokens) - len(wanted) : len(tokens)])
                value = token_log_probs(logits, wanted).double().sum().item()
                answers.append((value, bool((logits.argmax(dim=-1) == wanted).all()), 1))
        return answers

    def _without_suffix(self, row: Scored) -> Scored:
        if not row.suffix or self._infilling == "prefix":
            return Scored(row.context, row.continuation, [])
        if self._infilling == "best_of":
            return Scored(row.context, [*row.continuation, *row.suffix], [])
        start = 1 if row.context[:1] == [self.prefix_token_id] else 0
        line = encode_piece(self.tokenizer, "\n", is_start=False)
        return Scored(
            [*row.context[:start], *row.suffix, *line, *row.context[start:]][-self.max_length :], row.continuation, []
        )

    def continue_batch(
        self, contexts: Sequence[list[int]], *, max_tokens: int, until: list[str], **sampling
    ) -> list[Written]:
        """See `BatchedLM`."""
        ids, real = pad_left(contexts)
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
        """See `BatchedLM`."""
        wants_best = self._infilling == "best_of" and any(blank.suffix for blank in blanks)
        prompts, most = [], []
        for context, blank in zip(contexts, blanks, strict=True):
            if self._infilling == "suffix_prompt" and blank.suffix.strip():
                prompts.append(f"{blank.suffix.strip()}\n{context}")
            else:
                prompts.append(context)
            most.append(blank.lengths[1] if blank.lengths else self.tokens_of(blank.length_of, context))
        ids = [
            self._context_ids(prompt)[-(self.max_length - length) :]
            for prompt, length in zip(prompts, most, strict=True)
        ]
        rows = range(len(ids))
        if not wants_best:
            written = self._generate(ids, max(most), **sampling)
            texts = [self._ended(ids[row], written[row][: most[row]], blanks[row]) for row in rows]
            return [Written(text, len(tokens), most[row]) for row, (text, tokens) in zip(rows, texts, strict=True)]
        return [self._best(ids[row], most[row], blanks[row]) for row in rows]

    def _generate(self, prompts: Sequence[list[int]], length: int, **sampling) -> list[list[int]]:
        """`length` tokens behind each prompt."""
        ids, real = pad_left(prompts)
        with torch.no_grad():
            output = self.model.generate(
                ids.to(self.device),
                attention_mask=real.to(self.device),
                max_new_tokens=length,
                min_new_tokens=length,
                suppress_tokens=special_token_ids(self.tokenizer, self.model.config.vocab_size) or None,
                pad_token_id=self.tokenizer.pad_token_id,
                **sampling,
            )
        return output[:, ids.shape[1] :].tolist()

    def _best(self, ids: list[int], most: int, blank: Blank) -> Written:
        """Of several samples the one which, followed by the suffix, is likeliest per token."""
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
        """What was written, up to the end of its last sentence where the length was left to the model."""
        text = decode_after(self.tokenizer, ids, tokens)
        if blank.lengths is None or blank.sentences is None:
            return text, tokens
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        if len(ends) < blank.sentences:
            return text, tokens
        text = text[: ends[blank.sentences - 1]]
        kept = next(n for n in range(len(tokens) + 1) if decode_after(self.tokenizer, ids, tokens[:n]).startswith(text))
        return text, tokens[:kept]

    def _likeliest(self, ids: list[int], texts: list[tuple[str, list[int]]], blank: Blank) -> int:
        """The text which, followed by the suffix, has the highest log-likelihood per token."""
        suffix = encode_piece(self.tokenizer, blank.suffix, is_start=False)
        rows = [
            Scored(ids[-(self.max_length - len(suffix) - len(tokens)) :], [*tokens, *suffix], []) for _, tokens in texts
        ]
        scores = [
            value / len(row.continuation) for (value, _, _), row in zip(self.score_batch(rows), rows, strict=True)
        ]
        return max(range(len(scores)), key=scores.__getitem__)
