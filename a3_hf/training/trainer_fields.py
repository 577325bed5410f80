"""Fields of transformers' TrainingArguments: those in use, those refused, and ranges of numbers."""

import math
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

USED = set(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
    gradient_accumulation_steps average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 fp16 tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode use_liger_kernel torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen
    log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start
    eval_accumulation_steps save_only_model save_strategy save_steps save_on_each_node save_total_limit
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    full_determinism seed data_seed use_cpu dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    remove_unused_columns train_sampling_strategy ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics local_rank
    """.split()
)
EVALUATION = "evaluation has its own orders, losses and batches"
BEST = "the model of a run is that of its last step, and its checkpoints are kept by save_total_limit"
COMMAND = "`a3 adapt` trains, and evaluates where eval_strategy says so"
# Refused fields, and why.
REFUSED = {
    "resume_from_checkpoint": "the same command resumes from the last whole checkpoint of output_dir by itself",
    "ignore_data_skip": "a resumed run would train on the same rows again",
    "restore_callback_states_from_checkpoint": "checkpoints contain what a run needs without it",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint without it",
    "do_train": COMMAND,
    "do_eval": COMMAND,
    "do_predict": COMMAND,
    "load_best_model_at_end": BEST,
    "metric_for_best_model": BEST,
    "greater_is_better": BEST,
    "prediction_loss_only": EVALUATION,
    "include_for_metrics": EVALUATION,
    "batch_eval_metrics": EVALUATION,
    "eval_do_concat_batches": EVALUATION,
    "eval_use_gather_object": EVALUATION,
    "bf16_full_eval": "evaluations are part of training, where it has no effect",
    "fp16_full_eval": "evaluations are part of training, where it has no effect",
    "label_names": "the rows' columns are known",
    "length_column_name": "the rows' columns are known",
    "auto_find_batch_size": "it would change the number of rows per step, and so the result",
    "accelerator_config": "a resumed run must divide rows among processes as before",
    "parallelism_config": "rows are spread over processes as the accelerate config says",
    "liger_kernel_config": "Liger's kernels do not support these models",
    "use_cache": "training has no cache",
    "neftune_noise_alpha": "noise on the embeddings would reach the content stream and not the query slots",
}
# Fields without effect on a mixture, which has its own data loader.
REFUSED_WITH_SOURCES = (
    "data_seed",
    "dataloader_drop_last",
    "dataloader_persistent_workers",
    "dataloader_multiprocessing_context",
    "dataloader_in_order",
    "train_sampling_strategy",
)
STRATEGIES = ("random", "sequential")


def _is_whole(least: int) -> Callable[[Any], bool]:
    return lambda value: value >= least and value == int(value)


def _is_from_0(value: float) -> bool:
    return 0 <= value < math.inf


def _is_above_0(value: float) -> bool:
    return 0 < value < math.inf


def _is_beta(value: float) -> bool:
    return 0 <= value < 1


COUNT, NUMBER, ABOVE_0, BETA = (
    "a whole number of 1 or more",
    "0 or more, finite",
    "above 0, finite",
    "from 0 to below 1",
)
RANGES = {
    "per_device_train_batch_size": (_is_whole(1), COUNT),
    "per_device_eval_batch_size": (_is_whole(1), COUNT),
    "gradient_accumulation_steps": (_is_whole(1), COUNT),
    "eval_accumulation_steps": (_is_whole(1), COUNT),
    "save_total_limit": (_is_whole(1), f"{COUNT}, or null for no limit"),
    "torch_empty_cache_steps": (_is_whole(1), COUNT),
    "dataloader_prefetch_factor": (_is_whole(1), COUNT),
    "dataloader_num_workers": (_is_whole(0), "a whole number of 0 or more"),
    "max_steps": (lambda value: value == -1 or value >= 1, "1 or more, or -1 to train for num_train_epochs"),
    "num_train_epochs": (_is_above_0, ABOVE_0),
    "learning_rate": (_is_from_0, NUMBER),
    "weight_decay": (_is_from_0, NUMBER),
    "max_grad_norm": (_is_from_0, f"{NUMBER}; 0: no clipping"),
    "adam_beta1": (_is_beta, BETA),
    "adam_beta2": (_is_beta, BETA),
    "adam_epsilon": (_is_from_0, NUMBER),
    "warmup_steps": (_is_from_0, f"{NUMBER}; below 1: a fraction of the run"),
    "logging_steps": (_is_above_0, ABOVE_0),
    "eval_steps": (_is_above_0, ABOVE_0),
    "save_steps": (_is_above_0, ABOVE_0),
    "eval_delay": (_is_from_0, NUMBER),
    "seed": (lambda value: 0 <= value < 2**32, "0 or more, and less than 2**32"),
    "data_seed": (lambda value: 0 <= value < 2**32, "0 or more, and less than 2**32"),
    "ddp_timeout": (_is_above_0, ABOVE_0),
    "peak_flops": (_is_above_0, ABOVE_0),
    "content_loss_weight": (_is_from_0, NUMBER),
    "distillation_weight": (_is_from_0, NUMBER),
}


def check_fields(arguments: Any) -> None:
    """Checks training arguments before transformers processes them.

    Raises:
        ValueError: a refused field that is set, an unknown field (new in transformers), or a number out of range.
    """
    own = {f.name for f in fields(type(arguments)) if f.name in type(arguments).__annotations__} - USED
    for field in fields(arguments):
        if field.name in USED | own:
            continue
        value = getattr(arguments, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value != default:
            why = REFUSED.get(field.name, "a3_hf does not know this field, which is new in the installed transformers")
            raise ValueError(f"{field.name}={value!r}: {why}; leave it out")
    for name, (is_in_range, expected) in RANGES.items():
        value = getattr(arguments, name)
        if value is not None and not is_in_range(value):
            raise ValueError(f"{name}={value}: expected {expected}")
    if arguments.train_sampling_strategy not in STRATEGIES:
        raise ValueError(
            f"train_sampling_strategy={arguments.train_sampling_strategy!r}: expected "
            f"{' or '.join(map(repr, STRATEGIES))}, because all rows have one length"
        )
