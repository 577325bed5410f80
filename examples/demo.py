"""A3 on a pretrained LLaMA in a few minutes on a CPU, offline: blanks, an adapter, groups, the LLaMA's own text in fewer
passes, and an adaptation of your own.

    make demo                                   # brings the model, then calls this
    python examples/demo.py --text notes.txt    # adapts to a text of yours

The LLaMA is SmolLM2-135M-Instruct, which `make smollm2` puts into models/smollm2-135m. Without it, `make demo` runs
demo_synthetic.py, which needs nothing.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import disable_progress_bars
from rich.console import Console
from rich.progress import track
from rich.table import Table
from story_language import sample_stories
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from a3_hf import attach_draft_head
from a3_hf.adapters.checkpoints import load_model, load_tokenizer
from a3_hf.evaluation.measures.sentence_nats import IN_PLACE, arrange, blank_nats, mean_nats, split_story
from a3_hf.models.a3_llama.infilling_templates import Template, encode_prompt
from a3_hf.training.recipes import parse_recipe, read_settings
from a3_hf.training.run import METRICS_FILE, run

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "demo" / "config_smollm2.yaml"
# The best of the wordings in recipes/smollm2-135m/README.md for the LLaMA as it is.
PROMPT = 'Later in the story: "{suffix}"\nThe whole story:\n'
BLANKS = (
    "He opened the <blank:1> and took out the cold milk.",
    "Last night we went to the <blank:1>. The film was far too long.",
    "We waited at the <blank:2> for an hour, but the train never came.",
    "Dear Anna, thank you for the <blank:2> you gave me. It keeps my head warm all winter.",
)
# After step 5, and at any time.
MADE_BLANK = (
    "someone hid a <blank:2> in the attic . mia asked tom for help . later mia found the red key in the attic ."
)
OWN_BLANK = "We met in <blank:auto>, and it rained all day."
GROUP_SIZE = 4
FEWEST, MOST = 4000, 1_000_000  # characters of a text to adapt to
HELD_OUT = 0.1  # of the text
TEXT_FILES = ("train.txt", "held_out.txt")

console = Console()


@dataclass(frozen=True)
class Size:
    """How much the demo does."""

    stories: int
    speed_tokens: int
    speed_repeats: int
    steps: int
    made_stories: int


FULL = Size(stories=10, speed_tokens=96, speed_repeats=3, steps=40, made_stories=600)
SMOKE = Size(stories=2, speed_tokens=8, speed_repeats=1, steps=2, made_stories=40)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"), help="the LLaMA's folder")
    parser.add_argument(
        "--adapter", type=Path, default=Path("adapters/smollm2-135m"), help="a trained adapter's folder"
    )
    parser.add_argument(
        "--drafts", type=Path, default=Path("adapters/smollm2-135m-drafts"), help="a trained draft head's folder"
    )
    parser.add_argument("--text", type=Path, help="UTF-8 text to adapt to (default: stories of a made-up language)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo-smollm2"), help="where the demo writes")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    arguments = parser.parse_args(words)
    size = SMOKE if arguments.smoke else FULL
    try:
        text = check(arguments, size)
    except ValueError as error:
        parser.error(str(error))
    # The load report would list query_embed as missing: just that is the adaptation's start.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of libraries, to developers
            return demonstrate(arguments, size, text)
    except KeyboardInterrupt:
        console.print("\nStopped.")
        return 130


def check(arguments: argparse.Namespace, size: Size) -> str:
    """Returns the text to adapt to.

    Raises:
        ValueError: no model, a folder for an adapter or a draft head that holds none, an adapter's folder that step 5 writes
            to, or a text that can't be used.
    """
    if not (arguments.model / "config.json").is_file():
        raise ValueError(f"--model {arguments.model}: holds no model; `make smollm2` brings one to models/smollm2-135m")
    if arguments.adapter.exists() and not (arguments.adapter / "adapter_config.json").is_file():
        raise ValueError(f"--adapter {arguments.adapter}: holds no adapter (no adapter_config.json)")
    if arguments.adapter.resolve() == (arguments.output_dir / "adapter").resolve():
        raise ValueError(f"--adapter {arguments.adapter}: step 5 writes there; give another --output-dir")
    if arguments.drafts.exists() and not (arguments.drafts / "config.json").is_file():
        raise ValueError(f"--drafts {arguments.drafts}: holds no draft head (no config.json)")
    if arguments.text is None:
        return "\n\n".join(story.text for story in sample_stories(size.made_stories, seed=0))
    return read_text(arguments.text)


def read_text(path: Path) -> str:
    """Reads a text, at most its first `MOST` characters.

    Raises:
        ValueError: no such file, a file that is not UTF-8, or one of fewer than `FEWEST` characters.
    """
    if not path.is_file():
        raise ValueError(f"--text {path}: there is no such file")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST).strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path}: expected text in UTF-8, which byte {error.start} is not") from error
    if len(text) < FEWEST:
        raise ValueError(f"--text {path}: holds {len(text):,} characters of text; expected at least {FEWEST:,}")
    return text


def demonstrate(arguments: argparse.Namespace, size: Size, text: str) -> int:
    start = time.perf_counter()
    tokenizer = load_tokenizer(str(arguments.model))
    base = load_model(str(arguments.model), dtype=torch.float32).eval()
    base.pack_weights()
    adapted = None
    if arguments.adapter.exists():
        adapted = load_model(str(arguments.adapter), base=str(arguments.model), dtype=torch.float32).eval()
        adapted.get_base_model().pack_weights()

    console.rule("1. A pretrained LLaMA fills blanks, untrained")
    show_blanks(base, tokenizer)

    console.rule("2. Ten short stories, the third sentence blank")
    if adapted is None:
        console.print(f"There is no adapter in {arguments.adapter}: the LLaMA is shown alone.", soft_wrap=True)
    stories = read_stories(ROOT / "examples" / "short_stories.txt")[: size.stories]
    show_texts(base, adapted, tokenizer, stories)
    show_nats(base, adapted, tokenizer, stories)

    console.rule(f"3. Groups of {GROUP_SIZE} tokens against one at a time")
    show_speed(base, base if adapted is None else adapted, tokenizer, stories[0], size)

    console.rule("4. The LLaMA's own text in fewer passes")
    if arguments.drafts.exists():
        attach_draft_head(base, arguments.drafts)
    show_lossless(base, tokenizer, stories[0], size)

    console.rule("5. A minute of adaptation to a text")
    del base, adapted
    code = adapt(arguments, size, text)
    if code:
        return code

    console.rule("6. Next")
    console.print(f"The demo took {time.perf_counter() - start:.0f} s. With the environment activated:")
    show_next(arguments)
    return 0


def show_next(arguments: argparse.Namespace) -> None:
    """Prints three commands that go on from here."""
    best = arguments.adapter if arguments.adapter.exists() else arguments.model
    own, text = arguments.output_dir / "adapter", MADE_BLANK if arguments.text is None else "One day <blank:8>."
    longer = recipe_words(arguments, max_steps=300, output_dir=arguments.output_dir / "longer")
    for about, words in (
        ("a text of yours, with a blank of any length", ["a3", "infill", best, OWN_BLANK]),
        ("what the adapter of step 5 has learnt", ["a3", "infill", own, text]),
        ("a longer adaptation to the same text", ["a3", "adapt", os.path.relpath(RECIPE), *longer]),
    ):
        console.print(f"  {about}:\n    {command_line(words)}", soft_wrap=True, markup=False, highlight=False)


def command_line(words: Sequence[str | Path]) -> str:
    """Words as a shell takes them; those with spaces in double quotes, as they hold none of the shell's own characters."""
    return " ".join(f'"{word}"' if " " in str(word) else shlex.quote(str(word)) for word in words)


def show_blanks(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prints texts with blanks, filled by the LLaMA as it is, with the text after the blank in two places."""
    ways = {"in place": "", "in a prompt": PROMPT}
    filled = {name: base.infill(tokenizer, list(BLANKS), suffix_template=words) for name, words in ways.items()}
    console.print("The LLaMA reads the text after a blank in its place, or before all other text, in a prompt.\n")
    for number, text in enumerate(BLANKS):
        table = Table(show_header=False, box=None, padding=(0, 1))
        table.add_row("text", shown(text))
        for name, texts in filled.items():
            table.add_row(name, f"[bold]{shown(texts[number])}")
        console.print(table, "")


def read_stories(path: Path) -> list[tuple[str, str, str]]:
    """Stories of a file, each as the text before its third sentence, that sentence and the text after it."""
    return [split_story(story.splitlines()) for story in path.read_text(encoding="utf-8").strip().split("\n\n")]


def show_texts(
    base: PreTrainedModel,
    adapted: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    stories: Sequence[tuple[str, str, str]],
) -> None:
    """Prints each story, and what is written into its blank at the true sentence's number of tokens."""
    rows = [arrange(tokenizer, story, IN_PLACE) for story in stories]
    templates = [
        Template((before + " ", after), (len(target),))
        for (before, _, after), (_, target, _) in zip(stories, rows, strict=True)
    ]
    written = {"LLaMA": base.fill_templates(tokenizer, templates, suffix_template=PROMPT).written}
    if adapted is not None:
        written["adapter"] = adapted.fill_templates(tokenizer, templates).written
    console.print("A blank has as many tokens as the true sentence, so that a text may end too early.\n")
    for number, (before, target, after) in enumerate(stories):
        table = Table(show_header=False, box=None, padding=(0, 1))
        table.add_row("", f"[dim]{before}")
        table.add_row("true", target.strip())
        for name, texts in written.items():
            table.add_row(name, f"[bold]{shown(texts[number][0])}")
        table.add_row("", f"[dim]{after.strip()}\n")
        console.print(table)


def shown(written: str) -> str:
    """A text on one line, in which square brackets are no markup."""
    return " ".join(written.split()).replace("[", r"\[")


def show_nats(
    base: PreTrainedModel,
    adapted: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    stories: Sequence[tuple[str, str, str]],
) -> None:
    """Prints how likely the true sentences are, in nats per token: the fewer, the better."""
    ways = {"LLaMA, all text in its place": (base, IN_PLACE), "LLaMA, text after the blank in a prompt": (base, PROMPT)}
    if adapted is not None:
        ways["adapter"] = (adapted, adapted.config.suffix_template or IN_PLACE)
    measured = {}
    for name, (model, way) in ways.items():
        rows = [arrange(tokenizer, story, way) for story in stories]
        nats = blank_nats(model, rows, batch_size=5, track=track, about=name)
        measured[name] = (mean_nats(nats, rows), nats)
    _, prompted = measured["LLaMA, text after the blank in a prompt"]
    table = Table(title="the true sentence, given the text on both sides")
    for name in ("", "nats per token", "stories better than prompted"):
        table.add_column(name, justify="right" if name else "left")
    for name, (mean, nats) in measured.items():
        wins = sum(own < other for own, other in zip(nats, prompted, strict=True))
        table.add_row(name, f"{mean:.4f}", "–" if nats is prompted else f"{wins} of {len(stories)}")
    console.print(table)


def show_speed(
    base: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    story: tuple[str, str, str],
    size: Size,
) -> None:
    """Times writing on from a story's start, in turns, and prints medians and both texts. Neither stops at an end of text."""
    prompt = torch.tensor([encode_prompt(tokenizer, story[0])])

    def one_by_one(count: int) -> torch.Tensor:
        lengths = {"max_new_tokens": count, "min_new_tokens": count}
        mask = torch.ones_like(prompt)
        return base.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)

    def in_groups(count: int) -> torch.Tensor:
        settings = {"group_size": GROUP_SIZE, "eos_token_id": []}
        return model.generate_any_order(prompt, max_new_tokens=count, **settings).sequences

    ways = {"LLaMA, generate": one_by_one, f"A3, groups of {GROUP_SIZE}": in_groups}
    for write in ways.values():  # warms up
        write(GROUP_SIZE)
    seconds, texts = {name: [] for name in ways}, {}
    for _ in track(range(size.speed_repeats), "in turns"):
        for name, write in ways.items():
            elapsed, texts[name] = timed(write, size.speed_tokens)
            seconds[name].append(elapsed)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    console.print(
        f"{size.speed_tokens} tokens after a prompt, one row, float32, CPU, threads: {torch.get_num_threads()}; "
        f"medians of {size.speed_repeats}"
    )
    table = Table()
    for name in ("", "seconds", "tokens/s", "against generate"):
        table.add_column(name, justify="right" if name else "left")
    for name, median in medians.items():
        faster = medians["LLaMA, generate"] / median
        table.add_row(name, f"{median:.2f}", f"{size.speed_tokens / median:.1f}", f"{faster:.2f} ×")
    console.print(table)
    for name, sequences in texts.items():
        text = tokenizer.decode(sequences[0, prompt.shape[1] :], skip_special_tokens=True)
        console.print(f"[dim]{name}:[/] … {shown(text)}\n", soft_wrap=True, highlight=False)
    console.print(
        "Groups bring speed. What they cost depends on the training: the tokens of a group don't see each other while they "
        "are chosen, and a LLaMA that has not been trained for groups writes poorly in them.\n"
    )


def show_lossless(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, story: tuple[str, str, str], size: Size
) -> None:
    """Times the LLaMA's own text with drafts that it checks itself, and prints how many were right in each pass."""
    prompt = torch.tensor([encode_prompt(tokenizer, story[0])])
    mask = torch.ones_like(prompt)
    drafts = "ngram" if base.drafter is None else "ngram+head"
    outputs = []

    def one_by_one(count: int) -> torch.Tensor:
        lengths = {"max_new_tokens": count, "min_new_tokens": count}
        return base.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)

    def drafted(count: int) -> torch.Tensor:
        settings = {"strategy": "speculative", "draft": drafts, "verify": "content", "suppress_tokens": ends}
        outputs.append(base.generate_any_order(prompt, max_new_tokens=count, eos_token_id=[], **settings))
        return outputs[-1].sequences

    end = base.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    seconds = {one_by_one: [], drafted: []}
    texts = {write: write(2) for write in seconds}  # warms up
    for _ in track(range(size.speed_repeats), "in turns"):
        for write in seconds:
            elapsed, texts[write] = timed(write, size.speed_tokens)
            seconds[write].append(elapsed)
    medians = {write: statistics.median(times) for write, times in seconds.items()}
    table = Table()
    for name in ("", "passes", "tokens a pass", "tokens/s", "against generate"):
        table.add_column(name, justify="right" if name else "left")
    source = "the text so far" if drafts == "ngram" else "the text so far and a draft head"
    for name, write, passes in (
        ("LLaMA, generate", one_by_one, size.speed_tokens),
        ("A3, the same text", drafted, outputs[-1].num_forward_passes),
    ):
        cells = (f"{size.speed_tokens / passes:.2f}", f"{size.speed_tokens / medians[write]:.1f}")
        table.add_row(name, str(passes), *cells, f"{medians[one_by_one] / medians[write]:.2f} ×")
    console.print(f"Drafts from {source}, checked by the LLaMA itself; {size.speed_tokens} tokens, one row.")
    console.print(table)
    same = torch.equal(texts[one_by_one], texts[drafted])
    console.print(f"The texts are {'the same, token by token' if same else 'NOT the same'}.")
    steps = outputs[-1].commit_step[0, prompt.shape[1] :]
    right = Counter((steps.bincount() - 1).tolist())
    console.print("Passes by the number of drafts that were right in them:")
    for number in range(max(right) + 1):
        console.print(f"  {number}  {'█' * right[number]} {right[number]}", highlight=False)
    text = tokenizer.decode(texts[drafted][0, prompt.shape[1] :], skip_special_tokens=True)
    console.print(f"[dim]Both:[/] … {shown(text)}\n", soft_wrap=True, highlight=False)


def timed(write: Callable[[int], torch.Tensor], count: int) -> tuple[float, torch.Tensor]:
    """Seconds that a call takes, and its result."""
    start = time.perf_counter()
    sequences = write(count)
    return time.perf_counter() - start, sequences


def adapt(arguments: argparse.Namespace, size: Size, text: str) -> int:
    """Adapts the LLaMA to a text, as the command `a3 adapt` does, and prints held-out losses. Returns the exit code."""
    write_texts(text, arguments.output_dir)
    target = arguments.output_dir / "adapter"
    if (target / "run.json").is_file():  # of an earlier demo
        shutil.rmtree(target)
    source = "stories of a made-up language, which it has never read" if arguments.text is None else arguments.text
    console.print(f"The text: {source}; its last tenth is held out. By hand:\n", soft_wrap=True)
    words = recipe_words(arguments, max_steps=size.steps, output_dir=target)
    shown_command = command_line(["a3", "adapt", os.path.relpath(RECIPE), *words])
    console.print(f"  {shown_command}\n", soft_wrap=True, markup=False, highlight=False)
    set_seed(0)
    code = run(parse_recipe(RECIPE, words))
    if code == 0:
        before, after = held_out_losses(target / METRICS_FILE)
        console.print(f"\nHeld-out text: {before:.3f} nats per token before, {after:.3f} after {size.steps} steps.")
    return code


def recipe_words(arguments: argparse.Namespace, **settings: object) -> list[str]:
    """What the command line of `a3 adapt` says beyond the recipe."""
    train_file, held_out_file = (arguments.output_dir / name for name in TEXT_FILES)
    settings |= {"model_name_or_path": arguments.model, "train_file": train_file, "validation_file": held_out_file}
    own = read_settings(RECIPE)
    changed = {name: str(value) for name, value in settings.items() if str(value) != str(own[name])}
    return [word for name, value in changed.items() for word in (f"--{name}", value)]


def write_texts(text: str, folder: Path) -> None:
    """Writes a text to `TEXT_FILES`, the last `HELD_OUT` of it to the second, cut between paragraphs or else words."""
    near = int(len(text) * (1 - HELD_OUT))
    cut = re.compile(r"\n\s*\n").search(text, near) or re.compile(r"\s").search(text, near)
    at = cut.start() if cut else near
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(TEXT_FILES, (text[:at], text[at:]), strict=True):
        (folder / name).write_text(part.strip(), encoding="utf-8")


def held_out_losses(path: Path) -> tuple[float, float]:
    """The first and the last held-out loss in a run's metrics file, nats per token."""
    entries = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    losses = [entry["eval_loss_left_to_right"] for entry in entries if "eval_loss_left_to_right" in entry]
    return losses[0], losses[-1]


if __name__ == "__main__":
    sys.exit(main())
