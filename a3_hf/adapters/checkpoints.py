"""Loading of models and tokenizers from checkpoints: full models, and LoRA adapters attached to their base."""

import copy
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import set_seed

from a3_hf.models.a3_draft_head.drafter import attach_draft_head
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
    """Loads a full model of `a3_hf.models.auto.ARCHITECTURES`, or an A3 adapter or a draft head attached to its base. An
    adapted model has all methods of `A3LlamaForCausalLM`.

    Args:
        checkpoint: a folder, a hub id, or the result of `CheckpointInfo.read`.
        base: the adapter's base, if it has moved since training.
        trainable: leave the adapter trainable; all other weights are frozen.
        architecture: architecture to convert a LLaMA to, or that any other checkpoint must have. None: A3 for a LLaMA, else
            the checkpoint's.
        **settings: arguments of the base's `from_pretrained` (`dtype`, `attn_implementation`, …).

    Raises:
        ValueError: no checkpoint (see `CheckpointInfo.read`), weights that don't fit the base, or another architecture.
    """
    info = _read(checkpoint, base)
    if info.is_draft_head:
        if architecture not in (None, "a3", "draft_head"):
            raise ValueError(
                f"architecture={architecture!r}: expected 'a3' or 'draft_head', as {info.path} holds a draft head"
            )
        model = A3LlamaForCausalLM.from_pretrained(info.base, **settings)
        attach_draft_head(model, info.path)
        return model
    if info.adapter_config is None:
        architecture = architecture or info.architecture
        info.model_config(architecture)  # raises if the architecture does not match
        return ARCHITECTURES[architecture].model.from_pretrained(info.path, **settings)
    if architecture not in (None, "a3"):
        raise ValueError(f"architecture={architecture!r}: expected 'a3', as {info.path} holds an adapter")
    start = info.base_settings(settings.pop("slot_start", None), settings.pop("suffix_template", None))
    if "config" in settings:  # from_pretrained reads them from the config
        settings["config"].update(start)
        start = {}
    return attach_adapter(A3LlamaForCausalLM.from_pretrained(info.base, **settings, **start), info, trainable=trainable)


def attach_adapter(model: A3LlamaForCausalLM, adapter: str | CheckpointInfo, *, trainable: bool = False) -> PeftModel:
    """Loads a stored adapter and attaches it to its base, `model`.

    Raises:
        ValueError: no adapter, an adapter other than LoRA, or a `slot_start` or weights that don't fit the model.
    """
    stored = adapter.adapter_config if isinstance(adapter, CheckpointInfo) else read_adapter_config(adapter)
    path = adapter.path if isinstance(adapter, CheckpointInfo) else adapter
    if stored is None:
        raise ValueError(f"path={path!r} holds no adapter (no adapter_config.json)")
    if stored.slot_start not in (None, model.config.slot_start):
        raise ValueError(
            f"path={path!r} holds an adapter trained with slot_start={stored.slot_start!r}, but the model has "
            f"{model.config.slot_start!r}. Load its base with slot_start={stored.slot_start!r}."
        )
    config = copy.deepcopy(stored)
    config.slot_start, config.suffix_template = model.config.slot_start, model.config.suffix_template
    config.base_model_name_or_path = model.name_or_path
    config.inference_mode = not trainable
    adapted = wrap_model(model, config)
    load_weights(adapted, path)
    return adapted.train(trainable)


def load_weights(adapted: PeftModel, path: str | PathLike) -> None:
    """Loads the weights at `path` into a model's adapters and its `query_embed`.

    Raises:
        ValueError: the weights' names or shapes don't match.
    """
    try:
        keys = adapted.load_adapter(str(path), ADAPTER, is_trainable=adapted.training)
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights don't fit this base: {error}") from error
    for kind, names in (("missing", keys.missing_keys), ("unexpected", keys.unexpected_keys)):
        if names:
            raise ValueError(f"{path}: {len(names)} {kind} weights: {', '.join(names[:3])}{', …' if names[3:] else ''}")


def load_tokenizer(checkpoint: str | CheckpointInfo, *, base: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a checkpoint's tokenizer; for an adapter without one, its base's.

    Raises:
        ValueError: no checkpoint, no tokenizer, or a base given for a full model.
    """
    info = _read(checkpoint, base)
    has_own = (info.adapter_config is None and not info.is_draft_head) or Path(
        info.path, "tokenizer_config.json"
    ).is_file()
    place = info.path if has_own else info.base
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:  # the library's message may not name the folder
        raise ValueError(f"model={info.path!r}: the tokenizer at {place} can't be loaded: {error}") from error


def merge(path: str, output: str | PathLike, *, base: str | None = None) -> None:
    """Merges an adapter into its base and saves the result, with the tokenizer, as a plain A3 checkpoint.

    Args:
        output: a new or empty folder.
        base: as in `load_model`.

    Raises:
        ValueError: no adapter, one with `rows: slots`, a folder that is not empty, or an error of `load_model`.
    """
    info = CheckpointInfo.read(path, base=base)
    if info.adapter_config is None:
        raise ValueError(f"path={path!r} holds no adapter (no adapter_config.json): nothing to merge")
    if isinstance(info.adapter_config, SlotLoraConfig):
        raise ValueError(f"{path}: {NOT_MERGED}")
    if Path(output).exists() and (not Path(output).is_dir() or any(Path(output).iterdir())):
        raise ValueError(f"output={str(output)!r} exists: expected a new or empty folder")
    tokenizer = load_tokenizer(info)
    load_model(info).merge_and_unload(safe_merge=True).save_pretrained(output)
    tokenizer.save_pretrained(output)


def content_llama(adapted: PeftModel) -> LlamaForCausalLM:
    """Returns an adapted model's content stream as a LLaMA, which shares its weights. With `rows: slots` it is the base; with
    `rows: all` the adapters are merged first, and `adapted` is used up.
    """
    if isinstance(adapted.peft_config[ADAPTER], SlotLoraConfig):
        model = adapted.get_base_model()
    else:
        model = adapted.merge_and_unload(safe_merge=True)
    left_out = {"model_type", *(A3LlamaConfig().to_dict().keys() - LlamaConfig().to_dict().keys())}
    config = LlamaConfig(**{name: value for name, value in model.config.to_dict().items() if name not in left_out})
    with torch.device("meta"):
        names = LlamaForCausalLM(config).state_dict().keys()
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    llama = LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict={name: weights[name] for name in names},
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
    ).to(model.device)
    llama.generation_config = model.generation_config
    return llama.eval()


def check_start(info: CheckpointInfo, lora: LoraArguments | None, config: LlamaConfig) -> None:
    """Checks, without loading weights, that a run with `lora` can start from this checkpoint. From an adapter, a run with
    the same `lora` continues training it; a run without `lora` merges it first.

    Args:
        config: configuration of the checkpoint's base.

    Raises:
        ValueError: a target that matches nothing; an adapter that differs from `lora`; no `lora`, and an adapter that can't
            be merged; adapters on an architecture other than A3.
    """
    stored = info.adapter_config
    if info.is_draft_head:
        raise ValueError(
            f"model_name_or_path={info.path!r} holds a draft head: expected a model or an adapter to train"
        )
    if config.model_type != A3LlamaConfig.model_type:
        if lora is not None or stored is not None:
            raise ValueError(
                f"lora: expected architecture 'a3'. A model of type {config.model_type!r} can only be trained with all its "
                "weights."
            )
        return
    if lora is not None:
        _target_names(lora, config)
    if stored is not None and lora is not None:
        check_same(info.path, lora, config)
    elif isinstance(stored, SlotLoraConfig):
        raise ValueError(f"model_name_or_path={info.path!r} without lora: {NOT_MERGED}")


def check_same(path: str | PathLike, lora: LoraArguments | None, config: LlamaConfig) -> None:
    """Checks that the checkpoint at `path` has the adapter settings of `lora` (dropout may differ), or is a full model if
    `lora` is None.

    Raises:
        ValueError: they differ; the message lists the differences.
    """
    stored = read_adapter_config(path)
    is_whole = stored is None and Path(path, "config.json").is_file()  # a sharded checkpoint has neither config file
    if stored is None and (lora is None or not is_whole):
        return
    if stored is None or lora is None:
        has, wants = ("a full model", "adapters") if stored is None else ("adapters", "a full model (no lora)")
        raise ValueError(
            f"{path} holds {has}, but the recipe trains {wants}. Set lora to the checkpoint's settings, or use another folder."
        )
    settings = {
        "r": (stored.r, lora.r),
        "alpha": (stored.lora_alpha, lora.alpha),
        "rows": ("slots" if isinstance(stored, SlotLoraConfig) else "all", lora.rows),
        "target": (sorted(stored.target_modules), sorted(_target_names(lora, config))),
    }
    changed = [f"lora.{name}={new!r}: expected {old!r}" for name, (old, new) in settings.items() if old != new]
    if changed:
        raise ValueError(f"{path} holds adapters that differ from lora. {'; '.join(changed)}")


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
        seed: seed of new adapters' weights, so that a restarted run initialises them identically.
        finished: a checkpoint of this run from which to load the weights instead.
        architecture: architecture to train; `"a3"` with `lora`.
        **settings: arguments of `from_pretrained`.

    Raises:
        ValueError: an error of `attach`, `load_model` or `load_weights`.
    """
    if lora is None:
        model = load_model(info if finished is None else str(finished), architecture=architecture, **settings)
        if isinstance(model, PeftModel):
            model = model.merge_and_unload().requires_grad_(True)  # peft froze the weights
        return model
    start = info.base_settings(settings.pop("slot_start", None), settings.pop("suffix_template", None))
    model = A3LlamaForCausalLM.from_pretrained(info.base, **settings, **start)
    set_seed(seed)
    adapted = attach(model, lora)
    if finished is not None or info.adapter_config is not None:
        load_weights(adapted, finished or info.path)
    return adapted


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Returns bitsandbytes settings of a 4-bit base (QLoRA's NF4, double quantisation), computing in `dtype`."""
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
