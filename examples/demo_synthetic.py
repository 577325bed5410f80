"""A3 from nothing in a few minutes on a CPU, offline: a tiny LLaMA is pretrained, adapted and put to use.

    make demo-synthetic

The claim that it checks: of words that only the text after them settles, the LLaMA, which sees the text before a blank,
fills as many as chance would, and the A3 model adapted from it at least `REQUIRED` of them. It exits with 1 otherwise.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from story_language import NUM_STORIES, SLOTS, Story, build_tokenizer, sample_stories
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)
from transformers.utils import logging

from a3_hf import A3LlamaForCausalLM, A3Trainer, Curriculum
from a3_hf.data.collator import RowCollator
from a3_hf.training.arguments import A3TrainingArguments

REQUIRED = 0.9
CONTEXT = 256
GROUP_SIZES = (1, 4, 8)
STAGES = [
    {"name": "ar", "until": 0.1},
    {"name": "expand", "until": 0.25, "group_size": [1, 4]},
    {"name": "permute", "group_size": 4},
]

console = Console()


@dataclass(frozen=True)
class Size:
    """How much the demo does."""

    pretraining_steps: int
    adaptation_steps: int
    batch_size: int
    held_out: int
    speed_tokens: int
    speed_repeats: int


FULL = Size(
    pretraining_steps=400, adaptation_steps=1000, batch_size=16, held_out=500, speed_tokens=240, speed_repeats=5
)
SMOKE = Size(pretraining_steps=2, adaptation_steps=6, batch_size=4, held_out=4, speed_tokens=16, speed_repeats=1)


def main() -> int:
    parser = argparse.ArgumentParser(description="Pretrain a tiny LLaMA, adapt it to any-order generation, use it.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="where both models are saved")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, and no claim checked")
    arguments = parser.parse_args()
    size = SMOKE if arguments.smoke else FULL
    # The load report would list query_embed as missing: just that is the adaptation's start.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Layers this narrow gain little from a second thread, and lose much where the core is not free.
    torch.set_num_threads(1)
    start = time.perf_counter()

    tokenizer = build_tokenizer()
    stories = sample_stories(
        size.held_out + (size.pretraining_steps + size.adaptation_steps) * size.batch_size, seed=arguments.seed
    )
    held_out, unread = stories[: size.held_out], stories[size.held_out :]
    console.rule("1. A language")
    console.print(
        f"{NUM_STORIES:,} stories; {len(unread):,} to train on, {len(held_out)} held out, no two with the same facts. "
        f"One of them:\n\n  {held_out[0].text}\n"
    )

    console.rule("2. A LLaMA, pretrained left to right")
    num_pretraining = size.pretraining_steps * size.batch_size
    base_path = arguments.output_dir / "base"
    write_stories(arguments.output_dir / "stories.txt", unread[num_pretraining:])
    pretrain(base_path, unread[:num_pretraining], tokenizer, size, arguments.seed)

    console.rule("3. The same weights, adapted: " + " → ".join(stage["name"] for stage in STAGES))
    a3_path = arguments.output_dir / "a3"
    adapt(base_path, a3_path, unread[num_pretraining:], tokenizer, size, arguments.seed)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = LlamaForCausalLM.from_pretrained(base_path).to(device).eval()
    model = A3LlamaForCausalLM.from_pretrained(a3_path).to(device).eval()

    console.rule("4. The same blanks, filled by both")
    by_opening = {story.tokens[1]: story for story in reversed(held_out)}
    show_fills(base, model, list(by_opening.values()), tokenizer)
    score = show_scores(base, model, held_out, tokenizer)

    console.rule("5. Speed")
    show_speed(base, model, held_out[0], tokenizer, size)

    console.rule("6. The order in which a story is filled")
    show_order(model, held_out[1], tokenizer)

    console.rule("7. Next")
    console.print(f"Both models are in {arguments.output_dir}; the demo took {time.perf_counter() - start:.0f} s.")
    console.print("what else these models do:   README.md, docs/decoding.md", soft_wrap=True)
    console.print("a really pretrained LLaMA:   make demo", soft_wrap=True)
    console.print("a LLaMA of yours, on a GPU:  a3 adapt recipes/llama-3.2-1b/config_full.yaml", soft_wrap=True)
    if not arguments.smoke and score < REQUIRED:
        console.print(
            f"[bold red]The claim fails:[/] A3 fills {score:.1%} of the words that only the right settles; "
            f"at least {REQUIRED:.0%} was expected."
        )
        return 1
    return 0


def write_stories(path: Path, stories: Sequence[Story]) -> None:
    """One story a line, for `recipes/demo`, which adapts the same LLaMA by the command `a3 adapt`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(story.text for story in stories), encoding="utf-8")


def rows_of(stories: Sequence[Story], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Training rows; BOS is given, so it has no label."""
    encoded = tokenizer([story.text for story in stories])
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": [-100, *ids[1:]]}
        for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]


def training_arguments(path: Path, num_steps: int, batch_size: int, seed: int) -> A3TrainingArguments:
    return A3TrainingArguments(
        output_dir=str(path),
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-3,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": max(1, num_steps * 3 // 10)},
        warmup_steps=min(30, num_steps // 2),
        adam_beta2=0.98,
        weight_decay=0.01,
        logging_steps=max(1, num_steps // 6),
        save_strategy="no",
        seed=seed,
        disable_tqdm=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def pretrain(path: Path, stories: Sequence[Story], tokenizer: PreTrainedTokenizerBase, size: Size, seed: int) -> None:
    """Trains a LLaMA of 0.9M parameters from scratch, and saves it."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        # Wider than usual, as the model is narrow: at 0.02 it takes several times as long to learn to look words up.
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    base = LlamaForCausalLM(config)
    console.print(f"{base.num_parameters():,} parameters, {config.num_hidden_layers} layers, {len(tokenizer)} words\n")
    trainer = Trainer(
        model=base,
        args=training_arguments(path, size.pretraining_steps, size.batch_size, seed),
        train_dataset=rows_of(stories, tokenizer),
        data_collator=RowCollator(pad_token_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


def adapt(
    base_path: Path,
    path: Path,
    stories: Sequence[Story],
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
    seed: int,
) -> None:
    """Adapts the LLaMA of `base_path` to any order, and saves it."""
    set_seed(seed)
    model = A3LlamaForCausalLM.from_pretrained(base_path)
    console.print(f"new beside LLaMA's weights: query_embed, {model.config.hidden_size} numbers\n")
    trainer = A3Trainer(
        model=model,
        args=training_arguments(path, size.adaptation_steps, size.batch_size, seed),
        train_dataset=rows_of(stories, tokenizer),
        data_collator=RowCollator(pad_token_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
        curriculum=Curriculum.from_config(STAGES, unit="fraction"),
    )
    trainer.train()
    trainer.save_model()


@torch.no_grad()
def fill_from_prefix(base: LlamaForCausalLM, input_ids: torch.Tensor, blank_mask: torch.Tensor) -> torch.Tensor:
    """Fills blanks (B, S) as a LLaMA can: greedily, left to right, each from all that stands before it (what it wrote
    itself included).
    """
    filled = input_ids.masked_fill(blank_mask, base.config.pad_token_id)
    for column in blank_mask.any(dim=0).nonzero().flatten().tolist():
        rows = blank_mask[:, column]
        logits = base(filled[rows, :column], logits_to_keep=1).logits[:, -1]
        filled[rows, column] = logits.argmax(dim=-1)
    return filled


def fill_from_both_sides(model: A3LlamaForCausalLM, input_ids: torch.Tensor, blank_mask: torch.Tensor) -> torch.Tensor:
    """Fills blanks (B, S) as A3 can: the surest first, each from all other text."""
    batches = zip(input_ids.split(500), blank_mask.split(500), strict=True)
    return torch.cat(
        [model.generate_any_order(ids, blank_mask=mask, strategy="dynamic").sequences for ids, mask in batches]
    )


def encode(stories: Sequence[Story], tokenizer: PreTrainedTokenizerBase, device: torch.device) -> torch.Tensor:
    """(B, S) token ids; all stories are equally long."""
    return torch.tensor(tokenizer([story.text for story in stories])["input_ids"], device=device)


def mask_at(positions: Sequence[Sequence[int]], like: torch.Tensor) -> torch.Tensor:
    """(B, S) bool, True at the given positions of each row."""
    mask = torch.zeros_like(like, dtype=torch.bool)
    return mask.scatter_(1, torch.tensor(positions, device=like.device), True)


def show_fills(
    base: LlamaForCausalLM,
    model: A3LlamaForCausalLM,
    stories: Sequence[Story],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Prints stories whose first mentions are blank, and both models' words for them."""
    input_ids = encode(stories, tokenizer, base.device)
    blank_mask = mask_at([story.right_settled for story in stories], input_ids)
    from_prefix = fill_from_prefix(base, input_ids, blank_mask)
    from_both = fill_from_both_sides(model, input_ids, blank_mask)

    table = Table(show_lines=True)
    table.add_column("story", ratio=3)
    table.add_column("LLaMA, from the left alone", ratio=1)
    table.add_column("A3, from both sides", ratio=1)
    for row, story in enumerate(stories):
        words = ["____" if at in story.right_settled else word for at, word in enumerate(story.tokens)]
        fills = [Text(), Text()]
        for text, filled in zip(fills, (from_prefix, from_both), strict=True):
            for at in story.right_settled:
                word = tokenizer.convert_ids_to_tokens(int(filled[row, at]))
                right = word == story.tokens[at]
                text.append(f"{word} {'✓' if right else '✗'}\n", style="green" if right else "red")
            text.rstrip()
        table.add_row(" ".join(words[1:-1]), *fills)
    console.print(table)


def show_scores(
    base: LlamaForCausalLM,
    model: A3LlamaForCausalLM,
    stories: Sequence[Story],
    tokenizer: PreTrainedTokenizerBase,
) -> float:
    """Prints how many blanks of unseen stories both models fill with the right word; returns the lowest share of A3's
    among blanks settled by the right.
    """
    input_ids = encode(stories, tokenizer, base.device)
    chance = 1 / min(len(words) for words in SLOTS.values())
    console.print(f"right words in {len(stories)} unseen stories (chance: {chance:.1%})")
    table = Table()
    table.add_column("blanks settled by")
    table.add_column("blank at once")
    for name in ("words", "LLaMA, from the left alone", "A3, from both sides"):
        table.add_column(name, justify="right")

    scores = []
    for side in ("right", "left"):
        positions = [getattr(story, f"{side}_settled") for story in stories]
        num_blanks = len(positions[0])
        one_each = [[position] for blanks in positions for position in blanks]
        for how_many, repeats, blanks in (("one", num_blanks, one_each), (f"all {num_blanks}", 1, positions)):
            truth = input_ids.repeat_interleave(repeats, dim=0)
            blank_mask = mask_at(blanks, truth)
            shares = [
                (fill(filler, truth, blank_mask) == truth)[blank_mask].float().mean().item()
                for fill, filler in ((fill_from_prefix, base), (fill_from_both_sides, model))
            ]
            table.add_row(f"the {side}", how_many, str(int(blank_mask.sum())), *(f"{share:.1%}" for share in shares))
            if side == "right":
                scores.append(shares[1])
    console.print(table)
    return min(scores)


def show_speed(
    base: LlamaForCausalLM,
    model: A3LlamaForCausalLM,
    story: Story,
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
) -> None:
    """Times writing on from a prompt, in turns, and prints medians. What is written doesn't matter, so neither stops at
    an end of text.
    """
    prompt = encode([story], tokenizer, base.device)[:, : CONTEXT - 240]
    base.generation_config.eos_token_id = None
    ways: dict[str, Callable[[], object]] = {
        "LLaMA, generate": lambda: base.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=size.speed_tokens, do_sample=False
        )
    }
    for group_size in GROUP_SIZES:
        ways[f"A3, groups of {group_size}"] = lambda group_size=group_size: model.generate_any_order(
            prompt, max_new_tokens=size.speed_tokens, group_size=group_size, eos_token_id=[]
        )
    seconds = {name: [] for name in ways}
    for repeat in range(size.speed_repeats + 1):
        for name, write in ways.items():
            elapsed = timed(write, base.device)
            if repeat:  # the first round warms up
                seconds[name].append(elapsed)

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    baseline = medians["LLaMA, generate"]
    console.print(
        f"{size.speed_tokens} tokens after a prompt, one row, {device_name(base.device)}: medians of {size.speed_repeats}"
    )
    table = Table()
    table.add_column("")
    for name in ("tokens/s", "against LLaMA"):
        table.add_column(name, justify="right")
    for name, median in medians.items():
        table.add_row(name, f"{size.speed_tokens / median:,.0f}", f"{baseline / median:.2f} ×")
    console.print(table)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"


def show_order(model: A3LlamaForCausalLM, story: Story, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prints a story of which the last sentence was given: each word that was written with the step it was written at."""
    input_ids = encode([story], tokenizer, model.device)
    last_sentence = max(at for at, word in enumerate(story.tokens[:-2]) if word == ".") + 1
    output = model.generate_any_order(
        input_ids, blank_mask=mask_at([range(1, last_sentence)], input_ids), strategy="dynamic"
    )
    words = tokenizer.convert_ids_to_tokens(output.sequences[0].tolist())
    steps = output.commit_step[0].tolist()
    text = Text()
    for word, step in list(zip(words, steps, strict=True))[1:-1]:
        if step < 0:
            text.append(f"{word} ", style="dim")
        else:
            share = step / max(steps)
            text.append(
                word, style=f"bold rgb({int(80 + 175 * share)},{int(200 - 100 * share)},{int(255 - 175 * share)})"
            )
            text.append(f"·{step + 1} ", style="dim")
    console.print(
        "Given: the last sentence (dim). Written: the words with a number, the step at which each was chosen.\n"
    )
    console.print(text)
    console.print(f"\n{max(steps) + 1} words in {output.num_forward_passes} passes; the true story: {story.text}")


if __name__ == "__main__":
    sys.exit(main())
