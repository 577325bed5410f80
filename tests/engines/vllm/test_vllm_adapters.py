"""Adapters in vLLM: on all rows, merged and by its LoRA; on slots alone, two of them in one batch."""

import pytest
from vllm.lora.request import LoRARequest

from a3_hf.adapters.checkpoints import merge
from a3_hf.engines.vllm.requests import Blanks
from tests.conftest import tiny_model
from tests.engines.vllm.cases import LAYOUTS, SHAPE, adapter, continued, filled, given_tokens, one_token_cases
from tests.engines.vllm.engines import ask, engine, num_equal

LORA = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 3}
WAYS = (
    {"group_size": 4},
    {},
    {"order": "random", "group_size": 2},
    {"strategy": "dynamic", "tokens_per_step": 2},
    {"group_size": 3, "do_sample": True, "temperature": 0.8, "seed": 2},
)


def cases_in_turn(model, ways) -> list:
    return [
        filled(model, Blanks(*layout, is_text=False), given_tokens(sum(layout[0]), number), **ways[number % len(ways)])
        for number, layout in enumerate(LAYOUTS)
    ]


@pytest.mark.parametrize("start", ["left_token", "query_embed"])
def test_adapters_of_slots_beside_each_other_and_beside_none(tmp_path, start):
    ones = [adapter(tmp_path, tiny_model(slot_start=start, **SHAPE), "slots", seed) for seed in (1, 2)]
    loras = [LoRARequest(f"slots{number}", number, one[2]) for number, one in enumerate(ones, start=1)]
    base = tiny_model(slot_start=start, **SHAPE)
    cases, requests = [], []
    for model, lora in (*((one[0], lora) for one, lora in zip(ones, loras, strict=True)), (base, None)):
        own = cases_in_turn(model, WAYS)
        cases += own
        requests += [lora] * len(own)
    with engine(str(tmp_path / "base"), hf_overrides={"canvas_length": 24}, **LORA) as llm:
        assert num_equal(cases, ask(llm, cases, lora=requests)) == len(cases)
        assert num_equal(cases, ask(llm, cases, lora=requests)) == len(cases)  # with cached prefixes


def test_adapters_of_all_rows_in_groups(tmp_path):
    model, _, exported = adapter(tmp_path, tiny_model(slot_start="query_embed", **SHAPE), "all", 3)
    cases = cases_in_turn(model, WAYS)
    with engine(str(tmp_path / "base"), hf_overrides={"canvas_length": 24}, **LORA) as llm:
        assert num_equal(cases, ask(llm, cases, lora=[LoRARequest("all", 1, exported)] * len(cases))) == len(cases)


def test_adapters_of_all_rows_one_token_a_step_merged_and_by_lora(tmp_path):
    model, saved, exported = adapter(tmp_path, tiny_model(slot_start="left_token", **SHAPE), "all", 3)
    whole = tiny_model(slot_start="left_token", **SHAPE)
    cases = one_token_cases(model) + one_token_cases(whole)
    half, lora = len(LAYOUTS), LoRARequest("all", 1, exported)
    with engine(str(tmp_path / "base"), **LORA) as llm:
        assert num_equal(cases, ask(llm, cases, lora=[lora] * half + [None] * half)) == len(cases)
        # an adapter of slots would act on all rows here: vLLM refuses it by a weight that it does not know
        slots = adapter(tmp_path, tiny_model(slot_start="left_token", **SHAPE), "slots", 1)[2]
        with pytest.raises(ValueError, match="query_embed"):
            ask(llm, cases[:1], lora=[LoRARequest("slots", 2, slots)])
    save_tokenizer(tmp_path / "base")
    merge(saved, tmp_path / "merged")
    merged = [*cases[:half], continued(model, given_tokens(40, 9), 6)]
    with engine(str(tmp_path / "merged")) as llm:
        assert num_equal(merged, ask(llm, merged)) == len(merged)


def save_tokenizer(folder) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
