"""Parts that the commands share: option spelling, error messages, options, loading a model."""

import contextlib
import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

UsageError = typer.BadParameter.__bases__[0]  # click's; its import path differs between versions of typer


class Command(TyperCommand):
    # Identical to Typer's command except: errors that the user can fix are printed in one line.
    def invoke(self, context):
        return report_user_errors(functools.partial(super().invoke, context))


class Commands(TyperGroup):
    # Identical to Typer's group except: --num-orders may be written --num_orders, errors are printed in one line, and the exit
    # code is the value that a command returns.
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
    """A hint if a text was parsed as an option, else ""."""
    options = args[: args.index("--")] if "--" in args else args
    texts = [arg for arg in options if arg.startswith("-") and (" " in arg or "<blank" in arg)]
    return f" Put a text that begins with a dash after --: … -- {texts[0]!r}" if texts else ""


def report_user_errors(action: Callable[[], Any]) -> Any:
    """Registers the models, takes cuDNN out of attention, runs an action and returns its result. A ValueError or OSError is
    printed in one line, without a traceback, and ends the command with exit code 2.
    """
    try:
        from a3_hf import registration  # noqa: F401
        from a3_hf.devices import leave_out_cudnn_attention

        leave_out_cudnn_attention()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of libraries, to developers
            return action()
    except (ValueError, OSError) as error:
        print("a3:", " ".join(str(error).split()), file=sys.stderr)
        raise typer.Exit(2) from error


APP_SETTINGS = {
    "cls": Commands,
    "no_args_is_help": True,
    "add_completion": False,
    "pretty_exceptions_enable": False,
}
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def _option(kind: type, help: str, default: str | bool = False, *names: str):
    """Makes an option that is None unless given; the help shows `default`."""
    return Annotated[kind | None, typer.Option(*names, help=help, show_default=default)]


ModelPath = Annotated[
    str,
    typer.Argument(help="An adapted model, an adapter or a draft head: a folder or a hub id.", show_default=False),
]
Base = _option(str, "Path of the base model of an adapter or a draft head, if it has moved.")
SlotStart = _option(str, "Start of the slots of a plain LLaMA: left_token or query_embed.")
Seed = Annotated[int, typer.Option(help="Random seed.")]
SpanLength = _option(int, "Tokens per span, with the order spans.")
ORDER_HELP = "left_to_right, right_to_left, random or spans."
# Fields of A3GenerationConfig. Its defaults hold for options that are not given.
DECODING_OPTIONS = {
    "strategy": _option(str, "groupwise, dynamic, speculative or refine.", "groupwise"),
    "order": _option(str, ORDER_HELP),
    "group_size": _option(int, "Groupwise: tokens per pass.", "1"),
    "span_length": SpanLength,
    "criterion": _option(str, "Dynamic: confidence, entropy, margin or random."),
    "tokens_per_step": _option(int, "Dynamic: tokens per pass.", "1"),
    "threshold": _option(float, "Dynamic: commit every token above this probability."),
    "entropy_budget": _option(float, "Dynamic: entropy to commit per pass, in nats."),
    "window": _option(int, "Dynamic: number of next blanks that compete.", "all"),
    "draft": _option(str, "Speculative: model, ngram, head or ngram+head.", "model; with a draft head, ngram+head"),
    "draft_tokens": _option(int, "Speculative: most drafts per pass.", "4, ngram 7, head 8"),
    "draft_width": _option(int, "Speculative, with a draft head: most drafts after one token; 1: chains.", "4"),
    "verify": _option(
        str, "Speculative: slots, or content, for the text of the plain LLaMA.", "slots; with a draft head, content"
    ),
}
GENERATION_OPTIONS = {
    **DECODING_OPTIONS,
    "refine_rounds": _option(int, "Refine: number of rounds.", "4"),
    "refine_fraction": _option(float, "Refine: fraction of the tokens that a round rewrites.", "0.25"),
    "do_sample": _option(bool, "Sample instead of taking the most likely token.", False, "--do-sample"),
    "temperature": _option(float, "With --do-sample."),
    "top_k": _option(int, "With --do-sample."),
    "top_p": _option(float, "With --do-sample."),
    "min_p": _option(float, "With --do-sample."),
    "repetition_penalty": _option(float, "Above 1: makes tokens of the text less likely."),
    "max_time": _option(float, "Time limit in seconds."),
    "seed": _option(int, "Random seed."),
}


def with_options(options: dict[str, Any]) -> Callable:
    """Returns a decorator that adds options to a command. The command receives the given ones as the dict `settings`."""

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def wrapped(**arguments):
            given = {name: arguments.pop(name) for name in options}
            settings = {name: value for name, value in given.items() if value is not None}
            return command(**arguments, settings=settings)

        own = [one for one in inspect.signature(command).parameters.values() if one.name != "settings"]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in options.items()
        ]
        wrapped.__signature__ = inspect.Signature([*own, *added])
        wrapped.__annotations__ = {one.name: one.annotation for one in (*own, *added)}
        return wrapped

    return decorate


PACKED_PARAMETERS = 10**9  # of a model that is packed, at most


def load(
    path: str,
    *,
    base: str | None = None,
    slot_start: str | None = None,
    rope_scaling: dict[str, Any] | None = None,
    dtype: str | None = None,
    device: str | None = None,
):
    """The model at `path`, in evaluation mode, and its tokenizer. Without a `dtype`, on a CPU, it is in the one that this CPU
    computes fastest in, and a line on stderr says which.

    Args:
        base: the base of an adapter, if it has moved.
        slot_start: the start of the slots, if the checkpoint does not name one.
        rope_scaling: stretches the context; see `scale_rope`.
        dtype: "auto" (the checkpoint's own), "float32", …
        device: of torch; None: the GPU if there is one.

    Raises:
        ValueError: no model that can be loaded, or settings that it does not support.
    """
    import torch

    from a3_hf.adapters.checkpoint_info import CheckpointInfo, check_is_there
    from a3_hf.adapters.checkpoints import load_model, load_tokenizer
    from a3_hf.devices import default_dtype

    check_is_there(path, name="model")
    settings: dict[str, Any] = {}
    checkpoint = CheckpointInfo.read(path, base=base)
    if slot_start is not None:
        _check_slot_start(slot_start, checkpoint.base_config, path)
        settings["slot_start"] = slot_start
    if rope_scaling is not None:
        from a3_hf.evaluation.measures.inputs import stretched_config

        settings["config"] = stretched_config(checkpoint, rope_scaling)
    tokenizer = load_tokenizer(checkpoint)
    place = _checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    says_dtype = dtype is None and place.type == "cpu"
    dtype = default_dtype(place) if dtype is None else dtype
    if says_dtype:
        has = "has" if dtype == torch.bfloat16 else "has no"
        print(f"Computing in {str(dtype).removeprefix('torch.')}: this CPU {has} bfloat16 products.", file=sys.stderr)
    model = load_model(checkpoint, dtype=dtype, **settings).to(place).eval()
    if place.type == "cpu":
        _pack(model)
    return model, tokenizer


def _checked_device(name: str):
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r}: {str(error).splitlines()[0]}") from error


def _pack(model) -> None:
    """Packs the weights of a small A3 model, where that is possible: decoding is faster, and takes twice the memory."""
    from peft import PeftModel

    from a3_hf.models.a3_llama.modeling_a3_llama import A3LlamaForCausalLM

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(base, A3LlamaForCausalLM) and base.num_parameters() <= PACKED_PARAMETERS:
        with contextlib.suppress(ValueError):  # bfloat16, adapters on all rows, …: it decodes as it is
            base.pack_weights()


def _check_slot_start(slot_start: str, config: dict[str, Any], path: str) -> None:
    from a3_hf.models.a3_llama.configuration_a3_llama import SLOT_STARTS

    given = f"--slot-start {slot_start}"
    if slot_start not in SLOT_STARTS:
        raise ValueError(f"{given}: expected {' or '.join(SLOT_STARTS)}")
    model_type = config.get("model_type")
    if model_type not in ("llama", "a3_llama"):
        raise ValueError(f"{given}: a model of type {model_type!r} has no slot start; leave it out")
    if model_type == "a3_llama" and config.get("slot_start", slot_start) != slot_start:
        raise ValueError(f"{given}: {path} was trained with {config['slot_start']}; leave it out")


def check_page(path: Path | None) -> None:
    """Checks, before anything is computed, that a page can be written to `path`.

    Raises:
        ValueError: a folder, or a file in a folder that does not exist.
    """
    if path is not None and path.is_dir():
        raise ValueError(f"html={str(path)!r} is a folder: expected a file name")
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"html={str(path)!r}: the folder {str(path.parent)!r} does not exist")
