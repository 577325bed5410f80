"""A draft head's folder as a checkpoint: loaded with its base, in Python and at the command line."""

import shutil

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM
from typer.testing import CliRunner

from a3_hf.adapters.checkpoint_info import CheckpointInfo
from a3_hf.adapters.checkpoints import check_start, load_model, load_tokenizer
from a3_hf.cli import app
from a3_hf.evaluation.lm_harness.a3_lm import A3LM
from a3_hf.models.a3_draft_head.configuration_a3_draft_head import DraftHeadConfig
from a3_hf.models.a3_draft_head.modeling_a3_draft_head import DraftHead


@pytest.fixture
def folder(source, tmp_path, monkeypatch):
    """A head beside a copy of its base, which it names by a relative path."""
    shutil.copytree(source, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    config = AutoConfig.from_pretrained("base")
    DraftHead(DraftHeadConfig.for_base(config, rank=2, sampler_size=4, base_model_name_or_path="base")).save_pretrained(
        "head"
    )
    return tmp_path / "head"


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def test_it_loads_with_its_base(folder):
    info = CheckpointInfo.read("head")
    assert (info.is_draft_head, info.base, info.adapter_config, info.architecture) == (True, "base", None, "a3")
    model, tokenizer = load_model("head"), load_tokenizer("head")
    ids = torch.tensor([tokenizer("<s> w1 w2 w3", add_special_tokens=False)["input_ids"]])
    llama = LlamaForCausalLM.from_pretrained("base").eval()
    wanted = llama.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    output = model.generate_any_order(ids, max_new_tokens=12, strategy="speculative", eos_token_id=[])
    assert model.drafter is not None and torch.equal(output.sequences, wanted)
    (folder.parent / "base").rename(folder.parent / "moved")
    with pytest.raises(ValueError, match=r"head: its base 'base': no such folder .* \(--base\)"):
        CheckpointInfo.read("head")
    assert load_model("head", base="moved").drafter is not None


def test_the_command_line_writes_the_bases_text(folder):
    drafted = run("generate", folder, "w1 w2", "--max-new-tokens", "9")
    assert drafted.exit_code == 0, drafted.output
    plain = run("generate", "base", "w1 w2", "--max-new-tokens", "9", "--slot-start", "left_token")
    assert drafted.stdout == plain.stdout
    chain = run("generate", folder, "w1 w2", "--max-new-tokens", "9", "--strategy", "speculative", "--draft", "head",
                "--verify", "content", "--draft-width", "1")  # fmt: skip
    assert chain.stdout == plain.stdout
    assert run("infill", folder, "w1 <blank:2> w3").exit_code == 0


def test_what_a_head_is_not_for_is_refused(folder):
    with pytest.raises(ValueError, match="holds a draft head, which changes no likelihood"):
        A3LM("head")
    info = CheckpointInfo.read("head")
    with pytest.raises(ValueError, match="holds a draft head: expected a model or an adapter to train"):
        check_start(info, None, info.model_config())
    with pytest.raises(
        ValueError, match="architecture='llama': expected 'a3' or 'draft_head', as head holds a draft head"
    ):
        load_model("head", architecture="llama")
    DraftHead(DraftHeadConfig.for_base(AutoConfig.from_pretrained("base"))).save_pretrained("lost")
    with pytest.raises(ValueError, match="lost holds a draft head whose config.json lacks base_model_name_or_path"):
        load_model("lost")
