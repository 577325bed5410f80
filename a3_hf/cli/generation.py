"""`a3 infill`, `a3 generate` and `a3 score`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    GENERATION_OPTIONS,
    ORDER_HELP,
    Base,
    ModelPath,
    Seed,
    SlotStart,
    SpanLength,
    check_page,
    load,
    with_options,
)

Show = Annotated[bool, typer.Option("--show", help="Replay the generation in the terminal.")]
Html = Annotated[Path | None, typer.Option(help="Write a replay as a single HTML file.", show_default=False)]


@with_options(GENERATION_OPTIONS)
def infill(
    model: ModelPath,
    text: Annotated[
        str,
        typer.Argument(
            help='For example "The dog <blank:6> home.", a blank of 6 tokens. <blank:2..8> and <blank:auto> take the most '
            "likely length.",
        ),
    ],
    auto_lengths: Annotated[str, typer.Option(help="Lengths that <blank:auto> tries.")] = "1..16",
    suffix_template: Annotated[
        str | None,
        typer.Option(
            help='Words that bring the text after the last blank to the front, as "Later:{suffix}\\n\\n"; "": it stays in '
            "place. Default: the model's own.",
            show_default=False,
        ),
    ] = None,
    slot_start: SlotStart = None,
    base: Base = None,
    show: Show = False,
    html: Html = None,
    *,
    settings: dict,
) -> None:
    """Fill the blanks of a text and print it; the number of passes and the log-likelihood go to stderr."""
    from a3_hf.models.a3_llama.infilling_templates import Template

    # errors in the arguments are found before the model is loaded
    lengths = _range("auto_lengths", auto_lengths)
    Template.parse(text).with_range(lengths)
    _check_settings(settings)
    check_page(html)
    a3, tokenizer = load(model, base=base, slot_start=slot_start)
    if tokenizer.eos_token_id is not None:
        settings["suppress_tokens"] = [tokenizer.eos_token_id]
    if suffix_template is not None:  # a shell passes \n as two characters
        suffix_template = suffix_template.replace("\\n", "\n")
    output = a3.infill(
        tokenizer, [text], auto_lengths=lengths, suffix_template=suffix_template, return_outputs=True, **settings
    )
    _present(output.texts[0], tokenizer, output.generation, show, html, title=text)
    for number, scores in enumerate(output.length_scores[0], start=1):
        if scores:
            best = sorted(scores, key=scores.get, reverse=True)[:3]
            shown = ", ".join(f"{length} ({scores[length]:.3f})" for length in best)
            print(f"blank {number}: likeliest lengths {shown}; in nats, from the blank to the end", file=sys.stderr)


@with_options(GENERATION_OPTIONS)
def generate(
    model: ModelPath,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write after the prompt.")] = 128,
    slot_start: SlotStart = None,
    base: Base = None,
    show: Show = False,
    html: Html = None,
    *,
    settings: dict,
) -> None:
    """Continue a prompt, several tokens per pass, and print both. The text ends at the first end-of-text token.

    With a draft head, the text is that of its base, in fewer passes.
    """
    import torch

    from a3_hf.models.a3_llama.infilling_templates import decode_after, encode_prompt

    _check_settings(settings, max_new_tokens=max_new_tokens)
    check_page(html)
    a3, tokenizer = load(model, base=base, slot_start=slot_start)
    if getattr(a3, "drafter", None) is not None:
        settings.setdefault("strategy", "speculative")
    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=a3.device)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    output = a3.generate_any_order(ids, max_new_tokens=max_new_tokens, **ends, **settings)
    written = decode_after(tokenizer, ids[0].tolist(), output.sequences[0, ids.shape[1] :].tolist())
    _present(prompt + written, tokenizer, output, show, html, title=prompt or "Empty prompt")


def score(
    model: ModelPath,
    text: Annotated[str, typer.Argument(help="The text to score.")],
    order: Annotated[str, typer.Option(help=ORDER_HELP)] = "left_to_right",
    group_size: Annotated[int, typer.Option(help="Tokens predicted together.")] = 1,
    span_length: SpanLength = None,
    num_orders: Annotated[int, typer.Option(help="Number of random orders to average over.")] = 1,
    seed: Seed = 0,
    slot_start: SlotStart = None,
    base: Base = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page of each token's surprise under this order and another.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="With --html: the other order.", show_default="random, or left_to_right")
    ] = None,
) -> None:
    """Print the exact log-probability (nats) of each token under an order, in one pass, and their sum."""
    check_page(html)
    if against is not None and html is None:
        raise ValueError(f"against={against!r} has no effect without --html")
    a3, tokenizer = load(model, base=base, slot_start=slot_start)
    settings = {"group_size": group_size, "span_length": span_length, "seed": seed}
    scored = a3.score(tokenizer, text, order=order, num_orders=num_orders, **settings)
    if html is not None:
        from a3_hf.visualization.html import surprise_page
        from a3_hf.visualization.tokens import scored_pieces

        other_order = against or ("random" if order == "left_to_right" else "left_to_right")
        other = a3.score(tokenizer, text, order=other_order, group_size=group_size, seed=seed)
        columns = [(name, scored_pieces(tokenizer, one)) for name, one in ((order, scored), (other_order, other))]
        html.write_text(surprise_page(columns, title=text), encoding="utf-8")
    _print_scores(tokenizer, scored)


def _print_scores(tokenizer, scored) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("token", "group", "log p", "spread")
    tokens = tokenizer.convert_ids_to_tokens(scored.token_ids.tolist())
    num_orders = len(scored.totals)
    columns = (scored.group_ids[0].tolist(), scored.mean.tolist(), scored.spread.tolist())
    for token, group, log_prob, spread in list(zip(tokens, *columns, strict=True))[1:]:
        shown = repr(token)[1:-1].replace("[", r"\[")
        table.add_row(shown, str(group) if num_orders == 1 else "", f"{log_prob:.4f}", f"{spread:.4f}")
    Console().print(table)
    total, count = float(scored.totals.mean()), len(tokens) - 1
    summary = f"log-likelihood {total:.4f} nats, {total / count:.4f} per token ({count} tokens)"
    if num_orders > 1:
        summary += f", spread {float(scored.totals.std(correction=0)):.4f} over {num_orders} orders"
    print(summary)


def _present(text: str, tokenizer, output, show: bool, html: Path | None, *, title: str) -> None:
    """Prints or replays a generated text, writes its page, and prints its figures to stderr."""
    from rich.console import Console

    from a3_hf.visualization.html import replay_page
    from a3_hf.visualization.terminal import animate
    from a3_hf.visualization.tokens import generated_pieces

    pieces = generated_pieces(tokenizer, output)
    if show:
        animate(pieces, Console())
    else:
        print(text)
    if html is not None:
        html.write_text(replay_page(pieces, title=title), encoding="utf-8")
    print(
        f"{sum(piece.step >= 0 for piece in pieces)} tokens in {output.num_forward_passes} passes, "
        f"log-likelihood {float(output.log_probs.sum()):.3f} nats",
        file=sys.stderr,
    )


def _range(name: str, text: str) -> tuple[int, int]:
    try:
        least, most = (int(bound) for bound in text.split(".."))
    except ValueError:
        raise ValueError(f"{name}={text!r}: expected LEAST..MOST, for example 1..16") from None
    return least, most


def _check_settings(settings: dict, **more) -> None:
    from a3_hf.models.a3_llama.generation_config import A3GenerationConfig

    A3GenerationConfig(**settings, **more)
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if name in settings and not settings.get("do_sample"):
            option = f"--{name.replace('_', '-')} {settings[name]}"
            raise ValueError(f"{option} has no effect without --do-sample; add --do-sample to sample")
