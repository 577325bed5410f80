"""`infill` on vLLM's `LLM` against the model's own, with a plain LLaMA served as A3."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from a3_hf import A3LlamaForCausalLM
from a3_hf.engines.vllm.offline import infill
from tests.conftest import tiny_model
from tests.engines.vllm.cases import SHAPE
from tests.engines.vllm.engines import engine

TEXTS = ["The dog <blank:3> home. Tom <blank:4> happy.", "Tom was <blank:2..5>, and so was <blank:3>."]
AS_A3 = {"architectures": ["A3LlamaForCausalLM"], "model_type": "a3_llama", "slot_start": "left_token"}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A LLaMA that nobody converted."""
    path = tmp_path_factory.mktemp("llama")
    model = tiny_model(slot_start="left_token", **{**SHAPE, "vocab_size": 320})
    own = {"model_type", "slot_start", "suffix_template", "architectures"}
    settings = {name: value for name, value in model.config.to_dict().items() if name not in own}
    llama = LlamaForCausalLM(LlamaConfig(**settings)).double()
    llama.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "query_embed" not in name})
    llama.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path), A3LlamaForCausalLM.from_pretrained(path).eval()


def test_infill_in_one_call(folder, tokenizer):
    path, model = folder
    expected = model.infill(tokenizer, TEXTS, return_outputs=True)
    with engine(path, hf_overrides=AS_A3, skip_tokenizer_init=False) as llm:
        rows = infill(llm, TEXTS, temperature=0.0, logprobs=0)
        assert [row.text() for row in rows] == expected.texts and [row.written for row in rows] == expected.written
        assert len(infill(llm, TEXTS[0], n=3, seed=1)) == 3
        with pytest.raises(ValueError, match="canvas_length"):
            infill(llm, TEXTS, group_size=2)
    with engine(path, hf_overrides=AS_A3, skip_tokenizer_init=False, max_model_len=40) as llm:
        refused = []
        for length in range(18, 30):  # up to the last place, and beyond
            text = f"The dog <blank:3> home. Tom <blank:{length}> happy."
            try:
                [row] = infill(llm, text, temperature=0.0)
            except ValueError:
                refused.append(length)
            else:
                assert row.text() == model.infill(tokenizer, text) and not refused
        assert 0 < len(refused) < 12
    with engine(path, hf_overrides={**AS_A3, "canvas_length": 16}, skip_tokenizer_init=False) as llm:
        for settings in ({"group_size": 2}, {"strategy": "dynamic", "tokens_per_step": 2}, {"order": "right_to_left"}):
            rows = infill(llm, TEXTS, temperature=0.0, **settings)
            assert [row.text() for row in rows] == model.infill(tokenizer, TEXTS, **settings)
