"""Tokenization of documents; special tokens in them are read as plain text."""

from transformers import PreTrainedTokenizerBase


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, boundary_id: int) -> list[list[int]]:
    """Returns the ids of each text, without special tokens, followed by the boundary token."""
    return [[*ids, boundary_id] for ids in encode_documents(texts, tokenizer)]


def encode_documents(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the ids of each text without special tokens: "</s>" in HTML is encoded as plain characters.

    Raises:
        ValueError: a special token in a text that the tokenizer can't encode as characters.
    """
    # `verbose` would warn of documents longer than the context; packing cuts them.
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return [ids if special.isdisjoint(ids) else _spelled(ids, special, tokenizer) for ids in encoded]


def _spelled(ids: list[int], special: set[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Replaces special tokens in `ids`, which the tokenizer's merges may produce from characters, by their characters."""
    pieces = [tokenizer.convert_ids_to_tokens(token) if token in special else None for token in ids]
    letters = tokenizer.backend_tokenizer.model.tokenize if tokenizer.is_fast else None
    spelled = [
        [token] if piece is None else [part.id for letter in piece for part in letters(letter)] if letters else [token]
        for token, piece in zip(ids, pieces, strict=True)
    ]
    flat = [token for part in spelled for token in part]
    if not special.isdisjoint(flat):
        found = next(piece for piece in pieces if piece is not None)
        raise ValueError(
            f"a document holds {found!r}, which the tokenizer of {tokenizer.name_or_path!r} always encodes as a special "
            "token. Remove it from the text, or use another tokenizer"
        )
    return flat


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the padding token's id, or 0 if there is none (as in LLaMA's tokenizers); models ignore it."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
