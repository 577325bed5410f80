"""How well several words of a story are filled in at once: nats per token and exact matches.

    python eval/several_blanks.py adapters/smollm2-135m ../shared/data/rocstories/cloze_test_val__spring2016.csv --count 200

The model is a LLaMA, an A3 model, an adapter or masked diffusion. Three words of each story are blanked; each blank has its
true number of tokens. Nats are exact, from left to right over all blanks; texts are greedy, in the same order, or with masked
diffusion the most confident token in each pass. With an adapter or A3 model that has a `suffix_template`, a second row has the
text after the last blank in its place. A prompt or fill-in-the-middle training has no answer to more than one blank.
"""

import argparse
import json
import platform
import random
import re
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from infill_rocstories import read_stories
from rich.progress import track

from a3_hf.adapters.checkpoints import load_model, load_tokenizer
from a3_hf.evaluation.measures.batching import order_inputs, pad_rows
from a3_hf.evaluation.reporting.markdown import markdown_table
from a3_hf.models.a3_llama.infilling_templates import Template, encode_piece, encode_template

WORD = re.compile(r"(?<= )[A-Za-z]{3,}(?=[ .,!?])")
Blanked = tuple[Template, list[str]]


def blanked(tokenizer, text: str, number: int, generator: random.Random) -> Blanked | None:
    """A text without `number` words that are drawn at random, and these words; None if it has fewer."""
    words = [match.span() for match in WORD.finditer(text)]
    if len(words) < number:
        return None
    spans = sorted(generator.sample(words, number))
    targets = [text[start:end] for start, end in spans]
    lengths = tuple(len(encode_piece(tokenizer, f" {word}", is_start=False)) for word in targets)
    cut = Template.cut(text, spans, 1)
    return Template(cut.pieces, lengths), targets


@torch.no_grad()
def total_nats(model, tokenizer, batch: list[Blanked], way: str | None) -> float:
    """Nats of all true words of a batch, from left to right."""
    rows, places = [], []
    for template, targets in batch:
        ids, blanks = encode_template(tokenizer, template.with_suffix_first(way))
        fresh = iter([token for word in targets for token in encode_piece(tokenizer, f" {word}", is_start=False)])
        rows.append([next(fresh) if blank else token for token, blank in zip(ids, blanks, strict=True)])
        places.append([int(blank > 0) for blank in blanks])
    ids, real = pad_rows(rows)
    scored = pad_rows(places)[0].bool()
    return -float(model.log_likelihood(**order_inputs(ids, real, scored, model.device)).double().sum())


def measure(model, tokenizer, stories: list[Blanked], way: str | None, *, batch_size: int) -> dict[str, Any]:
    """Nats per token, and in percent the words and the stories that are written exactly."""
    strategy: dict[str, Any] = {}
    if model.config.model_type == "masked_diffusion_llama":
        strategy = {"strategy": "dynamic", "criterion": "confidence", "tokens_per_step": 1}
    nats, words, whole = 0.0, 0, 0
    starts = range(0, len(stories), batch_size)
    for start in track(starts, "in place" if way is None else repr(way)):
        batch = stories[start : start + batch_size]
        nats += total_nats(model, tokenizer, batch, way)
        output = model.fill_templates(tokenizer, [one for one, _ in batch], suffix_template=way or "", **strategy)
        for (_, targets), written in zip(batch, output.written, strict=True):
            right = [text.strip() == word for text, word in zip(written, targets, strict=True)]
            words, whole = words + sum(right), whole + all(right)
    tokens = sum(sum(template.lengths) for template, _ in stories)
    number = sum(len(targets) for _, targets in stories)
    return {"nats": nats / tokens, "words, %": 100 * words / number, "stories, %": 100 * whole / len(stories)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="LLaMAs, A3 models, adapters or masked diffusion")
    parser.add_argument("stories", type=Path, help="file of the story cloze test")
    parser.add_argument("--count", type=int, help="stories (default: all)")
    parser.add_argument("--blanks", type=int, default=3, help="words of a story")
    parser.add_argument("--seed", type=int, default=0, help="seed of the words' choice")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the table as JSON too")
    arguments = parser.parse_args()

    table = []
    for path in arguments.models:
        tokenizer = load_tokenizer(path)
        model = load_model(path, dtype=torch.float32).eval()
        texts = [" ".join(sentences) for sentences in read_stories(arguments.stories)[: arguments.count]]
        drawn = [
            blanked(tokenizer, text, arguments.blanks, random.Random(f"{arguments.seed} {index}"))
            for index, text in enumerate(texts)
        ]
        stories = [one for one in drawn if one is not None]
        own = getattr(model.config, "suffix_template", None)
        for way in dict.fromkeys([own, None]):
            row = measure(model, tokenizer, stories, way, batch_size=arguments.batch_size)
            table.append({"model": path, "text after the last blank": "in front" if way else "in place", **row})
            print(f"{path}, {table[-1]['text after the last blank']}: {row['nats']:.4f} nats", flush=True)
    print(f"{len(stories)} stories, {date.today()}, {platform.machine()} CPU, fp32, torch {torch.__version__}, transformers "
          f"{transformers.__version__}")  # fmt: skip
    cells = [[one if isinstance(one, str) else f"{one:.4g}" for one in row.values()] for row in table]
    print(markdown_table(list(table[0]), cells))
    if arguments.json:
        arguments.json.write_text(json.dumps({"stories": len(stories), "rows": table}, indent=1))


if __name__ == "__main__":
    main()
