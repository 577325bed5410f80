"""How well the length of a blank is found, on the demo's language, where the true one is known.

    python examples/demo.py
    python eval/auto_length.py runs/demo/a3

From each of the stories that the demo held out, a run of 1 to 6 words at a random place is taken. `auto` chooses among 1 to
16 tokens by exact likelihood (`a3_hf/lengths.py`); `oracle` is told the true length.
"""

import argparse
import random
import sys
from collections import Counter
from pathlib import Path

from rich.progress import track

from a3_hf.adapters import load_model, load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import FULL
from story_language import sample_stories

LONGEST = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the A3 model that the demo saved")
    parser.add_argument("--count", type=int, default=FULL.held_out, help="stories")
    parser.add_argument("--seed", type=int, default=0, help="the demo's, which decides what was held out")
    parser.add_argument("--strategy", default="dynamic", choices=["groupwise", "dynamic"])
    arguments = parser.parse_args()

    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model).eval()
    steps = FULL.pretraining_steps + FULL.adaptation_steps
    stories = sample_stories(FULL.held_out + steps * FULL.batch_size, seed=arguments.seed)[: arguments.count]
    rng = random.Random(arguments.seed)
    ranks, right = Counter(), Counter()
    for story in track(stories, "blanks"):
        words = story.text.split()
        length = rng.randint(1, LONGEST)
        start = rng.randint(0, len(words) - length)
        before, blank, after = words[:start], words[start : start + length], words[start + length :]
        for name, marker in {"oracle": f"<blank:{length}>", "auto": "<blank:auto>"}.items():
            template = " ".join([*before, marker, *after])
            output = model.infill(tokenizer, template, strategy=arguments.strategy, return_outputs=True)
            right[name] += output.written[0][0].split() == blank
        scores = output.length_scores[0][0]
        ranks[sorted(scores, key=scores.get, reverse=True).index(length) + 1] += 1
    count = len(stories)
    print(f"{count} blanks of 1 to {LONGEST} words, lengths 1 to 16 compared, strategy {arguments.strategy}")
    print(f"true length first: {ranks[1] / count:.1%}; among the top 2: {(ranks[1] + ranks[2]) / count:.1%}")
    print(f"exact match: oracle length {right['oracle'] / count:.1%}, auto length {right['auto'] / count:.1%}")
    print("rank of the true length: " + ", ".join(f"{rank}: {ranks[rank]}" for rank in sorted(ranks)))


if __name__ == "__main__":
    main()
