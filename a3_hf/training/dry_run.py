"""Dry run: data sources, stages, memory and hours of a recipe, and some rows in their orders."""

import math
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
from a3_hf.models.a3_llama.configuration_a3_llama import A3LlamaConfig
from a3_hf.models.a3_llama.modeling_a3_llama import A3LlamaForCausalLM

from .arguments import Recipe
from .base_trainer import given_tokens, row_generator
from .curriculum import draw_order
from .run_checks import check_settings
from .run_inputs import RunInputs
from .schedule import AdaptiveSchedule, Schedule
from .throughput import NO_ADAPTERS, AdapterWeights, training_flops

GIB = 2**30
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters
SHOWN_ROWS, SHOWN_TOKENS = 10, 16


def dry_run(recipe: Recipe, *, accelerate_configs: Path, tflops: float) -> None:
    """Prints the sources, the stages in steps and tokens, memory per GPU under each accelerate config, hours, and ten rows in
    orders of the last stage. Trains nothing, but loads the data as a run does and raises the same errors.

    Args:
        accelerate_configs: a folder of accelerate configs.
        tflops: assumed TFLOP/s of a GPU.

    Raises:
        ValueError: settings, files or a curriculum that can't be used, or an architecture other than A3, which has no
            formulas.
    """
    if recipe.model.architecture != "a3":
        raise ValueError(
            f"architecture={recipe.model.architecture!r}: expected 'a3', the only one with formulas for a dry run"
        )
    check_settings(recipe)
    inputs = RunInputs.load(recipe)
    rows, _ = inputs.load_rows(recipe)
    training, data = recipe.training, recipe.data
    max_steps = training.max_steps
    if max_steps <= 0:
        max_steps = math.ceil(training.num_train_epochs * math.ceil(len(rows) / training.rows_per_step))
    tokens_per_step = training.rows_per_step * data.block_size
    schedule = recipe.curriculum.resolve(max_steps=max_steps, tokens_per_step=tokens_per_step)

    console = Console(width=120, highlight=False)
    size = ModelSize.of(inputs.config, recipe.lora)
    trained = "" if recipe.lora is None else f", of which {size.trained:,} are trained"
    console.print(f"{size.total:,} parameters{trained}; {size.layers} layers; rows of {data.block_size} tokens")
    if data.sources is not None:
        total = sum(source.weight for source in data.sources.values())
        for name, source in data.sources.items():
            console.print(f"source {name}: {source.weight / total:.1%} of the documents")
    local_tokens = training.per_device_train_batch_size * training.gradient_accumulation_steps * data.block_size
    console.print(_stages_table(schedule, local_tokens))
    flops = training_flops(
        inputs.config, length=data.block_size, adapters=size.adapters, recomputed=training.gradient_checkpointing
    )
    hours = flops * local_tokens * schedule.ends[-1] / (tflops * 1e12) / 3600
    console.print(_memory_table(recipe, size, accelerate_configs, hours))
    console.print(
        f"Activations and logits are not included. Hours at {tflops:g} TFLOP/s per GPU, with a slot for each token. "
        "Each GPU has its own rows: more GPUs train on more tokens in the same hours."
    )
    _print_rows(console, recipe.training.seed, schedule, rows, inputs.tokenizer)


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters: all, the trained ones, those of one decoder layer, those outside the layers (embeddings, lm_head,
    `query_embed`); the number of layers; and the adapters' weights.
    """

    total: int
    trained: int
    layer: int
    outside: int
    layers: int
    adapters: AdapterWeights = NO_ADAPTERS

    @classmethod
    def of(cls, config: A3LlamaConfig, lora: LoraArguments | None = None) -> "ModelSize":
        """Counts the parameters on the meta device, which allocates no memory."""
        with torch.device("meta"):
            model = A3LlamaForCausalLM(config)
            model.tie_weights()  # parameters() has a tied weight once
            total = model.num_parameters()
            layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
            adapted = model if lora is None else attach(model, lora)
            trained = adapted.num_parameters(only_trainable=True)
        layers = config.num_hidden_layers
        return cls(
            total=total,
            trained=trained,
            layer=layer,
            outside=total - layer * layers,
            layers=layers,
            adapters=AdapterWeights.of(adapted),
        )


def state_bytes(
    size: ModelSize, spread: ClusterConfig, *, weight_bytes: int, pass_bytes: int, in_4bit: bool = False
) -> dict[str, float]:
    """Returns the bytes on each GPU of weights, gradients, AdamW's two moments and the engine's own buffers, by the formulas
    of `accelerate_configs/README.md`.

    Args:
        spread: an accelerate config.
        weight_bytes: bytes of a number in the recipe's dtype.
        pass_bytes: bytes of a number in forward and backward.
        in_4bit: the layers' weights have half a byte each.
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
            "moments": 12 * trained / processes,  # with the fp32 copy
            "engine": pass_bytes * min(LIVE_PARAMETERS, size.total) if stage == 3 else 0,
        }
    state = {"weights": weights, "gradients": weight_bytes * trained, "moments": 2 * weight_bytes * trained}
    if kind == DistributedType.FSDP:
        sharded = {name: number / processes for name, number in state.items()}
        return {**sharded, "engine": pass_bytes * (2 * size.layer + size.outside)}
    return {**state, "engine": weight_bytes * trained if kind == DistributedType.MULTI_GPU else 0}


def _memory_table(recipe: Recipe, size: ModelSize, accelerate_configs: Path, hours: float) -> Table:
    table = Table(title="GiB per GPU, by formula")
    for column in ("config", "GPUs", "weights", "gradients", "moments", "engine", "total", "hours"):
        table.add_column(column, justify="right")
    weight_bytes = 4 if recipe.model.dtype == "float32" else 2
    for path in sorted(accelerate_configs.glob("*.yaml")):
        spread = load_config_from_file(str(path))
        parts = state_bytes(
            size,
            spread,
            weight_bytes=weight_bytes,
            pass_bytes=2 if spread.mixed_precision == "bf16" else weight_bytes,
            in_4bit=recipe.model.load_in_4bit,
        )
        numbers = (f"{number / GIB:.1f}" for number in (*parts.values(), sum(parts.values())))
        table.add_row(path.stem, str(spread.num_processes), *numbers, "" if spread.use_cpu else f"{hours:.1f}")
    return table


def _stages_table(schedule: Schedule | AdaptiveSchedule, tokens_per_step: int) -> Table:
    table = Table(title=f"stages ({tokens_per_step:,} tokens per step and process)")
    for column in ("stage", "group sizes", "from step", "to step (at most)", "tokens per process"):
        table.add_column(column, justify="right")
    start = 0
    for stage, end in zip(schedule.stages, schedule.ends, strict=True):
        sizes = stage.group_sizes
        shown = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        table.add_row(stage.name, shown, str(start), str(end), f"{(end - start) * tokens_per_step:,}")
        start = end
    return table


def _print_rows(
    console: Console,
    seed: int,
    schedule: Schedule | AdaptiveSchedule,
    rows: Iterable[Mapping],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    step = schedule.ends[-1] - 1
    stage = schedule.at(step)
    console.print(f"\nThe first {SHOWN_ROWS} rows in orders of {stage.name} (token·group, {SHOWN_TOKENS} tokens):")
    for number, row in enumerate(islice(rows, SHOWN_ROWS)):
        batch = {name: torch.tensor([list(values)]) for name, values in row.items()}
        order = draw_order(
            stage,
            batch["attention_mask"].bool(),
            given_mask=given_tokens(batch),
            generator=[row_generator(seed, step, number)],
        )
        ids, groups = batch["input_ids"][0, :SHOWN_TOKENS].tolist(), order.group_ids[0, :SHOWN_TOKENS].tolist()
        text = " ".join(
            f"{tokenizer.decode([token]) or tokenizer.convert_ids_to_tokens(token)!r}·{group}"
            for token, group in zip(ids, groups, strict=True)
        )
        console.print(f"{number + 1:>2}. {text}", markup=False, highlight=False, soft_wrap=True)
