"""Documents packed into rows of `block_size` tokens that start with BOS."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from .arguments import DataArguments
from .collator import IGNORED_LABEL
from .fim import FimRows
from .loading import load_documents, texts_of
from .tokenization import encode_documents, pad_id, tokenize

# The code that makes the rows: part of their cache's key.
CODE = "".join(
    Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("fim.py", "packing.py", "tokenization.py")
)
# 9 bytes per token on disk; datasets' default types would take 24.
ROW_FEATURES = Features(
    {"input_ids": List(Value("int32")), "attention_mask": List(Value("int8")), "labels": List(Value("int32"))}
)
ISOLATED_ROW_FEATURES = Features({**ROW_FEATURES, "document_ids": List(Value("int32"))})


def load_rows(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    context_length: int | None = None,
    suffix_template: str | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Packs text into rows of `block_size` tokens, or with `fim` cuts it into rows of one blank each (see `FimRows`).

    Documents are tokenized without special tokens and followed by the boundary token (`document_boundary`); each row is BOS
    and the next block_size − 1 tokens of this stream. Nothing is dropped: the last row is padded. Blank documents are skipped,
    and .txt documents are stripped of surrounding white space. For isolated documents see `pack_rows`.

    Evaluation data is `validation_file`, or the last `validation_documents` documents of the source, which are not trained on
    (a text that occurs twice is two documents), or none.

    Args:
        arguments: the data settings of a recipe. A .txt file is read as a whole, 2 GB at most.
        tokenizer: has a BOS token, and an EOS token if that is the boundary; needs no padding token.
        seed: the seed of `shuffle_documents`.
        context_length: the model's maximum number of tokens; None: not checked.
        suffix_template: the model's, for rows of this form.

    Returns:
        The rows to train on and to evaluate on (None: no evaluation data), with `input_ids`, `attention_mask` (0 at padding)
        and `labels`: the ids unshifted, −100 at padding and at the first token, which is given and never scored. With
        block_size 4, the documents "a b" and "c d", and EOS as boundary:
            {"input_ids": [bos, a, b, eos], "attention_mask": [1, 1, 1, 1], "labels": [-100, a, b, eos]}
            {"input_ids": [bos, c, d, eos], "attention_mask": [1, 1, 1, 1], "labels": [-100, c, d, eos]}
        Isolated documents add `document_ids`.

    Raises:
        ValueError: a file that is missing, of an unknown kind, empty or damaged; no text in `text_column`, or none left to
            train on; a separator without a .txt file; the errors of `check_tokens`.
    """
    boundary_id = check_tokens(arguments, tokenizer, context_length=context_length)
    train, evaluation = load_documents(arguments)
    if arguments.shuffle_documents:
        train = train.shuffle(seed=seed)

    parts = [(train, arguments.max_train_rows)]
    if evaluation is not None:
        parts.append((evaluation, arguments.max_eval_rows))
    if arguments.fim is None:
        is_isolated = arguments.documents == "isolated"
        make_rows, features = _packed_rows, ISOLATED_ROW_FEATURES if is_isolated else ROW_FEATURES
        settings = {"boundary_id": boundary_id, "block_size": arguments.block_size, "isolated": is_isolated}
    else:
        fim = FimRows(
            arguments.fim, tokenizer, block_size=arguments.block_size, seed=seed, suffix_template=suffix_template
        )
        make_rows, features, settings = _fim_rows, ROW_FEATURES, {"fim": fim}
    rows = [
        Dataset.from_generator(
            make_rows,
            features=features,
            cache_dir=arguments.cache_dir,
            gen_kwargs={
                "documents": documents,
                "tokenizer": tokenizer,
                **settings,
                "max_rows": max_rows,
                "code": CODE,
            },
        )
        for documents, max_rows in parts
    ]
    return rows[0], rows[1] if len(rows) == 2 else None


def check_tokens(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None = None
) -> int:
    """Returns the id of the token after each document.

    Raises:
        ValueError: block_size above `context_length`; a tokenizer without BOS or without the boundary token.
    """
    if context_length is not None and arguments.block_size > context_length:
        raise ValueError(
            f"block_size={arguments.block_size}: expected at most the model's context of {context_length} tokens"
        )
    tokens = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    if tokens["bos"] is None:
        raise ValueError(
            "the tokenizer has no BOS token, with which rows start. Set tokenizer.bos_token, or tokenizer_name_or_path to a "
            "tokenizer that has one"
        )
    if tokens[arguments.document_boundary] is None:
        raise ValueError(
            f"document_boundary={arguments.document_boundary!r}: the tokenizer has no such token. Set "
            f"tokenizer.{arguments.document_boundary}_token, or the other boundary"
        )
    return tokens[arguments.document_boundary]


def pack_rows(
    documents: Iterable[Sequence[int]], *, bos_id: int, pad_id: int, block_size: int, isolated: bool = False
) -> Iterator[tuple[dict[str, list[int]], int]]:
    """Packs documents, token ids that end with the boundary, into rows of `block_size` tokens.

    Joined: a row is BOS and the next block_size − 1 tokens of the stream of all documents. Isolated (not specified in the
    paper): each document of a row starts with its own BOS, which is given and never scored, and `document_ids` numbers them
    from 1, 0 at padding. A document that does not fit continues in the next row after that row's BOS, without seeing the row
    before; a row with room for BOS only is padded.

    Yields:
        A row, and the number of tokens of the last read document in this row and those before. A row is yielded when full,
        before another document is read; the last one is padded. With block_size 6, isolated, of [a, b, eos], [c, d, eos]:
            {"input_ids": [bos, a, b, eos, bos, c], "attention_mask": [1, 1, 1, 1, 1, 1],
             "labels": [-100, a, b, eos, -100, c], "document_ids": [1, 1, 1, 1, 2, 2]}, 1
            {"input_ids": [bos, d, eos, pad, pad, pad], "attention_mask": [1, 1, 1, 0, 0, 0],
             "labels": [-100, d, eos, -100, -100, -100], "document_ids": [1, 1, 1, 0, 0, 0]}, 3
    """
    ids, labels, document_ids, used = [], [], [], 0

    def start(document_id: int) -> None:
        ids.append(bos_id)
        labels.append(IGNORED_LABEL)
        document_ids.append(document_id)

    def row() -> dict[str, list[int]]:
        padding = block_size - len(ids)
        full = {
            "input_ids": [*ids, *[pad_id] * padding],
            "attention_mask": [1] * len(ids) + [0] * padding,
            "labels": [*labels, *[IGNORED_LABEL] * padding],
        }
        if isolated:
            full["document_ids"] = [*document_ids, *[0] * padding]
        for column in (ids, labels, document_ids):
            column.clear()
        return full

    for tokens in documents:
        used = 0
        if ids and isolated:
            start(document_ids[-1] + 1)
        while used < len(tokens):
            if not ids:
                start(1)
            piece = tokens[used : used + block_size - len(ids)]
            ids += piece
            labels += piece
            document_ids += [document_ids[-1]] * len(piece)
            used += len(piece)
            # Isolated: no BOS without a token after it.
            if len(ids) > block_size - (2 if isolated else 1):
                yield row(), used
    if ids:
        yield row(), used


def _packed_rows(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    boundary_id: int,
    block_size: int,
    isolated: bool,
    max_rows: int | None,
    code: str,
) -> Iterator[dict[str, list[int]]]:
    """Yields at most `max_rows` rows of `documents`, and tokenizes no more than they need. `code` is unused: datasets hashes
    the arguments as the key of its cache and would not notice a change in this file.
    """
    rows = pack_rows(
        _tokenized(documents, tokenizer, boundary_id),
        bos_id=tokenizer.bos_token_id,
        pad_id=pad_id(tokenizer),
        block_size=block_size,
        isolated=isolated,
    )
    for row, _ in itertools.islice(rows, max_rows):
        yield row


def _fim_rows(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, fim: FimRows, max_rows: int | None, code: str
) -> Iterator[dict[str, list[int]]]:
    """Yields at most `max_rows` rows of `documents`; `code` as in `_packed_rows`."""
    texts = ([text for text in texts_of(batch) if text.strip()] for batch in documents.iter(1000))
    ids = itertools.chain.from_iterable(encode_documents(batch, tokenizer) for batch in texts if batch)
    yield from itertools.islice(fim.rows(ids), max_rows)


def _tokenized(documents: Dataset, tokenizer: PreTrainedTokenizerBase, boundary_id: int) -> Iterator[list[int]]:
    for batch in documents.iter(1000):
        texts = [text for text in texts_of(batch) if text.strip()]
        if texts:
            yield from tokenize(texts, tokenizer, boundary_id=boundary_id)
