"""The table of eval/results/stories260k: every task family, every way of decoding, on one small model.

    python eval/evaluate_stories.py ../shared/data/models/stories260K runs/stories260k ../shared/data eval/results/stories260k

Each line is what `a3 eval --model … --model_args … --tasks …` does; here lm-eval's own tasks are not indexed for each. A run
whose result is there already is left out, so that the command goes on where it was stopped.
"""

import argparse
import json
import tempfile
from pathlib import Path

import lm_eval
import torch
from lm_eval.api.registry import get_model
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from a3_hf.evaluation.lm_harness import causal_lm as causal  # noqa: F401  (they register their models)
from a3_hf.evaluation.lm_harness.command import TASKS

CHOICES = ["a3_hellaswag", "a3_piqa", "a3_siqa", "a3_winogrande", "a3_winogrande_infill"]
STOCK = ["hellaswag", "piqa", "social_iqa", "winogrande"]
BLANKS = ["rocstories_infill_3", "rocstories_infill_2to4"]
AUTO = ["rocstories_infill_3_auto"]
DYNAMIC = {"decoding": "dynamic", "tokens_per_step": 2}
# What is run: (model, base or adapted, its settings, tasks).
RUNS = [
    ("hf", "base", {}, STOCK),
    ("a3_ar", "base", {}, [*STOCK, *CHOICES, "a3_triviaqa", *BLANKS, *AUTO]),
    ("a3_ar", "base", {"infilling": "suffix_prompt"}, ["a3_winogrande_infill", *BLANKS, *AUTO]),
    ("a3_ar", "base", {"infilling": "best_of"}, ["a3_winogrande_infill", *BLANKS, *AUTO]),
    ("a3_ar", "adapted", {}, [*CHOICES, "a3_triviaqa"]),
    ("a3", "adapted", {}, [*STOCK, *CHOICES, "a3_triviaqa", *BLANKS, *AUTO]),
    ("a3", "adapted", {"order": "random", "num_orders": 4}, CHOICES),
    ("a3", "adapted", {"group_size": 4}, ["a3_triviaqa", *BLANKS, *AUTO]),
    *(
        ("a3", "adapted", {**DYNAMIC, "criterion": criterion}, ["a3_triviaqa", *BLANKS, *AUTO])
        for criterion in ("confidence", "entropy", "margin", "random")
    ),
    ("a3", "adapted", {"decoding": "speculative"}, ["a3_triviaqa", *BLANKS, *AUTO]),
]


def without_places(text: str) -> str:
    """A result of lm-eval without the folders of this machine, and of its environment what a report shows."""
    result = json.loads(text.replace(f"{TASKS.parents[2]}/", ""))
    shown = ("PyTorch version", "Python version", "Model name", "GPU ")
    lines = result["pretty_env_info"].splitlines()
    result["pretty_env_info"] = "\n".join(line for line in lines if line.startswith(shown))
    return json.dumps(result, indent=1, ensure_ascii=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("adapted")
    parser.add_argument("data_dir")
    parser.add_argument("output", type=Path)
    parser.add_argument("--limit", type=int, default=1000, help="items of a task")
    parser.add_argument("--limit-texts", type=int, default=100, help="items of a task that writes")
    parser.add_argument(
        "--max_length",
        type=int,
        default=1024,
        help="tokens of a text to score: hf stops at a longer choice, and PIQA has one of 625 in this vocabulary",
    )
    parser.add_argument("--batch_size", type=int, default=32)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {"base": arguments.base, "adapted": arguments.adapted}
    arguments.output.mkdir(parents=True, exist_ok=True)
    metadata = {"data_dir": arguments.data_dir}
    manager = TaskManager(include_defaults=False, include_path=str(TASKS), metadata=metadata)
    for model, which, settings, tasks in RUNS:
        writes = [task for task in tasks if task not in (*STOCK, *CHOICES)]
        name = "_".join([model, which, *(str(value) for value in settings.values())])
        for part, limit in (("choices", arguments.limit), ("texts", arguments.limit_texts)):
            wanted = [task for task in tasks if (task in writes) == (part == "texts")]
            path = arguments.output / f"{name}_{part}.json"
            if not wanted or path.exists():
                continue
            print(f"{name}: {', '.join(wanted)}", flush=True)
            given = {"pretrained": models[which], **settings}
            if part == "choices":
                given["max_length"] = arguments.max_length
            lm = get_model(model).create_from_arg_obj(given, {"batch_size": arguments.batch_size, "device": device})
            results = lm_eval.simple_evaluate(
                lm, tasks=wanted, task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
            )
            # what the command line would have written of them
            results["config"].update(
                model=model, model_args=given, device=device, limit=limit, batch_size=arguments.batch_size
            )
            told = ",".join(f"{key}={value}" for key, value in given.items())
            with tempfile.TemporaryDirectory() as folder:
                tracker = EvaluationTracker(output_path=folder)
                tracker.general_config_tracker.log_experiment_args(model, told, "", "", False)
                tracker.save_results_aggregated(results=results, samples=None)
                (written,) = Path(folder).rglob("results_*.json")
                path.write_text(without_places(written.read_text()) + "\n")


if __name__ == "__main__":
    main()
