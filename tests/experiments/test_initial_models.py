"""Starts for training from scratch: texts come back as they were, all architectures load them, no half of one is left."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaForCausalLM

from a3_hf import A3LlamaForCausalLM, DecoupledRopeLlamaForCausalLM
from a3_hf.adapters.checkpoints import load_tokenizer
from a3_hf.experiments import initial_models as starts
from a3_hf.experiments.initial_models import character_tokenizer, make_start
from a3_hf.models.masked_diffusion_llama.modeling_masked_diffusion_llama import MaskedDiffusionLlamaForCausalLM
from a3_hf.training import run as train_module
from a3_hf.training.recipes import parse_recipe
from tests.conftest import CORPUS

TEXT = "\n".join(CORPUS) + "  \t“café” — it's 3\r\n\n"
CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


def make(folder, **changes) -> None:
    make_start(folder, **{"text": TEXT, "tokenizer": "characters", "config": CONFIG, "seed": 3, **changes})


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts") / "characters"
    make(folder)
    return folder


def test_each_character_is_a_token_and_texts_come_back(start):
    tokenizer = load_tokenizer(str(start))
    assert tokenizer.get_vocab() == {
        token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *sorted(set(TEXT))])
    }
    for text in (TEXT, "  Tom  \n ran .", "\n", " ", "don 't ,"):
        ids = tokenizer(text)["input_ids"]
        assert ids == [tokenizer.convert_tokens_to_ids(character) for character in text]
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("aßßa")["input_ids"][1:3] == [tokenizer.unk_token_id] * 2
    named = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert named == (0, 1, 2, 3)


def test_rare_characters_are_unknown_where_asked():
    tokenizer = character_tokenizer("aabbbc", min_count=2)
    assert tokenizer("abc")["input_ids"] == [4, 5, tokenizer.unk_token_id]


def test_all_architectures_load_it_with_the_same_weights(start):
    llama = LlamaForCausalLM.from_pretrained(start)
    tokenizer = load_tokenizer(str(start))
    assert llama.config.vocab_size == len(tokenizer)
    assert [llama.config.pad_token_id, llama.config.bos_token_id, llama.config.eos_token_id] == [0, 1, 2]
    size = sum(weight.numel() for weight in llama.parameters())
    for kind, more in (
        (A3LlamaForCausalLM, 16),  # query_embed
        (DecoupledRopeLlamaForCausalLM, 0),
        (MaskedDiffusionLlamaForCausalLM, 16),  # the row of the mask
    ):
        model = kind.from_pretrained(start)
        if kind is MaskedDiffusionLlamaForCausalLM:
            assert model.set_mask_token(tokenizer) == len(tokenizer)
        assert sum(weight.numel() for weight in model.parameters()) == size + more
        for name, weight in llama.state_dict().items():
            assert torch.equal(model.state_dict()[name][: len(weight)], weight)


def test_the_weights_come_from_the_seed_alone(start, tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    make(tmp_path / "same")
    assert torch.equal(torch.get_rng_state(), before)
    make(tmp_path / "other", seed=4)
    folders = (start, tmp_path / "same", tmp_path / "other")
    weights = [LlamaForCausalLM.from_pretrained(folder).model.embed_tokens.weight for folder in folders]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_recipe_trains_from_it(start, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model_name_or_path: {start}
train_file: {tmp_path / "text.txt"}
block_size: 32
curriculum: {{unit: fraction, stages: [{{name: permute, group_size: 1}}]}}
max_steps: 2
per_device_train_batch_size: 2
use_cpu: true
save_strategy: "no"
output_dir: {tmp_path / "run"}
"""
    )
    assert train_module.run(parse_recipe(recipe)) == 0
    assert A3LlamaForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == 4 + len(set(TEXT))


def test_made_once(start):
    before = {path: path.stat().st_mtime_ns for path in start.iterdir()}
    make(start, config=dict(reversed(CONFIG.items())))
    assert {path: path.stat().st_mtime_ns for path in start.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seed": 4}, "seed=3, not 4"),
        ({"text": TEXT + "x"}, "another text"),
        ({"config": {**CONFIG, "hidden_size": 32}}, "config="),
        ({"min_count": 2}, "min_count=1, not 2"),
    ],
)
def test_other_settings_want_another_folder(start, changes, what):
    with pytest.raises(ValueError, match=what) as error:
        make(start, **changes)
    assert f"Remove {start}" in str(error.value)


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no start\.json"):
        make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_killed_on_the_way_it_leaves_nothing_to_be_taken_for_whole(tmp_path, monkeypatch):
    folder = tmp_path / "start"

    def fail(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(starts.PreTrainedTokenizerFast, "save_pretrained", fail)
        with pytest.raises(KeyboardInterrupt):
            make(folder)
    assert list(tmp_path.iterdir()) == []
    make(folder)
    assert json.loads((folder / "start.json").read_text())["seed"] == 3


def test_several_at_once_make_one(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: make(tmp_path / "start"), range(4)))
    assert [path.name for path in tmp_path.iterdir()] == ["start"]
    LlamaForCausalLM.from_pretrained(tmp_path / "start")


def test_one_that_comes_second_finds_the_first(tmp_path, monkeypatch):
    folder, save = tmp_path / "start", starts.LlamaForCausalLM.save_pretrained

    def another_is_faster(self, *args, **kwargs):
        monkeypatch.setattr(starts.LlamaForCausalLM, "save_pretrained", save)
        make(folder, seed=other_seed)
        return save(self, *args, **kwargs)

    for other_seed, message in ((3, None), (4, "seed=4, not 3")):
        folder = tmp_path / str(other_seed)
        monkeypatch.setattr(starts.LlamaForCausalLM, "save_pretrained", another_is_faster)
        if message is None:
            make(folder)
        else:
            with pytest.raises(ValueError, match=message):
                make(folder)
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tokenizer": "words"}, "tokenizer='words'"),
        ({"config": {**CONFIG, "hiden_size": 16}}, r"config: unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ({"config": {**CONFIG, "vocab_size": 99}}, r"config\.vocab_size=99"),
        ({"text": ""}, "text has 0 characters"),
        ({"text": "abc", "min_count": 2}, "none of them min_count=2 times"),
        ({"text": "an end</s>"}, "text: expected no '</s>'"),
        ({"min_count": 0}, "min_count=0"),
    ],
)
def test_bad_input(tmp_path, changes, what):
    with pytest.raises(ValueError, match=what):
        make(tmp_path / "start", **changes)
    assert list(tmp_path.iterdir()) == []
