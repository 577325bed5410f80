"""What the commands share: loading a model, and saying in a line what the user can put right."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

ModelPath = Annotated[
    str, typer.Argument(help="An adapted model, or an adapter: a folder or a hub name.", show_default=False)
]


def load(path: str, **settings: Any):
    """The model (on the GPU if there is one) and the tokenizer at `path`; `settings` as in `from_pretrained`.

    Raises:
        ValueError: nothing there that can be loaded.
    """
    import torch

    from .adapters import load_model, load_tokenizer

    try:
        tokenizer = load_tokenizer(path)
    except OSError as error:  # the library's message may not say which model
        raise ValueError(f"model={path!r} can't be loaded: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(path, **settings).to(device).eval(), tokenizer


def or_exit(action: Callable[[], Any]) -> Any:
    """Runs an action; what the user can put right is said in a line, without a traceback."""
    try:
        return action()
    except (ValueError, OSError) as error:
        print(f"a3: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
