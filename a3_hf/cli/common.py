"""What the commands share: how they are spelled, loading a model, and saying what is wrong in a line."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

ModelPath = Annotated[
    str, typer.Argument(help="An adapted model, or an adapter: a folder or a hub name.", show_default=False)
]
Base = Annotated[
    str | None, typer.Option("--base", help="The adapter's base, if no longer where it was.", show_default=False)
]
SlotStart = Annotated[
    str | None,
    typer.Option("--slot-start", help="What slots of a LLaMA start as: left_token or query_embed.", show_default=False),
]
UsageError = typer.BadParameter.__bases__[0]  # click's, which typer has under another name in each version


class Commands(TyperGroup):
    # Identical to Typer's group except: --num-orders is --num_orders too, and what is wrong is said in a line.
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.context_settings["token_normalize_func"] = lambda name: name.replace("_", "-")

    def main(self, args=None, *more, **settings):
        given = sys.argv[1:] if args is None else list(args)
        try:
            code = super().main(given, *more, **{**settings, "standalone_mode": False})
        except UsageError as error:
            command = error.ctx.command_path if error.ctx else "a3"
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                print(f"a3: {error.format_message()}{_about_dashes(given)} ({command} --help)", file=sys.stderr)
            sys.exit(error.exit_code)
        except typer.Abort:
            sys.exit(130)
        sys.exit(code)


def _about_dashes(args: list[str]) -> str:
    """What a message adds where a text was taken for an option."""
    options = args[: args.index("--")] if "--" in args else args
    texts = [arg for arg in options if arg.startswith("-") and (" " in arg or "<blank" in arg)]
    return f" A text that begins with a dash goes behind --: … -- {texts[0]!r}" if texts else ""


def load(path: str, *, base: str | None = None, slot_start: str | None = None, **settings: Any):
    """The model (on the GPU if there is one) and the tokenizer at `path`; `settings` as in `from_pretrained`.

    Args:
        base: the base of an adapter, where it is no longer where it was.
        slot_start: what slots start as, where the checkpoint does not say it.

    Raises:
        ValueError: nothing there that can be loaded.
    """
    import torch

    from a3_hf.adapters.checkpoint_info import CheckpointInfo, check_is_there
    from a3_hf.adapters.checkpoints import load_model, load_tokenizer

    check_is_there(path, name="model")
    checkpoint = CheckpointInfo.read(path, base=base)
    if slot_start is not None:
        _check_slot_start(slot_start, checkpoint.base_config, path)
        settings["slot_start"] = slot_start
    tokenizer = load_tokenizer(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(checkpoint, **settings).to(device).eval(), tokenizer


def _check_slot_start(slot_start: str, config: dict[str, Any], path: str) -> None:
    from a3_hf.models.a3_llama.configuration_a3_llama import SLOT_STARTS

    if slot_start not in SLOT_STARTS:
        raise ValueError(f"--slot-start {slot_start}: it takes {' or '.join(SLOT_STARTS)}")

    model_type = config.get("model_type")
    if model_type not in ("llama", "a3_llama"):
        raise ValueError(
            f"--slot-start {slot_start}: a model of type {model_type!r} has no slots that start; leave it out"
        )
    if model_type == "a3_llama" and config.get("slot_start", slot_start) != slot_start:
        raise ValueError(f"--slot-start {slot_start}: {path} was trained with {config['slot_start']}; leave it out")


def check_page(path: Path | None) -> None:
    """Whether a page can be written to `path`, before the work that it would show."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ValueError(f"html={str(path)!r} lies in no folder: {str(path.parent)!r} does not exist")
    if path.is_dir():
        raise ValueError(f"html={str(path)!r} is a folder; it takes the name of a file")


def report_user_errors(action: Callable[[], Any]) -> Any:
    """Runs an action, with the models registered; what the user can put right is said in a line, without a traceback."""
    try:
        from a3_hf import registration  # noqa: F401

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # to developers, of what libraries will rename
            return action()
    except (ValueError, OSError) as error:
        print("a3:", " ".join(str(error).split()), file=sys.stderr)
        raise typer.Exit(2) from error
