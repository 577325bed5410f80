"""The identity of a model for lm-eval's cache: its weights, its tokenizer, and its arguments."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Arguments that change only how fast and where answers are computed.
SPEED_ALONE = ("batch_size", "max_batch_size", "device")
ABOUT_FILES = ("_name_or_path", "transformers_version")


def identity_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that determines the answers of `model`, with the arguments `given`, as JSON values."""
    arguments = {name: value for name, value in given.items() if name not in SPEED_ALONE}
    return {
        "arguments": json.loads(json.dumps(arguments, sort_keys=True, default=lambda value: type(value).__name__)),
        "weights": _of_weights(model),
        "config": _of_text(_without_files(model.config.to_dict()), _without_files(model.generation_config.to_dict())),
        "tokenizer": _of_text(
            tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab(),
            tokenizer.special_tokens_map,
            tokenizer.chat_template,
        ),
    }


def _of_weights(model: PreTrainedModel) -> str:
    """SHA-256 of all weights: a few seconds for 8B parameters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _without_files(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in ABOUT_FILES}


def _of_text(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
