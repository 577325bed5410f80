"""A live server of a tiny model, and what the model says in process."""

import copy
import threading
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
import httpx
import uvicorn

from a3_hf.serving.app import build_app
from a3_hf.serving.engine import Engine
from a3_hf.serving.model_plans import ModelPlanner
from a3_hf.serving.server import bound_socket
from a3_hf.serving.service import Service
from tests.conftest import tiny_model

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' and not loop.first %}{{ raise_exception('system first') }}"
    "{% endif %}<s>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


class Live:
    """A server in a thread of this process."""

    def __init__(self, model, tokenizer, *, timeout: float = 60.0, engine: dict | None = None, **settings):
        self.model, self.tokenizer = model, tokenizer
        self.engine = Engine(model, **(engine or {}))
        self.service = Service(ModelPlanner(model, tokenizer, self.engine), self.engine, name="tiny", timeout=timeout)
        bound = bound_socket("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        config = uvicorn.Config(build_app(self.service, **settings), log_config=None, lifespan="on")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [bound]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def post(self, path: str, **body) -> httpx.Response:
        return self.client.post(path, json=body)

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="session")
def served_model():
    return tiny_model(vocab_size=320, slot_start="left_token", max_position_embeddings=128)


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


@pytest.fixture(scope="session")
def live(served_model, chat_tokenizer):
    server = Live(served_model, chat_tokenizer)
    yield server
    server.close()


@pytest.fixture
def start(served_model, chat_tokenizer):
    """Starts servers of other settings."""
    servers = []

    def make(**settings) -> Live:
        servers.append(Live(served_model, chat_tokenizer, **settings))
        return servers[-1]

    yield make
    for server in servers:
        server.close()
