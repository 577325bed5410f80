"""Trains a draft head for a LLaMA on what the LLaMA itself writes.

    python scripts/write_text.py models/smollm2-135m greedy.jsonl --tokens 300000 --temperature 0 --opening-tokens 20 \\
        --chat 0.5 --length 80 --batch-size 96
    python scripts/train_draft_head.py models/smollm2-135m greedy.jsonl runs/drafts --epochs 1

Only written tokens are learnt, not openings. Stopped, the same command goes on from the last checkpoint, to the same head. At
the end the head is stored in bfloat16 with a model card, and the shares of right guesses on held-out documents are printed.
"""

import argparse
import json
import platform
from collections import Counter
from datetime import date
from pathlib import Path

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from a3_hf import A3LlamaForCausalLM
from a3_hf.evaluation.reporting.markdown import markdown_table
from a3_hf.models.a3_draft_head.configuration_a3_draft_head import DraftHeadConfig
from a3_hf.models.a3_draft_head.modeling_a3_draft_head import DraftHead
from a3_hf.models.a3_llama.model_card import build_card, write_card

SIZES = ("num_drafts", "first_layer", "rank", "sampler_size", "num_candidates")
USE = """\
A draft head: with it, its base writes its own text, token by token, in fewer passes.

```python
from a3_hf.adapters.checkpoints import load_model, load_tokenizer

model, tokenizer = load_model("{name}"), load_tokenizer("{name}")
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
output = model.generate_any_order(ids, max_new_tokens=40, strategy="speculative")
print(tokenizer.decode(output.sequences[0]), output.tokens_per_forward)
```"""


def read_documents(path: Path) -> list[dict[str, list[int]]]:
    """Documents of a file that `write_text.py` wrote, with labels for the written tokens."""
    documents = []
    for line in path.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        ids, given = document["input_ids"], document["prompt_length"]
        if len(ids) > given + 2:  # behind a document's last two tokens, nothing is guessed
            documents.append({"input_ids": ids, "labels": [-100] * given + ids[given:]})
    return documents


def likely_tokens(documents: list[dict[str, list[int]]], number: int) -> torch.Tensor:
    """The `number` tokens that are most frequent in the written text; then those of the lowest ids."""
    counts = Counter(token for one in documents for token in one["labels"] if token != -100)
    first = [token for token, _ in counts.most_common(number)]
    others = (token for token in range(number * 2) if token not in counts)
    return torch.tensor(sorted(first + [next(others) for _ in range(number - len(first))]), dtype=torch.int32)


def collate(documents: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {
        name: pad_sequence([torch.tensor(one[name]) for one in documents], batch_first=True, padding_value=padding)
        for name, padding in (("input_ids", 0), ("labels", -100))
    }


@torch.no_grad()
def measure(head: DraftHead, documents: list[dict[str, list[int]]], batch_size: int) -> list[dict[str, float]]:
    """Each distance's loss and share of right guesses."""
    totals = torch.zeros(3, head.config.num_drafts, dtype=torch.float64)
    for first in range(0, len(documents), batch_size):
        output = head(
            **{name: value.to(head.device) for name, value in collate(documents[first : first + batch_size]).items()}
        )
        totals += torch.stack(
            [output.num_scored, output.losses * output.num_scored, output.right * output.num_scored]
        ).cpu()
    return [
        {"distance": 2 + number, "nats": float(loss / count), "right": float(right / count), "tokens": int(count)}
        for number, (count, loss, right) in enumerate(totals.T)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a LLaMA")
    parser.add_argument("text", type=Path, help="documents of write_text.py, .jsonl")
    parser.add_argument("output", type=Path, help="folder")
    parser.add_argument("--start", help="a draft head to go on from; sizes and candidates are its")
    parser.add_argument("--skip", type=int, default=0, help="first documents, which that head has learnt")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=64, help="last documents, which are measured and not learnt")
    parser.add_argument("--num-drafts", type=int, default=3)
    parser.add_argument("--first-layer", type=int, help="default: the last fifth of the layers")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--sampler-size", type=int, default=768)
    parser.add_argument("--num-candidates", type=int, default=8192)
    parser.add_argument("--save-steps", type=int, default=50, help="between checkpoints")
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    documents = read_documents(arguments.text)
    if not 0 <= arguments.skip < len(documents):
        parser.error(f"skip={arguments.skip}: expected 0 to {len(documents) - 1}")
    documents = documents[arguments.skip :]
    if not 1 <= arguments.held_out < len(documents):
        parser.error(f"held_out={arguments.held_out}: expected 1 to {len(documents) - 1}")
    learnt, held_out = documents[: -arguments.held_out], documents[-arguments.held_out :]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = A3LlamaForCausalLM.from_pretrained(
        arguments.base, dtype=torch.bfloat16 if device == "cuda" else torch.float32
    )
    base = base.to(device).eval().requires_grad_(False)
    sizes = {name: getattr(arguments, name) for name in SIZES if name != "first_layer"}
    sizes["num_candidates"] = min(sizes["num_candidates"], base.config.vocab_size)
    if arguments.first_layer is not None:
        sizes["first_layer"] = arguments.first_layer
    set_seed(arguments.seed)
    if arguments.start:
        head = DraftHead.from_pretrained(arguments.start, dtype=torch.float32)
    else:
        head = DraftHead(DraftHeadConfig.for_base(base.config, base_model_name_or_path=arguments.base, **sizes))
        head.candidates.copy_(likely_tokens(learnt, sizes["num_candidates"]))
    head.attach_to(base)
    trainer = Trainer(
        model=head,
        args=TrainingArguments(
            output_dir=str(arguments.output),
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            adam_beta2=0.98,
            logging_steps=10,
            save_steps=arguments.save_steps,
            save_total_limit=2,
            remove_unused_columns=False,
            average_tokens_across_devices=False,
            report_to=[],
            seed=arguments.seed,
            use_cpu=device == "cpu",
        ),
        train_dataset=learnt,
        data_collator=collate,
    )
    last = get_last_checkpoint(str(arguments.output)) if arguments.output.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_state()
    head.to(torch.bfloat16).save_pretrained(arguments.output)  # measured as it is stored
    table = measure(head.to(base.dtype).eval(), held_out, arguments.batch_size)
    (arguments.output / "held_out.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    cells = [[str(row["distance"]), f"{row['nats']:.3f}", f"{row['right']:.3f}", str(row["tokens"])] for row in table]
    shown = markdown_table(list(table[0]), cells)
    written = sum(label != -100 for one in learnt for label in one["labels"])
    settings = {
        "base": arguments.base,
        "started from": arguments.start or "new weights",
        "text": f"{len(learnt):,} documents, {written:,} tokens that the base wrote ({arguments.text.name})",
        "steps": f"{trainer.state.global_step} of {arguments.batch_size} documents",
        "learning rate": f"{arguments.learning_rate}, cosine",
        **{name: getattr(head.config, name) for name in SIZES},
        "made": f"{date.today()}, {platform.machine()} {device}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    card = build_card(
        arguments.output.name,
        use=USE,
        report=f"## Training\n\n| setting | value |\n| --- | --- |\n{rows}\n\n## Guesses\n\nOf {len(held_out)} held-out "
        f"documents, given the true tokens before; distance 1 is the base's own:\n\n{shown}",
        base_model=arguments.base,
        tags=["a3_draft_head", "speculative-decoding"],
    )
    write_card(card, arguments.output, replace=True)
    print(shown)


if __name__ == "__main__":
    main()
