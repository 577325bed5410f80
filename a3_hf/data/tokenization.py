"""Text to token ids: special tokens spelled in a document are text."""

from transformers import PreTrainedTokenizerBase


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, boundary_id: int) -> list[list[int]]:
    """The ids of each text, without special tokens, and its boundary."""
    return [[*ids, boundary_id] for ids in encode_documents(texts, tokenizer)]


def encode_documents(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each text, without special tokens: where it spells one ("</s>" in HTML), those are letters like others.

    Raises:
        ValueError: a special token in a text, with a tokenizer that has no other way to write its letters.
    """
    # `verbose` would warn that a document is longer than the context, which is what packing is for.
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return [ids if special.isdisjoint(ids) else _spelled(ids, special, tokenizer) for ids in encoded]


def _spelled(ids: list[int], special: set[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids` with special tokens, which the tokenizer's own merges may make of their letters, letter by letter."""
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
            f"a document holds {found!r}, which the tokenizer of {tokenizer.name_or_path!r} takes for a special token "
            "whatever it is told: take it out of the text, or take another tokenizer"
        )
    return flat


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands at padding."""
    # Any id will do, since nothing reads it; LLaMA's tokenizers have no padding token.
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
