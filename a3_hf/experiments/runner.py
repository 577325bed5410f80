"""Runs an experiment: trains and measures each cell, then writes the result and its report."""

import datetime
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerState

from a3_hf.adapters.checkpoints import load_model, load_tokenizer
from a3_hf.data.loading import load_documents
from a3_hf.evaluation.measures.attention_distance import measure_attention
from a3_hf.evaluation.measures.coherence_diversity import measure_samples
from a3_hf.evaluation.measures.decoding_frontier import measure_decoding
from a3_hf.evaluation.measures.draft_heads import measure_drafts
from a3_hf.evaluation.measures.infilling_quality import measure_infilling
from a3_hf.evaluation.measures.order_losses import measure_losses
from a3_hf.evaluation.measures.trained_run import Trained
from a3_hf.evaluation.reporting.results import environment
from a3_hf.training import run as train
from a3_hf.training.loss_report import loss_names

from .grid import Cell, Experiment, check_record
from .initial_models import make_start
from .report import present

MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "losses": measure_losses,
    "infilling": measure_infilling,
    "infilling_rocstories": measure_infilling,
    "samples": measure_samples,
    "attention": measure_attention,
    "decoding": measure_decoding,
    "drafts": measure_drafts,
}
MEASURED_FILE = "measured.json"
RESULT_FILE = "result.json"
LOG_FILE = "log.txt"


def run(experiment: Experiment, output: Path, *, jobs: int = 1, command: str) -> int:
    """Trains and measures each unfinished cell, and writes `result.json`, `report.md` and the plots to `output`.

    Args:
        jobs: cells at a time on a CPU, each in a process of its own, with an equal part of this machine's threads.
        command: the command line, which the result quotes.

    Returns:
        0, or 130 if a cell was stopped by Ctrl-C; the same command resumes.

    Raises:
        ValueError: fewer than one job, several on a GPU; a grid that changed (`check_record`); an invalid recipe or measure.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: expected 1 or more")
    if jobs > 1 and torch.cuda.is_available() and not all(cell.recipe.training.use_cpu for cell in experiment.cells):
        raise ValueError(f"jobs={jobs}: expected 1, because cells share one GPU")
    check_record(experiment)
    if experiment.start is not None:
        _make_starts(experiment)

    threads = max(1, torch.get_num_threads() // jobs)
    progress = tqdm(total=len(experiment.cells), desc=f"{experiment.name} ({experiment.size})", unit="run")
    if jobs == 1:
        for cell in experiment.cells:
            if run_cell(cell, experiment.measures) is None:
                return train.INTERRUPTED
            progress.update()
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_start_worker, initargs=(threads,)) as pool:
            futures = [pool.submit(_run_in_worker, cell, experiment.measures) for cell in experiment.cells]
            try:
                for future in as_completed(futures):
                    if future.result() is None:
                        return train.INTERRUPTED
                    progress.update()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    progress.close()

    result = {
        "experiment": experiment.name,
        "question": experiment.question,
        "command": command,
        "size": experiment.size,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "threads": threads,
        "environment": environment("cpu" if experiment.cells[0].recipe.training.use_cpu else "cuda"),
        "cells": [json.loads(_measured_file(cell).read_text(encoding="utf-8"))["result"] for cell in experiment.cells],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"The result is in {present(result, experiment.report, output)}.")
    return 0


def run_cell(cell: Cell, measures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Trains a cell, unless it is finished, and measures its model, unless that was done under the same settings.

    Returns:
        The cell's part of the result, or None if training was stopped.
    """
    path = _measured_file(cell)
    settings = json.loads(json.dumps(measures))
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"measures": {}, "values": {}}
    if known["measures"] == settings and "result" in known:
        return known["result"]
    if train.run(cell.recipe) != 0:
        return None
    trained = load_trained(cell)
    values = {}
    for name, own in settings.items():
        # Measurements under the same settings are kept.
        if known["measures"].get(name) == own and name in known["values"]:
            values[name] = known["values"][name]
        else:
            values[name] = MEASURES[name](trained, **own)
            _write(path, {"measures": {done: settings[done] for done in values}, "values": values})
    tokens_per_step = cell.recipe.training.rows_per_step * cell.recipe.data.block_size
    steps = max(entry["step"] for entry in trained.log_history)
    curve = [
        {"tokens": entry["step"] * tokens_per_step, **_losses(entry, trained.architecture)}
        for entry in trained.log_history
        if loss_names(entry)
    ]
    result = {
        "arm": cell.arm,
        "axes": dict(cell.axes),
        "tokens": steps * tokens_per_step,
        "train_seconds": sum(entry.get("train_runtime", 0.0) for entry in trained.log_history),
        "parameters": trained.model.num_parameters(),
        "curve": curve,
        "measures": {name: value for measured in values.values() for name, value in measured.items()},
    }
    if curve and "nll_any_order" in curve[-1]:
        result["measures"]["nll_any_order"] = curve[-1]["nll_any_order"]
    _write(path, {"measures": settings, "values": values, "result": result})
    return result


def _write(path: Path, content: Mapping[str, Any]) -> None:
    # Written to another file and renamed, so that a file is never half-written.
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _losses(entry: Mapping[str, float], architecture: str) -> dict[str, float]:
    """The losses of an evaluation, and the one that architectures have in common, `nll_any_order`: the mean over random
    orders of single tokens, which masked diffusion's bound estimates too.
    """
    losses = {name: entry[name] for name in loss_names(entry)}
    common = "eval_loss" if architecture == "masked_diffusion" else "eval_loss_scattered_1"
    return {**losses, "nll_any_order": losses[common]} if common in losses else losses


def load_trained(cell: Cell) -> Trained:
    """Loads a finished cell for measures, on a GPU if it was trained on one."""
    folder = cell.recipe.training.output_dir
    model = load_model(folder, architecture=cell.recipe.model.architecture)
    device = "cuda" if torch.cuda.is_available() and not cell.recipe.training.use_cpu else "cpu"
    documents, held_out = (None, None) if cell.recipe.draft_head else load_documents(cell.recipe.data)
    return Trained(
        model=model.to(device).eval(),
        tokenizer=load_tokenizer(folder),
        recipe=cell.recipe,
        documents=_texts(held_out),
        training_documents=_texts(documents),
        log_history=TrainerState.load_from_json(str(Path(folder) / train.STATE_FILE)).log_history,
    )


def _texts(documents) -> list[str]:
    if documents is None:
        return []
    (column,) = documents.column_names
    return [text for text in documents[column] if text and text.strip()]


def _measured_file(cell: Cell) -> Path:
    return Path(cell.recipe.training.output_dir) / MEASURED_FILE


def _make_starts(experiment: Experiment) -> None:
    """Makes the models that cells start from: one per seed, for all arms."""
    recipes = {cell.recipe.model.model_name_or_path: cell.recipe for cell in experiment.cells}
    for folder, recipe in recipes.items():
        documents, _ = load_documents(recipe.data)
        text = "\n".join(_texts(documents))
        make_start(Path(folder), text=text, seed=recipe.training.seed, **experiment.start)


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_stop_with_parent, daemon=True).start()


def _stop_with_parent() -> None:
    # Workers stop with a checkpoint if their parent is killed; they would train on for hours. (Not by SIGINT, which processes
    # started by `nohup` ignore.)
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _run_in_worker(cell: Cell, measures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    # Workers would overwrite each other's lines; the parent shows progress.
    log = Path(cell.recipe.training.output_dir) / LOG_FILE
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        return run_cell(cell, measures)
