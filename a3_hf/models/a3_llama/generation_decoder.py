"""State and operations shared by all decoding strategies: noise, logits processing, commits."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from copy import copy
from typing import Protocol

import torch

from .generation_canvas import Canvas, columns_of
from .generation_config import A3GenerationConfig
from .generation_observers import Observers
from .generation_processors import SlotProcessors, make_warpers, sampling_of, warp
from .generation_runner import ForwardRunner
from .generation_sampling import (
    at_least_float32,
    choose_tokens,
    commit_scores,
    slots_to_commit,
    uniform_noise,
)
from .orders import seed_of

SAMPLE, CRITERION, ACCEPT, RESIDUAL = range(4)  # purposes of noise
FINITE_CHECK_EVERY = 32  # steps, on devices where reading a value synchronises


class NonFiniteLogitsError(ValueError):
    """The model's logits are NaN. `step` is the first such step; `output` holds the tokens committed before it."""

    def __init__(self, step: int):
        super().__init__(
            f"the model's logits are NaN at step {step}; this error's `output` holds the tokens committed before. Usually "
            "float16 overflowed: try bfloat16 or float32."
        )
        self.step = step
        self.output = None


class SlotNoise:
    """Random numbers of every blank, independent of batch and padding."""

    def __init__(self, config: A3GenerationConfig, canvas: Canvas):
        self.row_seeds = _row_seeds(config.seed, canvas)
        self.seeds = torch.tensor(self.row_seeds, dtype=torch.long, device=canvas.sequences.device)
        place = canvas.blank_mask.long().cumsum(
            dim=1
        )  # the number of a blank in its row, from 1; 0 for the padding column
        self.place = torch.nn.functional.pad(place, (0, 1))

    def uniform(self, columns: torch.Tensor, step: int | torch.Tensor, purpose: int) -> torch.Tensor:
        """Returns (B, n) numbers in [0, 1) for the canvas `columns` (B, n) at a step, or at steps (B, n)."""
        return uniform_noise(self.seeds, self.place.gather(1, columns), step, purpose)

    def afresh(self) -> "SlotNoise":
        """Returns noise with other numbers for the same blanks, for another round."""
        again = copy(self)
        again.seeds = self.seeds + 1
        return again

    def rows(self, index: torch.Tensor) -> "SlotNoise":
        """Returns the noise of the rows `index` (n,)."""
        part = copy(self)
        part.row_seeds = [self.row_seeds[row] for row in index.tolist()]
        part.seeds, part.place = self.seeds[index], self.place[index]
        return part

    @classmethod
    def joined(cls, noises: "Sequence[SlotNoise]", width: int) -> "SlotNoise":
        """Returns the noise of several canvases' rows in one of `width` columns."""
        whole = copy(noises[0])
        whole.row_seeds = [seed for noise in noises for seed in noise.row_seeds]
        whole.seeds = torch.cat([noise.seeds for noise in noises])
        places = (noise.place[:, :-1] for noise in noises)
        whole.place = torch.cat([torch.nn.functional.pad(place, (0, width + 1 - place.shape[1])) for place in places])
        return whole

    def order_generators(self) -> list[torch.Generator]:
        """Returns one generator per row, for random orders."""
        return [torch.Generator().manual_seed(seed) for seed in self.row_seeds]


def _row_seeds(seed, canvas: Canvas) -> list[int]:
    """Returns one seed per row, from the seed, the row's text and the number of equal rows before it."""
    batch_size = canvas.sequences.shape[0]
    if isinstance(seed, (list, tuple)):
        if len(seed) != batch_size:
            raise ValueError(f"seed holds {len(seed)} seeds: expected an integer, or {batch_size}, one per row")
        return [seed_of(one) for one in seed]
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    real = (canvas.given_mask | canvas.blank_mask).cpu()
    texts = canvas.sequences[:, :-1].masked_fill(canvas.blank_mask, -1).cpu()
    seen, seeds = Counter(), []
    for text, mask in zip(texts, real, strict=True):
        content = text[mask].numpy().tobytes()
        seeds.append(row_seed(seed, text[mask], seen[content]))
        seen[content] += 1
    return seeds


def row_seed(seed: int, text: torch.Tensor, copy: int) -> int:
    """Returns the seed of a row: of its text (S,), −1 at blanks and without padding, and how many equal rows are before it."""
    return seed_of(seed, text.numpy().tobytes(), copy)


class RowsHook(Protocol):
    """A logits hook that follows the rows of a filling as they leave and join."""

    def __call__(self, step: int, columns: torch.Tensor, logits: torch.Tensor) -> torch.Tensor: ...

    def rows(self, index: torch.Tensor) -> "RowsHook":
        """The hook of the rows `index` (n,)."""

    @classmethod
    def joined(cls, hooks: "Sequence[RowsHook]", canvas: Canvas) -> "RowsHook":
        """One hook for the rows of several, in one canvas."""


class Decoder:
    """Fills one canvas: runs the model, chooses tokens, commits them.

    Args:
        deadline: `time.perf_counter()` after which only one final pass starts.
        step: the number of the first step.
    """

    def __init__(
        self,
        canvas: Canvas,
        runner: ForwardRunner,
        config: A3GenerationConfig,
        processors: SlotProcessors,
        chance: SlotNoise,
        observers: Observers,
        *,
        logits_hook=None,
        deadline: float = math.inf,
        step: int = 0,
    ):
        self.canvas, self.runner, self.config = canvas, runner, config
        self.processors, self.chance, self.observers = processors, chance, observers
        self.logits_hook, self.deadline, self.step = logits_hook, deadline, step
        self.first_step = step
        self.row_sampling: list | None = None  # `sampling_of` each row, where they differ
        # (B, 1) how many steps ran before each row joined; None: all rows began together
        self.steps_before: torch.Tensor | None = None
        self.has_ended = False  # an EOS ended the continuation of some row
        self.extra_passes = 0  # of the model, beside the runner's
        self.last_step: int | None = None  # the step that wrote all remaining blanks after the deadline

    def uniform(self, columns: torch.Tensor, purpose: int) -> torch.Tensor:
        """Returns (B, n) this step's random numbers for `columns` (B, n)."""
        return self.chance.uniform(columns, self.row_step() - self.first_step, purpose)

    def row_step(self) -> int | torch.Tensor:
        """The number of the step; (B, 1) where rows have joined at different times."""
        return self.step if self.steps_before is None else self.step - self.steps_before

    def again(self, canvas: Canvas, chance: SlotNoise, step: int) -> "Decoder":
        """Returns a decoder of the same settings for another canvas of these rows, from its first pass on.

        Args:
            step: the number of its first step.
        """
        other = copy(self)
        other._follow(canvas, self.runner.again(canvas))
        other.observers.streamer = None
        other.chance, other.step, other.first_step, other.has_ended = chance, step, step, False
        return other

    def keep_rows(self, index: torch.Tensor) -> None:
        """Lets all rows but `index` (n,) go."""
        canvas = self.canvas.rows(index)
        self._follow(canvas, self.runner.rows(index, canvas))
        if self.logits_hook is not None:
            self.logits_hook = self.logits_hook.rows(index)
        self.chance = self.chance.rows(index)
        self.steps_before = None if self.steps_before is None else self.steps_before[index]
        if self.row_sampling is not None:
            self.row_sampling = [self.row_sampling[row] for row in index.tolist()]

    @classmethod
    def joined(cls, decoders: "Sequence[Decoder]") -> "Decoder":
        """Returns a decoder of the rows of several, whose settings are the same but for `do_sample` and the sampling
        processors'. They are used up.
        """
        canvas = Canvas.joined([decoder.canvas for decoder in decoders])
        runner = ForwardRunner.joined([decoder.runner for decoder in decoders], canvas)
        whole = copy(decoders[0])
        whole.chance = SlotNoise.joined([decoder.chance for decoder in decoders], canvas.pad_column)
        if whole.logits_hook is not None:
            whole.logits_hook = type(whole.logits_hook).joined([decoder.logits_hook for decoder in decoders], canvas)
        samplings = [
            decoder.row_sampling or [sampling_of(decoder.config)] * len(decoder.canvas.end) for decoder in decoders
        ]
        flat = [sampling for rows in samplings for sampling in rows]
        whole.row_sampling = None if set(flat) == {sampling_of(whole.config)} else flat
        whole.has_ended = any(decoder.has_ended for decoder in decoders)
        whole.step = max(decoder.step for decoder in decoders)
        late = [whole.step - decoder.row_step() for decoder in decoders]
        late = [
            torch.zeros_like(decoder.canvas.end[:, None]) + each for decoder, each in zip(decoders, late, strict=True)
        ]
        whole.steps_before = torch.cat(late)
        whole._follow(canvas, runner)
        return whole

    def _follow(self, canvas: Canvas, runner: ForwardRunner) -> None:
        self.canvas, self.runner = canvas, runner
        self.processors, self.observers = copy(self.processors), copy(self.observers)
        self.processors.canvas = self.observers.canvas = canvas

    def out_of_time(self) -> bool:
        return time.perf_counter() > self.deadline

    def logits_of(self, content: torch.Tensor, slots: torch.Tensor, **groups) -> torch.Tensor:
        """Returns the model's logits (B, Q, V). By default, the first pass's content (given tokens) is singletons."""
        return self.runner.forward(content, slots, **groups or {"singletons": self.runner.passes == 0})

    def processed(self, logits: torch.Tensor, slots: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
        """Applies the logits hook and all processors except the sampling ones."""
        if self.logits_hook is not None:
            logits = self.logits_hook(self.step, slots, logits)
        return self.processors.process(logits, slots, self.canvas.known()[:, None] if known is None else known)

    def widths_known(self) -> bool:
        """True if each step commits a fixed number of tokens and no row ends early, so no value is read from the device."""
        config = self.config
        return config.threshold is None and config.entropy_budget is None and not self.canvas.eos_token_ids.numel()

    def select(self, scores: torch.Tensor, slots: torch.Tensor, tokens_per_step: int | torch.Tensor) -> torch.Tensor:
        """Returns (B, Q) bool, the slots to commit by the config's criterion.

        Args:
            scores: (B, Q, V) processed logits.
            tokens_per_step: one number, or (B, 1); used without threshold and entropy budget.
        """
        threshold, entropy_budget = self.config.threshold, self.config.entropy_budget
        criterion = self.config.criterion or ("confidence" if entropy_budget is None else "entropy")
        scores_of_slots = commit_scores(
            scores, criterion, self.uniform(slots, CRITERION) if criterion == "random" else None
        )
        if self.config.criterion_temperature:
            uniform = self.uniform(slots, CRITERION).clamp_min(1e-12)
            scores_of_slots = scores_of_slots / self.config.criterion_temperature - (-uniform.log()).log()
        return slots_to_commit(
            scores_of_slots,
            slots != self.canvas.pad_column,
            tokens_per_step=tokens_per_step,
            confidence=None if threshold is None else commit_scores(scores, "confidence").exp(),
            threshold=threshold,
            entropy=None if entropy_budget is None else -commit_scores(scores, "entropy"),
            entropy_budget=entropy_budget,
        )

    def warped(self, scores: torch.Tensor) -> torch.Tensor:
        """Applies the sampling processors to processed logits (B, Q, V); greedy rows have none."""
        if self.row_sampling is None:
            return warp(self.processors.warpers, scores)
        scores = at_least_float32(scores).clone()
        for sampling, rows in self._rows_by_sampling():
            scores[rows] = warp(make_warpers(sampling), scores[rows])
        return scores

    def choose(self, scores: torch.Tensor, slots: torch.Tensor, numbers: torch.Tensor | None = None) -> torch.Tensor:
        """Returns (B, Q) a token for each slot, from warped logits.

        Args:
            numbers: (B, Q) the numbers of the steps whose noise decides; None: this step's.
        """
        if self.row_sampling is None and not self.config.do_sample:
            return choose_tokens(scores, None)
        noise = self.uniform(slots, SAMPLE) if numbers is None else self.chance.uniform(slots, numbers, SAMPLE)
        if self.row_sampling is None:
            return choose_tokens(scores, noise)
        tokens = torch.empty_like(slots)
        for sampling, rows in self._rows_by_sampling():
            tokens[rows] = choose_tokens(scores[rows], None if sampling is None else noise[rows])
        return tokens

    def _rows_by_sampling(self) -> list[tuple[tuple[float | None, ...] | None, torch.Tensor]]:
        """Returns each way of sampling and the rows (n,) that it has."""
        rows: dict = {}
        for row, sampling in enumerate(self.row_sampling):
            rows.setdefault(sampling, []).append(row)
        device = self.canvas.end.device
        return [(sampling, torch.tensor(index, device=device)) for sampling, index in rows.items()]

    def commit(self, index: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor, scores: torch.Tensor) -> None:
        """Writes tokens to the canvas and reports the step. Arguments as in `Canvas.commit`."""
        canvas = self.canvas
        canvas.commit(index, tokens, logits, scores, self.row_step())
        if logits.device.type == "cpu" or (self.step + 1) % FINITE_CHECK_EVERY == 0:
            self.check_finite()
        if canvas.eos_token_ids.numel() and not self.has_ended:
            self.has_ended = bool((canvas.end < canvas.pad_column - 1).any())
            self.runner.ragged = self.runner.ragged or self.has_ended
        self.observers.after_step(self.step)
        self.step += 1

    def check_finite(self) -> None:
        """Checks the tokens written so far.

        Raises:
            NonFiniteLogitsError: the model's logits were NaN.
            ValueError: the processors excluded all tokens.
        """
        failed, excluded = self.canvas.failed_step, self.canvas.excluded_step
        if int(torch.maximum(failed, excluded)) < 0:  # a single read, which on a GPU synchronises
            return
        if int(failed) >= 0:
            raise NonFiniteLogitsError(int(failed))
        raise ValueError(
            f"suppress_tokens, bad_words_ids, logits_processor or logits_hook exclude all tokens at step {int(excluded)} "
            "(an EOS is excluded if text stands after it): expected at least one left"
        )

    def mask_finished(self, columns: torch.Tensor) -> torch.Tensor:
        """Replaces `columns` (B, n) after the end of a row's continuation by the padding column."""
        if not self.has_ended:
            return columns
        return columns.masked_fill(self.canvas.is_over(columns), self.canvas.pad_column)

    def fill_remaining(self, content: torch.Tensor) -> None:
        """Ends the continuation after its last written token, and fills all blanks before it in one pass (after the
        deadline). `content` (B, C) are columns not yet encoded.
        """
        canvas = self.canvas
        columns = torch.arange(canvas.pad_column, device=canvas.end.device)
        last = torch.where(canvas.known(), columns, -1).amax(dim=1)
        last = torch.maximum(last, canvas.new_from[:, 0] - 1)
        canvas.end = torch.minimum(canvas.end, last)
        slots = columns_of(canvas.blank_mask & ~canvas.known() & ~canvas.is_over(columns), canvas.pad_column)
        if slots.shape[1]:
            self.runner.ragged, self.last_step = True, self.step
            logits = self.logits_of(content, slots)
            scores = self.warped(self.processed(logits, slots))
            self.commit(slots, self.choose(scores, slots), logits, scores)
