"""The command `a3`: adapt a LLaMA, then infill, generate and score with the result."""

import functools
import inspect
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from .common import Base, Commands, ModelPath, SlotStart, check_page, load, report_user_errors

app = typer.Typer(
    cls=Commands,
    help="A3: any-order generation from a pretrained LLaMA. Options are written with hyphens or underscores.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

Order = Annotated[str | None, typer.Option(help="left_to_right, right_to_left, random or spans.")]
SpanLength = Annotated[int | None, typer.Option(help="With --order spans.")]
Show = Annotated[bool, typer.Option("--show", help="Play in the terminal how the text came about.")]
Html = Annotated[Path | None, typer.Option(help="Write a page that replays it, one file.", show_default=False)]
# Fields of A3GenerationConfig; not given, its defaults hold.
GENERATION_OPTIONS = {
    "strategy": Annotated[
        str | None,
        typer.Option(help="groupwise, dynamic, speculative or refine.", show_default="groupwise"),
    ],
    "order": Order,
    "group_size": Annotated[int | None, typer.Option(help="Groupwise: tokens per pass.", show_default="1")],
    "span_length": SpanLength,
    "criterion": Annotated[str | None, typer.Option(help="Dynamic: confidence, entropy, margin or random.")],
    "criterion_temperature": Annotated[float | None, typer.Option(help="Dynamic: noise on the criterion.")],
    "tokens_per_step": Annotated[int | None, typer.Option(help="Dynamic: tokens per pass.", show_default="1")],
    "threshold": Annotated[float | None, typer.Option(help="Dynamic: commit all blanks above this probability.")],
    "entropy_budget": Annotated[float | None, typer.Option(help="Dynamic: commit within this many nats.")],
    "window": Annotated[int | None, typer.Option(help="Dynamic: only the next so many blanks compete.")],
    "draft": Annotated[str | None, typer.Option(help="Speculative: model or ngram.", show_default="model")],
    "draft_tokens": Annotated[int | None, typer.Option(help="Speculative: drafts per pass.", show_default="4")],
    "refine_rounds": Annotated[int | None, typer.Option(help="Refine: rounds.", show_default="4")],
    "refine_fraction": Annotated[float | None, typer.Option(help="Refine: opened again.", show_default="0.25")],
    "do_sample": Annotated[
        bool | None, typer.Option("--do-sample", help="Sample instead of taking the likeliest token.")
    ],
    "temperature": Annotated[float | None, typer.Option(help="With --do-sample.")],
    "top_k": Annotated[int | None, typer.Option(help="With --do-sample.")],
    "top_p": Annotated[float | None, typer.Option(help="With --do-sample.")],
    "min_p": Annotated[float | None, typer.Option(help="With --do-sample.")],
    "repetition_penalty": Annotated[float | None, typer.Option(help="Above 1: tokens of the text are less likely.")],
    "max_time": Annotated[float | None, typer.Option(help="Seconds.")],
    "seed": Annotated[int | None, typer.Option(help="Of sampling and random orders.")],
}


def with_generation_options(command):
    """Gives a command an option for each of `GENERATION_OPTIONS`; it gets those that were given as `settings`."""

    @functools.wraps(command)
    def wrapped(**arguments):
        given = {name: arguments.pop(name) for name in GENERATION_OPTIONS}
        command(**arguments, settings={name: value for name, value in given.items() if value is not None})

    own = [parameter for parameter in inspect.signature(command).parameters.values() if parameter.name != "settings"]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in GENERATION_OPTIONS.items()
    ]
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    wrapped.__signature__ = inspect.Signature([*own, *options])
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *options)}
    return wrapped


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"a3 {version('a3-hf')}")
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(context_settings=PASS_ON)
def adapt(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A YAML file: one complete run.", show_default=False)],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run will read, do and take, and some rows; train nothing.")
    ] = False,
    accelerate_configs: Annotated[
        Path, typer.Option(help="With --dry-run: a folder of accelerate configs to reckon memory for.")
    ] = Path("accelerate_configs"),
    tflops: Annotated[
        float, typer.Option(help="With --dry-run: what a GPU reaches; 400 is about 40% of an H100 in bfloat16.")
    ] = 400.0,
) -> None:
    """Adapt a pretrained LLaMA as RECIPE says. Any setting of the recipe can be replaced: --learning_rate 1e-4.

    The same command goes on from the last checkpoint after Ctrl-C or a crash.
    """
    from a3_hf.training.dry_run import dry_run as plan
    from a3_hf.training.recipes import parse_recipe
    from a3_hf.training.run import run

    def start() -> int:
        if not dry_run:
            return run(parse_recipe(recipe, context.args))
        if not accelerate_configs.is_dir():
            raise ValueError(f"accelerate_configs={str(accelerate_configs)!r}: there is no such folder")
        if tflops <= 0:
            raise ValueError(f"tflops={tflops}: takes a number above 0")
        plan(parse_recipe(recipe, context.args), accelerate_configs=accelerate_configs, tflops=tflops)
        return 0

    raise typer.Exit(report_user_errors(start))


@app.command()
@with_generation_options
def infill(
    model: ModelPath,
    text: Annotated[
        str,
        typer.Argument(
            help='E.g. "The dog <blank:6> home.": 6 tokens are written there; <blank:2..8> and <blank:auto>: as many as '
            "are likeliest."
        ),
    ],
    auto_lengths: Annotated[str, typer.Option(help="The lengths that <blank:auto> tries.")] = "1..16",
    slot_start: SlotStart = None,
    base: Base = None,
    show: Show = False,
    html: Html = None,
    settings: dict | None = None,
) -> None:
    """Fill the blanks of a text and print it; passes and log-likelihood go to stderr."""

    def fill() -> None:
        from a3_hf.models.a3_llama.infilling_templates import Template

        # mistakes are found before the model is loaded
        least_and_most = _range("auto_lengths", auto_lengths)
        Template.parse(text).with_range(least_and_most)
        _check_settings(settings)
        check_page(html)
        a3, tokenizer = load(model, base=base, slot_start=slot_start)
        if tokenizer.eos_token_id is not None:
            settings["suppress_tokens"] = [tokenizer.eos_token_id]
        output = a3.infill(tokenizer, [text], auto_lengths=least_and_most, return_outputs=True, **settings)
        _present(output.texts[0], tokenizer, output.generation, show, html, title=text)
        for number, scores in enumerate(output.length_scores[0], start=1):
            if scores:
                ranked = sorted(scores, key=scores.get, reverse=True)[:3]
                tried = ", ".join(f"{length} ({scores[length]:.3f})" for length in ranked)
                print(
                    f"blank {number}: likeliest lengths {tried} nats, of the blank and all behind it", file=sys.stderr
                )

    report_user_errors(fill)


@app.command()
@with_generation_options
def generate(
    model: ModelPath,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write after the prompt.")] = 128,
    slot_start: SlotStart = None,
    base: Base = None,
    show: Show = False,
    html: Html = None,
    settings: dict | None = None,
) -> None:
    """Go on from a prompt, several tokens a pass, and print prompt and continuation.

    The text ends at the first end-of-text token.
    """

    def go_on() -> None:
        import torch

        from a3_hf.models.a3_llama.infilling_templates import decode_after, encode_prompt

        _check_settings(settings, max_new_tokens=max_new_tokens)
        check_page(html)
        a3, tokenizer = load(model, base=base, slot_start=slot_start)
        ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=a3.device)
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
        output = a3.generate_any_order(ids, max_new_tokens=max_new_tokens, **ends, **settings)
        written = decode_after(tokenizer, ids[0].tolist(), output.sequences[0, ids.shape[1] :].tolist())
        _present(prompt + written, tokenizer, output, show, html, title=prompt or "From nothing")

    report_user_errors(go_on)


@app.command()
def score(
    model: ModelPath,
    text: Annotated[str, typer.Argument(help="The text whose log-likelihood is asked for.")],
    order: Annotated[str, typer.Option(help="left_to_right, right_to_left, random or spans.")] = "left_to_right",
    group_size: Annotated[int, typer.Option(help="Tokens predicted together.")] = 1,
    span_length: SpanLength = None,
    num_orders: Annotated[int, typer.Option(help="Random orders to average over.")] = 1,
    seed: Annotated[int, typer.Option(help="Of a random order.")] = 0,
    slot_start: SlotStart = None,
    base: Base = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page of each token's surprise, beside another order's.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="With --html: the other order.", show_default="random, or left_to_right")
    ] = None,
) -> None:
    """Print each token's log-probability (nats) under an order, and their sum: exact, in one pass."""

    def tell() -> None:
        from rich.console import Console
        from rich.table import Table

        check_page(html)
        if against is not None and html is None:
            raise ValueError(f"against={against!r} has no effect without --html")
        a3, tokenizer = load(model, base=base, slot_start=slot_start)
        settings = {"group_size": group_size, "span_length": span_length, "seed": seed}
        scored = a3.score(tokenizer, text, order=order, num_orders=num_orders, **settings)
        beside = against or ("random" if order == "left_to_right" else "left_to_right")
        other = a3.score(tokenizer, text, order=beside, group_size=group_size, seed=seed) if html else None
        table = Table("token", "group", "log p", "spread")
        tokens = tokenizer.convert_ids_to_tokens(scored.token_ids.tolist())
        columns = (scored.group_ids[0].tolist(), scored.mean.tolist(), scored.spread.tolist())
        for token, group, log_prob, spread in list(zip(tokens, *columns, strict=True))[1:]:
            shown = repr(token)[1:-1].replace("[", r"\[")
            table.add_row(shown, str(group) if num_orders == 1 else "", f"{log_prob:.4f}", f"{spread:.4f}")
        Console().print(table)
        total, count = float(scored.totals.mean()), len(tokens) - 1
        spread = f", spread {float(scored.totals.std(correction=0)):.4f} over {num_orders} orders"
        print(
            f"log-likelihood {total:.4f} nats, {total / count:.4f} per token ({count} tokens)"
            f"{spread if num_orders > 1 else ''}"
        )
        if html:
            from a3_hf.visualization.rendering import surprise_page

            pages = [(name, _score_pieces(tokenizer, one)) for name, one in ((order, scored), (beside, other))]
            html.write_text(surprise_page(pages, title=text), encoding="utf-8")

    report_user_errors(tell)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="An adapter: a folder or a hub name.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="A folder that is new or empty.", show_default=False)],
    base: Base = None,
) -> None:
    """Write an adapter and its base as one plain checkpoint into OUTPUT."""

    def join() -> None:
        from a3_hf.adapters.checkpoints import merge

        merge(adapter, output, base=base)
        print(f"The model is in {output}.")

    report_user_errors(join)


@app.command("eval", context_settings={**PASS_ON, "help_option_names": []})
def evaluate(context: typer.Context) -> None:
    """Run lm-eval with the models a3 and a3_ar and the tasks of this package, or measure: ppl, judge, needle, calibration.

    All arguments are lm-eval's; `a3 eval --help` says which models and tasks there are beside its own.
    """
    from .evaluation import run

    report_user_errors(lambda: run(context.args))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What `a3 eval` wrote: its --output_path.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="Where report.md and its plots go.", show_default="FOLDER")
    ] = None,
    plots: Annotated[bool, typer.Option(help="Draw the plots, as PNG files.")] = True,
) -> None:
    """Write the results in FOLDER as tables and plots, with the paper's figures beside them."""

    def tell() -> None:
        from a3_hf.evaluation.reporting.report import write_report

        print(f"The report is {write_report(folder, output, plots=plots)}.")

    report_user_errors(tell)


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help="Of a file in recipes/experiments, or a path.", show_default=False)],
    size: Annotated[str, typer.Option(help="Which of the experiment's sizes: smoke, cpu, gpu.")] = "cpu",
    jobs: Annotated[int, typer.Option(help="Runs at a time, on a CPU.")] = 1,
    runs: Annotated[Path, typer.Option(help="Where its runs train.")] = Path("runs/experiments"),
    output: Annotated[
        Path | None,
        typer.Option(help="Where the result goes.", show_default="eval/results/NAME, or NAME-SIZE if it is not cpu"),
    ] = None,
) -> None:
    """Train and measure a grid of runs, and write its result, table and plots; goes on where it was stopped."""

    def go() -> int:
        from a3_hf.experiments.grid import read_experiment
        from a3_hf.experiments.runner import MEASURES, run

        plan = read_experiment(name, size=size, runs=runs, known_measures=MEASURES)
        folder = plan.name if size == "cpu" else f"{plan.name}-{size}"
        command = f"a3 experiment {name} --size {size} --jobs {jobs}"
        return run(plan, output or Path("eval/results") / folder, jobs=jobs, command=command)

    raise typer.Exit(report_user_errors(go))


def _range(name: str, text: str) -> tuple[int, int]:
    try:
        least, most = (int(bound) for bound in text.split(".."))
    except ValueError:
        raise ValueError(f"{name}={text!r}; it takes LEAST..MOST, e.g. 1..16") from None
    return least, most


def _check_settings(settings: dict, **more) -> None:
    from a3_hf.models.a3_llama.generation_config import A3GenerationConfig

    A3GenerationConfig(**settings, **more)
    sampling = [name for name in ("temperature", "top_k", "top_p", "min_p") if name in settings]
    if sampling and not settings.get("do_sample"):
        name = sampling[0].replace("_", "-")
        raise ValueError(f"--{name} {settings[sampling[0]]} has no effect without --do-sample, which samples; add it")


def _present(text: str, tokenizer, output, show: bool, html: Path | None, *, title: str) -> None:
    """Prints a generated text, or plays it; the page and the figures beside."""
    from rich.console import Console

    from a3_hf.visualization.rendering import Piece, animate, replay_page, token_texts

    real = (output.group_ids[0] >= 0).cpu()
    fields = (output.group_ids, output.commit_step, output.log_probs, output.sequences)
    groups, steps, log_probs, ids = (field[0].cpu()[real].tolist() for field in fields)
    pieces = [
        Piece(piece, group, step, log_prob if step >= 0 else None, token_id)
        for piece, group, step, log_prob, token_id in zip(
            token_texts(tokenizer, ids), groups, steps, log_probs, ids, strict=True
        )
    ]
    if show:
        animate(pieces, Console())
    else:
        print(text)
    if html is not None:
        html.write_text(replay_page(pieces, title=title), encoding="utf-8")
    print(
        f"{sum(step >= 0 for step in steps)} tokens in {output.num_forward_passes} passes, "
        f"log-likelihood {float(output.log_probs.sum()):.3f} nats",
        file=sys.stderr,
    )


def _score_pieces(tokenizer, scored) -> list:
    from a3_hf.visualization.rendering import Piece, token_texts

    ids = scored.token_ids.tolist()
    columns = zip(token_texts(tokenizer, ids), scored.group_ids[0].tolist(), scored.mean.tolist(), ids, strict=True)
    return [
        Piece(text, group, -1 if place == 0 else group, log_prob if place else None, token_id)
        for place, (text, group, log_prob, token_id) in enumerate(columns)
    ]
