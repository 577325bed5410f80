"""Logits processing between the model and the choice of tokens: transformers' processors, at slots of any position."""

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from .generation_config import A3GenerationConfig
from .generation_sampling import at_least_float32

# In `generate`'s order of application.
WARPERS = {
    "temperature": logits_process.TemperatureLogitsWarper,
    "top_k": logits_process.TopKLogitsWarper,
    "top_p": logits_process.TopPLogitsWarper,
    "min_p": logits_process.MinPLogitsWarper,
    "typical_p": logits_process.TypicalLogitsWarper,
    "epsilon_cutoff": logits_process.EpsilonLogitsWarper,
}


def sampling_of(config: A3GenerationConfig) -> tuple[float | None, ...] | None:
    """Returns the value of each of `WARPERS`; None: greedy."""
    return tuple(getattr(config, name) for name in WARPERS) if config.do_sample else None


def make_warpers(sampling: tuple[float | None, ...] | None) -> LogitsProcessorList:
    """Returns the sampling processors of `sampling_of`; none, if greedy."""
    warpers = LogitsProcessorList()
    for (name, warper), value in zip(WARPERS.items(), sampling or (), strict=sampling is not None):
        # saved configs may hold these values for "off"
        off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0}.get(name)
        if value is not None and value != off:
            warpers.append(warper(value))
    return warpers


def warp(warpers: LogitsProcessorList, logits: torch.Tensor) -> torch.Tensor:
    """Applies sampling processors (temperature, top-k, …) to logits (B, Q, V)."""
    if not len(warpers) or not logits.numel():
        return logits
    logits = at_least_float32(logits)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # the maximum, 0, can't overflow at any temperature
    return warpers(None, logits.flatten(0, 1)).view_as(logits)


class SlotProcessors:
    """Applies a config's processors to the logits of slots.

    Processors that read the text so far (`repetition_penalty` and the caller's) get, for each slot, the row rotated to end
    just before the slot: the text after the slot, then the text before it, by position. Open blanks, and left padding of
    shorter rows, hold the row's first given token (BOS).

    An EOS is excluded before the continuation, and wherever a given or written token stands after the slot.
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
        self.warpers = make_warpers(sampling_of(config))

    @property
    def reads_text(self) -> bool:
        """Whether a slot's scores depend on the text around it."""
        return bool(len(self.contextual) or self.bad_words)

    def process(self, logits: torch.Tensor, slots: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Applies all processors except the sampling ones to logits (B, Q, V) of the columns `slots` (B, Q).

        Args:
            known: (B, 1, S) or (B, Q, S), True at tokens that a slot sees.
        """
        if len(self.contextual):
            context = self._contexts(slots, known)
            scores = self.contextual(context.flatten(0, 1), at_least_float32(logits).flatten(0, 1))
            logits = scores.view_as(logits)
        if self.suppressed.numel():
            logits = logits.index_fill(-1, self.suppressed, -torch.inf)
        for words in self.bad_words:
            logits = self._without(words, logits, slots, known)
        if self.eos.numel():
            inside = (slots < self._last_known(known))[..., None]
            if logits.device.type != "cpu" or inside.any():  # on a GPU, to ask takes longer than the copy
                logits = torch.where(inside, logits.index_fill(-1, self.eos, -torch.inf), logits)
        if self.forced_eos is not None:
            last = (slots == self.canvas.pad_column - 1)[..., None]
            other = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
            other[self.forced_eos] = False
            logits = logits.masked_fill(last & other, -torch.inf)
        return logits

    def _last_known(self, known: torch.Tensor) -> torch.Tensor:
        """Returns (B, 1) or (B, Q) the last column that holds a token, but at least the continuation's first."""
        columns = torch.arange(self.canvas.pad_column, device=known.device)
        return torch.maximum(torch.where(known, columns, -1).amax(dim=-1), self.canvas.new_from)

    def _contexts(self, slots: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        canvas = self.canvas
        width = canvas.pad_column
        length = (canvas.given_mask | canvas.blank_mask).sum(dim=1)[:, None, None]  # of each row
        turn = torch.arange(width - 1, device=slots.device) - (width - length)  # (B, 1, S − 1), negative: left padding
        position = canvas.position_ids.gather(1, slots)[..., None] + 1 + turn
        columns = canvas.columns_at(torch.where(turn >= 0, position % length, -1))  # (B, Q, S − 1)
        first = canvas.sequences.gather(1, canvas.given_mask.long().argmax(dim=1, keepdim=True))
        text = torch.where(known, canvas.sequences[:, None, :-1], first[..., None])
        text = torch.cat([text, first[..., None].expand(-1, text.shape[1], -1)], dim=2)  # adds the padding column
        return text.expand(-1, slots.shape[1], -1).gather(2, columns)

    def _without(self, words: list[int], logits, slots, known) -> torch.Tensor:
        """Excludes each token of `words` at slots where the other tokens of `words` already surround it."""
        canvas = self.canvas
        text = torch.nn.functional.pad(canvas.sequences[:, None, :-1].masked_fill(~known, -1), (0, 1), value=-1)
        text = text.expand(-1, slots.shape[1], -1)
        position = canvas.position_ids.gather(1, slots)
        for index, word in enumerate(words):
            completed = slots != canvas.pad_column
            for other, neighbour in enumerate(words):
                if other != index:
                    columns = canvas.columns_at(position + other - index)
                    completed = completed & (text.gather(2, columns[..., None]).squeeze(-1) == neighbour)
            banned = torch.zeros_like(logits, dtype=torch.bool)
            banned[..., word] = completed
            logits = logits.masked_fill(banned, -torch.inf)
        return logits
