"""How a text came about: replayed in the terminal and on pages of one file."""

import base64
import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

# From probability 0 to 1, in steps of about equal size in OKLab. Lightness falls all the way and the hue goes from orange
# to blue, so that the order is seen without colour and with any kind of colour blindness.
SCALE = ("#f09103", "#d38b69", "#b08695", "#8182ba", "#3d7adc")
HIGHEST_SURPRISE = 8.0  # nats; the end of the scale of a surprise page
CUT_AFTER = 64  # tokens decoded together before token_texts looks for a place to start afresh
# Controls other than newline and tab, as their pictures; what can't be encoded or turns the direction of a text.
PICTURES = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    127: "\u2421",
    **dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd"),
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),
}


@dataclass(frozen=True)
class Piece:
    """A token of a text: what it says, when it was written and how likely it was.

    `text` is what the token adds to the text, `group` its group (lower = earlier), `step` the step from 0 at which it was
    written (−1: given), `log_prob` its log-probability in nats (None: not scored).

    Raises:
        ValueError: a step below −1; a log_prob that is NaN.
    """

    text: str
    group: int
    step: int
    log_prob: float | None
    token_id: int | None = None

    def __post_init__(self):
        if self.step < -1:
            raise ValueError(f"step={self.step}; it takes the step from 0, or -1 for a given token")
        if self.log_prob is not None and math.isnan(self.log_prob):
            raise ValueError("log_prob is NaN; it takes nats, or None where a token is not scored")

    @property
    def confidence(self) -> float | None:
        """The probability of the token; None where not scored."""
        return None if self.log_prob is None else math.exp(min(self.log_prob, 0.0))


def token_texts(tokenizer, token_ids: Sequence[int]) -> list[str]:
    """The text each token adds. Joined, they are `tokenizer.decode(token_ids, skip_special_tokens=True)`.

    A character spread over several tokens belongs to the last of them; the others, and special tokens, add "".
    """

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    token_ids = list(token_ids)
    whole = decode(token_ids)
    texts, end = [], 0
    start, base = 0, 0  # the tokens from `start` on, decoded alone, are the text from `base` on
    for index in range(len(token_ids)):
        prefix = decode(token_ids[start : index + 1])
        shared = base + _shared_length(prefix, whole, base) if index + 1 < len(token_ids) else len(whole)
        texts.append(whole[end : max(end, shared)])
        end = max(end, shared)
        is_clean = end == shared == base + len(prefix) and not prefix.endswith("\ufffd")
        if is_clean and index + 1 - start >= CUT_AFTER and decode(token_ids[index + 1 :]) == whole[end:]:
            start, base = index + 1, end
    return texts


def _shared_length(prefix: str, whole: str, base: int) -> int:
    """How many characters of `prefix` the text `whole` has from `base` on."""
    if whole.startswith(prefix, base):
        return len(prefix)
    pairs = zip(prefix, whole[base:], strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(prefix), len(whole) - base))


def confidence_colour(confidence: float) -> str:
    """A colour "#rrggbb" for a probability, from orange (0) to blue (1); it shows on black and on white."""
    place = min(max(confidence, 0.0), 1.0) * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    ends = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in SCALE[low : low + 2]]
    return "#" + "".join(f"{round(one + (other - one) * (place - low)):02x}" for one, other in zip(*ends, strict=True))


def visible(text: str) -> str:
    """The text with control characters other than newline and tab replaced by characters that show them."""
    return text.translate(PICTURES)


# In the terminal


def frame(pieces: Sequence[Piece], step: int) -> Text:
    """The text after a step (from 0; −1: before the first): given and written tokens, boxes where it is open.

    Written tokens have the colour of their confidence; those of this very step are bold, the last step's excepted.

    Raises:
        ValueError: no pieces.
    """
    _check(pieces)
    last = _last_step(pieces)
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


def animate(pieces: Sequence[Piece], console: Console, *, seconds_per_step: float = 0.1) -> None:
    """Shows on a terminal how a text is written, step by step, and leaves the full text there.

    While it runs, a text taller than the terminal is shown around the tokens being written. Where the console is not a
    terminal, the text alone is printed.

    Raises:
        ValueError: no pieces; negative seconds_per_step.
    """
    _check(pieces)
    if not seconds_per_step >= 0:
        raise ValueError(f"seconds_per_step={seconds_per_step}; it takes 0 or more")
    last = _last_step(pieces)
    if not console.is_terminal:
        console.print(frame(pieces, last), soft_wrap=True)
        return
    with Live(console=console, auto_refresh=False) as live:
        for step in range(-1, last + 1):
            footer = _footer(pieces, step)
            height = console.height - len(footer.wrap(console, console.width)) - 2
            live.update(Group(_window(pieces, step, console, height), "", footer), refresh=True)
            if step < last:
                time.sleep(seconds_per_step)
        live.update(Group(frame(pieces, last), "", _footer(pieces, last)))


def _boxes(text: str) -> str:
    """Boxes as wide as a text, where its line breaks and the spaces before it stay."""
    spaces = len(text) - len(text.lstrip(" "))
    lines = text[spaces:].split("\n")
    if text and not any(lines):
        return "░" * max(spaces, 1) + text[spaces:]
    return text[:spaces] + "\n".join("░" * cell_len(line) for line in lines)


def _window(pieces: Sequence[Piece], step: int, console: Console, height: int) -> Text:
    """The frame, or `height` of its lines around the first token of the step where it has more."""
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
    of, tokens = str(_last_step(pieces) + 1), str(len(steps))
    count = sum(written <= step for written in steps)
    footer = Text(
        f"step {step + 1:{len(of)}}/{of}  {count:{len(tokens)}}/{tokens} tokens  ",
        style="dim",
    )
    footer.append("unsure ")
    for tenth in range(11):
        footer.append("■", style=f"not dim {confidence_colour(tenth / 10)}")
    return footer.append(" sure  ░ open")


# On a page


def replay_page(pieces: Sequence[Piece], title: str) -> str:
    """A page of one file, without network, that replays how a text was written.

    Written tokens are coloured by confidence; without JavaScript the page shows the full text. `#step=3` opens it with
    three steps done. Every token is a `span.token` whose `data-step` counts from 0 as `Piece.step` does; the counter and
    the tooltips count steps from 1.

    Raises:
        ValueError: no pieces.
    """
    _check(pieces)
    last = _last_step(pieces)
    written = [piece for piece in pieces if piece.step >= 0]
    summary = f"{_count(len(written), 'token')} written in {_count(last + 1, 'step')}"
    scores = [piece.log_prob for piece in written if piece.log_prob is not None]
    if scores:
        of = "" if len(scores) == len(written) else f" over {_count(len(scores), 'scored token')}"
        summary += f" · log-likelihood {_number(math.fsum(scores))} nats{of}"
    spans = []
    for index, piece in enumerate(pieces):
        order = f"step {piece.step + 1} of {last + 1}" if piece.step >= 0 else "given"
        style = "" if piece.step < 0 or piece.confidence is None else f"--c:{confidence_colour(piece.confidence)}"
        spans.append(_span(piece, index, order, style))
    legend = (
        f"{_swatches('unsure, 0 %', 'sure, 100 %', [(confidence_colour(at / 10), 38) for at in range(11)])}"
        '<span class="key"><span class="swatch box"></span>open</span><span class="key">plain: given</span>'
    )
    # the controls work by the script alone: they are hidden until it runs
    controls = f"""<div class="controls" role="group" aria-label="Replay" hidden>
<button type="button" id="play" aria-label="Play" aria-keyshortcuts="Space">▶ Play</button>
<button type="button" id="back" aria-label="Previous step" aria-keyshortcuts="ArrowLeft">‹</button>
<input type="range" id="at" min="0" max="{last + 1}" value="{last + 1}" step="1" aria-label="Steps done">
<button type="button" id="next" aria-label="Next step" aria-keyshortcuts="ArrowRight">›</button>
<label>Speed <select id="speed" aria-label="Speed"><option value="0.5">½×</option>
<option value="1" selected>1×</option><option value="2">2×</option><option value="4">4×</option></select></label>
<output id="counter" for="at" aria-live="polite">step {last + 1} of {last + 1}</output>
</div>
"""
    return _page(
        title,
        f"""<main class="narrow">
<h1>{_escaped(title)}</h1>
<p class="summary">{summary}</p>
{controls if written else ""}<div class="text" dir="auto">{"".join(spans)}</div>
<div class="legend" role="group" aria-label="Legend">{legend}</div>
</main>""",
        REPLAY,
    )


def surprise_page(columns: Sequence[tuple[str, Sequence[Piece]]], title: str) -> str:
    """A page of one file, without network: the surprise (−log p, nats) of each token of a text under several orders.

    Each column is (name, pieces), all for the same tokens. A token pointed at is marked in every column.

    Raises:
        ValueError: no columns, a column without pieces, columns of different length.
    """
    if not columns:
        raise ValueError("columns is empty; it takes at least one (name, pieces)")
    for name, pieces in columns:
        if not pieces:
            raise ValueError(f"columns: {name!r} has no pieces; it takes at least one token")
    lengths = [len(pieces) for _, pieces in columns]
    if len(set(lengths)) > 1:
        raise ValueError(f"columns have {lengths} tokens; they take the same tokens in every column")
    tints = [_surprise_tint(at * HIGHEST_SURPRISE / 10) for at in range(11)]
    legend = _swatches("0", f"{HIGHEST_SURPRISE:g} nats or more", tints)
    return _page(
        title,
        f"""<main class="wide">
<h1>{_escaped(title)}</h1>
<p class="summary">Surprise of each token, −log p in nats: 0 is certain.</p>
<div class="legend" role="group" aria-label="Legend">{legend}<span class="key">plain: not scored</span></div>
<div class="columns">{"".join(_column(name, pieces) for name, pieces in columns)}</div>
</main>""",
        SURPRISE,
    )


def _column(name: str, pieces: Sequence[Piece]) -> str:
    scores = [piece.log_prob for piece in pieces if piece.log_prob is not None]
    total = -math.fsum(scores) + 0.0  # not −0
    told = "not scored"
    if scores:
        told = f"sum {_number(total)} nats, mean {_number(total / len(scores))} over {_count(len(scores), 'token')}"
    spans = []
    for index, piece in enumerate(pieces):
        style = ""
        if piece.log_prob is not None:
            colour, strength = _surprise_tint(-piece.log_prob)
            style = f"--c:{colour};--a:{strength}%"
        spans.append(_span(piece, index, "", style))
    return f"""<section class="column" data-name="{_escaped(name)}">
<h2>{_escaped(name)}</h2>
<p class="summary">{told}</p>
<div class="text" dir="auto">{"".join(spans)}</div>
</section>"""


def _surprise_tint(surprise: float) -> tuple[str, int]:
    """The colour of a surprise in nats and its strength in percent: what was expected is pale."""
    height = min(max(surprise / HIGHEST_SURPRISE, 0.0), 1.0)
    return confidence_colour(1 - height), round(12 + 48 * height)


def _span(piece: Piece, index: int, order: str, style: str) -> str:
    """A token as an element that holds its text and nothing else, with what is known of it in data attributes."""
    told = [order, f"group {piece.group}"]
    data = {"index": index, "step": piece.step, "group": piece.group}
    if piece.log_prob is None:
        told.append("not scored" if piece.step >= 0 or not order else "")
    else:
        told += [f"confidence {100 * piece.confidence:.1f} %", f"log p {_number(piece.log_prob)} nats"]
        data["log-prob"] = repr(float(piece.log_prob))
    if piece.token_id is not None:
        data["token-id"] = piece.token_id
    text = visible(piece.text)
    core = text.strip(" \n") or text.strip("\n")  # what is tinted: neither spaces around a word nor line breaks
    before, _, after = text.partition(core) if core else ("", "", text)
    mark = "" if core or not style else f' data-mark="{"↵" if text else "◦"}"'
    attributes = "".join(f' data-{key}="{value}"' for key, value in data.items())
    kind = "tinted" if style else "unscored" if piece.step >= 0 else "given"
    if style:
        attributes += f' style="{style}"'
    return (
        f'<span class="token {kind}"{attributes} title="{_escaped(", ".join(filter(None, told)))}">'
        f'{_escaped(before)}<span class="ink"{mark}>{_escaped(core)}</span>{_escaped(after)}</span>'
    )


def _swatches(low: str, high: str, tints: Iterable[tuple[str, int]]) -> str:
    bars = "".join(f'<span class="swatch" style="--c:{colour};--a:{strength}%"></span>' for colour, strength in tints)
    return f'<span class="key">{low}<span class="bar">{bars}</span>{high}</span>'


def _page(title: str, body: str, script: str) -> str:
    """The whole document. Its policy lets nothing be loaded and no script run but this one."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escaped(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
<div id="tip" role="tooltip" hidden></div>
<script>{script}</script>
</body>
</html>
"""


def _escaped(text: str) -> str:
    return escape(visible(text), quote=True)


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−").replace("inf", "∞")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _check(pieces: Sequence[Piece]) -> None:
    if not pieces:
        raise ValueError("pieces is empty; it takes at least one token")


def _last_step(pieces: Sequence[Piece]) -> int:
    return max((piece.step for piece in pieces), default=-1)


STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf9; --ink: #22262b; --muted: #626a73; --line: #d9d6d0; --open: #e6e3dc;
  --button: #fff; --link: #3d7adc; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171b; --ink: #e8e6e1; --muted: #9ba3ad; --line: #363b43;
  --open: #2f343c; --button: #22262c; --link: #6aaef5; } }
* { box-sizing: border-box; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
main { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
.narrow { max-width: 46rem; }
.wide { max-width: 84rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
.summary { color: var(--muted); margin: 0 0 1.25rem; font-variant-numeric: tabular-nums; }
.column .summary { margin-bottom: .75rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem 2.5rem;
  margin-top: 1.75rem; }
.column { min-width: 0; border-top: 2px solid var(--line); padding-top: .75rem; }
.text { font-family: Charter, "Iowan Old Style", Georgia, "Liberation Serif", serif; font-size: 1.2rem;
  line-height: 1.75; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.ink { border-radius: .2em; -webkit-box-decoration-break: clone; box-decoration-break: clone; padding: .1em 0; }
.tinted .ink, .swatch { background: color-mix(in srgb, var(--c) var(--a, 38%), transparent); }
.narrow .tinted .ink { box-shadow: inset 0 -2px var(--c); }
.unscored .ink { box-shadow: inset 0 -2px var(--line); }
.ink[data-mark]::before { content: attr(data-mark); opacity: .55; font-size: .8em; padding: 0 .15em; }
.replaying .ink { transition: background-color .3s, color .3s; }
.narrow .fresh .ink { box-shadow: 0 0 0 2px var(--c, var(--line)); }
.open { -webkit-user-select: none; user-select: none; }
.narrow .open .ink { color: transparent; background: var(--open); box-shadow: none; transition: none; }
.here .ink { outline: 2px solid var(--ink); outline-offset: 1px; }
.controls { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem .6rem; margin: 0 0 1.5rem; padding: .6rem 0;
  border: solid var(--line); border-width: 1px 0; }
.controls[hidden] { display: none; }
button, select { font: inherit; color: inherit; background: var(--button); border: 1px solid var(--line);
  border-radius: .4rem; padding: .25rem .7rem; cursor: pointer; }
#play { min-width: 6.5rem; }
input[type=range] { flex: 1 1 9rem; min-width: 6rem; accent-color: var(--link); }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
output { min-width: 100%; color: var(--muted); font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.5rem; color: var(--muted); font-size: .85rem; }
.text + .legend { margin-top: 1.75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
.key { display: inline-flex; align-items: center; gap: .5rem; }
.bar { display: inline-flex; border-radius: .2rem; overflow: hidden; }
.swatch { display: inline-block; width: 1rem; height: .95rem; }
.swatch.box { width: 1.6rem; background: var(--open); border-radius: .2rem; }
#tip { position: fixed; z-index: 1; max-width: min(32rem, 90vw); padding: .35rem .6rem; border-radius: .4rem;
  background: var(--ink); color: var(--paper); font-size: .85rem; white-space: pre-line; pointer-events: none;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
#tip[hidden] { display: none; }
@media (prefers-reduced-motion: reduce) { .replaying .ink { transition: none; } }
@media print { .controls { display: none; } }
"""

# A tooltip that comes at once, in place of the browser's. Texts go in by textContent only.
TOOLTIP = """
"use strict";
const tokens = Array.from(document.querySelectorAll(".token"));
const tip = document.getElementById("tip");
for (const token of tokens) {
  token.dataset.told = token.title;
  token.removeAttribute("title");
}
function point(choose) {
  document.addEventListener("pointerover", (event) => {
    const token = event.target.closest ? event.target.closest(".token") : null;
    for (const marked of document.querySelectorAll(".here")) marked.classList.remove("here");
    tip.hidden = !token;
    if (!token) return;
    tip.textContent = choose(token);
    const box = token.querySelector(".ink").getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (above < 4 ? box.bottom + 8 : above) + "px";
  });
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
}
"""

REPLAY = (
    TOOLTIP
    + """
const slider = document.getElementById("at");
point((token) => {
  token.classList.add("here");
  return token.classList.contains("open") ? "open, " + token.dataset.told.split(", ")[0] : token.dataset.told;
});
if (slider) {
  const [play, back, next, speed, counter] =
    ["play", "back", "next", "speed", "counter"].map((id) => document.getElementById(id));
  const last = Number(slider.max);
  const steps = tokens.map((token) => Number(token.dataset.step));
  const written = steps.filter((step) => step >= 0).length;
  const pause = Math.max(40, Math.min(450, 20000 / last));
  let done = last, timer = null;

  function show(count) {
    done = Math.max(0, Math.min(last, count));
    let shown = 0;
    tokens.forEach((token, index) => {
      const open = steps[index] >= done;
      token.classList.toggle("open", open);
      token.classList.toggle("fresh", steps[index] >= 0 && steps[index] === done - 1 && done < last);
      if (open) token.setAttribute("aria-hidden", "true"); else token.removeAttribute("aria-hidden");
      if (steps[index] >= 0 && !open) shown += 1;
    });
    slider.value = String(done);
    slider.setAttribute("aria-valuetext", "step " + done + " of " + last);
    counter.textContent = "step " + done + " of " + last + " · " + shown + " of " + written + " tokens";
    document.body.dataset.done = String(done);
  }
  function stop() {
    clearTimeout(timer);
    timer = null;
    play.textContent = "▶ Play";
    play.setAttribute("aria-label", "Play");
    counter.setAttribute("aria-live", "polite");
  }
  function tick() {
    show(done + 1);
    if (done >= last) stop(); else timer = setTimeout(tick, pause / Number(speed.value));
  }
  function toggle() {
    if (timer !== null) return stop();
    if (done >= last) show(0);
    play.textContent = "❚❚ Pause";
    play.setAttribute("aria-label", "Pause");
    counter.setAttribute("aria-live", "off");
    timer = setTimeout(tick, pause / Number(speed.value));
  }
  function step(by) { stop(); show(done + by); }
  function fromAddress() {
    const found = /^#step=(\\d+)$/.exec(location.hash);
    if (found) { stop(); show(Number(found[1])); }
  }

  play.addEventListener("click", toggle);
  back.addEventListener("click", () => step(-1));
  next.addEventListener("click", () => step(1));
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  window.addEventListener("hashchange", fromAddress);
  document.addEventListener("keydown", (event) => {
    const name = event.target.tagName;
    if (event.ctrlKey || event.altKey || event.metaKey || name === "SELECT") return;
    if (event.key === " " && name !== "BUTTON") toggle();
    else if (event.key === "ArrowRight" && name !== "INPUT") step(1);
    else if (event.key === "ArrowLeft" && name !== "INPUT") step(-1);
    else return;
    event.preventDefault();
  });
  document.querySelector(".controls").hidden = false;
  document.body.classList.add("replaying");
  show(last);
  fromAddress();
}
document.body.dataset.ready = "true";
"""
)

SURPRISE = (
    TOOLTIP
    + """
const columns = Array.from(document.querySelectorAll(".column"));
const rows = columns.map((column) => Array.from(column.querySelectorAll(".token")));
point((token) => rows.map((row, column) => {
  const same = row[Number(token.dataset.index)];
  same.classList.add("here");
  return columns[column].dataset.name + ": " + same.dataset.told;
}).join("\\n"));
document.body.dataset.ready = "true";
"""
)
