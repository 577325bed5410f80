"""The model card of a finished run: its base, recipe, tokens and losses."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, try_to_load_from_cache
from rich.table import Table
from transformers import TrainerState

from a3_hf.models.a3_draft_head.configuration_a3_draft_head import DraftHeadConfig
from a3_hf.models.a3_llama.model_card import CARD_FILE, USE, WITHOUT_PACKAGE, build_card, write_card
from a3_hf.models.auto import ARCHITECTURES

from .arguments import Recipe

USE_OF_AN_ADAPTER = """\
```python
from a3_hf.adapters.checkpoints import load_model, load_tokenizer

model = load_model("{name}")
tokenizer = load_tokenizer("{name}")
print(model.infill(tokenizer, "The dog <blank:4> home.", strategy="dynamic"))
```"""
USE_OF_A_DRAFT_HEAD = """\
A draft head: with it, its base writes its own text, token by token, in fewer passes.

```python
from a3_hf.adapters.checkpoints import load_model, load_tokenizer

model, tokenizer = load_model("{name}"), load_tokenizer("{name}")
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
output = model.generate_any_order(ids, max_new_tokens=40, strategy="speculative")
print(tokenizer.decode(output.sequences[0]), output.tokens_per_forward)
```"""
USE_OF_A_LLAMA = """\
```python
from transformers import pipeline

print(pipeline("text-generation", model="{name}")("The dog"))
```"""


def write_run_card(recipe: Recipe, state: TrainerState, losses: Table | None) -> bool:
    """Saves the model card of a finished run as README.md in `output_dir`, unless it has one that a3_hf did not write.

    Args:
        state: the state of the trainer after the last step.
        losses: the losses of each order after each stage, nats per token; None if none were measured.

    Returns:
        Whether the card was saved.
    """
    base = recipe.model.model_name_or_path
    base_card = read_card(base)
    base_model = base if not Path(base).is_dir() else None if base_card is None else base_card.data.base_model
    output_dir = Path(recipe.training.output_dir)
    card = build_card(
        output_dir.resolve().name,
        use=_use(recipe),
        report=_report(recipe, state, losses),
        base_model=base_model,
        license=None if base_card is None else base_card.data.license,
        datasets=_hub_datasets(recipe) or None,
        tags=_tags(recipe),
    )
    return write_card(card, output_dir, replace=True)


def _tags(recipe: Recipe) -> list[str]:
    if recipe.draft_head is not None:
        return [DraftHeadConfig.model_type, "speculative-decoding", "a3_hf"]
    return [ARCHITECTURES[recipe.model.architecture].config.model_type, "a3_hf"]


def read_card(model: str) -> ModelCard | None:
    """Returns the model card of a folder or of a hub id in the cache; None if there is none. Makes no network request."""
    path = Path(model) / CARD_FILE if Path(model).is_dir() else try_to_load_from_cache(model, CARD_FILE)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    return ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True)


def _use(recipe: Recipe) -> str:
    if recipe.lora is not None:
        return USE_OF_AN_ADAPTER
    if recipe.draft_head is not None:
        return USE_OF_A_DRAFT_HEAD
    if recipe.model.architecture == "llama":
        return USE_OF_A_LLAMA
    return USE + (WITHOUT_PACKAGE if recipe.model.architecture == "a3" else "")


def _report(recipe: Recipe, state: TrainerState, losses: Table | None) -> str:
    training, tokens_per_step = recipe.training, recipe.training.rows_per_step * recipe.data.block_size
    at_most = "at most " if recipe.data.fim is not None or recipe.draft_head is not None else ""  # shorter rows
    rows = {
        "base": _shown(recipe.model.model_name_or_path),
        "architecture": recipe.model.architecture,
        "data": ", ".join(_data(recipe)),
        "steps": f"{state.global_step:,}",
        "tokens": f"{at_most}{state.global_step * tokens_per_step:,} ({at_most}{tokens_per_step:,} a step)",
        "row length": f"{at_most}{recipe.data.block_size:,} tokens",
        "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type.value}",
        "seed": training.seed,
    }
    for name in ("slot_start", "suffix_template"):
        if getattr(recipe.model, name) is not None:
            rows[name] = repr(getattr(recipe.model, name))
    if recipe.lora is not None:
        rows["lora"] = f"r {recipe.lora.r}, alpha {recipe.lora.alpha:g}, rows: {recipe.lora.rows}"
    if recipe.draft_head is not None:
        rows |= {name: value for name, value in vars(recipe.draft_head).items() if value is not None}
    if recipe.curriculum is not None:
        rows["curriculum"] = " → ".join(stage.name for stage in recipe.curriculum.stages)
    parts = ["## Training", _markdown(["setting", "value"], [[name, str(value)] for name, value in rows.items()])]
    measured = next((entry for entry in reversed(state.log_history) if "eval_right_distance_2" in entry), None)
    if measured is not None:
        return "\n\n".join([*parts, *_guesses(measured)])
    if losses is not None:
        cells = zip(*(column.cells for column in losses.columns), strict=True)
        parts += ["## Losses", "Nats per token on held-out rows, under each order:"]
        parts.append(_markdown([str(column.header) for column in losses.columns], [list(row) for row in cells]))
    return "\n\n".join(parts)


def _guesses(measured: Mapping[str, float]) -> list[str]:
    """The part on a draft head's guesses, from the entry of the last evaluation in the log."""
    nats = {name.rpartition("_")[2]: value for name, value in measured.items() if "_loss_distance_" in name}
    cells = [[far, f"{value:.3f}", f"{measured[f'eval_right_distance_{far}']:.3f}"] for far, value in nats.items()]
    words = "On held-out documents, given the true tokens before; distance 1 is the base's own."
    return ["## Guesses", words, _markdown(["distance", "nats", "right"], cells)]


def _data(recipe: Recipe) -> list[str]:
    data = recipe.data
    if data.sources is not None:
        return [f"{_shown(one.dataset_name or one.path)} (weight {one.weight:g})" for one in data.sources.values()]
    return [_shown(data.dataset_name or data.train_file)]


def _hub_datasets(recipe: Recipe) -> list[str]:
    entries = [recipe.data] if recipe.data.sources is None else recipe.data.sources.values()
    return [entry.dataset_name for entry in entries if entry.dataset_name is not None]


def _shown(name: str) -> str:
    """Returns a hub id unchanged, and the last part of a local path, since the card may be published."""
    is_local = Path(name).is_absolute() or Path(name).exists() or name.startswith(".")
    return f"`{Path(name).name if is_local else name}`"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
