"""LoRA layers on all rows or on query slots only, and their attachment to a model."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn

from a3_hf.models.a3_llama.modeling_a3_llama import A3LlamaForCausalLM
from a3_hf.models.a3_llama.packed_layers import SlotFactors

from .arguments import LoraArguments

ADAPTER = "default"  # peft's name for a single adapter
# Stored as peft_type in adapter_config.json instead of LORA, so that peft rejects the file: it would adapt all rows.
SLOT_ADAPTER_TYPE = "A3_SLOT_LORA"
CONTENT_ONLY = ("k_proj", "v_proj")  # slots have no keys and values
NOT_MERGED = (
    "an adapter with rows: slots can't be merged: content tokens use the same weights. Keep adapter and base apart."
)


@dataclass
class SlotRows:
    """How many of a pass's last rows are query slots, said to the linear layers of one decoder layer."""

    number: int = 0


class SlotLinear(LoraLinear):
    # Identical to peft's LoRA linear layer except: the adapter acts on the last `slot_rows.number` rows only, and its output
    # is added in place, in the wider of both dtypes.
    slot_rows = SlotRows()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(x)
        num_slots = self.slot_rows.number
        if num_slots == 0 or self.disable_adapters:
            return result
        slots, adapted = x, result
        if num_slots < x.shape[1]:  # content rows come first
            slots, adapted = x[:, -num_slots:], result[:, -num_slots:]
        for name in self.active_adapters:
            down, up = self.lora_A[name].weight, self.lora_B[name].weight
            rows = slots.to(down.dtype).flatten(0, 1)
            if self.training:
                rows = self.lora_dropout[name](rows)
            rows = rows @ down.T
            if adapted.dtype == up.dtype and (len(x) == 1 or num_slots == x.shape[1]):
                adapted.flatten(0, 1).addmm_(rows, up.T, alpha=self.scaling[name])  # a view: one operation
            else:
                adapted.add_((rows @ up.T).view_as(adapted), alpha=self.scaling[name])
        return result

    def slot_factors(self) -> list[SlotFactors]:
        """What the active adapters add to slots, for `PackedLayers`."""
        return [
            SlotFactors(self.lora_A[name].weight, self.lora_B[name].weight, scale) for name, scale in self.slot_state()
        ]

    def slot_state(self) -> list[tuple[str, float]]:
        """The active adapters and their scales."""
        return [] if self.disable_adapters else [(name, self.scaling[name]) for name in self.active_adapters]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NOT_MERGED)


@dataclass
class A3LoraConfig(LoraConfig):
    # Identical to LoraConfig except: it stores the `slot_start` and the `suffix_template` of the model that the adapter was
    # trained in. `slot_start` None: the adapter was saved before it was stored.
    slot_start: str | None = None
    suffix_template: str | None = None


@dataclass
class SlotLoraConfig(A3LoraConfig):
    # Identical to A3LoraConfig except: linear layers become `SlotLinear`, and the saved type is `SLOT_ADAPTER_TYPE`.
    def __post_init__(self):
        super().__post_init__()
        self._register_custom_module({nn.Linear: SlotLinear})

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "peft_type": SLOT_ADAPTER_TYPE}


class _LoadedByA3Alone:
    """Config class that peft finds for `SLOT_ADAPTER_TYPE`: it raises, as peft and transformers would adapt all rows."""

    def __init__(self, **settings):
        raise ValueError(
            f"an adapter of type {SLOT_ADAPTER_TYPE} acts on an A3 model's query slots only, which peft and the Auto classes "
            "don't support. Load it by a3_hf.adapters.checkpoints.load_model(path)."
        )

    @classmethod
    def from_pretrained(cls, *args, **settings):
        return cls()


PEFT_TYPE_TO_CONFIG_MAPPING[SLOT_ADAPTER_TYPE] = _LoadedByA3Alone


def attach(model: A3LlamaForCausalLM, lora: LoraArguments) -> PeftModel:
    """Attaches new adapters, initialised from torch's global generator and with zero output, to a model. Only the adapters
    and `query_embed` are trained and saved; trained weights are in fp32, whatever the base's dtype.

    Raises:
        ValueError: an error of `target_names`.
    """
    kind = SlotLoraConfig if lora.rows == "slots" else A3LoraConfig
    return wrap_model(
        model,
        kind(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=target_names(model, lora),
            modules_to_save=["query_embed"],
            slot_start=model.config.slot_start,
            suffix_template=model.config.suffix_template,
        ),
    )


def wrap_model(model: A3LlamaForCausalLM, config: A3LoraConfig) -> PeftModel:
    """Returns the model with the adapters that `config` describes; trainable weights are in fp32."""
    adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # in bfloat16, most optimiser updates would be rounded to zero
    if isinstance(config, SlotLoraConfig):
        _check_slots_alone(adapted)
        model.model.content_is_frozen = True
    for layer in model.model.layers:
        linears = [module for module in layer.modules() if isinstance(module, SlotLinear)]
        if linears:
            slot_rows = SlotRows()
            for linear in linears:
                linear.slot_rows = slot_rows
            # A hook on attention, not on the layer or the model: gradient checkpointing recomputes it first.
            layer.self_attn.register_forward_pre_hook(partial(_count_slots, slot_rows), with_kwargs=True)
    return adapted


def _check_slots_alone(adapted: PeftModel) -> None:
    """Raises RuntimeError unless peft made every adapted layer a `SlotLinear`, and made at least one."""
    others = {
        type(module).__name__
        for module in adapted.modules()
        if isinstance(module, LoraLayer) and not isinstance(module, SlotLinear)
    }
    if others or not any(isinstance(module, SlotLinear) for module in adapted.modules()):
        raise RuntimeError(
            f"peft {peft.__version__} made {', '.join(sorted(others)) or 'no layer'}: rows: slots expects SlotLinear. "
            "LoraConfig._register_custom_module has no effect in this peft, so adapters would act on content tokens"
        )


def _count_slots(slot_rows: SlotRows, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    hidden_states = args[0] if args else kwargs["hidden_states"]
    slot_rows.number = hidden_states.shape[1] - kwargs["content_length"]


def target_names(model: nn.Module, lora: LoraArguments) -> list[str]:
    """Returns peft's `target_modules` for `lora` in a model: name suffixes of linear layers.

    Raises:
        ValueError: a target that matches no linear layer of the decoder, or with `rows: slots` a key or value projection.
    """
    linears = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    ]
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    if lora.rows == "slots":
        kinds = [kind for kind in kinds if kind not in CONTENT_ONLY]
    if lora.target == "all-linear":
        return kinds
    for target in lora.target:
        matched = [name for name in linears if f".{name}".endswith(f".{target}")]
        if not matched:
            raise ValueError(
                f"lora.target={target!r} matches no linear layer of the decoder: expected {', '.join(kinds)}, or a name "
                f"in one layer ({linears[0]!r})"
            )
        if lora.rows == "slots" and matched[0].endswith(CONTENT_ONLY):
            raise ValueError(
                f"lora.target={target!r} makes keys or values, which slots don't have: with rows: slots, expected "
                f"{', '.join(kinds)}"
            )
    return lora.target
