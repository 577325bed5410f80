"""Low-rank adapters (peft's LoRA) on all rows or on the query slots alone: attached, loaded, merged."""

import json
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import set_seed
from transformers.utils import find_adapter_config_file

from a3_hf.models.a3_llama.configuration_a3_llama import A3LlamaConfig
from a3_hf.models.a3_llama.modeling_a3_llama import A3LlamaForCausalLM
from a3_hf.models.auto import ARCHITECTURES, architecture_of, read_model_config
from a3_hf.models.locations import check_is_there

from .arguments import LoraArguments
from .layers import (
    ADAPTER,
    NOT_MERGED,
    SLOT_ADAPTER_TYPE,
    A3LoraConfig,
    SlotLoraConfig,
    attach,
    target_names,
    wrap_model,
)


def check_start(path: str, lora: LoraArguments | None, config: LlamaConfig) -> None:
    """Whether a run with `lora` can start from `path`, a checkpoint or an adapter, whose base has `config`; without the
    weights. From an adapter, a run with the same `lora` trains it further, and one without takes it merged.

    Raises:
        ValueError: a target that matches nothing; adapters of another kind than `lora`; no `lora` and adapters that can't be
            merged; adapters of any kind where `config` is not A3's.
    """
    if config.model_type != A3LlamaConfig.model_type:
        if lora is not None or read_config(path) is not None:
            raise ValueError(
                f"lora: adapters are for architecture 'a3'; a model of type {config.model_type!r} is trained with all its "
                "weights"
            )
        return
    if lora is not None:
        with torch.device("meta"):
            target_names(A3LlamaForCausalLM(config), lora)
    stored = read_config(path)
    if stored is not None and lora is not None:
        check_same(path, lora, config)
    elif isinstance(stored, SlotLoraConfig):
        raise ValueError(f"model_name_or_path={path!r}, without lora: {NOT_MERGED}")


def check_same(path: str | PathLike, lora: LoraArguments | None, config: LlamaConfig) -> None:
    """Whether the weights at `path` are of the kind that `lora` describes; its dropout may be another.

    Raises:
        ValueError: they are not; says in what they differ.
    """
    stored = read_config(path)
    is_whole = stored is None and Path(path, "config.json").is_file()  # a sharded checkpoint doesn't say what it holds
    if stored is None and (lora is None or not is_whole):
        return
    if stored is None or lora is None:
        has, asks = ("whole models", "adapters") if stored is None else ("adapters", "a whole model (it has no lora)")
        raise ValueError(
            f"{path} holds {has} where the recipe trains {asks}; set lora as it was there, or start elsewhere"
        )
    with torch.device("meta"):
        targets = target_names(A3LlamaForCausalLM(config), lora)
    rows = "slots" if isinstance(stored, SlotLoraConfig) else "all"
    settings = {
        "r": (stored.r, lora.r),
        "alpha": (stored.lora_alpha, lora.alpha),
        "rows": (rows, lora.rows),
        "target": (sorted(stored.target_modules), sorted(targets)),
    }
    changed = [f"{name} is {old!r} there and {new!r} here" for name, (old, new) in settings.items() if old != new]
    if changed:
        raise ValueError(f"{path} holds other adapters than lora says: {'; '.join(changed)}")


def read_config(path: str | PathLike) -> A3LoraConfig | None:
    """The settings of an adapter, in a folder or on the hub; None where there is none.

    Raises:
        ValueError: nothing there; an adapter that is not LoRA, or has settings that the installed peft doesn't know; a file
            that is cut off.
    """
    check_is_there(str(path))
    file = find_adapter_config_file(str(path))
    if file is None:
        return None
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is cut off, or not JSON: {error}") from error
    kind = settings.get("peft_type") if isinstance(settings, Mapping) else None
    if kind not in ("LORA", SLOT_ADAPTER_TYPE):
        raise ValueError(f"{path} holds an adapter of type {kind!r}; A3 takes LORA and its own {SLOT_ADAPTER_TYPE}")
    unknown = sorted(set(settings) - {field.name for field in fields(SlotLoraConfig)})
    if unknown:
        raise ValueError(
            f"{file} has settings that peft {peft.__version__} doesn't know: {', '.join(unknown)}; update peft"
        )
    of_kind = SlotLoraConfig if kind == SLOT_ADAPTER_TYPE else A3LoraConfig
    return of_kind(**{**settings, "peft_type": "LORA"})


def start_of(path: str, *, base: str, wanted: str | None = None) -> dict[str, str]:
    """`slot_start` as `from_pretrained` takes it for the base of the adapter at `path`: the adapter's own, where there is one,
    else `wanted`; empty where the base's is right.

    Raises:
        ValueError: another is wanted than the adapter's own.
    """
    stored = read_config(path)
    own = None if stored is None else stored.slot_start
    if stored is not None and own is None and PreTrainedConfig.get_config_dict(base)[0].get("model_type") == "llama":
        own = "query_embed"  # which all slots in a LLaMA had when adapters did not say
    if own is not None and wanted not in (None, own):
        raise ValueError(f"slot_start={wanted!r}: the adapter {path} was trained with {own!r}; leave it out")
    start = own or wanted
    return {} if start is None else {"slot_start": start}


def base_of(path: str) -> str:
    """Where the base of the adapter at `path` is; `path` itself where there is a whole model. A folder that is not where the
    adapter says, seen from the current directory, is looked for as seen from the adapter's own and those above it, and
    beside the adapter.

    Raises:
        ValueError: it is nowhere; or as `read_config`.
    """
    stored = read_config(path)
    if stored is None:
        return path
    named = stored.base_model_name_or_path
    own = Path(path).absolute()
    places = [named, *(folder / named for folder in (own, *own.parents)), own.parent / Path(named).name]
    found = next((str(place) for place in places if Path(place).is_dir()), named)
    try:
        check_is_there(found)
    except ValueError as error:
        raise ValueError(f"{path}: its base {error}; say where the base is: base (--base)") from error
    return found


def load_model(
    path: str,
    *,
    base: str | None = None,
    trainable: bool = False,
    architecture: str | None = None,
    **settings: Any,
) -> PreTrainedModel | PeftModel:
    """The model at `path`, a folder or a hub id: a LLaMA checkpoint or one of an architecture of
    `a3_hf.models.auto.ARCHITECTURES`, or an adapter of A3, put into its base. An adapted model has all methods of
    `A3LlamaForCausalLM`.

    Args:
        base: the adapter's base, where it is no longer where it was.
        trainable: train the adapter further, all else frozen.
        architecture: what a LLaMA checkpoint becomes, or what another has to be; None: what the checkpoint says, and A3 for
            a LLaMA.
        **settings: those of `from_pretrained` (`dtype`, `attn_implementation`, …), for the base.

    Raises:
        ValueError: an adapter that is not LoRA, whose base can't be loaded, or whose weights don't fit it; a checkpoint of
            another architecture.
    """
    config = read_config(path)
    if config is None:
        architecture = architecture or architecture_of(path)
        read_model_config(path, architecture)
        return ARCHITECTURES[architecture].model.from_pretrained(path, **settings)
    if architecture not in (None, "a3"):
        raise ValueError(f"{path} holds an adapter, which belongs to architecture 'a3', not {architecture!r}")
    base = base or base_of(path)
    check_is_there(base)
    start = start_of(path, base=base, wanted=settings.pop("slot_start", None))
    if "config" in settings:  # which then says it
        settings["config"].update(start)
        start = {}
    model = A3LlamaForCausalLM.from_pretrained(base, **settings, **start)
    return attach_adapter(model, path, trainable=trainable)


def attach_adapter(model: A3LlamaForCausalLM, path: str, *, trainable: bool = False) -> PeftModel:
    """Puts the adapter at `path` into a model, its base.

    Raises:
        ValueError: no adapter there, or one that is not LoRA or whose weights don't fit the model.
    """
    config = read_config(path)
    if config is None:
        raise ValueError(f"path={path!r} holds no adapter (adapter_config.json)")
    if config.slot_start not in (None, model.config.slot_start):
        raise ValueError(
            f"path={path!r} holds an adapter trained with slot_start={config.slot_start!r}, and the model has "
            f"{model.config.slot_start!r}; load its base with slot_start={config.slot_start!r}"
        )
    config.slot_start = model.config.slot_start
    config.base_model_name_or_path = model.name_or_path
    config.inference_mode = not trainable
    adapted = wrap_model(model, config)
    load_weights(adapted, path)
    return adapted.train(trainable)


def load_to_train(
    path: str,
    lora: LoraArguments | None,
    *,
    seed: int,
    finished: Path | None = None,
    architecture: str = "a3",
    **settings: Any,
) -> PreTrainedModel | PeftModel:
    """The model that a run with `lora` trains, starting from `path` (see `check_start`).

    Args:
        seed: fresh adapters are drawn from it, and from nothing else: a run that begins anew begins with the same.
        finished: a checkpoint that has the weights already.
        architecture: what is trained; with `lora`, `"a3"` alone.
        **settings: those of `from_pretrained`.

    Raises:
        ValueError: as `attach`, `load_model` and `load_weights`.
    """
    if lora is None:
        model = load_model(path if finished is None else str(finished), architecture=architecture, **settings)
        if isinstance(model, PeftModel):
            model = model.merge_and_unload().requires_grad_(True)  # peft had frozen them
        return model
    base = base_of(path)
    start = start_of(path, base=base, wanted=settings.pop("slot_start", None))
    model = A3LlamaForCausalLM.from_pretrained(base, **settings, **start)
    set_seed(seed)
    adapted = attach(model, lora)
    if finished is not None or read_config(path) is not None:
        load_weights(adapted, finished or path)
    return adapted


def load_weights(adapted: PeftModel, path: str | PathLike) -> None:
    """Puts the weights at `path` into a model's adapters and its `query_embed`.

    Raises:
        ValueError: they don't fit: other layers, or other shapes.
    """
    try:
        keys = adapted.load_adapter(str(path), ADAPTER, is_trainable=adapted.training)
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights don't fit this base: {error}") from error
    for kind, wrong in (("lacks", keys.missing_keys), ("has, and the base has not,", keys.unexpected_keys)):
        if wrong:
            raise ValueError(
                f"{path}: it {kind} {len(wrong)} weights: {', '.join(wrong[:3])}{', …' if wrong[3:] else ''}"
            )


def load_tokenizer(path: str, *, base: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, and for an adapter without one that of its base.

    Raises:
        ValueError: a base where there is no adapter.
    """
    is_adapter = read_config(path) is not None
    if base is not None and not is_adapter:
        raise ValueError(f"base={base!r}: {path} is a whole model and needs none; leave it out")
    has_own = not is_adapter or Path(path, "tokenizer_config.json").is_file()
    place = path if has_own else base or base_of(path)
    check_is_there(place)
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:  # the library's message may not say which
        raise ValueError(f"model={path!r}: the tokenizer at {place} can't be loaded: {error}") from error


def merge(path: str, output: str | PathLike, *, base: str | None = None) -> None:
    """Writes the adapter at `path` and its base as one plain A3 checkpoint, with the tokenizer.

    Args:
        output: a folder that is new or empty.
        base: as in `load_model`.

    Raises:
        ValueError: no adapter, one with `rows: slots`, an output folder with something in it, or as `load_model`.
    """
    config = read_config(path)
    if config is None:
        raise ValueError(f"{path!r} holds no adapter (no adapter_config.json): nothing to merge")
    if isinstance(config, SlotLoraConfig):
        raise ValueError(f"{path}: {NOT_MERGED}")
    if Path(output).exists() and (not Path(output).is_dir() or any(Path(output).iterdir())):
        raise ValueError(f"output={str(output)!r} exists already; give a folder that is new or empty")
    tokenizer = load_tokenizer(path) if base is None else AutoTokenizer.from_pretrained(base)
    load_model(path, base=base).merge_and_unload(safe_merge=True).save_pretrained(output)
    tokenizer.save_pretrained(output)


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """How a base is held in 4 bits (QLoRA's NF4, twice quantised); its products are in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
