"""Initial models for training from scratch: a folder with a random LLaMA and a character tokenizer."""

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from a3_hf.evaluation.measures.checks import check_counts
from a3_hf.settings import check_keys

SETTINGS_FILE = "start.json"
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Fields that the tokenizer decides.
NOT_IN_CONFIG = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")


def character_tokenizer(text: str, *, min_count: int = 1) -> PreTrainedTokenizerFast:
    """A tokenizer with `<pad>`, `<s>` (BOS), `</s>` (EOS), `<unk>`, and a token for each character of `text`, white space
    included. It adds no special tokens, and decodes texts of these characters unchanged.

    Args:
        min_count: characters that `text` holds fewer times become `<unk>`, as do those that it does not hold.

    Raises:
        ValueError: no character is left, or the text spells a special token, which could not be distinguished from the token.
    """
    check_counts(min_count=min_count)
    for token in SPECIAL_TOKENS.values():
        if token in text:
            raise ValueError(f"text: expected no {token!r}, which is a special token of the tokenizer")
    characters = sorted(character for character, count in Counter(text).items() if count >= min_count)
    if not characters:
        raise ValueError(
            f"text has {len(text)} characters, none of them min_count={min_count} times: expected more text"
        )
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS.values(), *characters])}
    # BPE without merges is its alphabet.
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL_TOKENS["unk_token"], fuse_unk=False)
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)


def make_start(
    folder: Path,
    *,
    text: str,
    tokenizer: Literal["characters"],
    config: Mapping[str, Any],
    seed: int,
    min_count: int = 1,
) -> None:
    """Writes a LLaMA with random weights and its tokenizer into `folder`, from which all four architectures start.

    The folder appears at once, complete, or not at all; one made from the same settings is kept. Several processes may call
    this at the same time. There is no mask token: `set_mask_token` of masked diffusion adds a row for it.

    Args:
        text: the training documents, from which the tokenizer is made. Other characters become `<unk>`.
        tokenizer: `"characters"`, see `character_tokenizer`; it decides the vocabulary's size and the special tokens.
        config: fields of `LlamaConfig`, e.g. `{"hidden_size": 64, "num_hidden_layers": 4, …}`.
        seed: seed of the weights.
        min_count: see `character_tokenizer`.

    Raises:
        ValueError: another tokenizer; a field that `LlamaConfig` does not have, or that the tokenizer decides; the errors of
            `character_tokenizer`; an existing folder that was made from other settings, or not by this function.
    """
    if tokenizer != "characters":
        raise ValueError(f"tokenizer={tokenizer!r}: expected 'characters'")
    for name in config:
        if name in NOT_IN_CONFIG:
            raise ValueError(f"config.{name}={config[name]!r}: the tokenizer decides it; leave it out")
    check_keys("config", config, set(LlamaConfig().to_dict()))
    settings = {
        "text": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        "tokenizer": tokenizer,
        "config": dict(config),
        "seed": seed,
        "min_count": min_count,
    }
    folder = Path(folder)
    if folder.exists():
        return _check_same(folder, settings)

    characters = character_tokenizer(text, min_count=min_count)
    tokens = {f"{name}_token_id": getattr(characters, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**config, **tokens, vocab_size=len(characters)))
        model.save_pretrained(unfinished)
        characters.save_pretrained(unfinished)
        (unfinished / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        unfinished.chmod(0o755)  # mkdtemp makes a folder that only its owner may read
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            _check_same(folder, settings)  # another process was faster
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    try:
        found = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"folder={str(folder)!r} exists and has no {SETTINGS_FILE}, so it is no start of this function. Set another "
            f"folder, or remove {folder}"
        ) from None
    for name, value in settings.items():
        # Compared as JSON, in which a tuple is a list.
        if found.get(name) != json.loads(json.dumps(value)):
            what = "another text" if name == "text" else f"{name}={found.get(name)!r}, not {value!r}"
            raise ValueError(f"folder={str(folder)!r} was made from {what}. Remove {folder} to make it again")
