"""The commands of `a3 eval` beyond lm-eval's tasks: ppl, judge, needle and calibration."""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from a3_hf.adapters.checkpoint_info import CheckpointInfo, check_is_there
from a3_hf.evaluation.reporting.results import write_result

from .common import Commands, ModelPath, load, report_user_errors

app = typer.Typer(
    cls=Commands,
    help="Measurements of an A3 model beyond lm-eval's tasks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
WIDTH = 160  # of a table that goes to a file or a pipe

TextPath = Annotated[Path, typer.Argument(help="A plain text file, UTF-8.", show_default=False)]
Separator = Annotated[
    str | None,
    typer.Option("--separator", help="What stands between documents, e.g. <|endoftext|>; none: one document per file."),
]
Documents = Annotated[
    int | None, typer.Option("--documents", help="So many of them from the start; -200: the last 200.")
]
Scaling = Annotated[
    str | None,
    typer.Option(
        "--rope_scaling",
        help='Stretches the context, in JSON: {"rope_type": "yarn", "factor": 4.0}; linear, yarn or llama3.',
    ),
]
BatchSize = Annotated[int, typer.Option("--batch_size", help="Rows in a pass; results don't depend on it.")]
Output = Annotated[Path | None, typer.Option("--output", help="Write what came out to this .json file.")]
Seed = Annotated[int, typer.Option("--seed", help="Of all that is drawn.")]


@app.command()
def ppl(
    model: ModelPath,
    text: TextPath,
    base: Annotated[
        str | None, typer.Option("--base", help="The LLaMA before adaptation: tells what adaptation cost.")
    ] = None,
    orders: Annotated[
        str, typer.Option("--orders", help="Some of left_to_right, right_to_left, random, spans.")
    ] = "left_to_right,right_to_left,random",
    group_sizes: Annotated[str, typer.Option("--group_sizes", help="Tokens predicted together.")] = "1",
    num_orders: Annotated[int, typer.Option("--num_orders", help="Random orders whose likelihoods are averaged.")] = 1,
    span_length: Annotated[int | None, typer.Option("--span_length", help="With the order spans.")] = None,
    max_length: Annotated[
        str | None, typer.Option("--max_length", help="Tokens in a window, e.g. 2048,4096.", show_default="the context")
    ] = None,
    rope_scaling: Scaling = None,
    separator: Separator = None,
    documents: Documents = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    output: Output = None,
) -> None:
    """Perplexity and bits per byte of TEXT under several orders: exact, one pass per window and order."""

    def measure() -> None:
        from a3_hf.evaluation.measures.perplexity import check_orders, perplexity_rows

        names, sizes = _words("orders", orders), _numbers("group_sizes", group_sizes, int)
        lengths = None if max_length is None else _numbers("max_length", max_length, int)
        scaling = _scaling(rope_scaling)
        check_orders(names, sizes, num_orders=num_orders, span_length=span_length)
        _check_counts(batch_size=batch_size)
        _check_file("output", output, ".json")
        texts = read_documents(text, separator=separator, documents=documents)
        a3, tokenizer = _load(model, scaling)
        settings = {
            "orders": names,
            "group_sizes": sizes,
            "num_orders": num_orders,
            "span_length": span_length,
            "seed": seed,
            "batch_size": batch_size,
        }
        rows = perplexity_rows(
            a3,
            tokenizer,
            texts,
            max_lengths=lengths,
            base=None if base is None else _load_base(base, scaling),
            track=_track(),
            **settings,
        )
        columns = {
            "length": "max_length",
            "model": "model",
            "order": "order",
            "group": "group_size",
            "orders": "num_orders",
            "windows": "windows",
            "nats/token": "nats_per_token",
            "mean of orders": "nats_per_token_mean_of_orders",
            "perplexity": "perplexity",
            "bits/byte": "bits_per_byte",
            "cost": "adaptation_cost",
            "tokens/s": "tokens_per_second",
        }
        _print(rows, columns, title=f"{len(texts)} documents of {text}, {rows[0]['tokens']} tokens")
        config = {
            "model": model,
            "text": str(text),
            "base": base,
            "max_length": lengths,
            "rope_scaling": scaling,
            "separator": separator,
            "documents": documents,
            **settings,
        }
        _write(output, "ppl", config, rows, a3)

    report_user_errors(measure)


@app.command()
def judge(
    model: ModelPath,
    text: TextPath,
    judge: Annotated[
        str, typer.Option("--judge", help="A causal model that tells the perplexity.", show_default=False)
    ],
    prompt_tokens: Annotated[int, typer.Option("--prompt_tokens", help="Of each document, given.")] = 32,
    new_tokens: Annotated[int, typer.Option("--new_tokens", help="Written after each prompt.")] = 64,
    steps: Annotated[str, typer.Option("--steps", help="Passes to write them in.")] = "16,32,64",
    criteria: Annotated[
        str, typer.Option("--criteria", help="Some of random, confidence, entropy, margin.")
    ] = "random,confidence,entropy",
    count: Annotated[int, typer.Option("--count", help="Prompts.")] = 32,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Sample.", show_default="the likeliest token")
    ] = None,
    separator: Separator = None,
    documents: Documents = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    output: Output = None,
) -> None:
    """Continue the documents of TEXT by steps and criteria; another model tells the perplexity of what was written."""

    def measure() -> None:
        from a3_hf.evaluation.measures.judge_perplexity import judge_rows, ways_to_write

        numbers, names = _numbers("steps", steps, int), _words("criteria", criteria)
        ways_to_write(numbers, names, new_tokens=new_tokens, temperature=temperature)
        _check_counts(prompt_tokens=prompt_tokens, count=count, batch_size=batch_size)
        _check_file("output", output, ".json")
        texts = read_documents(text, separator=separator, documents=documents)
        a3, tokenizer = load(model)
        judging, judge_tokenizer = _load_judge(judge)
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
        rows = judge_rows(a3, tokenizer, judging, judge_tokenizer, texts, track=_track(), **settings)
        columns = {
            "strategy": "strategy",
            "criterion": "criterion",
            "steps": "steps",
            "tokens/step": "tokens_per_step",
            "perplexity": "judge_perplexity",
            "nats/token": "judge_nats_per_token",
            "unique tokens": "unique_tokens",
            "passes": "passes",
            "tokens/s": "tokens_per_second",
        }
        _print(rows, columns, title=f"{count} continuations of {new_tokens} tokens, judged by {judge}")
        config = {
            "model": model,
            "text": str(text),
            "judge": judge,
            "separator": separator,
            "documents": documents,
            **settings,
        }
        _write(output, "judge", config, rows, a3)

    report_user_errors(measure)


@app.command()
def needle(
    model: ModelPath,
    haystack: Annotated[
        Path | None,
        typer.Option("--haystack", help="A plain text file.", show_default="a few sentences, over and over"),
    ] = None,
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of text, question and answer.")] = "128,256,512",
    depths: Annotated[str, typer.Option("--depths", help="0: at the start; 1: before the question.")] = (
        "0,0.25,0.5,0.75,1"
    ),
    answers: Annotated[
        str | None, typer.Option("--answers", help="Words to choose among.", show_default="eight words")
    ] = None,
    count: Annotated[int, typer.Option("--count", help="Texts for each length and depth.")] = 8,
    rope_scaling: Scaling = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    output: Output = None,
) -> None:
    """Hide a word in texts of several lengths, and see whether it is the likeliest answer at the end."""

    def measure() -> None:
        from a3_hf.evaluation.measures.needle import ANSWERS, needle_rows

        sizes, shares = _numbers("lengths", lengths, int), _numbers("depths", depths, float)
        words = list(ANSWERS) if answers is None else _words("answers", answers)
        scaling = _scaling(rope_scaling)
        _check_counts(count=count, batch_size=batch_size)
        _check_file("output", output, ".json")
        hay = None if haystack is None else _read("haystack", haystack)
        a3, tokenizer = _load(model, scaling)
        settings = {
            "lengths": sizes,
            "depths": shares,
            "answers": words,
            "count": count,
            "seed": seed,
            "batch_size": batch_size,
        }
        rows = needle_rows(a3, tokenizer, haystack=hay, track=_track(), **settings)
        cells = [
            {
                "length": size,
                **{
                    str(row["depth"]): f"{row['accuracy']:.2f} / {row['exact_match']:.2f}"
                    for row in rows
                    if row["length"] == size
                },
            }
            for size in sizes
        ]
        columns = {"length": "length", **{f"depth {share:g}": str(share) for share in shares}}
        title = f"accuracy among {len(words)} words / greedy exact match, {count} texts each"
        _print(cells, columns, title=title)
        config = {
            "model": model,
            "haystack": None if haystack is None else str(haystack),
            "rope_scaling": scaling,
            **settings,
        }
        _write(output, "needle", config, rows, a3)

    report_user_errors(measure)


@app.command()
def calibration(
    model: ModelPath,
    text: TextPath,
    share: Annotated[float, typer.Option("--share", help="Of the tokens, taken out.")] = 0.5,
    shape: Annotated[str, typer.Option("--shape", help="scattered, spans or middle.")] = "scattered",
    blank_length: Annotated[int | None, typer.Option("--blank_length", help="Tokens, with --shape spans.")] = None,
    max_length: Annotated[
        int | None, typer.Option("--max_length", help="Tokens in a window.", show_default="the context")
    ] = None,
    bins: Annotated[int, typer.Option("--bins", help="Of confidence.")] = 10,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw a reliability diagram, a .png file.")] = None,
    strategy: Annotated[str, typer.Option("--strategy", help="groupwise, dynamic or speculative.")] = "groupwise",
    order: Annotated[str | None, typer.Option("--order", help="left_to_right, right_to_left, random or spans.")] = None,
    span_length: Annotated[int | None, typer.Option("--span_length", help="With --order spans.")] = None,
    group_size: Annotated[int | None, typer.Option("--group_size", help="Groupwise: tokens per pass.")] = None,
    criterion: Annotated[
        str | None, typer.Option("--criterion", help="Dynamic: confidence, entropy, margin or random.")
    ] = None,
    tokens_per_step: Annotated[int | None, typer.Option("--tokens_per_step", help="Dynamic: tokens per pass.")] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Dynamic: commit all above this probability.")
    ] = None,
    entropy_budget: Annotated[
        float | None, typer.Option("--entropy_budget", help="Dynamic: commit within this many nats.")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Dynamic: only the next so many blanks compete.")
    ] = None,
    draft: Annotated[str | None, typer.Option("--draft", help="Speculative: model or ngram.")] = None,
    draft_tokens: Annotated[int | None, typer.Option("--draft_tokens", help="Speculative: drafts per pass.")] = None,
    separator: Separator = None,
    documents: Documents = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    output: Output = None,
) -> None:
    """Take tokens out of TEXT, have them written, and set the confidence of each against whether it is right."""
    chosen = {
        "strategy": strategy,
        "order": order,
        "span_length": span_length,
        "group_size": group_size,
        "criterion": criterion,
        "tokens_per_step": tokens_per_step,
        "threshold": threshold,
        "entropy_budget": entropy_budget,
        "window": window,
        "draft": draft,
        "draft_tokens": draft_tokens,
    }
    settings = {name: value for name, value in chosen.items() if value is not None}

    def measure() -> None:
        from a3_hf.evaluation.measures.calibration import WHOLE, calibration_rows, check_blanks, plot_reliability

        check_blanks(share, shape, blank_length, bins, settings)
        _check_counts(batch_size=batch_size)
        _check_file("output", output, ".json")
        _check_file("plot", plot, ".png")
        if plot is not None:
            _check_matplotlib()
        texts = read_documents(text, separator=separator, documents=documents)
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
        rows = calibration_rows(a3, tokenizer, texts, settings=settings, track=_track(), **blanks)
        shown = [
            {**row, "confidence": WHOLE if row["bin"] == WHOLE else f"{row['above']:.2f} to {row['up_to']:.2f}"}
            for row in rows
        ]
        columns = {
            "confidence": "confidence",
            "tokens": "count",
            "mean confidence": "mean_confidence",
            "accuracy": "accuracy",
        }
        error = rows[-1]["expected_calibration_error"]
        _print(shown, columns, title=f"{strategy}: expected calibration error {error:.4f}")
        if plot is not None:
            plot.parent.mkdir(parents=True, exist_ok=True)
            plot_reliability(rows, plot)
        config = {
            "model": model,
            "text": str(text),
            **settings,
            "separator": separator,
            "documents": documents,
            **blanks,
        }
        _write(output, "calibration", config, rows, a3)

    report_user_errors(measure)


def read_documents(path: Path, *, separator: str | None = None, documents: int | None = None) -> list[str]:
    """The documents of a text file, without the white space around them and without those that hold none.

    Args:
        separator: what stands between them; None: the file is one document.
        documents: at most so many, from the start; a negative number: from the end.

    Raises:
        ValueError: a file that can't be read, is not UTF-8 or holds no text; a separator that is empty or not in it.
    """
    from a3_hf.data.documents import split_text

    if documents == 0:
        raise ValueError("documents=0; it takes at least 1, or a negative number of the last ones")
    content = _read("text", path)
    if separator is not None and (not separator or separator not in content):
        raise ValueError(f"separator={separator!r} is nowhere in {str(path)!r}; it takes what stands between documents")
    found = split_text(content, separator)
    found = found[:documents] if documents is None or documents > 0 else found[documents:]
    if not found:
        raise ValueError(f"text={str(path)!r} holds no text")
    return found


def _read(name: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}={str(path)!r} can't be read: {error}") from error


def _words(name: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if "" in words or len(set(words)) < len(words):
        raise ValueError(f"{name}={text!r}; it takes different words with commas between")
    return words


def _numbers(name: str, text: str, kind: type) -> list:
    try:
        numbers = [kind(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}={text!r}; it takes numbers with commas between") from None
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}={text!r} names a number twice")
    return numbers


def _scaling(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        scaling = json.loads(text)
    except json.JSONDecodeError:
        scaling = None
    if not isinstance(scaling, dict):
        raise ValueError(f'rope_scaling={text!r}; it takes JSON such as {{"rope_type": "yarn", "factor": 4.0}}')
    return scaling


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count}; it takes at least 1")


def _check_file(name: str, path: Path | None, suffix: str) -> None:
    """Before the work, so that it is not lost for want of a place."""
    if path is not None and (path.suffix != suffix or path.is_dir()):
        raise ValueError(f"{name}={str(path)!r}; it takes a file that ends in {suffix}")


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("plot needs matplotlib: pip install 'a3-hf[plot]'") from error


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(path: str, scaling: dict[str, Any] | None):
    """The model, with its context stretched, and its tokenizer."""
    from a3_hf.evaluation.measures.text_windows import scale_rope

    if scaling is None:
        return load(path)
    config = CheckpointInfo.read(path).model_config()
    scale_rope(config, scaling)
    return load(path, config=config)


def _load_base(path: str, scaling: dict[str, Any] | None):
    from transformers import AutoConfig, LlamaForCausalLM

    from a3_hf.evaluation.measures.text_windows import scale_rope

    check_is_there(path, name="base")
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"base={path!r} can't be loaded: {error}") from error
    if config.model_type != "llama":
        raise ValueError(f"base={path!r} holds a model of type {config.model_type!r}; it takes a LLaMA")
    if scaling is not None:
        scale_rope(config, scaling)
    return LlamaForCausalLM.from_pretrained(path, config=config).to(_device()).eval()


def _load_judge(path: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_is_there(path, name="judge")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"judge={path!r} can't be loaded: {error}") from error
    return model.to(_device()).eval(), tokenizer


def _track():
    from rich.console import Console
    from rich.progress import track

    return partial(track, console=Console(stderr=True), transient=True)


def _print(rows: Sequence[dict[str, Any]], columns: dict[str, str], *, title: str) -> None:
    """A table of rows: for each column its heading and the key of its values."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title))
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(Text(_shown(row[key])) for key in columns.values()))
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"
    return str(value)


def _write(output: Path | None, kind: str, config: dict[str, Any], rows: list[dict[str, Any]], model) -> None:
    if output is not None:
        write_result(output, kind, config, rows, device=model.device)
        print(f"The result is in {output}.", file=sys.stderr)
