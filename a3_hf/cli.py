"""The command `a3`: adapt a LLaMA, then infill, generate and score with the result."""

import sys
from typing import Annotated

import typer

app = typer.Typer(
    help="A3: any-order generation from a pretrained LLaMA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

ModelPath = Annotated[str, typer.Argument(help="An adapted model: a folder or a hub name.", show_default=False)]
Strategy = Annotated[str | None, typer.Option(help="groupwise or dynamic.", show_default="groupwise")]
Order = Annotated[str | None, typer.Option(help="Groupwise: left_to_right, right_to_left, random or spans.")]
GroupSize = Annotated[int | None, typer.Option(help="Groupwise: tokens written per pass.", show_default="1")]
SpanLength = Annotated[int | None, typer.Option(help="Groupwise with --order spans.")]
Criterion = Annotated[str | None, typer.Option(help="Dynamic: confidence, entropy, margin or random.")]
TokensPerStep = Annotated[int | None, typer.Option(help="Dynamic: tokens committed per pass.", show_default="1")]
Threshold = Annotated[float | None, typer.Option(help="Dynamic: commit all blanks above this probability.")]
DoSample = Annotated[bool, typer.Option("--do-sample", help="Sample instead of taking the likeliest token.")]
Temperature = Annotated[float | None, typer.Option(help="With --do-sample.")]
TopK = Annotated[int | None, typer.Option(help="With --do-sample.")]
TopP = Annotated[float | None, typer.Option(help="With --do-sample.")]
Seed = Annotated[int | None, typer.Option(help="Of sampling and random orders.")]


@app.command(context_settings=PASS_ON)
def adapt(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A YAML file: one complete run.", show_default=False)],
) -> None:
    """Adapt a pretrained LLaMA as RECIPE says. Any setting of the recipe can be replaced: --learning_rate 1e-4.

    The same command goes on from the last checkpoint after Ctrl-C or a crash.
    """
    from .arguments import parse_recipe
    from .train import run

    raise typer.Exit(_or_exit(lambda: run(parse_recipe(recipe, context.args))))


@app.command()
def infill(
    model: ModelPath,
    text: Annotated[str, typer.Argument(help='E.g. "The dog <blank:6> home.": 6 tokens are written there.')],
    strategy: Strategy = None,
    order: Order = None,
    group_size: GroupSize = None,
    span_length: SpanLength = None,
    criterion: Criterion = None,
    tokens_per_step: TokensPerStep = None,
    threshold: Threshold = None,
    do_sample: DoSample = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
) -> None:
    """Fill the blanks of a text and print it; passes and log-likelihood go to stderr."""
    settings = _settings(locals(), leave_out=("model", "text"))

    def fill() -> None:
        from .generation import A3GenerationConfig
        from .infilling import Template

        # mistakes are found before the model is loaded
        Template.parse(text)
        A3GenerationConfig(**settings)
        a3, tokenizer = _load(model)
        texts, output = a3.infill(tokenizer, [text], return_outputs=True, **settings)
        print(texts[0])
        _report(output)

    _or_exit(fill)


@app.command()
def generate(
    model: ModelPath,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write after the prompt.")] = 128,
    strategy: Strategy = None,
    order: Order = None,
    group_size: GroupSize = None,
    span_length: SpanLength = None,
    criterion: Criterion = None,
    tokens_per_step: TokensPerStep = None,
    threshold: Threshold = None,
    do_sample: DoSample = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
) -> None:
    """Go on from a prompt, several tokens a pass, and print prompt and continuation.

    The text ends at the first end-of-text token.
    """
    settings = _settings(locals(), leave_out=("model", "prompt"))

    def go_on() -> None:
        import torch

        from .generation import A3GenerationConfig
        from .infilling import encode_prompt

        A3GenerationConfig(**settings)
        a3, tokenizer = _load(model)
        ids = encode_prompt(tokenizer, prompt)
        output = a3.generate_any_order(torch.tensor([ids], device=a3.device), **settings)
        sequence = output.sequences[0].tolist()
        if tokenizer.eos_token_id in sequence[len(ids) :]:
            sequence = sequence[: sequence.index(tokenizer.eos_token_id, len(ids))]
        print(tokenizer.decode(sequence, skip_special_tokens=True))
        _report(output)

    _or_exit(go_on)


@app.command()
def score(
    model: ModelPath,
    text: Annotated[str, typer.Argument(help="The text whose log-likelihood is asked for.")],
    order: Annotated[str, typer.Option(help="left_to_right, right_to_left, random or spans.")] = "left_to_right",
    group_size: Annotated[int, typer.Option(help="Tokens predicted together.")] = 1,
    span_length: SpanLength = None,
    seed: Annotated[int, typer.Option(help="Of a random order.")] = 0,
) -> None:
    """Print each token's log-probability (nats) under an order, and their sum: exact, in one pass."""

    def tell() -> None:
        import torch
        from rich.console import Console
        from rich.table import Table

        from .infilling import encode_prompt
        from .orders import GroupOrder

        a3, tokenizer = _load(model)
        ids = torch.tensor([encode_prompt(tokenizer, text)])
        scored = torch.arange(ids.shape[1])[None] > 0  # all but BOS
        if not scored.any():
            raise ValueError("text is empty; it takes at least one token to score")
        group_order = GroupOrder.infilling(
            scored,
            order=order,
            group_size=group_size,
            span_length=span_length,
            generator=[torch.Generator().manual_seed(seed)],
        )
        log_probs = a3.log_likelihood(ids.to(a3.device), group_order.group_ids.to(a3.device))[0].tolist()
        table = Table("token", "group", "log p")
        tokens = tokenizer.convert_ids_to_tokens(ids[0].tolist())
        rows = zip(tokens, group_order.group_ids[0].tolist(), log_probs, strict=True)
        for token, group, log_prob in list(rows)[1:]:
            table.add_row(repr(token)[1:-1].replace("[", r"\["), str(group), f"{log_prob:.4f}")
        Console().print(table)
        count = len(log_probs) - 1
        print(f"log-likelihood {sum(log_probs):.4f} nats, {sum(log_probs) / count:.4f} per token ({count} tokens)")

    _or_exit(tell)


def _settings(arguments: dict, *, leave_out: tuple[str, ...]) -> dict:
    """The generation options that were given."""
    unset = (None, False)
    return {name: value for name, value in arguments.items() if name not in leave_out and value not in unset}


def _load(path: str):
    import torch
    from transformers import AutoTokenizer

    from .modeling_a3_llama import A3LlamaForCausalLM

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except OSError as error:  # the library's message may not say which model
        raise ValueError(f"model={path!r} can't be loaded: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return A3LlamaForCausalLM.from_pretrained(path).to(device).eval(), tokenizer


def _report(output) -> None:
    written = output.commit_step >= 0
    print(
        f"{int(written.sum())} tokens in {output.num_forward_passes} passes, "
        f"log-likelihood {float(output.log_probs.sum()):.3f} nats",
        file=sys.stderr,
    )


def _or_exit(action):
    """Runs an action; what the user can put right is said in a line, without a traceback."""
    try:
        return action()
    except (ValueError, OSError) as error:
        print(f"a3: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
