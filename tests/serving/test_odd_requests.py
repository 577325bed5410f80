"""Requests that could stop a server for others: large, late, odd or many; and pairs of features that met here first."""

import json
import threading
import time

import pytest
import torch

from a3_hf import DraftHead, DraftHeadConfig, attach_draft_head
from a3_hf.serving.engine import Engine, Ticket
from a3_hf.serving.model_plans import ModelPlanner
from a3_hf.serving.schemas import CompletionRequest
from a3_hf.serving.texts import Stops, whole_characters
from tests.conftest import tiny_model
from tests.serving.conftest import Live


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/completions", {"prompt": ["a", *[1] * 500_000]}),
        ("/v1/completions", {"prompt": [[], *[{}] * 500_000]}),
        ("/v1/completions", {"prompt": "a", **{f"x{number}": 1 for number in range(100_000)}}),
        ("/v1/completions", {"prompt": "a", "stop": "a" * 100_000}),
        ("/v1/completions", {"prompt": "a", "strategy": "speculative", "draft_tokens": 1 << 20}),
        ("/v1/completions", {"prompt": "a <blank:1..90> b", "blanks": True}),
        ("/v1/chat/completions", {"messages": [0] * 500_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [0] * 500_000}]}),
    ],
    ids=lambda one: str(one)[:40],
)
def test_large_bodies_are_refused_at_once(live, path, body):
    """Each took the event loop, or the engine, for tens of seconds when every part of it was looked at."""
    response = live.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and len(response.text) < 2000


def test_what_is_decoded_again_does_not_grow_with_the_prompt(tokenizer):
    prompt = tokenizer.encode("word " * 400 + "\ufffd")
    assert len(whole_characters(tokenizer, prompt)) <= 64
    stops = Stops(["a" * 100 + "b"])
    stops.add("a" * 50)
    assert stops.certain() == ""


def requests(model, tokenizer, engine, *bodies: dict) -> list:
    planner = ModelPlanner(model, tokenizer, engine)
    base = {"prompt": "The dog", "temperature": 0}
    plans = [planner.completion(CompletionRequest(**base | body), Ticket(time.monotonic() + 60)) for body in bodies]
    return [job for plan in plans for job in plan.jobs]


def test_a_large_request_is_not_overtaken_by_its_kind(served_model, tokenizer):
    engine = Engine(served_model, max_batch=4)
    bodies = [{"max_tokens": 60}, {"max_tokens": 2, "n": 4, "temperature": 1}, *[{"max_tokens": 2}] * 5]
    first, large, *small = requests(served_model, tokenizer, engine, *bodies)
    done = []
    for name, job in (("large", large), *(("small", job) for job in small)):
        job.done.add_done_callback(lambda _, name=name: done.append(name))
    engine.submit(first)
    for job in (large, *small):
        engine.submit(job)
    for job in (first, large, *small):
        job.done.result(30)
    assert done[0] == "large"
    engine.close()


def test_rows_of_very_different_widths_are_not_padded_alike(tokenizer):
    model = tiny_model(vocab_size=320, slot_start="left_token", max_position_embeddings=2048)
    engine = Engine(model, max_tokens=4096)
    wide, *small = requests(model, tokenizer, engine, {"max_tokens": 1500}, *[{"max_tokens": 9}] * 20)
    assert wide.key != small[0].key and len({job.key for job in small}) == 1
    sizes, run_pass = [], engine._pass

    def watched(batch):
        sizes.append(len(batch.owners) * batch.width)
        run_pass(batch)

    engine._pass = watched
    for job in (wide, *small):
        engine.submit(job)
    for job in small:
        job.done.result(60)
    wide.ticket.is_cancelled = True
    engine.close()
    assert max(sizes) <= 4096


def test_with_a_draft_head_blanks_at_the_end_and_inside_wait_together(chat_tokenizer):
    model = tiny_model(vocab_size=320, slot_start="left_token", max_position_embeddings=128)
    torch.manual_seed(3)
    head = DraftHead(DraftHeadConfig.for_base(model.config, first_layer=1, sampler_size=8, rank=2, num_candidates=20))
    attach_draft_head(model, head.double())
    server = Live(model, chat_tokenizer)
    bodies = [
        {"prompt": "The dog", "suffix": " home", "max_tokens": 6, "strategy": "speculative"},
        {"prompt": "The dog <blank:6>", "blanks": True, "strategy": "speculative"},
        {"prompt": "The dog", "max_tokens": 30},
        {"prompt": "One day", "max_tokens": 30},
    ]
    alone = [server.post("/v1/completions", seed=1, **body).json()["choices"][0]["text"] for body in bodies]
    found: dict[int, str] = {}

    def send(number: int) -> None:
        found[number] = server.post("/v1/completions", seed=1, **bodies[number]).json()["choices"][0]["text"]

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(4)] == alone
    server.close()


def test_a_plan_that_waits_is_given_up_in_time(start):
    server = start(timeout=2)
    runs, release = threading.Event(), threading.Event()
    run_pass = server.engine._pass
    server.engine._pass = lambda batch: (runs.set(), release.wait(20), run_pass(batch))
    busy = threading.Thread(target=lambda: server.post("/v1/completions", prompt="The dog", max_tokens=4))
    busy.start()
    assert runs.wait(10)
    for path, body in (
        ("/v1/score", {"text": "The dog"}),
        ("/v1/completions", {"prompt": "The dog", "max_tokens": 0, "echo": True, "logprobs": 1}),
        ("/v1/completions", {"prompt": "The", "suffix": " dog", "auto_length": True, "max_tokens": 4}),
    ):
        assert server.post(path, **body).status_code == 504, path
    release.set()
    busy.join()


def test_a_fault_of_the_server_is_answered_and_logged(start, caplog):
    server = start()
    server.service.planner.model = None
    response = server.client.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "fault"})
    assert response.status_code == 500 and response.headers["x-request-id"] == "fault"
    assert response.json()["error"]["type"] == "server_error" and "a request failed" in caplog.text
    server.service.planner.model = server.model
    assert server.post("/v1/completions", prompt="a", max_tokens=2).status_code == 200  # the same connection


def test_many_prompts_are_one_request(start):
    server = start(engine={"max_queue": 2})
    response = server.post("/v1/completions", prompt=["The dog"] * 20, max_tokens=2)
    assert response.status_code == 200 and len(response.json()["choices"]) == 20


def test_offsets_of_an_echoed_prompt(live):
    body = {"prompt": "The dog", "echo": True, "logprobs": 1, "max_tokens": 3, "temperature": 0}
    whole = live.post("/v1/completions", **body).json()["choices"][0]
    text = live.post("/v1/completions", **body, stream=True).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [offset for part in parts for offset in part["text_offset"]] == whole["logprobs"]["text_offset"]
    for token, offset in zip(whole["logprobs"]["tokens"], whole["logprobs"]["text_offset"], strict=True):
        assert whole["text"][offset : offset + len(token)] == token


def test_an_echo_is_the_prompt(live):
    answer = live.post("/v1/completions", prompt="a</s>b <s>c .", echo=True, max_tokens=1).json()
    assert answer["choices"][0]["text"].startswith("a</s>b <s>c .")


@pytest.mark.parametrize("seed", range(60, 90))
def test_broken_characters_at_the_end_of_a_blank(live, seed):
    body = {"prompt": "中<blank:2..4> é <blank:3>", "blanks": True, "seed": seed, "temperature": 1.2}
    whole = live.post("/v1/completions", **body).json()["choices"][0]["text"]
    text = live.post("/v1/completions", **body, stream=True).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole


def test_a_message_fits_the_servers_memory(start):
    server = start(engine={"max_tokens": 100})
    response = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}], n=2)
    assert response.status_code == 200, response.text
