"""Cuts documents into windows of tokens, and stretches contexts to hold longer ones."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import LlamaConfig, PreTrainedTokenizerBase

from a3_hf.data.tokenization import encode_documents
from a3_hf.models.a3_llama.infilling_templates import encode_prompt

# The types of RoPE scaling whose angles do not depend on the batch, and the keys that each needs besides its factor.
# ("dynamic" and "longrope" depend on the longest row.)
SCALINGS = {"linear": (), "yarn": (), "llama3": ("low_freq_factor", "high_freq_factor")}
SCALING_OPTIONS = {
    "linear": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": (),
}

SCALE = ". Shorten it, or stretch the context with rope_scaling"  # a remedy in messages


class Window(NamedTuple):
    """Neighbouring tokens of a document: those that are given, then those that are scored."""

    given: tuple[int, ...]
    scored: tuple[int, ...]


def rolling_windows(ids: list[int], *, start_id: int, length: int) -> list[Window]:
    """Cuts a document as lm-eval's `loglikelihood_rolling` does, with a context of one token: every token is scored in
    exactly one window, of at most `length` scored tokens. The first window is given `start_id`, each later one the token
    before it; a shorter last window is given as many tokens before it as fill it.
    """
    pairs = get_rolling_token_windows(token_list=ids, prefix_token=start_id, max_seq_len=length, context_len=1)
    return [Window(*map(tuple, make_disjoint_window(pair))) for pair in pairs]


def cut_windows(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int) -> list[Window]:
    """Cuts documents into windows (`rolling_windows`), the first of each document after BOS. As in lm-eval, the last token
    of a full window has the position `length`, one beyond the context.

    Raises:
        ValueError: a length below 2, no document, an empty one, a tokenizer without BOS.
    """
    if length < 2:
        raise ValueError(f"max_length={length}: expected at least 2 tokens")
    if not documents:
        raise ValueError("documents is empty: expected at least one text")
    windows = []
    for number, document in enumerate(documents, start=1):
        (bos,) = encode_prompt(tokenizer, "")
        (ids,) = encode_documents([document], tokenizer)
        if not ids:
            raise ValueError(f"document {number} is empty: expected at least one token to score")
        windows += rolling_windows(ids, start_id=bos, length=length)
    return windows


def scale_rope(config: LlamaConfig, rope_scaling: Mapping[str, Any]) -> None:
    """Multiplies the context of a model that is not loaded yet by `factor`.

    Args:
        config: changed in place: `rope_parameters` (except `rope_theta`) and `max_position_embeddings`.
        rope_scaling: `rope_type` ("linear", "yarn" or "llama3"), `factor`, and the type's other options;
            `original_max_position_embeddings`, the context of training, defaults to the config's `max_position_embeddings`.

    Raises:
        ValueError: a type that is unknown or whose angles depend on the batch, a missing or unknown key, a factor below 1.
    """
    given = dict(rope_scaling)
    kind, factor = given.get("rope_type"), given.get("factor")
    if kind not in SCALINGS:
        raise ValueError(f"rope_scaling: rope_type={kind!r}: expected one of {', '.join(SCALINGS)}")
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor < 1:
        raise ValueError(f"rope_scaling: factor={factor!r}: expected a number of at least 1")
    needed = ("rope_type", "factor", *SCALINGS[kind])
    known = (*needed, *SCALING_OPTIONS[kind], "original_max_position_embeddings", "rope_theta")
    missing = [key for key in needed if key not in given]
    unknown = [key for key in given if key not in known]
    if missing or unknown:
        wrong = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}"
        raise ValueError(f"rope_scaling {wrong}: expected {', '.join(known)} with rope_type={kind!r}")
    original = given.pop("original_max_position_embeddings", config.max_position_embeddings)
    parameters = {"rope_theta": config.rope_parameters["rope_theta"], **given}
    if kind != "linear":
        parameters["original_max_position_embeddings"] = original
    config.rope_parameters = parameters
    config.max_position_embeddings = int(original * factor)
