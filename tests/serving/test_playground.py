"""The playground fills blanks as a person sees it, by mouse and by keyboard, and runs nothing from a text.

The slow tests drive a browser against a small server that writes scripted tokens in a scripted order.
"""

import asyncio
import base64
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
import threading
from types import SimpleNamespace

import pytest

from a3_hf.models.a3_llama.infilling_templates import Template
from a3_hf.serving.playground import playground_page
from a3_hf.visualization.tokens import confidence_colour

HOSTILE = "<script>alert(1)</script> 中文 😀"
WORDS = [" quiet", " <script>alert(1)</script>", " 中文", " stone", "\n", " walls", "&amp;", " river", "s", " '$HOME'"]
CONTINUATION = 9  # tokens after which the stub ends a continuation
SENTENCE = "The dog ran home."


def test_the_page_is_one_file_and_asks_no_other_host():
    page = playground_page()
    for outside in ("http:" + "//", "https:" + "//", "src=", "@import", "innerHTML", "eval(", " style=", " onclick"):
        assert outside not in page, outside
    assert not re.search(r"\burl\(", page)
    assert re.findall(r'href="([^"]*)"', page) == ["data:,"]


@pytest.mark.parametrize("tag", ["script", "style"])
def test_the_policy_allows_its_own_script_and_style_only(tag):
    page = playground_page()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    (own,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy


def test_it_has_the_colours_of_the_replay():
    colours = re.search(r'data-colours="([^"]*)"', playground_page()).group(1).split()
    assert len(colours) == 101 and colours[::50] == [confidence_colour(at) for at in (0, 0.5, 1)]


def scripted(lengths: list[int], seed: int, *, is_random: bool) -> tuple[list[list[str]], list[dict]]:
    """The tokens of each blank, and the commits that write them, two a step."""
    pieces = [[WORDS[(seed + at) % len(WORDS)] for at in range(length)] for length in lengths]
    places = [(blank, at) for blank, length in enumerate(lengths) for at in range(length)]
    if is_random:
        random.Random(seed).shuffle(places)
    commits = []
    for index, (blank, position) in enumerate(places):
        text, logprob = pieces[blank][position], -0.05 - 3 * (index % 5) / 5
        top = [{"text": text, "logprob": logprob}, {"text": " other", "logprob": math.log1p(-math.exp(logprob)) - 0.1}]
        commits.append(
            {"blank": blank, "position": position, "step": index // 2, "token_id": 7, "text": text, "logprob": logprob}
            | {"top_logprobs": top}
        )
    return pieces, commits


def stub_app(stub):
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

    app = FastAPI()

    @app.get("/", response_class=HTMLResponse)
    def page():
        return playground_page()

    def chunk(text="", finish_reason=None, **fields) -> str:
        choice = {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None, **fields}
        return line({"object": "text_completion", "choices": [choice], "usage": None})

    def line(data) -> str:
        return f"data: {json.dumps(data)}\n\n"

    async def stream(body: dict):
        if body.get("blanks"):
            lengths = [length or 3 for length in Template.parse(body["prompt"]).lengths]
        else:
            lengths = [body["max_tokens"]]
        seed = body.get("seed", 0)
        pieces, commits = scripted(lengths, seed, is_random=body.get("order") == "random")
        if not body.get("blanks"):
            pieces, commits = [pieces[0][:CONTINUATION]], commits[:CONTINUATION]
        if stub.split:  # a character of two tokens: the first shows nothing of its own
            pieces[0][:2] = ["", " 😀"]
            for commit in commits:
                if commit["blank"] == 0 and commit["position"] < 2:
                    commit["text"] = "\ufffd"
        if body.get("strategy") == "refine":
            commits.append(commits[-1] | {"blank": 0, "position": 0, "step": len(commits), "text": " again"})
            pieces[0][0] = " again"
        for index in range(0, len(commits), 2):
            if stub.stop_after is not None and index >= stub.stop_after:
                if stub.stop_with:
                    yield line(
                        {"error": {"message": stub.stop_with, "type": "server_error", "param": None, "code": None}}
                    )
                return
            fields = {"commits": commits[index : index + 2]} | ({} if index else {"blank_lengths": lengths})
            delta = "" if body.get("blanks") else "".join(pieces[0][index : index + 2])
            yield chunk(delta, **fields)
            await asyncio.sleep(stub.pause)
        yield chunk(finish_reason="length", **({"pieces": pieces} if body.get("blanks") else {}))
        yield line({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}})
        yield "data: [DONE]\n\n"

    @app.post("/v1/completions")
    async def completions(request: Request):
        stub.bodies.append(await request.json())
        stub.keys.append(request.headers.get("authorization"))
        status, message = stub.refuse or (None, None)
        if stub.key and stub.keys[-1] != f"Bearer {stub.key}":
            status, message = 401, "expected an API key"
        if status:
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            return JSONResponse({"error": error}, status)
        return StreamingResponse(stream(stub.bodies[-1]), media_type="text/event-stream")

    return app


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def served(stub):
    """Runs the stub on a free port in a thread; the server and its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(stub_app(stub), port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    return server, thread, f"http:{'//'}127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    stub = SimpleNamespace()
    server, thread, stub.address = served(stub)
    yield stub
    server.should_exit = True
    thread.join(5)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = find_browser()
    if path is None:
        pytest.skip("no chromium")
    flags = "no-sandbox disable-gpu disable-background-networking disable-component-update disable-sync no-first-run"
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=[f"--{flag}" for flag in flags.split()])
        yield browser
        browser.close()


@pytest.fixture
def stub(server):
    server.bodies, server.keys = [], []
    server.refuse, server.key, server.pause, server.split = None, None, 0.005, False
    server.stop_after, server.stop_with = None, None
    return server


@pytest.fixture
def open_page(browser, stub):
    """Opens the page, with the options of a browser context; afterwards no console may hold an error."""
    contexts, problems = [], []

    def note(message):
        # The browser itself reports every answer of 400 or more.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            problems.append(message.text)

    def opened(text: str | None = None, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.goto(stub.address)
        page.wait_for_selector("body[data-ready]")
        if text is not None:
            page.focus("#editor")
            page.keyboard.press("Control+A")
            page.keyboard.press("Delete")
            page.keyboard.insert_text(text)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems


def text_of(page) -> str:
    """The editor's text, with each blank as [length]."""
    return page.evaluate(
        """() => { const copy = document.getElementById("editor").cloneNode(true);
        const lengths = [...document.querySelectorAll("#editor .chip input")].map((field) => field.value);
        copy.querySelectorAll(".chip").forEach((chip, at) => chip.replaceWith("[" + lengths[at] + "]"));
        return copy.textContent; }"""
    )


def select(page, words: str, *, text: str):
    """Selects words of the text by keyboard."""
    page.focus("#editor")
    page.keyboard.press("Control+Home")
    for _ in range(text.index(words)):
        page.keyboard.press("ArrowRight")
    for _ in words:
        page.keyboard.press("Shift+ArrowRight")


def tint(logprob: float) -> str:
    return confidence_colour(round(math.exp(logprob), 2))


def wait_until_done(page):
    page.wait_for_function("() => /written in/.test(document.getElementById('state').textContent)")


def filled(body: dict) -> str:
    """The text that the stub makes of a request."""
    template = Template.parse(body["prompt"])
    pieces, _ = scripted([length or 3 for length in template.lengths], body.get("seed", 0), is_random=False)
    return "".join(given + "".join(own) for given, own in zip(template.pieces, [*pieces, []], strict=True))


@pytest.mark.slow
class TestInABrowser:
    def test_selected_words_become_a_blank_and_come_back(self, open_page, stub):
        page = open_page(SENTENCE)
        select(page, "dog ran ", text=SENTENCE)
        page.click("#blank")
        assert text_of(page) == "The [2] home."
        page.click(".chip button")
        assert text_of(page) == SENTENCE
        page.click("#undo")
        assert text_of(page) == "The [2] home."
        page.keyboard.press("Control+Z")
        assert text_of(page) == SENTENCE
        page.keyboard.press("Control+Shift+Z")
        assert text_of(page) == "The [2] home."

    def test_words_are_selected_by_mouse(self, open_page):
        page = open_page("dog")
        page.dblclick("#editor", position={"x": 25, "y": 30})
        page.click("#blank")
        assert text_of(page) == "[1]"

    def test_three_underscores_become_a_blank(self, open_page, stub):
        page = open_page("")
        page.keyboard.type("A ___ day and ___, then.")
        assert text_of(page) == "A [4] day and [4], then."
        page.keyboard.press("Control+Enter")
        wait_until_done(page)
        (body,) = stub.bodies
        assert body.pop("prompt") == "A <blank:4> day and <blank:4>, then."
        assert body == {
            "blanks": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "commits": True,
            "logprobs": 5,
            "temperature": 0.8,
            "seed": 1,
            "strategy": "groupwise",
            "order": "random",
            "group_size": 1,
        }

    def test_lengths_by_keyboard(self, open_page, stub):
        page = open_page("A ___ b ___ c ___")
        page.focus(".chip input")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.type("12")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        for _ in range(5):
            page.keyboard.press("ArrowDown")
        assert text_of(page) == "A [5] b [12] c [auto]"
        page.keyboard.press("Control+Enter")
        wait_until_done(page)
        assert stub.bodies[0]["prompt"] == "A <blank:5> b <blank:12> c <blank:auto>"
        assert page.text_content("#state").startswith("20 tokens written in 10 steps")

    def test_tokens_appear_as_they_are_written(self, open_page, stub):
        stub.pause = 0.1
        page = open_page("So ___ it ___.")
        page.click("#fill")
        page.wait_for_function("() => document.querySelectorAll('.token.tinted').length >= 2")
        assert page.locator(".token.open").count() >= 2
        assert re.fullmatch(r"\d of 8 tokens", page.text_content("#state"))
        assert page.evaluate("document.activeElement.id") == "stop"
        wait_until_done(page)
        assert text_of(page) == filled(stub.bodies[0])
        assert page.locator(".token.open").count() == 0 and page.locator("script").count() == 1
        _, commits = scripted([4, 4], 1, is_random=True)
        dots = page.evaluate(
            "[...document.querySelectorAll('.dot')].map((dot) => [dot.cx.baseVal.value, dot.cy.baseVal.value,"
            " dot.style.getPropertyValue('--c')])"
        )
        expected = [
            [16 * (5 * one["blank"] + one["position"] + 0.5), 16 * (one["step"] + 0.5), tint(one["logprob"])]
            for one in commits
        ]
        assert dots == expected
        tints = page.evaluate(
            "[...document.querySelectorAll('.token')].map((token) => token.style.getPropertyValue('--c'))"
        )
        assert sorted(tints) == sorted(tint for _, _, tint in dots)
        assert page.get_attribute("#order", "aria-label").startswith("8 tokens written in 4 steps. 1: ")

    @pytest.mark.parametrize("how", ["mouse", "dot", "caret"])
    def test_tooltip(self, open_page, stub, how):
        page = open_page("So ___.")
        page.select_option("[name=order]", "left_to_right")
        page.focus("#editor")
        page.keyboard.press("Control+Enter")
        wait_until_done(page)
        assert page.is_hidden("#tip")
        if how == "mouse":
            page.hover(".token:nth-child(1) .ink")
        elif how == "dot":
            page.hover(".dot")
        else:
            page.keyboard.press("Control+Home")
            for _ in range(5):
                page.keyboard.press("ArrowRight")
        page.wait_for_selector("#tip:not([hidden])")
        tip = page.inner_text("#tip")
        assert "␣<script>alert(1)</script>" in tip and "step 1, place 1 of 4, 95.1 %, log p −0.050 nats" in tip
        assert "␣other" in tip and "4.4 %" in tip
        assert page.locator(".here").count() == 2  # the token and its dot
        page.keyboard.press("Escape")
        assert page.is_hidden("#tip")

    def test_undo_and_fill_again(self, open_page, stub):
        page = open_page("So ___ it ___.")
        page.click("#fill")
        wait_until_done(page)
        first = text_of(page)
        page.click("#again")
        page.wait_for_function("() => document.querySelector('[name=seed]').value === '2'")
        wait_until_done(page)
        second = text_of(page)
        assert [body["seed"] for body in stub.bodies] == [1, 2]
        assert stub.bodies[0]["prompt"] == stub.bodies[1]["prompt"] and first != second == filled(stub.bodies[1])
        page.click("#undo")
        assert text_of(page) == first
        page.click("#undo")
        assert text_of(page) == "So [4] it [4]."

    def test_a_fill_is_text_that_can_be_edited(self, open_page, stub):
        page = open_page("So ___.")
        page.keyboard.press("Control+Enter")
        wait_until_done(page)
        whole = text_of(page)
        page.keyboard.press("Control+End")
        page.keyboard.type(" More")
        assert text_of(page) == whole + " More" and page.locator(".token").count() == 4
        page.keyboard.press("Control+Home")
        for _ in range(6):
            page.keyboard.press("ArrowRight")
        page.keyboard.type("x")
        assert text_of(page) == whole[:6] + "x" + whole[6:] + " More" and page.locator(".token").count() == 0
        page.keyboard.type("y")
        assert text_of(page) == whole[:6] + "xy" + whole[6:] + " More"
        page.keyboard.press("Control+Z")
        page.keyboard.press("Control+Z")
        assert text_of(page) == whole and page.locator(".token").count() == 4
        page.keyboard.press("Control+A")
        page.keyboard.type("all ___ new")
        assert text_of(page) == "all [4] new"

    def test_by_keyboard_alone(self, open_page, stub):
        """From the top of the page, only keys: write, select, blank, set a length and a strategy, fill, undo."""
        page = open_page()
        press = page.keyboard.press
        press("Tab")
        assert page.evaluate("document.activeElement.id") == "editor"
        press("Control+A")
        page.keyboard.type("One two\nthree")
        press("Control+Shift+ArrowLeft")
        press("Control+b")
        assert text_of(page) == "One two\n[1]"
        press("Tab")
        page.keyboard.type("3")
        press("Enter")
        page.keyboard.type(" end")
        assert text_of(page) == "One two\n[3] end"
        while page.evaluate("document.activeElement.name") != "strategy":
            press("Tab")
        page.keyboard.type("dyn")
        press("Tab")
        assert page.evaluate("document.activeElement.name") == "tokens_per_step"
        press("ArrowUp")
        press("Enter")
        wait_until_done(page)
        body = stub.bodies[0]
        assert body["prompt"] == "One two\n<blank:3> end" and body["strategy"] == "dynamic"
        assert body["tokens_per_step"] == 2 and "order" not in body and "group_size" not in body
        press("Control+z")
        assert text_of(page) == "One two\n[3] end"
        while page.evaluate("document.activeElement.id") != "editor":
            press("Shift+Tab")
        press("Control+Enter")
        wait_until_done(page)
        assert text_of(page) == filled(stub.bodies[1])

    def test_settings_follow_the_strategy(self, open_page):
        page = open_page()
        enabled = {
            strategy: page.select_option("[name=strategy]", strategy)
            and [name for name in ("order", "group_size", "tokens_per_step") if page.is_enabled(f"[name={name}]")]
            for strategy in ("groupwise", "dynamic", "speculative", "refine")
        }
        assert enabled == {
            "groupwise": ["order", "group_size"],
            "dynamic": ["tokens_per_step"],
            "speculative": ["order"],
            "refine": ["tokens_per_step"],
        }

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_narrow_screens_and_dark_mode(self, open_page, stub, scheme):
        page = open_page(
            "W" * 200 + " ___ " + HOSTILE,
            viewport={"width": 375, "height": 700},
            color_scheme=scheme,
            reduced_motion="reduce",
        )
        page.fill(".chip input", "60")
        page.click("#fill")
        wait_until_done(page)
        page.click("summary")
        page.locator(".token .ink").first.scroll_into_view_if_needed()
        page.wait_for_timeout(50)  # a page that scrolls hides the tooltip
        page.hover(".token .ink")
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 375
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == (scheme == "dark")

    def test_a_token_that_is_written_again(self, open_page, stub):
        page = open_page("So ___.")
        page.select_option("[name=strategy]", "refine")
        page.click("#fill")
        wait_until_done(page)
        assert text_of(page).startswith("So  again 中文") and page.locator(".token").count() == 4
        assert page.locator(".dot").count() == 5 and page.locator(".dot.old").count() == 1
        assert page.text_content("#state").startswith("4 tokens written in 5 steps")

    def test_a_click_keeps_the_tooltip(self, open_page, stub):
        page = open_page("So ___.")
        page.click("#fill")
        wait_until_done(page)
        page.click(".token .ink")
        page.wait_for_timeout(50)
        assert page.is_visible("#tip")
        page.keyboard.type("x")
        assert page.is_hidden("#tip")

    def test_nothing_changes_while_a_fill_runs(self, open_page, stub):
        stub.pause = 0.1
        page = open_page("So ___ it ___.")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(".token.tinted")
        for key in ("x", "Backspace", "Enter", "Control+B", "Control+Z", "Control+Enter", "Control+V", "Control+X"):
            page.keyboard.press(key)
        wait_until_done(page)
        assert text_of(page) == filled(stub.bodies[0]) and len(stub.bodies) == 1
        assert page.evaluate("document.activeElement.id") == "editor"

    def test_every_control_has_a_name(self, open_page):
        page = open_page("A ___ b")
        page.click("summary")
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("input, select, button:not([hidden]), [contenteditable=true], svg, pre")]
            .filter((one) => one.offsetParent && !one.labels?.length && !one.getAttribute("aria-label")
              && !one.textContent.trim()).map((one) => one.outerHTML)"""
        )
        assert nameless == []

    def test_texts_stay_texts(self, open_page, stub):
        text = rf"{HOSTILE} \<blank:2> <blank:3> <blanks \\"
        page = open_page(text + "___ ")
        assert text_of(page) == text + "[4] "
        page.click("#fill")
        wait_until_done(page)
        template = Template.parse(stub.bodies[0]["prompt"])
        assert template == Template((text, " "), (4,)) and stub.bodies[0]["prompt"] == str(template)
        assert text_of(page) == filled(stub.bodies[0]) and page.locator("script").count() == 1

    def test_a_character_of_two_tokens(self, open_page, stub):
        stub.split = True
        page = open_page("So ___.")
        page.click("#fill")
        wait_until_done(page)
        assert "\ufffd" not in text_of(page) and text_of(page).startswith("So  😀")
        assert page.locator(".token").count() == 4
        page = open_page("So")
        page.click("#fill")
        wait_until_done(page)
        assert "\ufffd" not in text_of(page) and text_of(page).startswith("So 😀 stone")

    def test_paste_and_copy_keep_lines_and_blanks(self, open_page):
        page = open_page("", permissions=["clipboard-read", "clipboard-write"])
        page.evaluate("navigator.clipboard.writeText('one\\r\\ntwo _____ three')")
        page.keyboard.press("Control+V")
        assert text_of(page) == "one\ntwo [4] three"
        page.keyboard.press("Control+A")
        page.keyboard.press("Control+X")
        assert text_of(page) == ""
        page.keyboard.press("Control+V")
        page.keyboard.press("Enter")
        page.keyboard.type("last")
        assert text_of(page) == "one\ntwo [4] three\nlast"
        for _ in range(len("\nlast") + len(" three") + 1):
            page.keyboard.press("Backspace")
        assert text_of(page) == "one\ntwo "

    def test_without_a_blank_the_text_goes_on(self, open_page, stub):
        page = open_page(SENTENCE)
        assert page.inner_text("#fill") == "Continue"
        page.click("#fill")
        wait_until_done(page)
        (body,) = stub.bodies
        assert body["prompt"] == SENTENCE and body["max_tokens"] == 64
        assert not {"blanks", "strategy", "order", "group_size", "tokens_per_step"} & set(body)
        pieces, _ = scripted([CONTINUATION], 1, is_random=False)
        assert text_of(page) == SENTENCE + "".join(pieces[0])
        page.click("#again")
        page.wait_for_function("() => document.querySelector('[name=seed]').value === '2'")
        wait_until_done(page)
        assert stub.bodies[1]["prompt"] == SENTENCE and stub.bodies[1]["max_tokens"] == 64
        page.click("#undo")
        page.click("#undo")
        assert text_of(page) == SENTENCE

    @pytest.mark.parametrize(
        "refuse, shown",
        [
            ((400, "seed: too <b>large</b>"), "The server refused the request (400): seed: too <b>large</b>"),
            (
                (503, "the model is loading."),
                "The server is not ready (503): the model is loading. Try again in a moment.",
            ),
        ],
    )
    def test_an_error_is_a_sentence(self, open_page, stub, refuse, shown):
        stub.refuse = refuse
        page = open_page("So ___.")
        page.click("#fill")
        page.wait_for_selector("#error:not([hidden])")
        assert page.text_content("#error") == shown and text_of(page) == "So [4]."
        stub.refuse = None
        page.click("#fill")
        wait_until_done(page)
        assert page.is_hidden("#error")

    @pytest.mark.parametrize(
        "message, shown",
        [
            ("out of memory", "The server stopped: out of memory"),
            (None, "The connection ended before the text was complete."),
        ],
    )
    def test_an_interrupted_fill_keeps_what_was_written(self, open_page, stub, message, shown):
        stub.stop_after, stub.stop_with = 2, message
        page = open_page("So ___.")
        page.select_option("[name=order]", "left_to_right")
        page.click("#fill")
        page.wait_for_selector("#error:not([hidden])")
        assert page.text_content("#error") == shown
        assert text_of(page) == "So " + WORDS[1] + WORDS[2] + "[2]."
        page.click("#undo")
        assert text_of(page) == "So [4]."

    def test_a_server_that_is_gone(self, open_page):
        page = open_page("So ___.")
        page.context.set_offline(True)
        page.click("#fill")
        page.wait_for_selector("#error:not([hidden])")
        assert page.text_content("#error") == "The server does not answer. Is it still running?"
        assert text_of(page) == "So [4]."

    def test_a_key_is_asked_for(self, open_page, stub):
        stub.key = "sesame"
        page = open_page("So ___.")
        page.click("#fill")
        page.wait_for_selector("#error:not([hidden])")
        assert page.text_content("#error") == "The server asks for an API key: expected an API key"
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("guess")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.getElementById('error').textContent.includes('refuses this API key')")
        page.fill("#key", "sesame")
        page.focus("#key")
        page.keyboard.press("Enter")
        wait_until_done(page)
        assert stub.keys == [None, "Bearer guess", "Bearer sesame"]
        assert "sesame" not in page.text_content("#curl") and "$API_KEY" in page.text_content("#curl")
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0

    def test_stop(self, open_page, stub):
        stub.pause = 0.2
        page = open_page("So ___ it ___.")
        page.click("#fill")
        page.wait_for_function("() => document.querySelectorAll('.token.tinted').length >= 2")
        page.keyboard.press("Enter")  # Stop has the focus
        page.wait_for_function("() => document.getElementById('state').textContent.startsWith('Stopped')")
        assert page.is_hidden("#error") and page.locator(".token.open").count() == 0
        written = page.locator(".token.tinted").count()
        lengths = re.findall(r"\[(\d)\]", text_of(page))
        assert written >= 2 and written + sum(map(int, lengths)) == 8
        stub.pause = 0
        page.click("#fill")
        wait_until_done(page)
        assert page.locator(".chip").count() == 0 and page.locator(".token.tinted").count() == 8

    def test_the_request_for_a_shell(self, open_page, stub):
        page = open_page("It's ___ \\ $HOME.", permissions=["clipboard-read", "clipboard-write"])
        page.click("#fill")
        wait_until_done(page)
        page.click("#copy")
        command = page.evaluate("navigator.clipboard.readText()")
        assert command == page.text_content("#curl")
        words = shell_words(command)
        assert words[:3] == ["curl", "-N", stub.address + "v1/completions"]
        assert json.loads(words[words.index("-d") + 1]) == stub.bodies[0]


def shell_words(command: str) -> list[str]:
    shown = subprocess.run(["sh", "-c", 'printf "%s\\0" ' + command], capture_output=True, text=True, check=True)
    return shown.stdout.split("\0")[:-1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["groupwise", "dynamic", "speculative", "refine"])
def test_the_real_server_fills_it(open_page, stub, live, monkeypatch, strategy):
    """What the page shows at the end is what the model fills in process with the same settings."""
    monkeypatch.setattr(stub, "address", f"{live.url}/")
    page = open_page(f"The dog ___ home {HOSTILE} ___.")
    page.select_option("select[name=strategy]", strategy)
    page.click("#fill")
    wait_until_done(page)
    body = json.loads(re.search(r"-d '(.*)'", page.text_content("#curl"), re.DOTALL)[1])
    assert body["strategy"] == strategy
    fields = ("strategy", "order", "group_size", "tokens_per_step", "temperature", "seed")
    settings = {name: body[name] for name in fields if name in body}
    output = live.model.infill(live.tokenizer, [body["prompt"]], do_sample=True, return_outputs=True, **settings)
    expected = output.texts[0]
    shown = page.evaluate("document.getElementById('editor').textContent")
    assert re.sub(r"[^\w<>() .]", "", shown) == re.sub(r"[^\w<>() .]", "", expected)
    page.hover(".token.tinted .ink >> nth=1")
    page.wait_for_function("() => !document.getElementById('tip').hidden")
    assert "%" in page.text_content("#tip")
