"""Checks of requests with blanks when they arrive, and the tokens that their blanks may hold."""

from dataclasses import dataclass

import torch
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor

from .requests import Blanks, OneRowScript


@dataclass(frozen=True)
class TextTokens:
    """Which tokens of a vocabulary are text.

    Attributes:
        special: (N,) ids of special tokens, and of those that the tokenizer does not know.
        begins: (V,) True at tokens that begin with a space.
    """

    special: torch.Tensor
    begins: torch.Tensor

    @classmethod
    def of(cls, vllm_config, device: torch.device) -> "TextTokens | None":
        """Returns those of the served tokenizer; None without one."""
        from vllm.tokenizers import cached_tokenizer_from_config

        from a3_hf.models.a3_llama.infilling import begins_with_space_mask
        from a3_hf.models.a3_llama.infilling_templates import special_token_ids

        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        if tokenizer is None:
            return None
        size = vllm_config.model_config.get_vocab_size()
        special = torch.tensor(special_token_ids(tokenizer, size), dtype=torch.long, device=device)
        return cls(special, begins_with_space_mask(tokenizer, size).to(device))


def check_params(params) -> None:
    """Raises a ValueError for parameters that no request with blanks takes, and none where groups are written."""
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        raise ValueError("prompt_logprobs: expected None with blanks, and where groups are written")
    if params.structured_outputs is not None:
        raise ValueError("structured_outputs: expected None with blanks, and where groups are written")


class OneRowMasks(LogitsProcessor):
    """In blanks that are written one token a step: no special tokens, a space first where the blank takes it, and the given
    token that begins a later blank's slot.
    """

    def __init__(self, vllm_config, req_states):
        self.device, self.tokens = req_states.device, req_states.all_token_ids
        self.text: TextTokens | None = TextTokens.of(vllm_config, self.device)
        self.blanks: dict[int, tuple[Blanks, OneRowScript]] = {}

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        blanks = Blanks.of(sampling_params)
        if blanks is None:
            return
        check_params(sampling_params)
        if blanks.sampling is not None:
            raise ValueError(
                "steps, drafts, dynamic: expected none of them, as this engine writes one token a step. For groups, other "
                "orders and speculation, start vLLM with --hf-overrides '{\"canvas_length\": 32}'."
            )
        outputs = OneRowScript(blanks).num_outputs
        if blanks.is_text and (sampling_params.max_tokens != outputs or not sampling_params.ignore_eos):
            raise ValueError(
                f"max_tokens={sampling_params.max_tokens}, ignore_eos={sampling_params.ignore_eos}: expected {outputs} and "
                "True, for these blanks"
            )

    def add_request(self, req_idx: int, sampling_params) -> bool:
        blanks = Blanks.of(sampling_params)
        self.blanks.pop(req_idx, None)
        if blanks is None:
            return False
        self.blanks[req_idx] = (blanks, OneRowScript(blanks))
        return True

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        texts, spaced, forced = [], [], []
        for row, index in enumerate(ctx.idx_mapping_np):
            if index not in self.blanks:
                continue
            blanks, script = self.blanks[index]
            number = int(ctx.seq_lens_upper_bound_np[row]) - script.num_prompt  # of the output token
            if not 0 <= number < script.num_outputs:
                continue
            if script.forced[number] is not None:
                forced.append((row, int(index), script.forced[number]))
                continue
            if blanks.is_text:
                texts.append(row)
            if script.starts[number] in blanks.spaced:
                spaced.append(row)
        if self.text is not None:
            if texts:
                rows = torch.tensor(texts, device=self.device)
                logits[rows[:, None], self.text.special] = -torch.inf
            if spaced:
                rows = torch.tensor(spaced, device=self.device)
                logits[rows] = logits[rows].masked_fill(~self.text.begins, -torch.inf)
        if forced:
            rows, indices, numbers = torch.tensor(forced, device=self.device).unbind(dim=1)
            logits[rows] = -torch.inf
            logits[rows, self.tokens.gpu[indices, numbers].long()] = 0.0  # a prompt begins with the given tokens
        return logits


class GroupChecks(LogitsProcessor):
    """Checks of requests where blanks are written in groups, by a sampler of their own (`group_sampler`)."""

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        blanks = Blanks.of(sampling_params)
        # vLLM's scheduler would fail: it expects them beside a first token, which no prompt here ends with
        check_params(sampling_params)
        for name, off in (("presence_penalty", 0), ("frequency_penalty", 0), ("repetition_penalty", 1)):
            if getattr(sampling_params, name) != off:
                raise ValueError(
                    f"{name}={getattr(sampling_params, name)}: expected {off}, as groups have no penalties yet"
                )
        if blanks is None:
            return
        if blanks.sampling is None:
            raise ValueError("sampling: expected with steps, drafts or dynamic, as this engine writes groups")
        width = (sampling_params.extra_args or {}).get("diffusion_canvas_length")
        if width != blanks.width():
            raise ValueError(
                f"diffusion_canvas_length={width!r}: expected {blanks.width()}, the rows that a step needs"
            )
        if not blanks.is_text and (sampling_params.max_tokens or 0) > sum(blanks.lengths):
            raise ValueError(f"max_tokens={sampling_params.max_tokens}: expected at most {sum(blanks.lengths)}")
        if blanks.is_text and (sampling_params.max_tokens != sum(blanks.lengths) or not sampling_params.ignore_eos):
            raise ValueError(
                f"max_tokens={sampling_params.max_tokens}, ignore_eos={sampling_params.ignore_eos}: expected "
                f"{sum(blanks.lengths)} and True, for these blanks"
            )
        if sampling_params.n > 1 and blanks.sampling.temperature > 0:
            raise ValueError(
                f"n={sampling_params.n}: expected 1 with a temperature in groups; send one request for each"
            )

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        return logits
