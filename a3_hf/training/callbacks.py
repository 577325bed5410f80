"""Callbacks of a run: a log file, a clean stop on signals, a check of the weights before they are saved."""

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .schedule import AdaptiveSchedule, Schedule

STOPPING = (signal.SIGINT, signal.SIGTERM)
LARGEST_WEIGHT = torch.finfo(torch.float16).max  # those of LLaMAs are below 100


class MetricsFileCallback(TrainerCallback):
    """Appends logs to a file, one JSON object per line, with the step and, under a schedule, the stage's name. A resumed run
    first drops the lines of steps that it will repeat.
    """

    def __init__(self, path: str | os.PathLike, schedule: Schedule | AdaptiveSchedule | None):
        self.path = Path(path)
        self.schedule = schedule

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step > 0 and self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= state.global_step]
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
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        step = None
    # Other lines were cut off while they were written.
    return step if isinstance(step, int) and not isinstance(step, bool) else float("inf")


class InterruptCallback(TrainerCallback):
    """Saves a checkpoint at the end of the step and stops all ranks on Ctrl-C (SIGINT) or SIGTERM (sent by SLURM and
    Kubernetes). A second Ctrl-C stops at once. A signal ignored at the start, as SIGINT is under `nohup`, stays ignored.

    Attributes:
        stopped_at: the step after which training stopped; None if it ran to its end.
        stopped_by: the signal.
    """

    def __init__(self):
        self.stopped_at: int | None = None
        self.stopped_by: int | None = None
        self._pressed_at: float | None = None
        self._got = 0
        self._previous_handlers = {}
        self._is_training = False
        self._process = os.getpid()
        os.register_at_fork(after_in_child=self._leave_to_the_parent)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.stopped_at = self.stopped_by = self._pressed_at = None
        self._got, self._is_training = 0, True
        # Only the main thread may set handlers.
        if threading.current_thread() is threading.main_thread():
            for signum in STOPPING:
                if signal.getsignal(signum) != signal.SIG_IGN:
                    self._previous_handlers[signum] = signal.signal(signum, self._handle)

    def _leave_to_the_parent(self) -> None:
        # Signals to the process group reach data loader workers too, which the main process needs until the step's end.
        if self._is_training:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)

    def end_workers(self) -> None:
        """Kills the data loader's workers after an exception; they ignore SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    def _handle(self, signum: int, frame) -> None:
        if os.getpid() != self._process:
            return
        if signum == signal.SIGTERM:
            if self._got < signum:
                os.write(2, b"\nterminated: saving at the end of this step\n")
            self._got = signum
            return
        if self._pressed_at is not None:
            # torchrun forwards a Ctrl-C that the terminal has sent already: not a second one.
            is_echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._pressed_at < 1.0
            if is_echo:
                return
            raise KeyboardInterrupt
        self._pressed_at = time.monotonic()
        self._got = max(self._got, signum)
        # Not print, which the signal may have interrupted.
        os.write(2, b"\ninterrupted: saving at the end of this step (Ctrl-C again stops at once)\n")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        got = self._got
        if args.world_size > 1:
            # All ranks must stop at the same step, or they would wait for each other forever.
            flag = torch.tensor(got, device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            got = int(flag.item())
        if got and state.global_step < state.max_steps:
            self.stopped_at, self.stopped_by = state.global_step, got
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Restores the previous signal handlers: at the end of training, or called after an exception."""
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)
        self._previous_handlers, self._is_training = {}, False


class WeightsCallback(TrainerCallback):
    """Runs `check_weights` before each checkpoint is written."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if control.should_save:
            check_weights(model, args, step=state.global_step)


def check_weights(model: nn.Module, args: TrainingArguments, *, step: int) -> None:
    """Raises ValueError on all ranks if a weight is not finite or above `LARGEST_WEIGHT`. Does not see weights sharded by
    ZeRO-3.
    """
    found = next((name for name, weight in model.named_parameters() if not _is_sane(weight)), None)
    is_bad = found is not None
    if args.world_size > 1:
        flag = torch.tensor(int(is_bad), device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        is_bad = bool(flag.item())
    if is_bad:
        where = f" ({found})" if found is not None else ""
        raise ValueError(
            f"step {step}: the weights{where} are not finite, or above {LARGEST_WEIGHT:g}, and are not saved; the "
            f"checkpoints in {args.output_dir} are unchanged. Lower learning_rate or max_grad_norm, or start from another "
            "model"
        )


def _is_sane(weight: torch.Tensor) -> bool:
    weight = weight.detach()
    if isinstance(weight, DTensor):
        weight = weight.to_local()
    return not weight.is_floating_point() or not weight.numel() or bool(weight.abs().max() <= LARGEST_WEIGHT)
