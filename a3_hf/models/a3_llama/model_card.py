"""The model card (README.md) saved with weights."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

CARD_FILE = "README.md"
MARK = "<!-- Written by a3_hf. A later run in this folder replaces this file; remove this line to keep your text. -->"
USE = """\
```python
import a3_hf  # registers the model's type
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
print(model.infill(tokenizer, "The dog <blank:4> home.", strategy="dynamic"))
```"""
WITHOUT_PACKAGE = (
    "\n\nWithout a3_hf, pass `trust_remote_code=True` to `from_pretrained`: the checkpoint carries its code."
)


def build_card(name: str, *, use: str = USE, report: str = "", **metadata) -> ModelCard:
    """Returns a model card: metadata, how to use the model, and a report of its training.

    Args:
        name: the model's name, a hub id or a folder's name; replaces `{name}` in `use`.
        use: Markdown on how to use the model.
        report: Markdown with the model's base, recipe and losses.
        metadata: fields of `huggingface_hub.ModelCardData`, such as `base_model`, `license` and `tags`; None leaves one out.
    """
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", **metadata)
    parts = [f"---\n{data.to_yaml()}\n---\n{MARK}", f"# {name}", f"## Use\n\n{use.format(name=name)}", report]
    return ModelCard("\n\n".join(part for part in parts if part) + "\n", ignore_metadata_errors=False)


def write_card(card: ModelCard, folder: str | Path, *, replace: bool) -> bool:
    """Saves a card as README.md of a folder, never overwriting one that this function did not write.

    Args:
        replace: overwrite a card that this function saved earlier.

    Returns:
        True if the card was saved.
    """
    path = Path(folder) / CARD_FILE
    if path.exists() and not (replace and MARK in path.read_text(encoding="utf-8")):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    card.save(path)
    return True
