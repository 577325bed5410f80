"""How well a sentence is filled in, given both sides: nats per token and ROUGE, with the suffix in several places.

    python eval/sentence_infilling.py models/smollm2-135m ../shared/data/rocstories/cloze_test_val__spring2016.csv --count 100

The model is a LLaMA, an A3 model or an adapter (`--fim`: a LLaMA trained on FIM rows). Each row of the table is a way to
show the text around sentence 3 of a story. An unadapted LLaMA with `left_token` and the suffix in front gives its own
next-token likelihoods: what a prompt gets out of it. Nats are exact, left to right in the blank; with `--texts N`, ROUGE of N
greedy texts of the true length.
"""

import argparse
import itertools
import json
import platform
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from infill_rocstories import read_stories
from rich.progress import track

from a3_hf.adapters.checkpoints import load_model, load_tokenizer
from a3_hf.adapters.layers import SlotLinear
from a3_hf.data.fim import fim_prompt
from a3_hf.evaluation.measures.sentence_nats import IN_PLACE, PREFIX_ALONE, arrange, blank_nats, mean_nats, split_story
from a3_hf.evaluation.reporting.markdown import markdown_table
from a3_hf.evaluation.tasks.functions import ROUGE, rouge
from a3_hf.models.a3_llama.infilling_templates import Template, encode_piece

# What a practitioner would write around the suffix; `{suffix}` begins with a space.
WORDINGS = [
    "{suffix}\n\n",
    "Later:{suffix}\n\n",
    'Later in the story: "{suffix}"\nThe whole story:\n',
    "The end of the text:{suffix}\n\nThe whole text:\n",
    "Here is how it goes on:{suffix}\n\nAnd this is all of it:\n",
]


def fim_arranged(tokenizer, story: tuple[str, str, str], form: str, marks: list[int]) -> tuple[list[int], ...]:
    """As `arrange`, in the form psm or spm, the middle's tokens last."""
    prefix, middle, suffix = (encode_piece(tokenizer, text, is_start=i == 0) for i, text in enumerate(story))
    return [tokenizer.bos_token_id, *fim_prompt(form, prefix, suffix, marks)], middle, []


def batched(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def mean_rouge(model, tokenizer, stories, way: str, *, batch_size: int, about: str) -> dict[str, float]:
    """ROUGE of greedy texts of the true length, in percent."""
    words = "" if way in (IN_PLACE, PREFIX_ALONE) else way
    totals = Counter()
    for batch in track(list(batched(list(range(len(stories))), batch_size)), about):
        templates = []
        for index in batch:
            before, target, after = stories[index]
            length = len(encode_piece(tokenizer, target, is_start=False))
            templates.append(Template((before + " ", "" if way == PREFIX_ALONE else after), (length,)))
        output = model.fill_templates(tokenizer, templates, suffix_template=words)
        for index, (written,) in zip(batch, output.written, strict=True):
            totals.update(rouge({"target": stories[index][1]}, [written]))
    return {name: total / len(stories) for name, total in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="LLaMA, A3 model or adapter")
    parser.add_argument("stories", type=Path, help="file of the story cloze test")
    parser.add_argument("--count", type=int, help="stories (default: all)")
    parser.add_argument("--texts", type=int, default=0, help="stories for which a text is written")
    parser.add_argument(
        "--ways", nargs="+", help="ways to show the text (default: prefix alone, in place, and wordings)"
    )
    parser.add_argument(
        "--fim", nargs=3, metavar="TOKEN", help="tokens of prefix, suffix, middle: measures psm and spm"
    )
    parser.add_argument("--scales", type=float, nargs="+", help="adapter: parts of what it adds (default: 1)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the table as JSON too")
    arguments = parser.parse_args()

    tokenizer = load_tokenizer(arguments.model)
    settings = {"architecture": "a3"} if arguments.fim else {}
    model = load_model(arguments.model, dtype=torch.float32, **settings).eval()
    stories = [split_story(sentences) for sentences in read_stories(arguments.stories)[: arguments.count]]
    own = model.config.suffix_template
    given = [way.replace("\\n", "\n") for way in arguments.ways or ()]  # a shell passes \n as two characters
    ways = given or [PREFIX_ALONE, IN_PLACE, *([own] if own else []), *(w for w in WORDINGS if w != own)]
    forms = {way: [arrange(tokenizer, story, way) for story in stories] for way in ways}
    if arguments.fim:
        marks = tokenizer.convert_tokens_to_ids(arguments.fim)
        forms = {form: [fim_arranged(tokenizer, story, form, marks) for story in stories] for form in ("psm", "spm")}
    adapters = [module for module in model.modules() if isinstance(module, SlotLinear)]
    if arguments.scales and not adapters:
        parser.error(f"--scales: {arguments.model} is not an adapter of slots")
    whole = [dict(module.scaling) for module in adapters]
    table = []
    for way, scale in itertools.product(forms, arguments.scales or [1.0]):
        rows = forms[way]
        for module, scaling in zip(adapters, whole, strict=True):
            module.scaling = {name: value * scale for name, value in scaling.items()}
        nats = blank_nats(model, rows, batch_size=arguments.batch_size, track=track, about=repr(way))
        row: dict[str, Any] = {
            "way": way,
            **({"scale": scale} if arguments.scales else {}),
            "nats": mean_nats(nats, rows),
        }
        if arguments.texts and not arguments.fim:
            chosen = stories[: arguments.texts]
            row |= mean_rouge(model, tokenizer, chosen, way, batch_size=arguments.batch_size, about=f"texts {way!r}")
        table.append(row)
        print(f"{row['nats']:.4f} {way!r}" + f", scale {scale:g}" * bool(arguments.scales), flush=True)
    names = [name for name in ("scale", "nats", *ROUGE) if name in table[0]]
    print(f"{arguments.model}, {len(stories)} stories, {date.today()}, {platform.machine()} CPU, fp32, torch "
          f"{torch.__version__}, transformers {transformers.__version__}")  # fmt: skip
    print(markdown_table(["way", *names], [[repr(row["way"]), *(f"{row[n]:.4g}" for n in names)] for row in table]))
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"model": arguments.model, "stories": len(stories), "rows": table}, indent=1)
        )


if __name__ == "__main__":
    main()
