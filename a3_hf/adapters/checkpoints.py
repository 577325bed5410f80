"""Models and tokenizers loaded from checkpoints: whole models, and low-rank adapters put into their base."""

import copy
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from a3_hf.models.a3_llama.configuration_a3_llama import A3LlamaConfig
from a3_hf.models.a3_llama.modeling_a3_llama import A3LlamaForCausalLM
from a3_hf.models.auto import ARCHITECTURES

from .arguments import LoraArguments
from .checkpoint_info import CheckpointInfo, read_adapter_config
from .layers import ADAPTER, NOT_MERGED, SlotLoraConfig, attach, target_names, wrap_model


def load_model(
    checkpoint: str | CheckpointInfo,
    *,
    base: str | None = None,
    trainable: bool = False,
    architecture: str | None = None,
    **settings: Any,
) -> PreTrainedModel | PeftModel:
    """Loads a whole model of `a3_hf.models.auto.ARCHITECTURES`, or an adapter of A3 put into its base. An adapted model has
    all methods of `A3LlamaForCausalLM`.

    Args:
        checkpoint: a folder, a hub id, or what `CheckpointInfo.read` found there.
        base: the adapter's base, where it was moved since training.
        trainable: train the adapter further, all else frozen.
        architecture: what a LLaMA checkpoint becomes, or what another must be; None: A3 for a LLaMA, else the checkpoint's.
        **settings: those of `from_pretrained` (`dtype`, `attn_implementation`, …), for the base.

    Raises:
        ValueError: nothing to load (see `CheckpointInfo.read`), weights that don't fit the base, or another architecture.
    """
    info = _read(checkpoint, base)
    if info.adapter_config is None:
        architecture = architecture or info.architecture
        info.model_config(architecture)  # its check
        return ARCHITECTURES[architecture].model.from_pretrained(info.path, **settings)
    if architecture not in (None, "a3"):
        raise ValueError(f"{info.path} holds an adapter, which belongs to architecture 'a3', not {architecture!r}")
    start = info.slot_start_settings(settings.pop("slot_start", None))
    if "config" in settings:  # from_pretrained takes it from there
        settings["config"].update(start)
        start = {}
    return attach_adapter(A3LlamaForCausalLM.from_pretrained(info.base, **settings, **start), info, trainable=trainable)


def attach_adapter(model: A3LlamaForCausalLM, adapter: str | CheckpointInfo, *, trainable: bool = False) -> PeftModel:
    """Puts a stored adapter into its base, `model`.

    Raises:
        ValueError: no adapter, one that is not LoRA, or one whose `slot_start` or weights don't fit the model.
    """
    stored = adapter.adapter_config if isinstance(adapter, CheckpointInfo) else read_adapter_config(adapter)
    path = adapter.path if isinstance(adapter, CheckpointInfo) else adapter
    if stored is None:
        raise ValueError(f"path={path!r} holds no adapter (adapter_config.json)")
    if stored.slot_start not in (None, model.config.slot_start):
        raise ValueError(
            f"path={path!r} holds an adapter trained with slot_start={stored.slot_start!r}, and the model has "
            f"{model.config.slot_start!r}; load its base with slot_start={stored.slot_start!r}"
        )
    config = copy.deepcopy(stored)
    config.slot_start = model.config.slot_start
    config.base_model_name_or_path = model.name_or_path
    config.inference_mode = not trainable
    adapted = wrap_model(model, config)
    load_weights(adapted, path)
    return adapted.train(trainable)


def load_weights(adapted: PeftModel, path: str | PathLike) -> None:
    """Loads the weights at `path` into a model's adapters and its `query_embed`.

    Raises:
        ValueError: weights of other layers or other shapes.
    """
    try:
        keys = adapted.load_adapter(str(path), ADAPTER, is_trainable=adapted.training)
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights don't fit this base: {error}") from error
    for problem, names in (("lacks", keys.missing_keys), ("has, and the base lacks,", keys.unexpected_keys)):
        if names:
            raise ValueError(
                f"{path}: it {problem} {len(names)} weights: {', '.join(names[:3])}{', …' if names[3:] else ''}"
            )


def load_tokenizer(checkpoint: str | CheckpointInfo, *, base: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a checkpoint's tokenizer; for an adapter without one, its base's.

    Raises:
        ValueError: no checkpoint or no tokenizer there, or a base given for a whole model.
    """
    info = _read(checkpoint, base)
    has_own = info.adapter_config is None or Path(info.path, "tokenizer_config.json").is_file()
    place = info.path if has_own else info.base
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:  # the library's message may not name the folder
        raise ValueError(f"model={info.path!r}: the tokenizer at {place} can't be loaded: {error}") from error


def merge(path: str, output: str | PathLike, *, base: str | None = None) -> None:
    """Writes an adapter and its base as one plain A3 checkpoint, with the tokenizer.

    Args:
        output: a new or empty folder.
        base: as in `load_model`.

    Raises:
        ValueError: no adapter, one with `rows: slots`, a folder that is not empty, or what `load_model` refuses.
    """
    info = CheckpointInfo.read(path, base=base)
    if info.adapter_config is None:
        raise ValueError(f"{path!r} holds no adapter (no adapter_config.json): nothing to merge")
    if isinstance(info.adapter_config, SlotLoraConfig):
        raise ValueError(f"{path}: {NOT_MERGED}")
    if Path(output).exists() and (not Path(output).is_dir() or any(Path(output).iterdir())):
        raise ValueError(f"output={str(output)!r} exists already; give a folder that is new or empty")
    tokenizer = load_tokenizer(info)
    load_model(info).merge_and_unload(safe_merge=True).save_pretrained(output)
    tokenizer.save_pretrained(output)


def check_start(info: CheckpointInfo, lora: LoraArguments | None, config: LlamaConfig) -> None:
    """Checks, without weights, that a run with `lora` can start from a checkpoint whose base has `config`. From an adapter, a
    run with the same `lora` trains it further, and a run without merges it first.

    Raises:
        ValueError: a target that matches nothing; adapters that differ from `lora`; no `lora` and adapters that can't be
            merged; adapters on another architecture than A3.
    """
    stored = info.adapter_config
    if config.model_type != A3LlamaConfig.model_type:
        if lora is not None or stored is not None:
            raise ValueError(
                f"lora: adapters are for architecture 'a3'; a model of type {config.model_type!r} is trained with all its "
                "weights"
            )
        return
    if lora is not None:
        _target_names(lora, config)
    if stored is not None and lora is not None:
        check_same(info.path, lora, config)
    elif isinstance(stored, SlotLoraConfig):
        raise ValueError(f"model_name_or_path={info.path!r}, without lora: {NOT_MERGED}")


def check_same(path: str | PathLike, lora: LoraArguments | None, config: LlamaConfig) -> None:
    """Checks that the weights at `path` are of the kind that `lora` describes; dropout may differ.

    Raises:
        ValueError: they differ; the message says in what.
    """
    stored = read_adapter_config(path)
    is_whole = stored is None and Path(path, "config.json").is_file()  # a sharded checkpoint has neither file
    if stored is None and (lora is None or not is_whole):
        return
    if stored is None or lora is None:
        has, wants = ("whole models", "adapters") if stored is None else ("adapters", "a whole model (it has no lora)")
        raise ValueError(
            f"{path} holds {has} where the recipe trains {wants}; set lora as it was there, or start elsewhere"
        )
    settings = {
        "r": (stored.r, lora.r),
        "alpha": (stored.lora_alpha, lora.alpha),
        "rows": ("slots" if isinstance(stored, SlotLoraConfig) else "all", lora.rows),
        "target": (sorted(stored.target_modules), sorted(_target_names(lora, config))),
    }
    changed = [f"{name} is {old!r} there and {new!r} here" for name, (old, new) in settings.items() if old != new]
    if changed:
        raise ValueError(f"{path} holds other adapters than lora says: {'; '.join(changed)}")


def load_to_train(
    info: CheckpointInfo,
    lora: LoraArguments | None,
    *,
    seed: int,
    finished: Path | None = None,
    architecture: str = "a3",
    **settings: Any,
) -> PreTrainedModel | PeftModel:
    """Loads the model that a run with `lora` trains, starting from a checkpoint that `check_start` accepts.

    Args:
        seed: seeds fresh adapters, so that a restarted run starts from the same ones.
        finished: a checkpoint of this run with the weights to load instead.
        architecture: what is trained; `"a3"` with `lora`.
        **settings: those of `from_pretrained`.

    Raises:
        ValueError: what `attach`, `load_model` or `load_weights` refuses.
    """
    if lora is None:
        model = load_model(info if finished is None else str(finished), architecture=architecture, **settings)
        if isinstance(model, PeftModel):
            model = model.merge_and_unload().requires_grad_(True)  # peft had frozen them
        return model
    start = info.slot_start_settings(settings.pop("slot_start", None))
    model = A3LlamaForCausalLM.from_pretrained(info.base, **settings, **start)
    set_seed(seed)
    adapted = attach(model, lora)
    if finished is not None or info.adapter_config is not None:
        load_weights(adapted, finished or info.path)
    return adapted


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Settings of a base held in 4 bits (QLoRA's NF4, quantised twice), multiplied in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _read(checkpoint: str | CheckpointInfo, base: str | None) -> CheckpointInfo:
    return checkpoint if isinstance(checkpoint, CheckpointInfo) else CheckpointInfo.read(checkpoint, base=base)


def _target_names(lora: LoraArguments, config: LlamaConfig) -> list[str]:
    with torch.device("meta"):
        return target_names(A3LlamaForCausalLM(config), lora)
