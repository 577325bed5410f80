"""Prints ROCStories with their third sentence written by an A3 model, given the sentences on both sides.

    python eval/infill_rocstories.py runs/stories260k ../shared/data/rocstories/cloze_test_val__spring2016.csv

The file is that of the story cloze test (paper §1, evaluation): four sentences and two endings, the right one appended.
The blank has the true sentence's number of tokens.
"""

import argparse
import csv
import json
import re
from itertools import islice
from pathlib import Path

from a3_hf.adapters.checkpoints import load_model, load_tokenizer
from a3_hf.models.a3_llama.infilling_templates import encode_piece


def read_stories(path: Path) -> list[list[str]]:
    """The five sentences of each story: of the story cloze test, or of a `.json` file with a list of one text in each line,
    where texts with another number of sentences are left out.
    """
    if path.suffix == ".json":
        texts = (json.loads(line)[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
        stories = [re.split(r"(?<=[.!?]) +", text) for text in texts]
        return [story for story in stories if len(story) == 5]
    with path.open(newline="", encoding="utf-8") as file:
        return [
            [
                *(row[f"InputSentence{i}"] for i in range(1, 5)),
                row[f"RandomFifthSentenceQuiz{row['AnswerRightEnding']}"],
            ]
            for row in csv.DictReader(file)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("stories", type=Path)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--strategy", default="groupwise", choices=["groupwise", "dynamic"])
    parser.add_argument("--temperature", type=float, help="sample, with seed 0 (default: greedy)")
    arguments = parser.parse_args()

    sampling = (
        {} if arguments.temperature is None else {"do_sample": True, "temperature": arguments.temperature, "seed": 0}
    )
    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model).eval()
    for number, sentences in enumerate(islice(read_stories(arguments.stories), arguments.count), start=1):
        length = len(encode_piece(tokenizer, " " + sentences[2], is_start=False))
        template = f"{' '.join(sentences[:2])} <blank:{length}> {' '.join(sentences[3:])}"
        filled = model.infill(tokenizer, template, strategy=arguments.strategy, **sampling)
        before, after = " ".join(sentences[:2]) + " ", " " + " ".join(sentences[3:])
        print(f"{number}. {before}**[{filled.removeprefix(before).removesuffix(after)}]**{after}")
        print(f"   (true: {sentences[2]})")


if __name__ == "__main__":
    main()
