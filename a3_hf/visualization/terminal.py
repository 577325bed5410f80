"""The replay of a generated text in a terminal."""

import time
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from .tokens import Piece, confidence_colour, number_of_steps, visible

SECONDS_PER_STEP = 0.1


def animate(pieces: Sequence[Piece], console: Console) -> None:
    """Replays on a terminal how a text was written, step by step, and leaves the whole text there.

    While it runs, a text taller than the terminal is cut to the lines around the tokens being written. A console that is
    not a terminal gets only the text.

    Raises:
        ValueError: no pieces.
    """
    last = number_of_steps(pieces) - 1
    if not console.is_terminal:
        console.print(frame(pieces, last), soft_wrap=True)
        return
    with Live(console=console, auto_refresh=False) as live:
        for step in range(-1, last + 1):
            footer = _footer(pieces, step)
            height = console.height - len(footer.wrap(console, console.width)) - 2
            live.update(Group(_window(pieces, step, console, height), "", footer), refresh=True)
            if step < last:
                time.sleep(SECONDS_PER_STEP)
        live.update(Group(frame(pieces, last), "", _footer(pieces, last)))


def frame(pieces: Sequence[Piece], step: int) -> Text:
    """The text after a step (-1: before the first): tokens given and written so far, and boxes for the others.

    Written tokens are coloured by their confidence; those of this step are bold, except in the last step.

    Raises:
        ValueError: no pieces.
    """
    last = number_of_steps(pieces) - 1
    text = Text()
    for piece in pieces:
        shown = visible(piece.text)
        if piece.step > step:
            text.append(_boxes(shown), style="dim")
        elif piece.step < 0:
            text.append(shown)
        else:
            style = "italic" if piece.confidence is None else confidence_colour(piece.confidence)
            text.append(shown, style=f"bold {style}" if piece.step == step < last else style)
    return text


def _boxes(text: str) -> str:
    """Boxes as wide as a text; its line breaks and leading spaces are kept."""
    spaces = len(text) - len(text.lstrip(" "))
    lines = text[spaces:].split("\n")
    if text and not any(lines):
        return "░" * max(spaces, 1) + text[spaces:]
    return text[:spaces] + "\n".join("░" * cell_len(line) for line in lines)


def _window(pieces: Sequence[Piece], step: int, console: Console, height: int) -> Text:
    """The frame, cut to `height` lines around the first token of the step."""
    text = frame(pieces, step)
    lines = text.wrap(console, console.width)
    if len(lines) <= height:
        return text
    first = next((index for index, piece in enumerate(pieces) if piece.step == step), 0)
    before = frame(pieces[: first + 1], step).wrap(console, console.width)
    top = min(max(len(before) - 1 - height // 2, 0), max(len(lines) - height, 0))
    return Text("\n").join(lines[top : top + max(height, 1)])


def _footer(pieces: Sequence[Piece], step: int) -> Text:
    steps = [piece.step for piece in pieces if piece.step >= 0]
    done, of = step + 1, number_of_steps(pieces)
    count, tokens = sum(written <= step for written in steps), len(steps)
    counter = f"step {done:{len(str(of))}}/{of}  {count:{len(str(tokens))}}/{tokens} tokens  "
    footer = Text(f"{counter}unsure ", style="dim")
    for tenth in range(11):
        footer.append("■", style=f"not dim {confidence_colour(tenth / 10)}")
    return footer.append(" sure  ░ open")
