"""Callbacks of a run: its log in a file, and a Ctrl-C that stops it between two steps."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .curriculum import AdaptiveSchedule, Schedule


class MetricsFileCallback(TrainerCallback):
    """Writes what is logged to a file, one JSON object a line, with the step and, where there is a schedule, the stage's
    name; lines of steps that a resumed run is about to repeat are dropped first.
    """

    def __init__(self, path: str | os.PathLike, schedule: Schedule | AdaptiveSchedule | None):
        self.path = Path(path)
        self.schedule = schedule

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step > 0 and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= state.global_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs,
    ) -> None:
        if not state.is_world_process_zero:
            return
        stage = {}
        if self.schedule is not None:
            stage = {"stage": self.schedule.at(max(state.global_step - 1, 0)).name}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **stage, **logs}) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # cut off while it was written


class InterruptCallback(TrainerCallback):
    """Ctrl-C saves a checkpoint at the end of the step and stops; a second one stops at once. `stopped_at` is then the
    step, and None where training ran to its end.
    """

    def __init__(self):
        self.stopped_at: int | None = None
        self._pressed_at: float | None = None
        self._previous_handler = None
        self._process = os.getpid()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.stopped_at = self._pressed_at = None
        # Python lets the main thread alone set handlers.
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, signum: int, frame) -> None:
        if os.getpid() != self._process:
            return  # a data loader's worker, which the terminal interrupts too: the main process will end it
        if self._pressed_at is not None:
            # torchrun hands a Ctrl-C on to processes that the terminal has already interrupted: not a second one.
            is_echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._pressed_at < 1.0
            if is_echo:
                return
            raise KeyboardInterrupt
        self._pressed_at = time.monotonic()
        # Not print: the signal may come in the middle of another one.
        os.write(2, b"\ninterrupted: saving at the end of this step (Ctrl-C again stops at once)\n")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        pressed = self._pressed_at is not None
        if args.world_size > 1:
            # All ranks stop at the same step, or the others would wait for this one forever.
            flag = torch.tensor(int(pressed), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            pressed = bool(flag.item())
        if pressed and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.restore_handler()

    def restore_handler(self) -> None:
        """Gives Ctrl-C back to whom it belonged before; needed only where training ended by an exception."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None
