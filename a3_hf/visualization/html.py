"""HTML pages of one file, without network: the replay of a generated text, and the surprise of each token."""

import base64
import hashlib
import math
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

from .tokens import Piece, confidence_colour, number_of_steps, visible

HIGHEST_SURPRISE = 8.0  # nats; the end of the colour scale of a surprise page


def replay_page(pieces: Sequence[Piece], title: str) -> str:
    """The HTML of a page that replays how a text was written.

    Written tokens are coloured by their confidence; without JavaScript the page shows the whole text. `#step=3` opens it
    after three steps. Every token is a `span.token` whose `data-step` is `Piece.step`, from 0; the counter and the tooltips
    count steps from 1.

    Raises:
        ValueError: no pieces.
    """
    steps = number_of_steps(pieces)
    written = [piece for piece in pieces if piece.step >= 0]
    summary = f"{_count(len(written), 'token')} written in {_count(steps, 'step')}"
    scores = [piece.log_prob for piece in written if piece.log_prob is not None]
    if scores:
        over = "" if len(scores) == len(written) else f" over {_count(len(scores), 'scored token')}"
        summary += f" · log-likelihood {_number(math.fsum(scores))} nats{over}"
    spans = []
    for index, piece in enumerate(pieces):
        order = f"step {piece.step + 1} of {steps}" if piece.step >= 0 else "given"
        style = "" if piece.step < 0 or piece.confidence is None else f"--c:{confidence_colour(piece.confidence)}"
        spans.append(_span(piece, index, order, style))
    legend = _legend(
        _swatches("unsure, 0 %", "sure, 100 %", [(confidence_colour(at / 10), 38) for at in range(11)]),
        '<span class="key"><span class="swatch box"></span>open</span><span class="key">plain: given</span>',
    )
    controls = Template(_file("controls.html")).substitute(steps=steps) if written else ""
    return _page(title, "narrow", summary, controls + _text(spans) + legend)


def surprise_page(columns: Sequence[tuple[str, Sequence[Piece]]], title: str) -> str:
    """The HTML of a page with the surprise (-log p, nats) of each token of a text under several orders.

    Args:
        columns: (name, pieces) of each order, with the same tokens in each. Pointing at a token marks it in every column.

    Raises:
        ValueError: no columns, a column without pieces, columns of different length.
    """
    if not columns:
        raise ValueError("columns is empty: expected at least one (name, pieces)")
    for name, pieces in columns:
        if not pieces:
            raise ValueError(f"columns: {name!r} has no pieces: expected at least one token")
    lengths = [len(pieces) for _, pieces in columns]
    if len(set(lengths)) > 1:
        raise ValueError(f"columns have {lengths} tokens: expected the same tokens in every column")
    tints = [_surprise_tint(at * HIGHEST_SURPRISE / 10) for at in range(11)]
    swatches = _swatches("0", f"{HIGHEST_SURPRISE:g} nats or more", tints)
    legend = _legend(swatches, '<span class="key">plain: not scored</span>')
    body = f'{legend}<div class="columns">{"".join(_column(name, pieces) for name, pieces in columns)}</div>'
    return _page(title, "wide", "Surprise of each token, −log p in nats: 0 is certain.", body)


def _column(name: str, pieces: Sequence[Piece]) -> str:
    scores = [piece.log_prob for piece in pieces if piece.log_prob is not None]
    summary = "not scored"
    if scores:
        total = -math.fsum(scores) + 0.0  # not −0
        mean = f"mean {_number(total / len(scores))} over {_count(len(scores), 'token')}"
        summary = f"sum {_number(total)} nats, {mean}"
    spans = []
    for index, piece in enumerate(pieces):
        style = ""
        if piece.log_prob is not None:
            colour, strength = _surprise_tint(-piece.log_prob)
            style = f"--c:{colour};--a:{strength}%"
        spans.append(_span(piece, index, "", style))
    return f"""<section class="column" data-name="{_escaped(name)}">
<h2>{_escaped(name)}</h2>
<p class="summary">{summary}</p>
{_text(spans)}</section>"""


def _surprise_tint(surprise: float) -> tuple[str, int]:
    """The colour of a surprise in nats and its strength in percent: expected tokens are pale."""
    height = min(max(surprise / HIGHEST_SURPRISE, 0.0), 1.0)
    return confidence_colour(1 - height), round(12 + 48 * height)


def _span(piece: Piece, index: int, order: str, style: str) -> str:
    """The element of a token: its text as content, its numbers as data attributes and as tooltip."""
    facts = [order, f"group {piece.group}"]
    data = {"index": index, "step": piece.step, "group": piece.group}
    if piece.log_prob is not None:
        facts += [f"confidence {100 * piece.confidence:.1f} %", f"log p {_number(piece.log_prob)} nats"]
        data["log-prob"] = repr(float(piece.log_prob))
    elif piece.step >= 0 or not order:
        facts.append("not scored")
    if piece.token_id is not None:
        data["token-id"] = piece.token_id
    text = visible(piece.text)
    core = text.strip(" \n") or text.strip("\n")  # tinted: the text without spaces around a word and line breaks
    before, _, after = text.partition(core) if core else ("", "", text)
    mark = "" if core or not style else f' data-mark="{"↵" if text else "◦"}"'
    attributes = "".join(f' data-{key}="{value}"' for key, value in data.items())
    if style:
        attributes += f' style="{style}"'
    kind = "tinted" if style else "unscored" if piece.step >= 0 else "given"
    return (
        f'<span class="token {kind}"{attributes} title="{_escaped(", ".join(filter(None, facts)))}">'
        f'{_escaped(before)}<span class="ink"{mark}>{_escaped(core)}</span>{_escaped(after)}</span>'
    )


def _text(spans: Sequence[str]) -> str:
    return f'<div class="text" dir="auto">{"".join(spans)}</div>\n'


def _legend(*keys: str) -> str:
    return f'<div class="legend" role="group" aria-label="Legend">{"".join(keys)}</div>\n'


def _swatches(low: str, high: str, tints: Sequence[tuple[str, int]]) -> str:
    bars = "".join(f'<span class="swatch" style="--c:{colour};--a:{strength}%"></span>' for colour, strength in tints)
    return f'<span class="key">{low}<span class="bar">{bars}</span>{high}</span>'


def _page(title: str, layout: str, summary: str, body: str) -> str:
    """The whole document. Its content security policy allows no network and no script except page.js."""
    script = _file("page.js")
    return Template(_file("page.html")).substitute(
        title=_escaped(title),
        layout=layout,
        summary=summary,
        body=body,
        style=_file("page.css"),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _escaped(text: str) -> str:
    return escape(visible(text), quote=True)


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−").replace("inf", "∞")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
