"""Keys of cached blocks. vLLM's prefix cache knows tokens, not their positions: two lengths of a blank before the same text
would share keys that differ. vLLM has no hook for it (its extra keys come from images, adapters, embeddings and a salt), so
one of its functions is wrapped; `start_check` tests what comes out of it.
"""

from vllm.v1.core import kv_cache_utils

from .requests import Blanks

WRAPPED = "generate_block_hash_extra_keys"


def blank_keys(request, end: int) -> tuple:
    """Returns what the key of a block that ends at place `end` of a request holds beside its tokens. Blocks inside the text
    before the first blank have plain LLaMA's key, and are shared with plain requests; later given text is shared by requests
    with the same blanks before it; the rest, whose order of writing and places are the request's own, by nobody.
    """
    if not hasattr(request, "a3_blanks"):  # read once for all blocks
        request.a3_blanks = _read_blanks(request)
    blanks = request.a3_blanks
    if blanks is None or end <= blanks.pieces[0]:
        return ()
    if blanks.sampling is None and blanks.num_given == blanks.pieces[0]:
        return ()  # written behind the whole text, from the left: a plain continuation
    if end <= blanks.num_given:
        covered, shape = 0, []
        for piece, length in zip(blanks.pieces, blanks.lengths, strict=False):
            covered += piece
            if covered >= end:
                break
            shape += [piece, length]
        return (("a3", *shape),)
    return (("a3", request.request_id, request.arrival_time),)


def _read_blanks(request) -> Blanks | None:
    try:
        return Blanks.of(request.sampling_params)
    except ValueError:
        return None  # of another model: A3's requests were checked on arrival


def wrap_block_keys() -> None:
    """Wraps vLLM's function, once in a process."""
    original = getattr(kv_cache_utils, WRAPPED, None)
    if original is None or hasattr(original, "without_blanks"):  # the start check tells of a function that is not there
        return

    def generate_block_hash_extra_keys(request, start_token_idx, end_token_idx, start_mm_idx):
        keys, mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        return ((keys or ()) + blank_keys(request, end_token_idx)) or None, mm_idx

    generate_block_hash_extra_keys.without_blanks = original
    setattr(kv_cache_utils, WRAPPED, generate_block_hash_extra_keys)
