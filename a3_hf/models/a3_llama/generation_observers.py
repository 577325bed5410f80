"""What looks on while a text is filled: a streamer, a hook, the history."""

from collections.abc import Callable

import torch


class Observers:
    """Called after each step; none of them changes the text.

    Args:
        streamer: transformers' own: `put` gets the tokens up to the first open blank as they become certain, in text
            order; a `TextDiffusionStreamer` also gets, by `put_draft`, what stands after it so far. One text only.
        commit_hook: `commit_hook(step, sequences, committed)`: (B, S) tokens, and (B, S) True where this step wrote.
        output_history: keep the text after each step.

    Raises:
        ValueError: what is no streamer, or one with more than one row.
    """

    def __init__(self, canvas, *, streamer=None, commit_hook: Callable | None = None, output_history: bool = False):
        if streamer is not None and canvas.sequences.shape[0] > 1:
            raise ValueError(f"streamer shows one text: expected a batch of 1, got {canvas.sequences.shape[0]}")
        if streamer is not None and not callable(getattr(streamer, "put", None)):
            raise ValueError(f"streamer is a {type(streamer).__name__}: expected a streamer of transformers (put, end)")
        self.canvas, self.streamer, self.commit_hook = canvas, streamer, commit_hook
        self.history: list[torch.Tensor] | None = [] if output_history else None
        self.streamed = -1  # columns handed to the streamer; −1: not even the prompt

    def start(self) -> None:
        """The prompt goes to the streamer."""
        if self.streamer is not None:
            self._stream()

    def after_step(self, step: int) -> None:
        """Shows what `step` wrote."""
        canvas = self.canvas
        if self.commit_hook is not None:
            self.commit_hook(step, canvas.sequences[:, :-1], canvas.commit_step[:, :-1] == step)
        if self.history is not None:
            self.history.append(canvas.sequences[:, :-1].masked_fill(~canvas.known(), -1))
        if self.streamer is not None:
            self._stream()

    def finish(self) -> None:
        """Everything written has been shown."""
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
