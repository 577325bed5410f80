"""What a client may do wrong, and what the server does when it is busy, late or alone again."""

import json
import socket
import threading
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a3_hf.serving import schemas

COMPLETION = {"prompt": "The dog", "max_tokens": 3, "temperature": 0}


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    "path, body, param, message",
    [
        ("completions", {"temperature": 3}, "temperature", "less than or equal to 2"),
        ("completions", {"temperature": 1e-40}, "temperature", "at least 1e-30"),
        ("completions", {"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ("completions", {"max_tokens": 0}, "max_tokens", "1 or more, or echo=true"),
        ("completions", {"max_tokens": 500}, "prompt", "expected at most 128"),
        ("completions", {"presence_penalty": 0.5}, "presence_penalty", "less than or equal to 0"),
        ("completions", {"logit_bias": {"3": 1.0}}, "logit_bias", "at most 0 items"),
        ("completions", {"n": 17}, "n", "less than or equal to 16"),
        ("completions", {"n": 3, "best_of": 2}, "best_of", "at least n=3"),
        ("completions", {"logprobs": 9}, "logprobs", "less than or equal to 5"),
        ("completions", {"stop": ["a"] * 5}, "stop", "at most 4 items"),
        ("completions", {"stop": ""}, "stop", "at least 1 character"),
        ("completions", {"spam": 1}, "spam", "Extra inputs"),
        ("completions", {"prompt": []}, "prompt", "empty list"),
        ("completions", {"prompt": [[]]}, "prompt", "empty list"),
        ("completions", {"prompt": [1, 320]}, "prompt", "token ids below 320"),
        ("completions", {"prompt": [-1]}, "prompt", "greater than or equal to 0"),
        ("completions", {"prompt": ["a"] * 40}, "prompt", "at most 32"),
        ("completions", {"prompt": ["a"], "suffix": "b"}, "prompt", "one text with a suffix"),
        ("completions", {"suffix": "b", "blanks": True}, "suffix", "expected None"),
        ("completions", {"suffix": "b", "echo": True}, "echo", "expected false"),
        ("completions", {"suffix": "b", "auto_length": True, "max_tokens": 17}, "max_tokens", "at most 16"),
        ("completions", {"auto_length": True}, "auto_length", "only with a suffix"),
        ("completions", {"suffix_template": "x"}, "suffix_template", "only with"),
        ("completions", {"suffix": "b", "suffix_template": "x"}, "suffix_template", "{suffix}"),
        ("completions", {"prompt": "<blank:2>", "blanks": True}, "max_tokens", "markers"),
        ("completions", {"prompt": "no", "blanks": True, "max_tokens": None}, "prompt", "holds no blank marker"),
        ("completions", {"prompt": "<blank:0>", "blanks": True, "max_tokens": None}, "prompt", "length 0"),
        ("completions", {"prompt": "<blank:2>", "blanks": True, "max_tokens": None, "stop": "x"}, "stop", "expected None"),
        ("completions", {"strategy": "fast"}, "strategy", "groupwise"),
        ("completions", {"strategy": "dynamic", "order": "random"}, "order", "no effect"),
        ("completions", {"order": "spans"}, "span_length", "expected a number"),
        ("completions", {"threshold": 0.5}, "threshold", "no effect"),
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
        ("chat/completions", {"messages": []}, "messages", "at least 1 item"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages", "'system'"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": []}, "tools", "Extra inputs"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs", "only with"),
        ("score", {"text": ""}, "text", "at least 1 character"),
        ("score", {"text": "a b", "num_orders": 3}, "num_orders", "expected 1"),
    ],
)  # fmt: skip
def test_bad_requests_are_named(live, path, body, param, message):
    base = COMPLETION if path == "completions" else {}
    response = live.post(f"/v1/{path}", **{**base, **body})
    error = error_of(response)
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and message in error["message"], error


def test_messages_that_the_template_refuses(live):
    messages = [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]
    response = live.post("/v1/chat/completions", messages=messages)
    assert response.status_code == 400 and "system first" in error_of(response)["message"]


def test_a_model_without_a_chat_template(served_model, tokenizer):
    from tests.serving.conftest import Live

    server = Live(served_model, tokenizer)
    response = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}])
    assert response.status_code == 400 and "no chat template" in error_of(response)["message"]
    server.close()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b'"x"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"null", b'{"prompt": NaN}']
)
def test_bodies_that_are_not_requests(live, content):
    for path in ("/v1/completions", "/infill", "/v1/score", "/v1/chat/completions"):
        response = live.client.post(path, content=content, headers={"Content-Type": "application/json"})
        if path == "/infill" and content == b"{}":
            continue
        assert response.status_code == 400, (path, response.text)
        error_of(response)


def test_paths_and_methods_that_do_not_exist(live):
    for response, status in ((live.client.get("/v1/nothing"), 404), (live.client.get("/v1/completions"), 405)):
        assert response.status_code == status and error_of(response)
    response = live.post("/v1/completions", **COMPLETION, model="other")
    assert response.status_code == 404 and error_of(response)["code"] == "model_not_found"


def test_the_key(start):
    server = start(api_key="secret-é")
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer secret-é".encode()}, 200),
    ):
        for path, body in (("/v1/completions", COMPLETION), ("/infill", {"n_predict": 0})):
            response = server.client.post(path, json=body, headers=headers)
            assert response.status_code == status, headers
        for path in ("/v1/models", "/metrics"):
            assert server.client.get(path, headers=headers).status_code == status
        for path in ("/", "/health", "/docs", "/openapi.json"):
            assert server.client.get(path, headers=headers).status_code == 200
    assert error_of(server.client.get("/v1/models"))["code"] == "invalid_api_key"


def test_large_bodies(start):
    server = start(max_body=200)
    assert server.post("/v1/completions", **COMPLETION).status_code == 200
    assert server.post("/v1/completions", prompt="a" * 300).status_code == 413

    def parts():
        for _ in range(10):
            yield b'{"prompt": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}'

    response = server.client.post("/v1/completions", content=parts())
    assert response.status_code == 413 and error_of(response)["code"] == "body_too_large"


def test_a_busy_server(start):
    server = start(engine={"max_batch": 1, "max_queue": 1})
    gate = threading.Event()
    run_pass = server.engine._pass
    server.engine._pass = lambda batch: (gate.wait(30), run_pass(batch))
    found, threads = [], []
    for seed in range(6):
        request = {**COMPLETION, "seed": seed}
        threads.append(
            threading.Thread(target=lambda body=request: found.append(server.post("/v1/completions", **body)))
        )
        threads[-1].start()
    while sum(one.is_alive() for one in threads) > 2:
        time.sleep(0.01)
    gate.set()
    for thread in threads:
        thread.join()
    assert sorted(one.status_code for one in found) == [200, 200, 429, 429, 429, 429]
    refused = next(one for one in found if one.status_code == 429)
    assert refused.headers["retry-after"] == "1" and error_of(refused)["type"] == "rate_limit_error"


@pytest.mark.parametrize("more", [{}, {"suffix": " home."}], ids=["continued", "filled"])
def test_a_late_answer_holds_what_was_written(start, more):
    server = start(timeout=3)
    run_pass = server.engine._pass
    server.engine._pass = lambda batch: (time.sleep(0.1), run_pass(batch))
    response = server.post("/v1/completions", **COMPLETION | {"max_tokens": 60} | more)
    body = response.json()
    assert response.status_code == 504 and body["error"]["type"] == "timeout_error"
    written = body["choices"][0]
    assert written["finish_reason"] == "timeout" and 0 < body["usage"]["completion_tokens"] < 60
    with server.client.stream(
        "POST", "/v1/completions", json=COMPLETION | {"max_tokens": 60, "stream": True} | more
    ) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == 504 and lines[-1] == "data: [DONE]"
    server.engine._pass = run_pass
    assert server.post("/v1/completions", **COMPLETION).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away(start, stream):
    server = start(engine={"max_batch": 1})
    run_pass, passes = server.engine._pass, []
    server.engine._pass = lambda batch: (time.sleep(0.05), passes.append(1), run_pass(batch))
    body = json.dumps(COMPLETION | {"max_tokens": 100, "stream": stream})
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
        connection.sendall((head + body).encode())
        while not passes:
            time.sleep(0.01)
    deadline = time.monotonic() + 5
    while not server.engine.is_idle and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.engine.is_idle and len(passes) < 80
    server.engine._pass = run_pass
    assert server.post("/v1/completions", **COMPLETION).status_code == 200


def test_metrics_ids_and_logs(live, caplog):
    with caplog.at_level("INFO", logger="a3_hf.serving"):
        response = live.client.post("/v1/completions", json=COMPLETION, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1" and response.json()["id"] == "cmpl-mine-1"
    facts = [record.facts for record in caplog.records if getattr(record, "facts", {}).get("request_id") == "mine-1"]
    assert facts[0]["path"] == "/v1/completions" and facts[0]["status"] == 200 and "The dog" not in str(facts)
    assert (
        live.client.get("/health", headers={"x-request-id": "bad id\u00e9".encode()}).headers["x-request-id"]
        != "bad id"
    )
    text = live.client.get("/metrics").text
    for name in (
        "a3_waiting_requests", "a3_running_requests 0.0", "a3_requests_total", "a3_request_seconds_bucket", "a3_passes_total",
        "a3_first_token_seconds_count", "a3_tokens_total", "a3_batch_rows_sum", "a3_pass_seconds_sum",
    ):  # fmt: skip
        assert name in text
    assert 'path="/v1/completions",status="200"' in text


def test_pages_of_other_origins(live, start):
    asks = {"Origin": "https://huggingface.co", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in live.client.options("/v1/completions", headers=asks).headers
    server = start(cors_origins=("https://huggingface.co",))
    allowed = server.client.options("/v1/completions", headers=asks)
    assert allowed.headers["access-control-allow-origin"] == "https://huggingface.co"


def test_the_description_names_every_field(live):
    described = live.client.get("/openapi.json").json()["components"]["schemas"]
    for kind in (schemas.CompletionRequest, schemas.ChatRequest, schemas.InfillRequest, schemas.ScoreRequest):
        assert set(described[kind.__name__]["properties"]) == set(kind.model_fields)
    assert live.client.get("/docs").status_code == 200 and "<html" in live.client.get("/").text


# Values of every kind for every field; half of the time one that may fit.
TEXT = st.text(max_size=12)
FITTING = {
    "prompt": TEXT | st.lists(st.integers(0, 319), max_size=4) | st.sampled_from(["<blank:2> a", "a <blank:auto>", "中文 😀"]),
    "suffix": st.none() | TEXT, "text": TEXT, "input_prefix": TEXT, "input_suffix": TEXT, "stop": st.none() | TEXT,
    "max_tokens": st.integers(1, 20), "n_predict": st.integers(-1, 20),
    "temperature": st.floats(0.1, 2) | st.just(0),
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXT}), max_size=3
    ),
    "seed": st.integers(-2, 10) | st.integers(), "n": st.integers(1, 3), "best_of": st.none() | st.integers(1, 3),
    "top_p": st.floats(0, 1), "top_k": st.integers(0, 9), "min_p": st.floats(0, 1),
    "logprobs": st.integers(0, 5) | st.booleans(),
    "strategy": st.sampled_from(["groupwise", "dynamic", "speculative", "refine"]), "blanks": st.booleans(),
    "order": st.sampled_from(["left_to_right", "random", "right_to_left", "spans"]), "stream": st.booleans(),
    "group_size": st.integers(1, 4), "tokens_per_step": st.integers(1, 4), "echo": st.booleans(), "model": st.none(),
}  # fmt: skip
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ROUTES = {
    "/v1/completions": schemas.CompletionRequest,
    "/v1/chat/completions": schemas.ChatRequest,
    "/infill": schemas.InfillRequest,
    "/v1/score": schemas.ScoreRequest,
}


@st.composite
def bodies(draw):
    path = draw(st.sampled_from(sorted(ROUTES)))
    names = draw(st.lists(st.sampled_from(sorted(ROUTES[path].model_fields)), max_size=4, unique=True))
    required = [name for name, field in ROUTES[path].model_fields.items() if field.is_required()]
    body = {}
    for name in {*names, *required}:
        fits = name in FITTING and draw(st.integers(0, 9)) > 0
        body[name] = draw(FITTING[name] if fits else ANYTHING)
    if draw(st.integers(0, 19)) == 0:
        body[draw(st.text(max_size=5))] = draw(ANYTHING)
    return path, body


def check_any_body(live, path: str, body: dict) -> int:
    response = live.client.post(path, json=body)
    assert response.status_code in (200, 400, 404), (response.status_code, response.text)
    if response.status_code != 200:
        error_of(response)
    elif body.get("stream"):
        assert '"code": 500' not in response.text and response.text.startswith("data: ")
    return response.status_code


FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@settings(max_examples=60, **FUZZ)
@given(bodies())
def test_any_body(live, drawn):
    check_any_body(live, *drawn)


@pytest.mark.slow
def test_a_thousand_bodies(live):
    statuses = []

    @settings(max_examples=1000, **FUZZ)
    @given(bodies())
    def run(drawn):
        statuses.append(check_any_body(live, *drawn))

    run()
    assert len(statuses) >= 1000 and statuses.count(200) > 100
    print({status: statuses.count(status) for status in set(statuses)})
