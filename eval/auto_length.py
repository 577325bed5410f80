"""How well the length of a blank is found (`a3_hf/models/a3_llama/infilling_lengths.py`), on a text of yours.

    python eval/auto_length.py runs/mine story.txt
    python eval/auto_length.py runs/mine stories.csv --count 300 --lengths 1..6 --candidates 1..8 --before 16 --after 8

From each of `--count` places, drawn from `--seed`, a run of whole words is taken out, of a number of tokens that goes round
`--lengths`; the model sees so many tokens before it and after it, chooses a length among `--candidates`, and fills it. The
text is a file whose documents are apart by an empty line or by <|endoftext|>, or the story cloze test's CSV. With lengths of
equal share a guess finds one in as many as there are candidates.
"""

import argparse
import csv
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track

from a3_hf.adapters.checkpoints import load_model, load_tokenizer
from a3_hf.models.a3_llama.infilling_templates import Template, begins_with_space, decode_after


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, or the stories of the story cloze test, the right ending appended."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".csv":
        return [document.strip() for document in re.split(r"<\|endoftext\|>|\n\s*\n", text) if document.strip()]
    return [
        " ".join(
            [
                *(row[f"InputSentence{i}"] for i in range(1, 5)),
                row[f"RandomFifthSentenceQuiz{row['AnswerRightEnding']}"],
            ]
        )
        for row in csv.DictReader(text.splitlines())
    ]


def draw_blanks(
    tokenizer, documents: list[str], lengths: list[int], *, before: int, after: int, seed: int
) -> Iterator[tuple[str, str, str, int]]:
    """Texts before a run of whole words, the words, the text after them, and the tokens of the words; the first from a
    document in random order that is long enough.
    """
    rng, spaced, number = random.Random(seed), set(begins_with_space(tokenizer)), 0
    for document in rng.sample(documents, len(documents)):
        ids = tokenizer.encode(document, add_special_tokens=False)
        length = lengths[number % len(lengths)]
        ends = [token in spaced or not tokenizer.decode([token]).strip()[:1].isalnum() for token in ids]
        places = [
            place for place in range(before, len(ids) - length - after) if ids[place] in spaced and ends[place + length]
        ]
        if places:
            start, number = rng.choice(places), number + 1
            end = start + length
            yield (
                decode_after(tokenizer, ids[: start - before], ids[start - before : start]).lstrip(" "),
                decode_after(tokenizer, ids[:start], ids[start:end]),
                decode_after(tokenizer, ids[:end], ids[end : end + after]),
                length,
            )


def bounds(text: str) -> tuple[int, int]:
    least, most = (int(bound) for bound in text.split(".."))
    return least, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an A3 model, a LLaMA or an adapter")
    parser.add_argument("text", type=Path, help="a text that the model was not trained on")
    parser.add_argument("--count", type=int, default=300, help="blanks")
    parser.add_argument("--lengths", type=bounds, default=(1, 6), help="their true lengths, in tokens (1..6)")
    parser.add_argument("--candidates", type=bounds, default=(1, 16), help="the lengths to choose among (1..16)")
    parser.add_argument("--before", type=int, default=32, help="tokens given before a blank")
    parser.add_argument("--after", type=int, default=16, help="tokens given after it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", default="groupwise", choices=["groupwise", "dynamic"])
    parser.add_argument("--slot-start", choices=["left_token", "query_embed"], help="in place of the model's own")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(arguments.model)
    settings = {} if arguments.slot_start is None else {"slot_start": arguments.slot_start}
    model = load_model(arguments.model, **settings).eval()
    lengths = list(range(arguments.lengths[0], arguments.lengths[1] + 1))
    places = {"before": arguments.before, "after": arguments.after, "seed": arguments.seed}
    drawn = draw_blanks(tokenizer, read_documents(arguments.text), lengths, **places)
    blanks = [blank for blank, _ in zip(drawn, range(arguments.count), strict=False)]
    if len(blanks) < arguments.count:
        raise SystemExit(f"{arguments.text} has {len(blanks)} documents that are long enough; --count takes no more")

    found, chosen, matches = defaultdict(list), Counter(), 0
    for before, words, after, length in track(blanks, "blanks"):
        template = Template((f"{before} ", after), (arguments.candidates,))
        output = model.fill_templates(tokenizer, [template], strategy=arguments.strategy)
        found[length].append(output.lengths[0][0])
        chosen[output.lengths[0][0]] += 1
        matches += output.written[0][0].strip() == words.strip()
    print("| true length | blanks | found | within one | mean choice |\n|---|---|---|---|---|")
    everything = [(length, one) for length, row in found.items() for one in row]
    for name, row in [*((str(n), [(n, one) for one in found[n]]) for n in lengths), ("all", everything)]:
        count = max(len(row), 1)
        exact, near = (sum(abs(true - one) <= far for true, one in row) / count for far in (0, 1))
        print(f"| {name} | {len(row)} | {exact:.1%} | {near:.1%} | {sum(one for _, one in row) / count:.1f} |")
    print("\nchosen: " + ", ".join(f"{length} tokens {chosen[length]} times" for length in sorted(chosen)))
    print(f"the very words: {matches / len(blanks):.1%}")


if __name__ == "__main__":
    main()
