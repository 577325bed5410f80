"""`a3 serve` as a process: its start, its end, and clients that are killed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT

pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def folder(served_model, chat_tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny"
    served_model.save_pretrained(path)
    chat_tokenizer.save_pretrained(path)
    return path


class Process:
    """A server of its own process."""

    def __init__(self, folder: Path, *options: str, port: int = 0):
        command = [sys.executable, "-m", "a3_hf", "serve", str(folder), "--port", str(port), *options]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
        )
        self.lines: list[str] = []
        self.url = None
        for line in self.process.stderr:
            self.lines.append(line)
            if "curl" in line:
                self.url = re.search(r"curl (\S+)/v1/", line)[1]
                break
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reader.start()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def wait_until_ready(self) -> None:
        while True:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture
def start(folder):
    processes = []

    def make(*options: str, port: int = 0) -> Process:
        processes.append(Process(folder, *options, port=port))
        if processes[-1].url:
            processes[-1].wait_until_ready()
        return processes[-1]

    yield make
    for one in processes:
        one.process.kill()
        one.process.wait()


BODY = {"prompt": "The dog", "temperature": 0.9, "strategy": "groupwise"}


def metric(url: str, name: str) -> float:
    return float(re.search(rf"^{name} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)[1])


def test_it_says_where_it_is_and_ends_cleanly(start):
    server = start("--name", "mine")
    first = next(line for line in server.lines if "API:" in line)
    assert first.startswith(f"mine at {server.url} ")
    example = next(line for line in server.lines if "curl" in line)
    body = json.loads(re.search(r"-d '(.*)'", example)[1])
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert answer["model"] == "mine" and answer["choices"][0]["text"]
    assert server.stop() == 0
    server.reader.join(5)
    line = next(json.loads(line) for line in server.lines if '"path": "/v1/completions"' in line)
    assert line["status"] == 200 and "dog" not in str(line)


def test_sigterm_finishes_what_was_accepted(start):
    server = start("--max-batch", "2")  # so that some wait in the queue
    found = []

    def send(seed: int) -> None:
        found.append(
            httpx.post(f"{server.url}/v1/completions", json=BODY | {"max_tokens": 90, "seed": seed}, timeout=60)
        )

    threads = [threading.Thread(target=send, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    while metric(server.url, "a3_running_requests") < 8 and any(one.is_alive() for one in threads):
        time.sleep(0.005)
    unfinished = 8 - len(found)
    assert server.stop() == 0
    for thread in threads:
        thread.join()
    assert unfinished > 0 and [one.status_code for one in found] == [200] * 8
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")


def test_two_servers_on_one_port(start):
    first = start()
    second = start(port=first.port)
    assert second.process.wait(60) == 2 and second.url is None
    errors = [line for line in second.lines if line.startswith("a3:")]
    assert len(errors) == 1 and f"port={first.port}" in errors[0] and "Choose another --port" in errors[0]
    assert httpx.get(f"{first.url}/health").status_code == 200


def test_a_client_that_is_killed(start):
    server = start()
    script = (
        "import httpx, sys\n"
        "with httpx.stream('POST', sys.argv[1], json={'prompt': 'The dog', 'max_tokens': 120, 'stream': True}) as stream:\n"
        "    for line in stream.iter_lines():\n"
        "        print(line, flush=True)\n"
    )
    client = subprocess.Popen([sys.executable, "-c", script, f"{server.url}/v1/completions"], stdout=subprocess.PIPE)
    client.stdout.readline()
    client.kill()
    client.wait()
    deadline = time.monotonic() + 10
    while metric(server.url, "a3_running_requests") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert metric(server.url, "a3_running_requests") == 0
    assert httpx.post(f"{server.url}/v1/completions", json=BODY).status_code == 200


@pytest.mark.parametrize(
    "options, message",
    [
        (["--dtype", "int8"], "dtype='int8': expected one of auto, float32"),
        (["--device", "cuda:99"], "device='cuda:99'"),
        (["--port", "70000"], "65535"),
        (["--host", "256.0.0.1"], "host='256.0.0.1'"),
    ],
)
def test_options_are_checked(folder, options, message):
    command = [sys.executable, "-m", "a3_hf", "serve", str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_without_the_extra(folder):
    """The package works without what the server needs, and `a3 serve` says what is missing."""
    code = (
        "import sys\n"
        "for name in ('fastapi', 'starlette', 'uvicorn', 'prometheus_client'): sys.modules[name] = None\n"
        "import a3_hf\n"
        "from a3_hf.cli import app\n"
        f"app(['serve', {str(folder)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "pip install 'a3-hf[serve]'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_day_in_small(start):
    """Mixed load with restarts behind clients that retry: every request is answered, once, with what it gets alone."""
    seconds = float(os.environ.get("A3_DAY_SECONDS", "600"))
    server = start()
    port, end, wrong, counts = server.port, time.monotonic() + seconds, [], {"answers": 0, "retries": 0, "restarts": 0}
    lock, known = threading.Lock(), {}

    def body_of(number: int) -> dict:
        draw = random.Random(number)
        kinds = (
            {},
            {"suffix": " home."},
            {"suffix": " was", "order": "random"},
            {"suffix": " a", "strategy": "dynamic"},
        )
        return {"prompt": "The dog", "seed": number, "max_tokens": draw.randint(1, 40), **draw.choice(kinds)}

    def client(name: int) -> None:
        draw = random.Random(name)
        while time.monotonic() < end:
            number = draw.randrange(300)
            while True:
                try:
                    response = httpx.post(f"{server.url}/v1/completions", json=body_of(number), timeout=60)
                except httpx.TransportError:
                    counts["retries"] += 1
                    time.sleep(0.2)
                    continue
                break
            with lock:
                counts["answers"] += 1
                text = response.json()["choices"][0]["text"] if response.status_code == 200 else response.text
                if response.status_code != 200 or known.setdefault(number, text) != text:
                    wrong.append((number, response.status_code, text))

    clients = [threading.Thread(target=client, args=(name,)) for name in range(6)]
    for one in clients:
        one.start()
    while time.monotonic() < end:
        time.sleep(min(max(seconds / 8, 5), max(end - time.monotonic(), 0.1)))
        if time.monotonic() < end:
            assert server.stop() == 0
            server = start(port=port)
            counts["restarts"] += 1
    for one in clients:
        one.join()
    print(counts)
    assert not wrong and counts["answers"] > seconds and counts["restarts"] >= 1
