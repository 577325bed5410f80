"""What happens to logits between the model and the choice of tokens: transformers' processors, at slots anywhere."""

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from .generation_config import A3GenerationConfig

# in the order in which `generate` applies them
WARPERS = {
    "temperature": logits_process.TemperatureLogitsWarper,
    "top_k": logits_process.TopKLogitsWarper,
    "top_p": logits_process.TopPLogitsWarper,
    "min_p": logits_process.MinPLogitsWarper,
    "typical_p": logits_process.TypicalLogitsWarper,
    "epsilon_cutoff": logits_process.EpsilonLogitsWarper,
}


class SlotProcessors:
    """The processors that a config asks for, applied to the logits of slots.

    Those that look at the text so far (`repetition_penalty`, and the caller's own) get, for each slot, the row turned so
    that it ends just before the slot: what stands after the slot, then what stands before it. Places not yet written hold
    the row's first given token (BOS).
    """

    def __init__(self, config: A3GenerationConfig, canvas, own_processors: LogitsProcessorList | None):
        self.canvas = canvas
        self.contextual = LogitsProcessorList()
        if config.repetition_penalty is not None and config.repetition_penalty != 1.0:
            self.contextual.append(logits_process.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        self.contextual.extend(own_processors or [])
        self.bad_words = [list(words) for words in config.bad_words_ids or []]
        suppressed = list(config.suppress_tokens or []) + [words[0] for words in self.bad_words if len(words) == 1]
        self.suppressed = torch.tensor(sorted(set(suppressed)), device=canvas.sequences.device)
        self.bad_words = [words for words in self.bad_words if len(words) > 1]
        self.eos = torch.tensor(config.eos_token_ids(), device=canvas.sequences.device, dtype=torch.long)
        self.forced_eos = config.forced_eos_token_id
        self.warpers = LogitsProcessorList()
        for name, warper in WARPERS.items():
            value = getattr(config, name)
            # transformers writes 1.0 and 0 for "off" into saved configs
            off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0}.get(name)
            if config.do_sample and value is not None and value != off:
                self.warpers.append(warper(value))

    def process(self, logits: torch.Tensor, slots: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Logits (B, Q, V) after all processors but the sampling ones, at the columns `slots` (B, Q).

        Args:
            known: (B, 1, S) or (B, Q, S), where the canvas holds tokens that a slot may look at.
        """
        if len(self.contextual):
            context = self._contexts(slots, known)
            scores = self.contextual(context.flatten(0, 1), logits.float().flatten(0, 1))
            logits = scores.view_as(logits)
        if self.suppressed.numel():
            logits = logits.index_fill(-1, self.suppressed, -torch.inf)
        for words in self.bad_words:
            logits = self._without(words, logits, slots, known)
        if self.eos.numel():
            inside = (slots < self.canvas.new_from)[..., None]
            logits = torch.where(inside, logits.index_fill(-1, self.eos, -torch.inf), logits)
        if self.forced_eos is not None:
            last = (slots == self.canvas.bin - 1)[..., None]
            other = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
            other[self.forced_eos] = False
            logits = logits.masked_fill(last & other, -torch.inf)
        return logits

    def warp(self, logits: torch.Tensor) -> torch.Tensor:
        """The sampling processors (temperature, top-k, …) on logits (B, Q, V)."""
        if not len(self.warpers) or not logits.numel():
            return logits
        return self.warpers(None, logits.float().flatten(0, 1)).view_as(logits)

    def _contexts(self, slots: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        length = self.canvas.bin
        turned = (slots[..., None] + 1 + torch.arange(length - 1, device=slots.device)) % length  # (B, Q, S − 1)
        first = self.canvas.given_mask.long().argmax(dim=1, keepdim=True)
        text = self.canvas.sequences[:, None, :length]
        text = torch.where(known, text, text.gather(2, first[..., None]))
        return text.expand(-1, slots.shape[1], -1).gather(2, turned)

    def _without(self, words: list[int], logits, slots, known) -> torch.Tensor:
        """Forbids each token of `words` where all the others stand around it."""
        length = self.canvas.bin
        text = self.canvas.sequences[:, None, :length].masked_fill(~known, -1).expand(-1, slots.shape[1], -1)
        for index, word in enumerate(words):
            completed = torch.ones_like(slots, dtype=torch.bool)
            for other, neighbour in enumerate(words):
                if other != index:
                    column = slots + other - index
                    stands = text.gather(2, column.clamp(0, length - 1)[..., None]).squeeze(-1) == neighbour
                    completed = completed & stands & (column >= 0) & (column < length)
            banned = torch.zeros_like(logits, dtype=torch.bool)
            banned[..., word] = completed
            logits = logits.masked_fill(banned, -torch.inf)
        return logits
