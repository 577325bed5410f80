"""One recipe, one run: from the files it names to a model, with resumes on the way."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerState
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import is_matplotlib_available

from a3_hf.adapters.checkpoints import (
    base_of,
    check_same,
    check_start,
    load_to_train,
    load_tokenizer,
    nf4_config,
    start_of,
)
from a3_hf.data.collator import RowCollator
from a3_hf.data.mixture import open_mixture
from a3_hf.data.packing import load_rows
from a3_hf.models.auto import read_model_config

from .arguments import A3TrainingArguments, Recipe
from .callbacks import InterruptCallback, MetricsFileCallback, WeightsCallback, check_weights
from .checkpoints import is_disk_full, last_whole_checkpoint, set_aside
from .dry_run import print_plan
from .even_rows import EvenRowsTrainer
from .loss_plot import loss_names, plot_losses
from .masked_diffusion_trainer import DiffusionTrainer
from .model_card import write_run_card
from .run_checks import check_attention, check_settings
from .run_lock import sole_use
from .run_record import check_inputs, check_resume, describe_inputs, write_record
from .schedule import RECORD, AdaptiveSchedule, Schedule
from .stream_trainer import StreamTrainer
from .trainer import A3Trainer

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "losses.png"
STATE_FILE = "trainer_state.json"
INTERRUPTED = 130


def run(recipe: Recipe, *, resume: bool = True) -> int:
    """Trains as the recipe says and leaves in its `output_dir` the model, the tokenizer, checkpoints, `metrics.jsonl`
    and `trainer_state.json`. What can be checked without the model is checked before it is loaded.

    Args:
        resume: go on from the last whole checkpoint of `output_dir`, if there is one.

    Returns:
        The exit code: 0 when the run is finished (now or earlier), 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ValueError: settings, files or a curriculum that can't be used, checkpoints where the run must not resume, or
            another run in `output_dir`.
        OSError: the disk is full.
    """
    training = recipe.training
    check_settings(recipe)
    try:
        with _output_dir(training):
            return _run(recipe, resume=resume)
    except KeyboardInterrupt:
        if training.process_index == 0:
            print(f"Stopped at once, without a checkpoint of this step; {_what_is_kept(training)}.")
        return INTERRUPTED
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_disk_full(error):
            raise
        raise OSError(
            f"output_dir={training.output_dir!r}: the disk is full; {_what_is_kept(training)}. With more room, the same "
            "command goes on from there"
        ) from error


@contextmanager
def _output_dir(training: A3TrainingArguments) -> Iterator[None]:
    """The folder is this run's alone; its main process holds it for all."""
    refusal, lock = None, ExitStack()
    with lock:
        if training.process_index == 0:
            try:
                lock.enter_context(sole_use(training.output_dir))
            except ValueError as error:
                refusal = error
        if training.world_size > 1:
            (refusal,) = broadcast_object_list([refusal])
        if refusal is not None:
            raise refusal
        yield


def _what_is_kept(training: A3TrainingArguments) -> str:
    checkpoint, _ = last_whole_checkpoint(training.output_dir)
    return "there is no checkpoint yet" if checkpoint is None else f"the last whole one is {checkpoint}"


def dry_run(recipe: Recipe, *, accelerate_configs: Path, tflops: float) -> None:
    """Prints what the run of a recipe will read, do and take (`training.dry_run`), and trains nothing. The data is opened as a
    run does, so that what would stop it there is known.

    Args:
        accelerate_configs: a folder of accelerate configs, for each of which memory is reckoned.
        tflops: TFLOP/s that a GPU is taken to reach.

    Raises:
        ValueError: settings, files or a curriculum that can't be used, or another architecture than A3, for which there are
            no formulas.
    """
    if recipe.model.architecture != "a3":
        raise ValueError(
            f"architecture={recipe.model.architecture!r}: the plan's formulas are those of architecture 'a3'"
        )
    check_settings(recipe)
    tokenizer, config = _load_tokenizer_and_config(recipe)
    train_rows, _ = _load_rows(recipe, tokenizer, config)
    training = recipe.training
    max_steps = training.max_steps
    if max_steps <= 0:
        max_steps = math.ceil(training.num_train_epochs * math.ceil(len(train_rows) / training.rows_per_step))
    print_plan(
        recipe,
        config=config,
        schedule=recipe.curriculum.resolve(
            max_steps=max_steps, tokens_per_step=training.rows_per_step * recipe.data.block_size
        ),
        rows=train_rows,
        tokenizer=tokenizer,
        accelerate_configs=accelerate_configs,
        tflops=tflops,
    )


def _run(recipe: Recipe, *, resume: bool) -> int:
    training = recipe.training
    output_dir = Path(training.output_dir)
    is_main = training.process_index == 0

    # 1. What needs no model.
    if resume and _is_finished(training, output_dir):
        if is_main:
            print(f"The run in {output_dir} is finished: nothing to do. A new run takes another output_dir.")
            print(_next_command(output_dir, recipe.model.architecture))
        return 0
    checkpoint = _find_checkpoint(training, output_dir, resume=resume)

    # 2. Data, model, trainer.
    tokenizer, config = _load_tokenizer_and_config(recipe)
    if checkpoint is not None:
        check_same(checkpoint, recipe.lora, config)
        changes = check_resume(recipe, tokenizer)
        if is_main and changes:
            print(f"Changed since the run was started, without effect on its result: {'; '.join(changes)}.")
    train_rows, eval_rows = _load_rows(recipe, tokenizer, config)
    inputs = describe_inputs(recipe, train_rows)
    if checkpoint is not None:
        with training.main_process_first(local=False, desc="comparing inputs"):
            changes = check_inputs(recipe, inputs)
        if is_main and changes:
            print(f"Read on although it was changed since the run was started: {'; '.join(changes)}.")
    if is_main and eval_rows is not None and training.eval_strategy == IntervalStrategy.NO:
        print("eval_strategy is 'no': losses are not measured; 'steps' measures them at the end of each stage as well.")

    state = TrainerState.load_from_json(str(checkpoint / STATE_FILE)) if checkpoint is not None else None
    steps_are_done = state is not None and _are_done(training, state)
    dtype = getattr(torch, recipe.model.dtype)
    model = load_to_train(
        recipe.model.model_name_or_path,
        recipe.lora,
        # Killed between the last step and the final save: nothing is left to train.
        finished=checkpoint if steps_are_done else None,
        seed=training.seed,
        architecture=recipe.model.architecture,
        dtype=dtype,
        attn_implementation=recipe.model.attn_implementation,
        **({"quantization_config": nf4_config(dtype)} if recipe.model.load_in_4bit else {}),
        **({} if recipe.model.slot_start is None else {"slot_start": recipe.model.slot_start}),
    )
    trainer = _make_trainer(recipe, model, tokenizer, train_rows, eval_rows, is_resumed=checkpoint is not None)
    interrupt = InterruptCallback()
    trainer.add_callback(interrupt)
    trainer.add_callback(WeightsCallback())
    schedule = None if recipe.curriculum is None else trainer.schedule
    trainer.add_callback(MetricsFileCallback(output_dir / METRICS_FILE, schedule))

    if is_main and checkpoint is None:
        write_record(recipe, tokenizer, inputs)

    # 3. Training.
    if steps_are_done:
        trainer.state = state
        if isinstance(schedule, AdaptiveSchedule):
            schedule.restore(state.stateful_callbacks.get(RECORD), step=state.global_step)
    else:
        if is_main and checkpoint is not None:
            print(f"Resuming from {checkpoint} (step {state.global_step} of {state.max_steps}).")
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except BaseException:
            interrupt.end_workers()
            raise
        finally:
            interrupt.restore_handlers()
    if interrupt.stopped_at is not None:
        if is_main:
            print(
                f"Stopped after step {interrupt.stopped_at} of {trainer.state.max_steps}; its checkpoint is in {output_dir}."
            )
            print("The same command goes on from there.")
        return 128 + interrupt.stopped_by

    check_weights(trainer.model, training, step=trainer.state.global_step)

    # 4. The model card, the model, and last the state, which says that the run is finished.
    if is_main:
        write_run_card(recipe, trainer.state, losses_table(trainer.state, schedule))
    trainer.save_model(str(output_dir))
    trainer.save_state()
    if is_main:
        table = losses_table(trainer.state, schedule)
        if table is not None:
            Console().print(table)
        if not is_matplotlib_available():
            print("matplotlib is not installed, so no plot of the losses: pip install 'a3-hf[plot]'")
        elif plot_losses(
            trainer.state.log_history,
            output_dir / PLOT_FILE,
            stages=[] if schedule is None else [stage.name for stage in schedule.stages],
            ends=[] if schedule is None else schedule.ends,
            tokens_per_step=training.rows_per_step * recipe.data.block_size,
        ):
            print(f"The losses over the tokens are drawn in {output_dir / PLOT_FILE}.")
        print(f"The model is in {output_dir}.{' To use it:' if recipe.model.architecture != 'llama' else ''}")
        print(_next_command(output_dir, recipe.model.architecture))
    return 0


def losses_table(state: TrainerState, schedule: Schedule | AdaptiveSchedule | None) -> Table | None:
    """The losses of each evaluation order (without a curriculum, the one loss there is) before training and after each
    stage, in nats per token; None where none was measured.
    """
    measured = {entry["step"]: entry for entry in state.log_history if loss_names(entry)}
    names = list(dict.fromkeys(name for entry in measured.values() for name in loss_names(entry)))
    table = Table(title="loss per order, nats per token")
    table.add_column("after")
    table.add_column("step", justify="right")
    for name in names:
        table.add_column(name.removeprefix("eval_loss_").removeprefix("eval_"), justify="right")
    rows = [("(start)", 0)]
    if schedule is None:
        rows.append(("(end)", state.max_steps))
    else:
        rows += [(stage.name, end) for stage, end in zip(schedule.stages, schedule.ends, strict=True)]
    for label, step in rows:
        if step in measured:
            table.add_row(label, str(step), *(f"{measured[step][name]:.4f}" for name in names))
    return table if table.row_count else None


@contextmanager
def _naming(argument: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # the libraries' messages go over several lines, and may not say which model
        raise ValueError(f"{argument}={path!r}: can't be loaded: {' '.join(str(error).split())}") from error
    except ValueError as error:
        if argument in str(error):
            raise
        raise ValueError(f"{argument}={path!r}: {error}") from error


def _load_tokenizer_and_config(
    recipe: Recipe,
) -> tuple[PreTrainedTokenizerBase, LlamaConfig]:
    path, tokenizer_path = recipe.model.model_name_or_path, recipe.model.tokenizer_name_or_path
    with _naming("tokenizer_name_or_path" if tokenizer_path else "model_name_or_path", tokenizer_path or path):
        tokenizer = load_tokenizer(tokenizer_path or path)
    with _naming("model_name_or_path", path):
        config = read_model_config(base_of(path), recipe.model.architecture)
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has ids up to {largest}, and the model {path} embeds those below "
            f"{config.vocab_size}: they don't belong together; set tokenizer_name_or_path to the model's own"
        )
    check_attention(recipe, config)
    check_start(path, recipe.lora, config)
    if recipe.lora is not None:
        start_of(path, base=base_of(path), wanted=recipe.model.slot_start)
    return tokenizer, config


def _load_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: LlamaConfig):
    """The rows to train on and to evaluate on (None: there are none)."""
    training = recipe.training
    load = load_rows if recipe.data.sources is None else open_mixture
    with training.main_process_first(local=False, desc="packing rows"):
        train_rows, eval_rows = load(
            recipe.data, tokenizer, seed=training.seed, context_length=config.max_position_embeddings
        )
    if eval_rows is None and training.eval_strategy != IntervalStrategy.NO:
        raise ValueError(
            f"eval_strategy={training.eval_strategy.value!r} needs something to evaluate on: set validation_file or "
            "validation_documents, or eval_strategy: no"
        )
    return train_rows, eval_rows


def _make_trainer(
    recipe: Recipe,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows,
    eval_rows,
    *,
    is_resumed: bool,
) -> Trainer:
    training = recipe.training
    # The losses "before" are those of step 0; a resumed run has them in its state.
    training.eval_on_start = training.eval_strategy != IntervalStrategy.NO and not is_resumed
    pad_token_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    shared = {
        "data_collator": RowCollator(pad_token_id=pad_token_id),
        "train_dataset": train_rows,
        "eval_dataset": eval_rows,
        "processing_class": tokenizer,
    }
    if recipe.model.architecture == "llama":
        return EvenRowsTrainer(model, training, **shared)
    if recipe.model.architecture == "masked_diffusion":
        model.set_mask_token(tokenizer)
        return DiffusionTrainer(
            model,
            training,
            masking=training.masking,
            low_discrepancy=training.low_discrepancy,
            anneal_steps=training.anneal_steps,
            **shared,
        )
    trainer = A3Trainer if recipe.data.sources is None else StreamTrainer
    return trainer(
        model,
        training,
        curriculum=recipe.curriculum,
        **shared,
        tokens_per_row=recipe.data.block_size,
        loss=training.loss,
        peak_flops=training.peak_flops,
        content_loss_weight=training.content_loss_weight,
        distillation_weight=training.distillation_weight,
    )


def _is_finished(training: A3TrainingArguments, output_dir: Path) -> bool:
    path = output_dir / STATE_FILE
    if not path.is_file():
        return False
    try:
        return _are_done(training, TrainerState.load_from_json(str(path)))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: is damaged, so that it can't be told whether the run is finished: {error}; remove it, and the same "
            "command goes on from the last checkpoint"
        ) from error


def _are_done(training: A3TrainingArguments, state: TrainerState) -> bool:
    if training.max_steps > 0:
        return state.global_step >= training.max_steps
    return state.global_step >= state.max_steps and state.num_train_epochs >= math.ceil(training.num_train_epochs)


def _find_checkpoint(training: A3TrainingArguments, output_dir: Path, *, resume: bool) -> Path | None:
    # The main process first: the others then find no half-written checkpoint.
    with training.main_process_first(local=False, desc="looking for checkpoints"):
        checkpoint, half_written = last_whole_checkpoint(output_dir)
        if not resume and (checkpoint is not None or half_written):
            raise ValueError(f"{output_dir} has checkpoints of an earlier run; resume it, or give another output_dir")
        for path in half_written:
            print(f"{path} is half-written, from a run that was killed: not used, renamed to {set_aside(path).name}.")
    return checkpoint


def _next_command(output_dir: Path, architecture: str) -> str:
    if architecture == "llama":
        return "It is a LLaMA, as transformers' generate takes it."
    return f'  a3 infill {output_dir} "Once upon a time <blank:8> happy."'
