"""`a3 serve`."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Base, ModelPath, SlotStart, load

DTYPES = ("auto", "float32", "bfloat16", "float16")


def serve(
    model: ModelPath,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: at all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests.", show_default="the last part of its path")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key that clients must send.", envvar="A3_API_KEY", show_default="none")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most texts that are decoded together.")] = 32,
    max_queue: Annotated[int, typer.Option(min=1, help="Most requests that wait; more get 429.")] = 256,
    max_batch_tokens: Annotated[int, typer.Option(min=16, help="Most tokens of all texts together.")] = 1 << 15,
    max_body: Annotated[int, typer.Option(min=1, help="Most bytes of a request; more get 413.")] = 4 << 20,
    join: Annotated[
        str, typer.Option(help="When new texts join a batch that runs: pass (between two) or batch (at its end).")
    ] = "pass",
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for a request; later ones get 504.")] = 120.0,
    drain_seconds: Annotated[float, typer.Option(min=1, help="Seconds to finish what runs at SIGTERM.")] = 30.0,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16 or float16.", show_default="what the device computes fast"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="For example cpu or cuda:1.", show_default="a GPU if there is one")
    ] = None,
    cors: Annotated[list[str] | None, typer.Option(help="Origin of a web page that may call; repeat for more.")] = None,
    log_texts: Annotated[bool, typer.Option("--log-texts", help="Log what clients send.")] = False,
    slot_start: SlotStart = None,
    base: Base = None,
) -> None:
    """Serve a model over HTTP: OpenAI's and llama.cpp's requests, with a suffix that is really infilled, and a page to try."""
    try:
        from a3_hf.serving.server import bound_socket
        from a3_hf.serving.server import serve as run
    except ModuleNotFoundError as error:
        raise ValueError(f"a3 serve needs {error.name}: pip install 'a3-hf[serve]'") from error
    from a3_hf.models.a3_llama.modeling_a3_llama import A3LlamaForCausalLM

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    if join not in ("pass", "batch"):
        raise ValueError(f"join={join!r}: expected pass or batch")
    bound = bound_socket(host, port)
    a3, tokenizer = load(model, base=base, slot_start=slot_start, dtype=dtype, device=device)
    plain = a3.get_base_model() if hasattr(a3, "get_base_model") else a3
    if not isinstance(plain, A3LlamaForCausalLM):
        raise ValueError(
            f"{model} is a {type(plain).__name__}: a3 serve expects an A3 model, an adapter or a draft head"
        )
    run(
        a3,
        tokenizer,
        bound,
        name=name or Path(model).resolve().name,
        api_key=api_key,
        max_batch=max_batch,
        max_queue=max_queue,
        max_tokens=max_batch_tokens,
        max_body=max_body,
        timeout=timeout,
        drain_seconds=drain_seconds,
        cors_origins=tuple(cors or ()),
        log_texts=log_texts,
        join=join,
    )
