"""Replays and pages show the text to the character and the numbers of every token, and run nothing from the text."""

import io
import math
import random
import re
import shutil
import subprocess
import time
import tomllib
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text
from transformers import AutoTokenizer

from a3_hf.visualization import terminal
from a3_hf.visualization.html import replay_page, surprise_page
from a3_hf.visualization.terminal import animate, frame
from a3_hf.visualization.tokens import (
    PICTURES,
    Piece,
    confidence_colour,
    generated_pieces,
    scored_pieces,
    token_texts,
    visible,
)
from tests.conftest import tiny_model

ROOT = Path(__file__).parents[2]
HOSTILE = [
    "<script>alert(1)</script>",
    "<script>document.title='pwned'</script>",
    "</script>",
    '"><img onerror="x" id=\'y\'>',
    " \"&'",
    "&lt;&amp;",
    "\n",
    " \n\n  ",
    "  ",
    "",
    "a\tb",
    "👩‍👩‍👧🙂",
    "[bold red]x[/] :smile:",
    "\n  <!-- ",
    "]]>",
]
PLAIN = ["word"] * len(HOSTILE)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def pieces_of(texts) -> list[Piece]:
    """Every third token given, the others written two a step from the end; one written token is not scored."""
    pieces = [Piece(text, index, -1, None, token_id=index) for index, text in enumerate(texts)]
    open_ = [index for index in range(len(texts)) if index % 3][::-1]
    for order, index in enumerate(open_):
        log_prob = None if order == 3 else -0.37 * order
        pieces[index] = Piece(texts[index], 100 + order // 2, order // 2, log_prob, token_id=index)
    return pieces


def both_pages(texts, title) -> dict[str, str]:
    pieces = pieces_of(texts)
    return {"replay": replay_page(pieces, title), "surprise": surprise_page([(title, pieces), ("b", pieces)], title)}


class Page(HTMLParser):
    """The elements of a page with their attributes, the text of its tokens, its title and its heading."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.tokens, self.within, self.texts = [], [], [], Counter()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in ("meta", "input"):
            self.within.append((tag, attributes))
        if attributes.get("class", "").startswith("token "):
            self.tokens.append([attributes, ""])

    def handle_endtag(self, tag):
        assert self.within.pop()[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if any(attributes.get("class", "").startswith("token ") for _, attributes in self.within):
            self.tokens[-1][1] += data
        for tag in ("title", "h1", "h2"):
            if self.within and self.within[-1][0] == tag:
                self.texts[tag] = (self.texts[tag] or "") + data


# Tokens' texts


def test_a_token_that_completes_a_character_has_it(tokenizer):
    ids = tokenizer.encode("<s>dog 🙂é!</s>", add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=True) == "dog 🙂é!"
    assert texts[0] == texts[-1] == "", "special tokens add nothing"
    assert texts[-8:-1] == ["", "", "", "🙂", "", "é", "!"]
    assert token_texts(tokenizer, []) == []


@pytest.mark.parametrize("seed", range(8))
def test_token_texts_join_to_the_whole_even_for_broken_characters(tokenizer, seed):
    draw = random.Random(seed)
    ids = [draw.randrange(len(tokenizer)) for _ in range(200)]
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_decoding_in_parts_equals_decoding_every_prefix(tokenizer, monkeypatch):
    ids = tokenizer.encode("The dog said 🙂 to Tom.\n\nZoë was happy, " * 12, add_special_tokens=False)
    in_parts = token_texts(tokenizer, ids)
    monkeypatch.setattr("a3_hf.visualization.tokens.CUT_AFTER", len(ids))
    assert in_parts == token_texts(tokenizer, ids)


def test_token_texts_of_a_llama_2_tokenizer(stories):
    """Its decoder strips the first space of whatever it is given, and spells unknown characters in bytes."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    ids = tokenizer.encode("Once upon a time, Zoë 🙂 saw a dog. " * 8)
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=True)
    assert texts[:5] == ["", "Once", " upon", " a", " time"] and "🙂" in texts


def test_no_text_is_lost_where_decoding_changes_what_came_before():
    class Cleaning:
        def decode(self, ids, skip_special_tokens):
            return " ".join(ids).replace(" n't", "n't").replace(" .", ".")

    assert token_texts(Cleaning(), ["do", "n't", "go", "."]) == ["do", "n't", " go", "."]


def test_token_texts_of_a_long_text_take_no_quadratic_time(tokenizer):
    ids = tokenizer.encode("The dog ran home. 🙂 " * 400, add_special_tokens=False)[:2000]
    start = time.perf_counter()
    token_texts(tokenizer, ids)
    assert len(ids) == 2000 and time.perf_counter() - start < 5


def test_pieces_of_a_generated_text_and_of_a_scored_one(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)
    output = model.infill(tokenizer, ["The <blank:3> dog"], order="right_to_left", return_outputs=True)
    pieces = generated_pieces(tokenizer, output.generation)
    assert "".join(piece.text for piece in pieces) == output.texts[0]
    assert [piece.step for piece in pieces if piece.step >= 0] == [2, 1, 0]
    assert all((piece.log_prob is None) == (piece.step < 0) for piece in pieces)
    written = sum(piece.log_prob for piece in pieces if piece.step >= 0)
    assert written == pytest.approx(float(output.generation.log_probs.sum()), abs=1e-5)

    scored = model.score(tokenizer, "The dog", order="right_to_left")
    first, *others = scored_pieces(tokenizer, scored)
    assert first.step == -1 and first.log_prob is None and first.token_id == 0
    assert [piece.log_prob for piece in others] == scored.mean.tolist()[1:]
    assert [piece.step for piece in others] == [piece.group for piece in others] == scored.group_ids[0].tolist()[1:]
    assert "".join(piece.text for piece in others) == "The dog"


# Pages


@pytest.mark.parametrize("kind", ["replay", "surprise"])
def test_no_text_becomes_markup(kind):
    title = "</title><script>x</script> \"&' 🙂"
    page = Page(both_pages(HOSTILE, title)[kind])
    plain = Page(both_pages(PLAIN, "title")[kind])
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert {name for _, attributes in page.elements for name in attributes} <= {
        *(name for _, attributes in plain.elements for name in attributes),
        "data-mark",
    }
    assert page.within == plain.within == []
    shown = "".join(text for _, text in page.tokens)
    assert shown == "".join(HOSTILE) * (2 if kind == "surprise" else 1)
    assert page.texts["title"] == page.texts["h1"] == title
    if kind == "surprise":
        assert page.texts["h2"] == title + "b"


@pytest.mark.parametrize("kind", ["replay", "surprise"])
def test_a_page_is_one_file(kind):
    page = both_pages(PLAIN, "title")[kind]
    assert page.startswith("<!doctype html>")
    for outside in ("http:" + "//", "https:" + "//", "src=", "@import", "url(", "<link", "fetch(", "href"):
        assert outside not in page
    assert "default-src 'none'" in page
    assert not re.search(r"\bon\w+=", page), "all that runs is in the one script the page's policy lets run"


def test_every_file_beside_the_code_is_package_data():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "a3_hf" / "visualization"
    beside = {path for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    packed = {path for pattern in patterns["a3_hf.visualization"] for path in folder.glob(pattern)}
    assert beside == packed and len(beside) >= 3


@pytest.mark.parametrize("kind", ["replay", "surprise"])
def test_every_token_carries_its_numbers(kind):
    pieces = pieces_of(HOSTILE)
    tokens = [attributes for attributes, _ in Page(both_pages(HOSTILE, "t")[kind]).tokens]
    assert len(tokens) == len(pieces) * (2 if kind == "surprise" else 1)
    for index, attributes in enumerate(tokens):
        piece = pieces[index % len(pieces)]
        assert int(attributes["data-index"]) == int(attributes["data-token-id"]) == index % len(pieces)
        assert int(attributes["data-step"]) == piece.step and int(attributes["data-group"]) == piece.group
        assert f"group {piece.group}" in attributes["title"]
        if piece.log_prob is None:
            assert "data-log-prob" not in attributes and "log p" not in attributes["title"]
        else:
            assert float(attributes["data-log-prob"]) == piece.log_prob
            assert f"confidence {100 * math.exp(piece.log_prob):.1f} %" in attributes["title"]
        if kind == "replay":
            assert attributes["title"].startswith("given" if piece.step < 0 else f"step {piece.step + 1} of 5")
            colour = None if piece.confidence is None or piece.step < 0 else confidence_colour(piece.confidence)
            assert attributes.get("style") == (colour and f"--c:{colour}")


def test_the_summaries_add_up():
    pieces = [Piece("a", 0, -1, None), Piece("b", 1, 0, -1.5), Piece("c", 2, 1, -0.25)]
    assert "2 tokens written in 2 steps · log-likelihood −1.750 nats<" in replay_page(pieces, "t")
    one = [*pieces[:2], Piece("c", 2, 1, None)]
    assert "log-likelihood −1.500 nats over 1 scored token<" in replay_page(one, "t")
    page = surprise_page([("x", pieces), ("y", [Piece("a", 0, -1, None)] * 3)], "t")
    assert "sum 1.750 nats, mean 0.875 over 2 tokens<" in page and ">not scored<" in page
    assert "sum 0.000 nats" in surprise_page([("x", [Piece("a", 0, -1, 0.0)])], "t")
    assert "−∞ nats" in replay_page([Piece("a", 0, 0, -math.inf)], "t")


def test_a_text_without_blanks_has_nothing_to_play():
    page = replay_page([Piece("all given", 0, -1, None)], "t")
    assert "0 tokens written in 0 steps" in page and 'id="play"' not in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the path")
def test_a_browser_runs_the_replay_and_nothing_else(tmp_path):
    pieces = pieces_of(HOSTILE)
    path = tmp_path / "replay.html"
    path.write_text(replay_page(pieces, "A <b>story</b>"), encoding="utf-8")

    def browse(name: str, *options: str, fragment: str = "") -> str:
        fixed = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        command = [CHROMIUM, *fixed.split(), "--disable-component-update", "--disable-sync"]
        command += [f"--user-data-dir={tmp_path / name}", "--virtual-time-budget=1000", *options]
        done = subprocess.run([*command, path.as_uri() + fragment], capture_output=True, timeout=60)
        return done.stdout.decode()

    dom = browse("dom", "--dump-dom", fragment="#step=2")
    body = re.search(r"<body[^>]*>", dom).group()
    assert 'data-ready="true"' in body and 'data-done="2"' in body
    assert "<title>A &lt;b&gt;story&lt;/b&gt;</title>" in dom and dom.count("<script") == 1
    page = Page(dom)
    assert "".join(text for _, text in page.tokens) == "".join(HOSTILE)
    for piece, (attributes, _) in zip(pieces, page.tokens, strict=True):
        assert ("open" in attributes["class"].split()) == (piece.step >= 2) == ("aria-hidden" in attributes)

    browse("shot", f"--screenshot={tmp_path / 'shot.png'}", "--window-size=800,600")
    picture = (tmp_path / "shot.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


# The terminal


def test_a_frame_shows_what_is_written_by_then():
    pieces = [
        Piece("The dog", 0, -1, None),
        Piece(" ran", 2, 1, -0.1),
        Piece(" all", 1, 0, -2.0),
        Piece("\n", 3, 2, -0.5),
        Piece("home.", 0, -1, None),
    ]
    assert frame(pieces, -1).plain == "The dog ░░░ ░░░░\nhome."
    assert frame(pieces, 0).plain == "The dog ░░░ all░\nhome."
    assert frame(pieces, 1).plain == "The dog ran all░\nhome."
    assert frame(pieces, 2).plain == "The dog ran all\nhome."


def test_a_frame_has_the_colours_of_confidence():
    pieces = [Piece("given", 0, -1, None), Piece("x", 1, 0, -0.7), Piece("y", 2, 1, None), Piece("z", 3, 2, -0.1)]
    styles = [str(span.style) for span in frame(pieces, 0).spans]
    assert styles == [f"bold {confidence_colour(math.exp(-0.7))}", "dim", "dim"]
    styles = [str(span.style) for span in frame(pieces, 2).spans]
    assert styles == [confidence_colour(math.exp(-0.7)), "italic", confidence_colour(math.exp(-0.1))]


def test_the_colour_scale_gets_darker_and_bluer():
    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        return sum(weight * channel**2.2 for weight, channel in zip((0.2126, 0.7152, 0.0722), channels, strict=True))

    colours = [confidence_colour(at / 20) for at in range(21)]
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
    assert all(luminance(one) > luminance(other) for one, other in pairwise(colours))
    blue = [int(colour[5:], 16) - int(colour[1:3], 16) for colour in colours]
    assert blue == sorted(blue) and blue[0] < 0 < blue[-1]
    assert confidence_colour(-0.1) == colours[0] and confidence_colour(1.0000001) == colours[-1]


CONTROLS = "\x1b[2J\x1b]0;title\x07\r\x00\x7f\x9b31m\u202e\ud800"


def test_controls_are_shown_and_not_obeyed():
    assert visible("a\x1b[31m\r\n\tb") == "a␛[31m␍\n\tb"
    for text in (frame([Piece(CONTROLS, 0, step, -0.1)], 0).plain for step in (-1, 0)):
        assert text == "␛[2J␛]0;title␇␍␀␡\ufffd31m\ufffd\ufffd"
    output = io.StringIO()
    animate([Piece(CONTROLS, 0, 0, -0.1)], Console(file=output))
    assert not any(chr(code) in output.getvalue() for code in PICTURES)
    page = replay_page([Piece(CONTROLS, 0, 0, -0.1)], CONTROLS)
    assert not any(chr(code) in page for code in PICTURES)
    page.encode()


def test_where_there_is_no_terminal_the_text_alone_is_printed():
    output = io.StringIO()
    animate(pieces_of(HOSTILE), Console(file=output, width=20))
    lines = (line.rstrip() for line in output.getvalue().splitlines())
    expected = "".join(HOSTILE).expandtabs(8)
    assert "".join(output.getvalue().split()) == "".join(expected.split())
    assert max(map(len, lines)) > 20, "no line is broken"
    assert "\x1b" not in output.getvalue()


@pytest.mark.parametrize("height", [4, 8, 50])
def test_on_a_terminal_every_step_is_shown_and_the_text_stays(height, monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_PER_STEP", 0)
    words = [f" w{index}" for index in range(60)]
    pieces = [Piece(word, index, index, -0.01 * index) for index, word in enumerate(words)]
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=40, height=height, color_system="truecolor")
    animate(pieces, console)
    plain = Text.from_ansi(re.sub(r"\x1b\[[0-9?]*[A-KlhG]", "", output.getvalue())).plain
    for step in range(61):
        assert f"step {step:2}/60" in plain
    last = plain.split("step")[-2]
    assert all(word.strip() in last.split() for word in words), "the last frame is not cut"


def test_a_tall_text_is_shown_where_it_is_written():
    pieces = [Piece(f"line {index}\n", index, 99 - index, -0.1) for index in range(100)]
    console = Console(file=io.StringIO(), width=40, height=24)
    for step in (0, 50, 99):
        shown = terminal._window(pieces, step, console, 10)
        assert len(shown.plain.split("\n")) == 10 and f"line {99 - step}" in shown.plain


def test_an_animation_takes_its_time(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    pieces = [Piece("a", 0, 0, -0.1), Piece("b", 1, 1, -0.1)]
    animate(pieces, Console(file=io.StringIO(), force_terminal=True))
    assert waits == [terminal.SECONDS_PER_STEP] * 2


# Refusals


PIECE = Piece("a", 0, 0, -0.1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: replay_page([], "t"), "pieces is empty"),
        (lambda: frame([], 0), "pieces is empty"),
        (lambda: animate([], Console(file=io.StringIO())), "pieces is empty"),
        (lambda: surprise_page([], "t"), "columns is empty"),
        (lambda: surprise_page([("x", [])], "t"), "columns: 'x' has no pieces"),
        (lambda: surprise_page([("x", [PIECE]), ("y", [PIECE] * 2)], "t"), r"columns have \[1, 2\] tokens"),
        (lambda: Piece("a", 0, -2, None), "step=-2"),
        (lambda: Piece("a", 0, 0, math.nan), "log_prob is NaN"),
    ],
)
def test_what_cannot_be_shown_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_confidence_is_the_probability():
    assert PIECE.confidence == math.exp(-0.1)
    assert Piece("a", 0, 0, None).confidence is None
    assert Piece("a", 0, 0, -math.inf).confidence == 0 and Piece("a", 0, 0, 1e-7).confidence == 1
