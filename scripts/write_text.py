"""Writes text with a LLaMA, to train on what the model itself says: documents separated by a line.

    python scripts/write_text.py models/smollm2-135m written.txt --tokens 200000
    python scripts/write_text.py models/smollm2-135m greedy.jsonl --temperature 0 --opening-tokens 20 --chat 0.5

Each document follows an opening put together from lists below, in one batch after another. A file that ends in .jsonl holds
the tokens themselves, with the number of those that the text was written after. Stopped, it goes on where it was: the text is
that of a run without a stop.
"""

import argparse
import json
import random
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

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
QUESTIONS = (
    "What is", "What are", "How do I", "How can I", "How does", "Why do", "Why is", "Who was", "When did", "Where is",
    "Can you explain", "Give me some", "Write a short", "Tell me about", "List three", "Describe a", "Which", "Suggest a",
    "What should I", "Is it", "How many", "Help me", "Name some", "What does", "I would like to", "Could you", "Explain how",
)  # fmt: skip


def opening(number: int, seed: int, chat: float) -> tuple[str, bool]:
    """The first words of a document, drawn from the lists; and whether they begin a question of a chat."""
    draw = random.Random(f"{seed} {number}")
    if chat and draw.random() < chat:
        return draw.choice(QUESTIONS), True
    subject = draw.choice(SUBJECTS)
    if draw.random() < 0.5:
        return f"{draw.choice(TIMES)}, {subject} {draw.choice(ACTIONS)}", False
    return f"{subject[0].upper()}{subject[1:]} {draw.choice(ACTIONS)}", False


class Document(NamedTuple):
    input_ids: list[int]
    prompt_length: int  # tokens of the opening, which others than the likeliest may have begun


@torch.no_grad()
def continuations(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[list[int]], length: int, temperature: float
) -> list[list[int]]:
    """At most `length` new tokens after each text, up to an end-of-text token."""
    batch = tokenizer.pad({"input_ids": texts}, return_tensors="pt").to(model.device)
    settings = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
    written = model.generate(**batch, max_new_tokens=length, pad_token_id=tokenizer.pad_token_id, **settings)
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    new = (row[batch["input_ids"].shape[1] :].tolist() for row in written)
    return [list(takewhile(lambda token: token not in ends, row)) for row in new]


def documents(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, openings: list[tuple[str, bool]],
    *, length: int, temperature: float, opening_tokens: int,
) -> list[Document]:  # fmt: skip
    """A document of at most `length` new tokens after each opening, which `opening_tokens` sampled ones make longer; a
    question of a chat ends there, and what is written is its answer.
    """

    def asked(question: str) -> str:
        return tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)

    def encoded(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    begun = [asked(text).partition(text)[0] + text if chat else tokenizer.bos_token + text for text, chat in openings]
    prompts = [encoded(text) for text in begun]
    if opening_tokens:
        more = continuations(model, tokenizer, prompts, opening_tokens, 1.0)
        prompts = [prompt + new for prompt, new in zip(prompts, more, strict=True)]
    for number, ((first, chat), prompt, text) in enumerate(zip(openings, prompts, begun, strict=True)):
        if chat:
            question = first + tokenizer.decode(prompt[len(encoded(text)) :])
            messages = [{"role": "user", "content": question.strip()}]
            prompts[number] = encoded(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
    written = continuations(model, tokenizer, prompts, length, temperature)
    return [Document(prompt + new, len(prompt)) for prompt, new in zip(prompts, written, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a LLaMA")
    parser.add_argument("output", type=Path, help="text file")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="at least so many")
    parser.add_argument("--length", type=int, default=160, help="tokens of a document after its opening, at most")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest tokens")
    parser.add_argument(
        "--opening-tokens", type=int, default=0, help="tokens sampled after the first words, at temperature 1"
    )
    parser.add_argument(
        "--chat", type=float, default=0.0, help="share of documents that are answers in the model's chat"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in ("tokens", "length", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"{name}={getattr(arguments, name)}: expected at least 1")
    if arguments.temperature < 0:
        parser.error(f"temperature={arguments.temperature}: expected at least 0")
    if arguments.opening_tokens < 0:
        parser.error(f"opening_tokens={arguments.opening_tokens}: expected at least 0")
    if not 0 <= arguments.chat <= 1:
        parser.error(f"chat={arguments.chat}: expected a share, from 0 to 1")

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def as_line(document: Document) -> str:
        return json.dumps(document._asdict()) + "\n"

    def as_text(document: Document) -> str:
        return f"{tokenizer.decode(document.input_ids, skip_special_tokens=True)}\n{SEPARATOR}\n"

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32
    )
    model = model.to(device).eval()
    folder = arguments.output.with_name(f"{arguments.output.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    about = " ".join(f"{name}={value}" for name, value in vars(arguments).items() if name not in ("output", "tokens"))
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
                openings = [opening(first + row, arguments.seed, arguments.chat) for row in range(arguments.batch_size)]
                set_seed(arguments.seed * 1_000_003 + number)
                made = documents(
                    model,
                    tokenizer,
                    openings,
                    length=arguments.length,
                    temperature=arguments.temperature,
                    opening_tokens=arguments.opening_tokens,
                )
                count = sum(len(one.input_ids) - 1 for one in made)
                text = "".join(map(as_line if arguments.output.suffix == ".jsonl" else as_text, made))
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
