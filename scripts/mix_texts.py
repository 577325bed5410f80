"""Mixes text files into one, the same number of documents of each, for a recipe's `train_file`.

    python scripts/mix_texts.py mixed.txt stories.txt wikitext2_test.txt --documents 2400

A document ends at a line `<|endoftext|>`, or where a file has none, at its line's end: headings and short lines are left out,
and the spaces and marks that WikiText put between tokens are taken back. Documents are taken from a file's start, in turns.
"""

import argparse
import re
from pathlib import Path

SEPARATOR = "<|endoftext|>"
SHORTEST = 300  # characters of a document that is a line
JOINED = {" @-@ ": "-", " @,@ ": ",", " @.@ ": ".", "( ": "(", " )": ")", "<unk>": "X"}


def documents_of(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if SEPARATOR in text:
        return [story for part in text.split(SEPARATOR) if (story := part.strip())]
    lines = (line.strip() for line in text.splitlines())
    return [detokenised(line) for line in lines if len(line) > SHORTEST and not line.startswith("=")]


def detokenised(line: str) -> str:
    """A line of WikiText as it was written."""
    for marked, plain in JOINED.items():
        line = line.replace(marked, plain)
    line = re.sub(r'" ([^"]*) "', r'"\1"', line)
    return re.sub(r" (n't|'s|'re|'ve|'ll|'d|[.,;:!?%])(?=\W|$)", r"\1", line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--documents", type=int, required=True, help="of all files together")
    arguments = parser.parse_args()
    missing = [str(path) for path in arguments.texts if not path.is_file()]
    if missing:
        parser.error(f"texts: there is no file {', '.join(missing)}")
    share, rest = divmod(arguments.documents, len(arguments.texts))
    if rest:
        parser.error(f"documents={arguments.documents}: expected a multiple of the {len(arguments.texts)} texts")
    read = {path: documents_of(path) for path in arguments.texts}
    for path, documents in read.items():
        if not 0 < share <= len(documents):
            parser.error(f"documents={arguments.documents}: expected at most {len(read) * len(documents)}, for {path}")
    turns = zip(*(documents[:share] for documents in read.values()), strict=True)
    mixed = [document for turn in turns for document in turn]
    arguments.output.write_text("".join(f"{document}\n{SEPARATOR}\n" for document in mixed), encoding="utf-8")
    print(f"{arguments.output}: {len(mixed):,} documents, {sum(map(len, mixed)):,} characters")


if __name__ == "__main__":
    main()
