"""Writes text with a LLaMA, to train on what the model itself says: documents separated by a line.

    python scripts/write_text.py models/smollm2-135m written.txt --tokens 200000
    python scripts/write_text.py models/smollm2-135m greedy.txt --tokens 200000 --temperature 0

Each document follows an opening put together from lists below, in one batch after another. Stopped, it goes on where it was:
the text is that of a run without a stop.
"""

import argparse
import random
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase, set_seed

SEPARATOR = "<|endoftext|>"
TIMES = (
    "Yesterday", "Last summer", "On Monday", "One evening", "This morning", "After work", "Years ago", "In winter",
    "Before dinner", "At school", "On the way home", "During the holidays", "In the end", "Once", "Every Sunday", "At night",
)  # fmt: skip
SUBJECTS = (
    "Anna", "Tom", "my brother", "the teacher", "a young man", "our neighbours", "Maria", "the old farmer", "Sam", "my aunt",
    "two friends", "the doctor", "a little girl", "Peter", "the new manager", "her parents", "the team", "I", "we", "someone",
)  # fmt: skip
ACTIONS = (
    "went to", "wanted to", "found a", "was told that", "decided to", "had to", "could not", "lost the", "tried to make",
    "heard that", "bought a", "was afraid of", "forgot the", "opened the", "needed a", "saw that", "had never", "was tired of",
)  # fmt: skip


def opening(number: int, seed: int) -> str:
    """The first words of a document, drawn from the lists."""
    draw = random.Random(f"{seed} {number}")
    subject = draw.choice(SUBJECTS)
    if draw.random() < 0.5:
        return f"{draw.choice(TIMES)}, {subject} {draw.choice(ACTIONS)}"
    return f"{subject[0].upper()}{subject[1:]} {draw.choice(ACTIONS)}"


@torch.no_grad()
def documents(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, openings: list[str], *, length: int, temperature: float
) -> list[tuple[str, int]]:
    """A text of at most `length` new tokens after each opening, and its number of tokens."""
    batch = tokenizer([tokenizer.bos_token + text for text in openings], return_tensors="pt", padding=True,
                      add_special_tokens=False)  # fmt: skip
    settings = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
    written = model.generate(
        **batch.to(model.device), max_new_tokens=length, pad_token_id=tokenizer.pad_token_id, **settings
    )
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [(text, int((row != tokenizer.pad_token_id).sum()) - 1) for text, row in zip(texts, written, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a LLaMA")
    parser.add_argument("output", type=Path, help="text file")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="at least so many")
    parser.add_argument("--length", type=int, default=160, help="tokens of a document after its opening, at most")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest tokens")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in ("tokens", "length", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"{name}={getattr(arguments, name)}: expected at least 1")
    if arguments.temperature < 0:
        parser.error(f"temperature={arguments.temperature}: expected at least 0")

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32
    )
    model = model.to(device).eval()
    folder = arguments.output.with_name(f"{arguments.output.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    about = f"{arguments.model} {arguments.length} {arguments.temperature} {arguments.batch_size} {arguments.seed}"
    settings = folder / "settings"
    if settings.exists() and settings.read_text(encoding="utf-8") != about:
        parser.error(f"{folder} holds parts of a run with other settings: remove it, or write to another file")
    settings.write_text(about, encoding="utf-8")

    tokens, number = 0, 0
    with Progress() as progress:
        task = progress.add_task("tokens written", total=arguments.tokens)
        while tokens < arguments.tokens:
            part = folder / f"{number:06d}.txt"
            if not part.exists():
                first = number * arguments.batch_size
                openings = [opening(first + row, arguments.seed) for row in range(arguments.batch_size)]
                set_seed(arguments.seed * 1_000_003 + number)
                made = documents(model, tokenizer, openings, length=arguments.length, temperature=arguments.temperature)
                count = sum(one for _, one in made)
                text = "".join(f"{text}\n{SEPARATOR}\n" for text, _ in made)
                temporary = part.with_suffix(".partial")
                temporary.write_text(f"{count}\n{text}", encoding="utf-8")
                temporary.rename(part)
            count, _, _ = part.read_text(encoding="utf-8").partition("\n")
            tokens, number = tokens + int(count), number + 1
            progress.update(task, completed=tokens)
    parts = (folder / f"{one:06d}.txt" for one in range(number))
    arguments.output.write_text("".join(part.read_text(encoding="utf-8").partition("\n")[2] for part in parts), "utf-8")
    print(f"{arguments.output}: {tokens:,} tokens, {number * arguments.batch_size:,} documents")


if __name__ == "__main__":
    main()
