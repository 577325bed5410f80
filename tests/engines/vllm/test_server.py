"""`vllm serve` with both plugins, asked by the official client and as editors ask, against the model in this process."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch

from a3_hf.models.a3_llama.infilling_templates import encode_prompt
from tests.conftest import tiny_model
from tests.engines.vllm.cases import SHAPE

KEY = "secret"
TEXT = {"prompt": "The dog ran", "suffix": " and Tom was happy"}
GREEDY = {"temperature": 0.0}


class Served:
    """A server process."""

    def __init__(self, folder: Path, log: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        command = [
            Path(sys.executable).with_name("vllm"), "serve", folder, "--served-model-name", "tiny", "--dtype", "float32",
            "--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "128", "--block-size", "32",
            "--enforce-eager", "--host", "127.0.0.1", "--port", self.port, "--api-key", KEY, *options,
        ]  # fmt: skip
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_PLUGINS": "a3,a3_endpoints",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "OMP_NUM_THREADS": "1",
        }
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [str(part) for part in command], env=environment, stdout=file, stderr=file, start_new_session=True
            )
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=120, headers={"Authorization": f"Bearer {KEY}"})
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=120)

    def wait(self) -> None:
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.25)
        raise AssertionError(f"the server does not answer: {self.log.read_text()[-3000:]}")

    def post(self, path: str, **body) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, **body) -> dict:
        answer = self.post("/v1/completions", **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)


@pytest.fixture(scope="module")
def model():
    return tiny_model(slot_start="left_token", **{**SHAPE, "vocab_size": 320})


@pytest.fixture(scope="module")
def servers(model, tokenizer, tmp_path_factory):
    """One that writes a token a step, and one that writes groups, started side by side."""
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logs = tmp_path_factory.mktemp("logs")
    found = [
        Served(folder, logs / "one_token.log"),
        Served(folder, logs / "groups.log", "--hf-overrides", json.dumps({"canvas_length": 16})),
    ]
    try:
        for server in found:
            server.wait()
        yield found
    finally:
        for server in found:
            server.close()


@pytest.fixture(scope="module")
def one_token(servers):
    return servers[0]


@pytest.fixture(scope="module")
def groups(servers):
    return servers[1]


@pytest.fixture(scope="module", params=["one_token", "groups"])
def either(request, servers):
    return servers[("one_token", "groups").index(request.param)]


def written(model, tokenizer, text: str, **settings) -> list[str]:
    return model.infill(tokenizer, [text], return_outputs=True, **settings).written[0]


def test_suffix(either, model, tokenizer):
    expected = written(model, tokenizer, "The dog ran<blank:6> and Tom was happy")
    answer = either.client.completions.create(model="tiny", max_tokens=6, temperature=0, **TEXT)
    assert answer.choices[0].text == expected[0] and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6 and answer.model == "tiny"
    chunks = either.client.completions.create(
        model="tiny", max_tokens=6, temperature=0, stream=True, stream_options={"include_usage": True}, **TEXT
    )
    chunks = list(chunks)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected[0]
    assert chunks[-1].usage.completion_tokens == 6


@pytest.mark.parametrize(
    "text",
    [
        "The dog <blank:3> home. Tom <blank:4> happy.",
        "One <blank:2><blank:3>, the cat <blank:5>",
        "Tom was <blank:2..5>, and so was <blank:3>.",
        "<blank:4> ran home.",
    ],
)
def test_blanks_of_a_text(either, model, tokenizer, text):
    expected = model.infill(tokenizer, [text], return_outputs=True)
    choice = either.complete(prompt=text, blanks=True, logprobs=2, commits=True, **GREEDY)["choices"][0]
    assert (choice["text"], choice["blanks"]) == (expected.texts[0], expected.written[0])
    log_probs = expected.generation.log_probs[0][expected.generation.commit_step[0] >= 0]
    assert [one["logprob"] for one in choice["commits"]] == pytest.approx(log_probs.tolist(), abs=5e-3)
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(log_probs.tolist(), abs=5e-3)
    assert all(len(one["top_logprobs"]) == 2 for one in choice["commits"])


def test_lengths_that_are_found(either, model, tokenizer):
    expected = written(model, tokenizer, "The dog ran<blank:1..7> and Tom was happy")
    body = {**TEXT, "max_tokens": 7, "auto_length": True, **GREEDY}
    for _ in range(2):  # the second time with all prefixes in the cache
        assert either.complete(**body)["choices"][0]["text"] == expected[0]


def test_the_suffix_in_front(either, model, tokenizer):
    template = "Later:{suffix}\n"
    expected = written(model, tokenizer, "The dog ran<blank:5> and Tom was happy", suffix_template=template)
    answer = either.complete(**TEXT, max_tokens=5, suffix_template=template, **GREEDY)
    assert answer["choices"][0]["text"] == expected[0]


def test_stop_n_and_seeds(either, model, tokenizer):
    whole = written(model, tokenizer, "The dog ran<blank:8> and Tom was happy")[0]
    stop = whole[3:5]
    answer = either.complete(**TEXT, max_tokens=8, stop=stop, **GREEDY)["choices"][0]
    assert answer["text"] == whole[: whole.index(stop)] and answer["finish_reason"] == "stop"
    sampled = {**TEXT, "max_tokens": 8, "temperature": 1.0, "n": 3}
    texts = [[choice["text"] for choice in either.complete(**sampled, seed=seed)["choices"]] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 3


def test_sampled_groups_are_those_of_our_own_decoder(groups, model, tokenizer):
    text = "The dog ran<blank:8> and Tom was happy"
    settings = {
        "group_size": 3,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 4,
        "num_return_sequences": 3,
    }
    expected = model.infill(tokenizer, [text], return_outputs=True, **settings)
    answer = groups.complete(**TEXT, max_tokens=8, group_size=3, temperature=0.8, top_p=0.9, seed=4, n=3)
    assert [choice["text"] for choice in answer["choices"]] == [one[0] for one in expected.written]


@pytest.mark.parametrize(
    "order",
    [
        {"group_size": 4},
        {"order": "right_to_left", "group_size": 2},
        {"order": "random", "seed": 3},
        {"order": "spans", "span_length": 3, "seed": 3},
        {"strategy": "dynamic", "tokens_per_step": 2},
        {"strategy": "dynamic", "threshold": 0.4, "window": 5},
        {"strategy": "speculative", "draft_tokens": 3},
    ],
)
def test_orders(groups, model, tokenizer, order):
    text = "The dog <blank:4> home. Tom <blank:5> happy."
    reference = order if order.get("strategy") != "speculative" else {}
    expected = model.infill(tokenizer, [text], return_outputs=True, **reference)
    body = {"prompt": text, "blanks": True, **order, **GREEDY}
    choice = groups.complete(**body, commits=True)["choices"][0]
    assert (choice["text"], choice["blanks"]) == (expected.texts[0], expected.written[0])
    with groups.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        chunks = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.texts[0]


def test_plain_completions_and_echo(either, model, tokenizer):
    ids = torch.tensor([encode_prompt(tokenizer, "The dog ran home")])
    output = model.generate(ids, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    answer = either.client.completions.create(model="tiny", prompt="<s>The dog ran home", max_tokens=6, temperature=0)
    assert answer.choices[0].text == expected


@pytest.mark.parametrize("stream", [False, True])
def test_what_llama_vim_sends(either, model, tokenizer, stream):
    body = {
        "id_slot": 0, "input_prefix": "One day\n", "input_suffix": "\nTom was happy", "prompt": "The dog",
        "input_extra": [{"text": "the cat sat", "time": [1, 2], "filename": "b.txt"}],
        "n_predict": 6, "stop": [], "n_indent": 0, "top_k": 40, "top_p": 0.90, "stream": stream,
        "samplers": ["top_k", "top_p", "infill"], "cache_prompt": True, "t_max_prompt_ms": 500, "t_max_predict_ms": 1000,
        "response_fields": [
            "content", "timings/prompt_n", "timings/prompt_ms", "timings/predicted_n", "timings/predicted_ms", "truncated",
            "tokens_cached",
        ],
        "temperature": 0.0,
    }  # fmt: skip
    expected = written(model, tokenizer, "the cat sat\nOne day\nThe dog<blank:1..6>\nTom was happy")[0]
    answer = either.post("/infill", **body)
    assert answer.status_code == 200
    if stream:
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
        assert "".join(event["content"] for event in events) == expected
        return
    assert answer.json()["content"] == expected
    assert set(answer.json()) == {*body["response_fields"]}
    warm = either.post("/infill", **{**body, "n_predict": 0, "response_fields": ["content", "tokens_predicted"]})
    assert warm.json() == {"content": "", "tokens_predicted": 0}


def test_without_the_key(either):
    for path in ("/v1/completions", "/infill"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY[:-1]}):
            answer = httpx.post(f"{either.url}{path}", json={"prompt": "a", "suffix": "b"}, headers=headers)
            assert answer.status_code == 401 and "error" in answer.json()
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{either.url}/v1", api_key="wrong").completions.create(model="tiny", **TEXT)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", {**TEXT, "max_tokens": -1}, "max_tokens"),
        ("/v1/completions", {**TEXT, "temperature": 3}, "temperature"),
        ("/v1/completions", {**TEXT, "group_size": 0}, "group_size"),
        ("/v1/completions", {"prompt": "a", "group_size": 0}, "group_size"),
        ("/v1/completions", {**TEXT, "top_p": 1.5}, "top_p"),
        ("/v1/completions", {**TEXT, "presence_penalty": 0.5}, "presence_penalty"),
        ("/v1/completions", {**TEXT, "best": 1}, "best"),
        ("/v1/completions", {**TEXT, "max_tokens": 400}, None),
        ("/v1/completions", {"prompt": ["a", "b"], "suffix": "c"}, "prompt"),
        ("/v1/completions", {"prompt": "a <blank:0>", "blanks": True}, "prompt"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 3, "order": "right_to_left"}, "order"),
        ("/v1/completions", {**TEXT, "strategy": "refine"}, "strategy"),
        ("/infill", {"input_prefix": 3}, "input_prefix"),
        ("/infill", {"n_predict": -5}, "n_predict"),
    ],
)
def test_bad_bodies_name_the_field(either, path, body, field):
    answer = either.post(path, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    assert field is None or field in (error["param"] or "") or error["message"].startswith(field)


def test_what_one_kind_of_server_does_not_do(one_token, groups):
    for name, value in (("group_size", 2), ("strategy", "dynamic"), ("order", "random")):
        error = one_token.post("/v1/completions", **TEXT, **{name: value}).json()["error"]
        assert error["param"] == name and "canvas_length" in error["message"]
    error = groups.post("/v1/completions", **TEXT, repetition_penalty=1.3).json()["error"]
    assert error["param"] == "repetition_penalty"
    error = groups.post("/v1/completions", **TEXT, max_tokens=20, group_size=16).json()["error"]
    assert "group_size=16" in error["message"] and "canvas_length" in error["message"]


def test_a_body_that_is_no_json_and_a_model_that_is_not_there(either):
    answer = either.http.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    for path in ("/v1/completions", "/infill"):
        nested = b"[" * 100_000
        answer = either.http.post(path, content=nested, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
    answer = either.http.post("/infill", content=b"{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert either.post("/v1/completions", **TEXT, model="other").status_code == 404


def test_a_client_that_leaves_frees_its_request(either):
    with either.http.stream("POST", "/v1/completions", json={**TEXT, "max_tokens": 120, "stream": True}) as stream:
        next(stream.iter_lines())
    for _ in range(100):
        lines = either.http.get("/metrics").text.splitlines()
        running = [line for line in lines if line.startswith("vllm:num_requests_running")]
        if running and all(line.endswith(" 0.0") for line in running):
            return
        time.sleep(0.1)
    raise AssertionError(running)
