"""Runs a recipe, from its data and base model to a trained model; resumes an interrupted run."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from rich.console import Console
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerState
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import is_matplotlib_available

from a3_hf.adapters.checkpoints import check_same, load_to_train, nf4_config
from a3_hf.data.collator import RowCollator
from a3_hf.data.tokenization import pad_id

from .arguments import A3TrainingArguments, ModelArguments, Recipe
from .callbacks import InterruptCallback, MetricsFileCallback, WeightsCallback, check_weights
from .checkpoints import is_disk_full, last_whole_checkpoint, set_aside
from .draft_head_trainer import DraftHeadTrainer, load_head_to_train
from .even_rows import EvenRowsTrainer
from .loss_report import losses_table, plot_losses
from .masked_diffusion_trainer import DiffusionTrainer
from .model_card import write_run_card
from .run_checks import check_settings
from .run_inputs import RunInputs
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
    """Trains a recipe. Its `output_dir` then holds the model, the tokenizer, checkpoints, `metrics.jsonl` and
    `trainer_state.json`. Everything that needs no weights is checked before they are loaded.

    Args:
        resume: resume from the last whole checkpoint of `output_dir`, if there is one.

    Returns:
        The exit code: 0 if the run is finished (now or earlier), 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ValueError: settings, files or a curriculum that can't be used, checkpoints where the run must not resume, or
            another run in `output_dir`.
        OSError: the disk is full.
    """
    training = recipe.training
    check_settings(recipe)
    try:
        with _lock_output_dir(training):
            code = _run(recipe, resume=resume)
        # Otherwise one of its threads may abort the process as it ends.
        PartialState().destroy_process_group()
        return code
    except KeyboardInterrupt:
        if training.process_index == 0:
            print(f"Stopped at once, without a checkpoint of this step; {_what_is_kept(training)}.")
        return INTERRUPTED
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_disk_full(error):
            raise
        raise OSError(
            f"output_dir={training.output_dir!r}: the disk is full; {_what_is_kept(training)}. Free some space; the same "
            "command then resumes from there"
        ) from error


def _run(recipe: Recipe, *, resume: bool) -> int:
    training = recipe.training
    output_dir = Path(training.output_dir)
    say = print if training.process_index == 0 else lambda message: None

    # 1. Find out where the run is.
    if resume and _is_finished(training, output_dir):
        say(f"The run in {output_dir} is finished: nothing to do. For a new run, set another output_dir.")
        say(_next_command(output_dir, recipe.model.architecture))
        return 0
    if training.bf16_by_default:
        say("Passes are in bfloat16, which this device multiplies faster than float32; bf16: false keeps to float32.")
    checkpoint = _find_checkpoint(training, output_dir, resume=resume)
    state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / STATE_FILE))

    # 2. Read everything but weights, and compare it with what the run was started with.
    inputs = RunInputs.load(recipe)
    if checkpoint is not None:
        check_same(checkpoint, recipe.lora, inputs.config)
        changes = check_resume(recipe, inputs.tokenizer)
        if changes:
            say(f"Changed since the run was started, without effect on its result: {'; '.join(changes)}.")
    train_rows, eval_rows = inputs.load_rows(recipe)
    versions = describe_inputs(recipe, train_rows)
    if checkpoint is not None:
        with training.main_process_first(local=False, desc="comparing inputs"):
            changes = check_inputs(recipe, versions)
        if changes:
            say(f"Accepted although changed since the run was started: {'; '.join(changes)}.")
    if eval_rows is not None and training.eval_strategy == IntervalStrategy.NO:
        say("eval_strategy is 'no': losses are not measured; 'steps' measures them at the end of each stage as well.")

    # 3. Load the weights and make the trainer. A run killed between its last step and the final save has nothing to train.
    is_trained = state is not None and _has_all_steps(training, state)
    settings = {"finished": checkpoint if is_trained else None, "seed": training.seed}
    settings |= _pretrained_settings(recipe.model)
    if inputs.head_config is not None:
        model = load_head_to_train(inputs.start, inputs.head_config, train_rows, **settings)
    else:
        model = load_to_train(inputs.start, recipe.lora, architecture=recipe.model.architecture, **settings)
    trainer = _make_trainer(recipe, model, inputs.tokenizer, train_rows, eval_rows, is_resumed=checkpoint is not None)
    schedule = None if recipe.curriculum is None else trainer.schedule
    interrupt = InterruptCallback()
    for callback in (interrupt, WeightsCallback(), MetricsFileCallback(output_dir / METRICS_FILE, schedule)):
        trainer.add_callback(callback)
    if checkpoint is None and training.process_index == 0:
        write_record(recipe, inputs.tokenizer, versions)

    # 4. Train.
    if is_trained:
        trainer.state = state
        if isinstance(schedule, AdaptiveSchedule):
            schedule.restore(state.stateful_callbacks.get(RECORD), step=state.global_step)
    else:
        if checkpoint is not None:
            say(f"Resuming from {checkpoint} (step {state.global_step} of {state.max_steps}).")
        _train(trainer, interrupt, checkpoint)
    if interrupt.stopped_at is not None:
        steps = f"step {interrupt.stopped_at} of {trainer.state.max_steps}"
        say(f"Stopped after {steps}; its checkpoint is in {output_dir}.\nThe same command resumes from there.")
        return 128 + interrupt.stopped_by
    check_weights(trainer.model, training, step=trainer.state.global_step)

    # 5. Save the model card, the model, then the state, which marks the run as finished.
    if training.process_index == 0:
        write_run_card(recipe, trainer.state, losses_table(trainer.state, schedule))
    if inputs.head_config is not None:
        trainer.model.to(torch.bfloat16)  # as it is used; checkpoints are in float32
    trainer.save_model(str(output_dir))
    trainer.save_state()
    if training.process_index == 0:
        _report(recipe, trainer.state, schedule)
    return 0


@contextmanager
def _lock_output_dir(training: A3TrainingArguments) -> Iterator[None]:
    """Locks the folder for this run; the main process holds the lock for all ranks."""
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
    return "there is no checkpoint yet" if checkpoint is None else f"the last whole checkpoint is {checkpoint}"


def _is_finished(training: A3TrainingArguments, output_dir: Path) -> bool:
    path = output_dir / STATE_FILE
    if not path.is_file():
        return False
    try:
        return _has_all_steps(training, TrainerState.load_from_json(str(path)))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: is damaged, so it is unknown whether the run is finished: {error}; remove it, and the same command "
            "resumes from the last checkpoint"
        ) from error


def _has_all_steps(training: A3TrainingArguments, state: TrainerState) -> bool:
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


def _pretrained_settings(model: ModelArguments) -> dict[str, Any]:
    dtype = getattr(torch, model.dtype)
    settings = {"dtype": dtype, "attn_implementation": model.attn_implementation}
    if model.load_in_4bit:
        settings["quantization_config"] = nf4_config(dtype)
    for name in ("slot_start", "suffix_template"):
        if getattr(model, name) is not None:
            settings[name] = getattr(model, name)
    return settings


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
    if training.eval_on_start is None:
        training.eval_on_start = training.eval_strategy != IntervalStrategy.NO
    training.eval_on_start = training.eval_on_start and not is_resumed
    shared = {
        "data_collator": RowCollator(pad_token_id=pad_id(tokenizer)),
        "train_dataset": train_rows,
        "eval_dataset": eval_rows,
        "processing_class": tokenizer,
    }
    if recipe.model.architecture == "llama":
        return EvenRowsTrainer(model, training, **shared)
    if recipe.model.architecture == "draft_head":
        own = None if recipe.model.tokenizer_name_or_path is None else tokenizer  # by default its base's
        return DraftHeadTrainer(model, training, **{**shared, "processing_class": own})
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
    trainer_class = A3Trainer if recipe.data.sources is None else StreamTrainer
    return trainer_class(
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


def _train(trainer: Trainer, interrupt: InterruptCallback, checkpoint: Path | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except BaseException:
        interrupt.end_workers()
        raise
    finally:
        interrupt.restore_handlers()


def _report(recipe: Recipe, state: TrainerState, schedule: Schedule | AdaptiveSchedule | None) -> None:
    """Prints and plots the losses of a finished run, and prints the command that uses its model."""
    output_dir, architecture = Path(recipe.training.output_dir), recipe.model.architecture
    table = losses_table(state, schedule)
    if table is not None:
        Console().print(table)
    if not is_matplotlib_available():
        print("matplotlib is not installed, so the losses are not plotted: pip install 'a3-hf[plot]'")
    elif plot_losses(
        state.log_history,
        output_dir / PLOT_FILE,
        stages=[] if schedule is None else [stage.name for stage in schedule.stages],
        ends=[] if schedule is None else schedule.ends,
        tokens_per_step=recipe.training.rows_per_step * recipe.data.block_size,
    ):
        print(f"Plot of the losses over tokens: {output_dir / PLOT_FILE}.")
    print(f"The model is in {output_dir}.{' To use it:' if architecture != 'llama' else ''}")
    print(_next_command(output_dir, architecture))


def _next_command(output_dir: Path, architecture: str) -> str:
    if architecture == "llama":
        return "It is a LLaMA: use it with transformers' generate."
    if architecture == "draft_head":
        return f'  a3 generate {output_dir} "Once upon a time"'
    return f'  a3 infill {output_dir} "Once upon a time <blank:8> happy."'
