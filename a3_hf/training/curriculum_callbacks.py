"""Callbacks that log the stage of each step and end a stage early."""

from collections.abc import Callable

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from .schedule import RECORD, AdaptiveSchedule, Schedule

logger = logging.get_logger(__name__)


class CurriculumCallback(TrainerCallback):
    """Prints when a stage or a group size begins, and requests an evaluation at the last step of each stage (unless
    `eval_strategy` is "no"); a regular one due a step later is skipped. Stateless: the stage follows from the step, also
    after a resume.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        step = state.global_step
        stage = self.schedule.at(step)
        if state.is_world_process_zero and (step == 0 or stage != self.schedule.at(step - 1)):
            start = self.schedule.ends[stage.index - 1] if stage.index else 0
            event = "begins" if step == start else "continues"
            message = f"step {step}: stage {stage.name} {event}, group size {stage.group_size}"
            logger.info(message)
            tqdm.write(message)
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        step, ends = state.global_step, self.schedule.ends
        if step in ends and args.eval_strategy != IntervalStrategy.NO:
            control.should_evaluate = True
        elif step - 1 in ends and args.eval_strategy == IntervalStrategy.STEPS and args.eval_steps > 1:
            control.should_evaluate = control.should_evaluate and args.load_best_model_at_end  # just done
        return control


class AdaptiveCallback(CurriculumCallback):
    """Identical to `CurriculumCallback` except: it passes the loss of each step to an adaptive schedule and stores the
    schedule's record in the trainer's state, from which a resumed run restores it.

    Args:
        schedule: the trainer's.
        step_loss: returns the loss of the last step in nats per token, the same on every rank.
    """

    def __init__(self, schedule: AdaptiveSchedule, step_loss: Callable[[], float]):
        super().__init__(schedule)
        self.step_loss = step_loss

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.schedule.restore(state.stateful_callbacks.get(RECORD), step=state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        step = state.global_step - 1
        if self.schedule.watches(step):
            reason = self.schedule.observe(step, self.step_loss())
            if reason is not None and state.is_world_process_zero:
                message = f"step {step + 1}: stage {self.schedule.at(step).name} ends: {reason}"
                logger.info(message)
                tqdm.write(message)
        state.stateful_callbacks[RECORD] = self.schedule.record()
        return super().on_step_end(args, state, control, **kwargs)
