"""Runs the application with uvicorn: from a bound socket to a clean end."""

import logging
import signal
import socket
import sys

import uvicorn

from .app import build_app
from .engine import Engine
from .limits import JsonLines
from .model_plans import ModelPlanner
from .service import Service


def bound_socket(host: str, port: int) -> socket.socket:
    """Returns a socket of this address, so that an address in use is found before a model is loaded.

    Raises:
        ValueError: the address is in use, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise ValueError(f"host={host!r}, port={port}: {error}. Choose another --port.") from error
    return bound


def serve(
    model,
    tokenizer,
    bound: socket.socket,
    *,
    name: str,
    api_key: str | None = None,
    max_batch: int = 32,
    max_queue: int = 256,
    max_tokens: int = 1 << 15,
    max_body: int = 4 << 20,
    timeout: float = 120.0,
    drain_seconds: float = 30.0,
    cors_origins: tuple[str, ...] = (),
    log_texts: bool = False,
    join: str = "pass",
) -> None:
    """Serves a model until SIGTERM or SIGINT; what runs then is finished, for `drain_seconds` at most.

    Args:
        model: an `A3LlamaForCausalLM`, adapted or not.
        bound: of `bound_socket`.
        name: the model's, as clients see it.
        others: as in `Engine`, `Service` and `build_app`.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    engine = Engine(model, max_batch=max_batch, max_queue=max_queue, max_tokens=max_tokens, join=join)
    service = Service(ModelPlanner(model, tokenizer, engine), engine, name=name, timeout=timeout, logs_texts=log_texts)
    app = build_app(service, api_key=api_key, max_body=max_body, cors_origins=cors_origins)
    _log_as_json()
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=max(int(drain_seconds), 1), lifespan="on"
    )
    # uvicorn raises the signal that ended it again; here it has done its work.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    host, port = bound.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = " -H 'Authorization: Bearer KEY'" if api_key else ""
    body = '{"prompt": "The dog", "suffix": " home.", "max_tokens": 4}'
    print(f"{name} at {address} (API: {address}/docs). Try:", file=sys.stderr)
    print(
        f"  curl {address}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'",
        file=sys.stderr,
        flush=True,
    )
    uvicorn.Server(config).run(sockets=[bound])


def _log_as_json() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("a3_hf.serving", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
