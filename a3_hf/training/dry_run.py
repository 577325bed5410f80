"""What a run will read, do and take, told before any GPU is taken."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.layers import attach
from a3_hf.models.a3_llama.chunked_cross_entropy import LOGITS_AT_ONCE, LOGITS_AT_ONCE_ELSEWHERE
from a3_hf.models.a3_llama.configuration_a3_llama import A3LlamaConfig
from a3_hf.models.a3_llama.modeling_a3_llama import A3LlamaForCausalLM

from .arguments import Recipe
from .base_trainer import given_tokens, row_generator
from .curriculum import draw_order
from .schedule import AdaptiveSchedule, Schedule
from .throughput import training_flops

GIB = 2**30
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters
SHOWN_ROWS, SHOWN_TOKENS = 10, 16


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters: all, those that are trained, those of a decoder layer, and those outside the layers
    (embeddings, lm_head, `query_embed`); and the widths that activations have.
    """

    total: int
    trained: int
    layer: int
    outside: int
    layers: int
    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int

    @classmethod
    def of(cls, config: A3LlamaConfig, lora: LoraArguments | None = None) -> "ModelSize":
        """Counted on a model that takes no memory."""
        with torch.device("meta"):
            model = A3LlamaForCausalLM(config)
            model.tie_weights()  # a tied weight is one: parameters() has it once
            total = sum(weight.numel() for weight in model.parameters())
            layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
            trained = total if lora is None else attach(model, lora).num_parameters(only_trainable=True)
        return cls(
            total=total,
            trained=trained,
            layer=layer,
            outside=total - layer * config.num_hidden_layers,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            key_value=config.num_key_value_heads * config.head_dim,
            vocabulary=config.vocab_size,
        )


def state_bytes(
    size: ModelSize, spread: ClusterConfig, *, weight_bytes: int, pass_bytes: int, in_4bit: bool = False
) -> dict[str, float]:
    """Bytes on each GPU of weights, gradients, AdamW's two moments, and of what the engine holds beside them, after the
    formulas of `accelerate_configs/README.md`.

    Args:
        spread: an accelerate config.
        weight_bytes: of a number of the recipe's dtype.
        pass_bytes: of a number in the passes.
        in_4bit: the layers' weights take half a byte each.
    """
    processes, trained = spread.num_processes, size.trained
    weights = weight_bytes * size.total
    if in_4bit:
        weights = weight_bytes * size.outside + 0.5 * size.layer * size.layers
    if trained < size.total:
        weights += 4 * trained  # adapters, in fp32
        weight_bytes = 4
    kind = spread.distributed_type
    if kind == DistributedType.DEEPSPEED:
        stage = spread.deepspeed_config["zero_stage"]
        whole = pass_bytes * size.total
        return {
            "weights": whole / processes if stage == 3 else whole,
            "gradients": pass_bytes * trained / processes,
            "moments": 12 * trained / processes,  # and the fp32 copy
            "engine": pass_bytes * min(LIVE_PARAMETERS, size.total) if stage == 3 else 0,
        }
    state = {"weights": weights, "gradients": weight_bytes * trained, "moments": 2 * weight_bytes * trained}
    if kind == DistributedType.FSDP:
        shares = {name: number / processes for name, number in state.items()}
        return {**shares, "engine": pass_bytes * (2 * size.layer + size.outside)}
    return {**state, "engine": weight_bytes * trained if kind == DistributedType.MULTI_GPU else 0}


def activation_bytes(size: ModelSize, *, positions: int, pass_bytes: int, checkpointing: bool) -> float:
    """Bytes of what a backward pass needs of the layers, for `positions` content tokens and slots together."""
    layer = positions * pass_bytes * (6 * size.hidden + 2 * size.key_value + 4 * size.intermediate)
    if not checkpointing:
        return layer * size.layers
    return layer + positions * pass_bytes * size.hidden * size.layers


def logits_bytes(size: ModelSize, *, slots: int, pass_bytes: int, at_once: int | None = None) -> float:
    """Bytes of the slots' logits and of their gradient, in the passes' width and in fp32; no more than `at_once` of them
    exist at a time.
    """
    number = slots * size.vocabulary
    return (number if at_once is None else min(number, at_once)) * 2 * (pass_bytes + 4)


def print_plan(
    recipe: Recipe,
    *,
    config: A3LlamaConfig,
    schedule: Schedule | AdaptiveSchedule,
    rows: Iterable[Mapping],
    tokenizer: PreTrainedTokenizerBase,
    accelerate_configs: Path,
    tflops: float,
    console: Console | None = None,
) -> None:
    """Prints the sources, the stages in steps and tokens, memory per GPU under each accelerate config, the hours at
    `tflops` TFLOP/s a GPU, and ten rows as the last stage would order them.
    """
    console = console or Console(width=120, highlight=False)
    training, data = recipe.training, recipe.data
    size = ModelSize.of(config, recipe.lora)
    rows_per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    trained = "" if recipe.lora is None else f", of which {size.trained:,} are trained"
    console.print(f"{size.total:,} parameters{trained}; {size.layers} layers; rows of {data.block_size} tokens")
    if data.sources is not None:
        total = sum(source.weight for source in data.sources.values())
        for name, source in data.sources.items():
            console.print(f"source {name}: {source.weight / total:.1%} of the documents")
    _print_stages(console, schedule, rows_per_step * data.block_size)

    table = Table(title=f"GiB per GPU with {training.per_device_train_batch_size} rows a pass, by formula")
    columns = ("config", "GPUs", "weights", "gradients", "moments", "engine", "activations", "logits", "all", "hours")
    for column in columns:
        table.add_column(column, justify="right")
    weight_bytes = 4 if recipe.model.dtype == "float32" else 2
    passes = 4 / 3 if training.gradient_checkpointing else 1.0  # forward once more
    flops_per_token = passes * training_flops(config, length=data.block_size)
    for path in sorted(accelerate_configs.glob("*.yaml")):
        spread = load_config_from_file(str(path))
        pass_bytes = 2 if spread.mixed_precision == "bf16" else weight_bytes
        widths = {"weight_bytes": weight_bytes, "pass_bytes": pass_bytes}
        parts = state_bytes(size, spread, **widths, in_4bit=recipe.model.load_in_4bit)
        batch = training.per_device_train_batch_size
        parts["activations"] = activation_bytes(
            size,
            positions=2 * batch * data.block_size,
            pass_bytes=pass_bytes,
            checkpointing=bool(training.gradient_checkpointing),
        )
        at_once = LOGITS_AT_ONCE["cpu"] if spread.use_cpu else LOGITS_AT_ONCE_ELSEWHERE
        parts["logits"] = logits_bytes(
            size,
            slots=batch * data.block_size,
            pass_bytes=pass_bytes,
            at_once=at_once if training.loss == "chunked" else None,
        )
        tokens = schedule.ends[-1] * rows_per_step * data.block_size
        hours = "" if spread.use_cpu else f"{tokens * flops_per_token / (tflops * 1e12) / 3600:.1f}"
        numbers = (f"{number / GIB:.1f}" for number in (*parts.values(), sum(parts.values())))
        table.add_row(path.stem, str(spread.num_processes), *numbers, hours)
    console.print(table)
    console.print(
        f"Hours at {tflops:g} TFLOP/s a GPU, each making its own {rows_per_step} rows a step: more GPUs, more tokens."
    )
    _print_rows(console, recipe, schedule, rows, tokenizer)


def _print_stages(console: Console, schedule: Schedule | AdaptiveSchedule, tokens_per_step: int) -> None:
    table = Table(title=f"stages ({tokens_per_step:,} tokens a step and process)")
    for column in ("stage", "group sizes", "from step", "to step (at most)", "tokens a process"):
        table.add_column(column, justify="right")
    start = 0
    for stage, end in zip(schedule.stages, schedule.ends, strict=True):
        sizes = stage.group_sizes
        shown = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        table.add_row(stage.name, shown, str(start), str(end), f"{(end - start) * tokens_per_step:,}")
        start = end
    console.print(table)


def _print_rows(console: Console, recipe: Recipe, schedule, rows: Iterable[Mapping], tokenizer) -> None:
    stage = schedule.at(schedule.ends[-1] - 1)
    console.print(
        f"\nThe first {SHOWN_ROWS} rows, as {stage.name} would order them (token·group, {SHOWN_TOKENS} tokens):"
    )
    for number, row in enumerate(islice(rows, SHOWN_ROWS)):
        batch = {name: torch.tensor([list(values)]) for name, values in row.items()}
        generators = [row_generator(recipe.training.seed, schedule.ends[-1] - 1, number)]
        order = draw_order(stage, batch["attention_mask"].bool(), given_mask=given_tokens(batch), generator=generators)
        ids, groups = batch["input_ids"][0, :SHOWN_TOKENS].tolist(), order.group_ids[0, :SHOWN_TOKENS].tolist()
        text = " ".join(
            f"{tokenizer.decode([token]) or tokenizer.convert_ids_to_tokens(token)!r}·{group}"
            for token, group in zip(ids, groups, strict=True)
        )
        console.print(f"{number + 1:>2}. {text}", markup=False, highlight=False, soft_wrap=True)
