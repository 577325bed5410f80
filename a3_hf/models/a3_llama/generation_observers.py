"""Observers of generation: a streamer, a commit hook, the history."""

from collections.abc import Callable

import torch


class Observers:
    """Reports each step to a streamer and a hook, and keeps the history; never changes the text.

    Args:
        streamer: a transformers streamer. `put` gets new tokens before the first open blank, in text order; a
            `TextDiffusionStreamer` also gets the tokens after it, by `put_draft`. One text only.
        commit_hook: `commit_hook(step, sequences, committed)`: (B, S) tokens, and (B, S) True where this step wrote.
        output_history: keep the text after each step.

    Raises:
        ValueError: not a streamer, or a streamer with more than one row.
    """

    def __init__(self, canvas, *, streamer=None, commit_hook: Callable | None = None, output_history: bool = False):
        if streamer is not None and canvas.sequences.shape[0] > 1:
            raise ValueError(f"streamer with {canvas.sequences.shape[0]} rows: expected a batch of 1")
        if streamer is not None and not callable(getattr(streamer, "put", None)):
            raise ValueError(f"streamer is a {type(streamer).__name__}: expected a transformers streamer (put, end)")
        self.canvas, self.streamer, self.commit_hook = canvas, streamer, commit_hook
        self.history: list[torch.Tensor] | None = [] if output_history else None
        self.streamed = -1  # columns handed to the streamer; −1: not even the prompt

    def start(self) -> None:
        """Sends the prompt to the streamer."""
        if self.streamer is not None:
            self._stream()

    def after_step(self, step: int) -> None:
        """Reports the tokens that `step` wrote."""
        canvas = self.canvas
        if self.commit_hook is not None:
            self.commit_hook(step, canvas.sequences[:, :-1], canvas.commit_step[:, :-1] == step)
        if self.history is not None:
            self.history.append(canvas.sequences[:, :-1].masked_fill(~canvas.known(), -1))
        if self.streamer is not None:
            self._stream()

    def finish(self) -> None:
        """Ends the stream."""
        if self.streamer is not None:
            self.streamer.end()

    def _stream(self) -> None:
        canvas = self.canvas
        columns = torch.arange(canvas.pad_column, device=canvas.end.device)[None]
        real = (canvas.given_mask | canvas.blank_mask) & ~canvas.is_over(columns)
        known = (canvas.known() & real)[0].cpu()
        is_open = (real & ~canvas.known())[0].cpu()
        tokens = canvas.sequences[0, :-1].cpu()
        certain = int(is_open.long().argmax()) if is_open.any() else len(known)
        columns = torch.arange(len(known))
        fresh = tokens[known & (columns >= max(self.streamed, 0)) & (columns < certain)]
        if len(fresh) or self.streamed < 0:
            self.streamer.put(fresh)
        self.streamed = max(self.streamed, certain)
        draft = tokens[known & (columns >= certain)]
        if hasattr(self.streamer, "put_draft") and len(draft):
            self.streamer.put_draft(draft)
