"""The measurements of `a3 eval` that lm-eval lacks: ppl, judge, needle and calibration."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import APP_SETTINGS, DECODING_OPTIONS, Command, ModelPath, Seed, SpanLength, load, with_options

app = typer.Typer(help="Measurements of an A3 model that lm-eval lacks.", **APP_SETTINGS)

TextPath = Annotated[Path, typer.Argument(help="A plain text file, UTF-8.", show_default=False)]
Separator = Annotated[
    str | None,
    typer.Option(help="Text between documents, for example <|endoftext|>.", show_default="the file is one document"),
]
Documents = Annotated[
    int | None, typer.Option(help="Number of documents from the start; -200: the last 200.", show_default="all")
]
Scaling = Annotated[
    str | None,
    typer.Option(help='JSON that stretches the context: {"rope_type": "yarn", "factor": 4.0}; linear, yarn or llama3.'),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per pass; does not change the results.")]
Output = Annotated[Path | None, typer.Option(help="Write the result to this .json file.")]


@app.command(cls=Command)
def ppl(
    model: ModelPath,
    text: TextPath,
    base: Annotated[
        str | None, typer.Option(help="The LLaMA before adaptation, to report the cost of adaptation.")
    ] = None,
    orders: Annotated[
        str, typer.Option(help="One or more of left_to_right, right_to_left, random, spans.")
    ] = "left_to_right,right_to_left,random",
    group_sizes: Annotated[str, typer.Option(help="Numbers of tokens predicted together.")] = "1",
    num_orders: Annotated[int, typer.Option(help="Number of random orders to average over.")] = 1,
    span_length: SpanLength = None,
    max_length: Annotated[
        str | None, typer.Option(help="Tokens per window, for example 2048,4096.", show_default="the context")
    ] = None,
    rope_scaling: Scaling = None,
    separator: Separator = None,
    documents: Documents = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    output: Output = None,
) -> None:
    """Exact perplexity and bits per byte of TEXT under several orders, in one pass per window and order."""
    from a3_hf.evaluation.measures.inputs import load_base, read_documents
    from a3_hf.evaluation.measures.perplexity import check_orders, perplexity_rows
    from a3_hf.evaluation.reporting.console import progress

    lengths = None if max_length is None else _numbers("max_length", max_length, int)
    scaling = _parse_scaling(rope_scaling)
    of_orders = {
        "orders": _words("orders", orders),
        "group_sizes": _numbers("group_sizes", group_sizes, int),
        "num_orders": num_orders,
        "span_length": span_length,
    }
    check_orders(**of_orders)
    _check_file("output", output, ".json")
    source = {"separator": separator, "documents": documents}
    texts = read_documents(text, **source)
    a3, tokenizer = load(model, rope_scaling=scaling)
    llama = None if base is None else load_base(base, scaling).to(a3.device)
    settings = {**of_orders, "seed": seed, "batch_size": batch_size}
    rows = perplexity_rows(a3, tokenizer, texts, max_lengths=lengths, base=llama, track=progress, **settings)
    config = {"model": model, "text": str(text), "base": base, "max_length": lengths, "rope_scaling": scaling}
    title = f"{len(texts)} documents of {text}, {rows[0]['tokens']} tokens"
    _present("ppl", rows, {**config, **source, **settings}, output, title=title, device=a3.device)


@app.command(cls=Command)
def judge(
    model: ModelPath,
    text: TextPath,
    judge: Annotated[str, typer.Option(help="The causal model that measures perplexity.", show_default=False)],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each document given as prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens written after each prompt.")] = 64,
    steps: Annotated[str, typer.Option(help="Numbers of passes to write them in.")] = "16,32,64",
    criteria: Annotated[
        str, typer.Option(help="One or more of random, confidence, entropy, margin.")
    ] = "random,confidence,entropy",
    count: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 32,
    temperature: Annotated[
        float | None, typer.Option(help="Sample at this temperature.", show_default="the most likely token")
    ] = None,
    separator: Separator = None,
    documents: Documents = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    output: Output = None,
) -> None:
    """Continue the documents of TEXT for each number of passes and criterion; report the perplexity under a judge."""
    from a3_hf.evaluation.measures.inputs import load_judge, read_documents
    from a3_hf.evaluation.measures.judge_perplexity import judge_rows, ways_to_write
    from a3_hf.evaluation.reporting.console import progress

    numbers, names = _numbers("steps", steps, int), _words("criteria", criteria)
    ways_to_write(numbers, names, new_tokens=new_tokens, temperature=temperature)
    _check_file("output", output, ".json")
    source = {"separator": separator, "documents": documents}
    texts = read_documents(text, **source)
    a3, tokenizer = load(model)
    judging, judge_tokenizer = load_judge(judge)
    judging = judging.to(a3.device)
    settings = {
        "steps": numbers,
        "criteria": names,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "count": count,
        "temperature": temperature,
        "seed": seed,
        "batch_size": batch_size,
    }
    rows = judge_rows(a3, tokenizer, judging, judge_tokenizer, texts, track=progress, **settings)
    config = {"model": model, "text": str(text), "judge": judge, **source, **settings}
    title = f"{count} continuations of {new_tokens} tokens, judged by {judge}"
    _present("judge", rows, config, output, title=title, device=a3.device)


@app.command(cls=Command)
def needle(
    model: ModelPath,
    haystack: Annotated[
        Path | None, typer.Option(help="A plain text file.", show_default="a few repeated sentences")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of text, question and answer together.")] = "128,256,512",
    depths: Annotated[str, typer.Option(help="0: at the start; 1: just before the question.")] = "0,0.25,0.5,0.75,1",
    answers: Annotated[str | None, typer.Option(help="Words to choose from.", show_default="eight words")] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of texts for each length and depth.")] = 8,
    rope_scaling: Scaling = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    output: Output = None,
) -> None:
    """Hide a word in texts of several lengths; report how often it is the most likely answer at the end."""
    from a3_hf.evaluation.measures.inputs import read_text
    from a3_hf.evaluation.measures.needle import ANSWERS, needle_rows
    from a3_hf.evaluation.reporting.console import progress

    words = list(ANSWERS) if answers is None else _words("answers", answers)
    settings = {
        "lengths": _numbers("lengths", lengths, int),
        "depths": _numbers("depths", depths, float),
        "answers": words,
        "count": count,
        "seed": seed,
        "batch_size": batch_size,
    }
    scaling = _parse_scaling(rope_scaling)
    _check_file("output", output, ".json")
    hay = None if haystack is None else read_text("haystack", haystack)
    a3, tokenizer = load(model, rope_scaling=scaling)
    rows = needle_rows(a3, tokenizer, haystack=hay, track=progress, **settings)
    file = None if haystack is None else str(haystack)
    config = {"model": model, "haystack": file, "rope_scaling": scaling, **settings}
    title = f"accuracy among {len(words)} words / greedy exact match, {count} texts each"
    _present("needle", rows, config, output, title=title, device=a3.device)


@app.command(cls=Command)
@with_options(DECODING_OPTIONS)
def calibration(
    model: ModelPath,
    text: TextPath,
    share: Annotated[float, typer.Option(help="Fraction of the tokens to remove.")] = 0.5,
    shape: Annotated[str, typer.Option(help="Shape of the blanks: scattered, spans or middle.")] = "scattered",
    blank_length: Annotated[int | None, typer.Option(help="Tokens per blank, with --shape spans.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per window.", show_default="the context")] = None,
    bins: Annotated[int, typer.Option(help="Number of bins of confidence.")] = 10,
    plot: Annotated[Path | None, typer.Option(help="Draw a reliability diagram to this .png file.")] = None,
    separator: Separator = None,
    documents: Documents = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    output: Output = None,
    *,
    settings: dict,
) -> None:
    """Remove tokens from TEXT and write them again; compare the confidence of each token with its accuracy."""
    from a3_hf.evaluation.measures.calibration import calibration_rows, check_blanks
    from a3_hf.evaluation.measures.inputs import read_documents
    from a3_hf.evaluation.reporting.console import progress
    from a3_hf.evaluation.reporting.plots import plot_reliability

    settings = {"strategy": "groupwise", **settings}
    check_blanks(share, shape, blank_length, bins, settings)
    _check_file("output", output, ".json")
    _check_file("plot", plot, ".png")
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("plot needs matplotlib: pip install 'a3-hf[plot]'")
    source = {"separator": separator, "documents": documents}
    texts = read_documents(text, **source)
    a3, tokenizer = load(model)
    blanks = {
        "share": share,
        "shape": shape,
        "blank_length": blank_length,
        "max_length": max_length,
        "bins": bins,
        "seed": seed,
        "batch_size": batch_size,
    }
    rows = calibration_rows(a3, tokenizer, texts, settings=settings, track=progress, **blanks)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot_reliability(rows, plot)
    config = {"model": model, "text": str(text), **settings, **source, **blanks}
    title = f"{settings['strategy']}: expected calibration error {rows[-1]['expected_calibration_error']:.4f}"
    _present("calibration", rows, config, output, title=title, device=a3.device)


def _present(
    kind: str, rows: list[dict[str, Any]], config: dict[str, Any], output: Path | None, *, title: str, device
) -> None:
    """Prints the rows of a measurement and writes its result."""
    from a3_hf.evaluation.reporting.console import print_rows
    from a3_hf.evaluation.reporting.results import write_result

    print_rows(kind, rows, title=title)
    if output is not None:
        write_result(output, kind, config, rows, device=device)
        print(f"The result is in {output}.", file=sys.stderr)


def _words(name: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if "" in words or len(set(words)) < len(words):
        raise ValueError(f"{name}={text!r}: expected different words separated by commas")
    return words


def _numbers(name: str, text: str, kind: type) -> list:
    try:
        numbers = [kind(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}={text!r}: expected numbers separated by commas") from None
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}={text!r}: expected each number once")
    return numbers


def _parse_scaling(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        scaling = json.loads(text)
    except json.JSONDecodeError:
        scaling = None
    if not isinstance(scaling, dict):
        raise ValueError(f'rope_scaling={text!r}: expected JSON such as {{"rope_type": "yarn", "factor": 4.0}}')
    return scaling


def _check_file(name: str, path: Path | None, suffix: str) -> None:
    """Checks, before anything is computed, that a result can be written to `path`."""
    if path is not None and (path.suffix != suffix or path.is_dir()):
        raise ValueError(f"{name}={str(path)!r}: expected a file that ends in {suffix}")
