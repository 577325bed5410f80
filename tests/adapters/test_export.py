"""Adapters in PEFT's own form, for engines that load LoRA."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from a3_hf.adapters.export import export
from tests.adapters.test_adapters import IDS, content_alone, save_adapter


def test_an_exported_adapter_of_all_rows_is_pefts_own(tmp_path):
    model, path = save_adapter(tmp_path, "all")
    export(path, tmp_path / "exported")
    settings = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["a3_rows"] == "all" and settings["slot_start"] == "query_embed"
    start = load_file(tmp_path / "exported" / "query_embed.safetensors")["query_embed.weight"]
    assert torch.equal(start, model.get_base_model().model.query_embed.weight.detach())
    # any LLaMA takes it, by peft alone
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(llama, str(tmp_path / "exported"))
    with torch.no_grad():
        assert (loaded(IDS).logits - content_alone(model)).abs().max() < 1e-3


def test_an_exported_adapter_of_slots_has_a_weight_that_no_other_loader_knows(tmp_path):
    _, path = save_adapter(tmp_path, "slots")
    export(path, tmp_path / "exported")
    settings = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert settings["a3_rows"] == "slots" and settings["r"] == 4 and "modules_to_save" not in settings
    weights = load_file(tmp_path / "exported" / "adapter_model.safetensors")
    assert [name for name in weights if "lora_" not in name] == ["base_model.model.model.query_embed.weight"]
    assert not (tmp_path / "exported" / "query_embed.safetensors").exists()


def test_what_can_not_be_exported(tmp_path):
    _, path = save_adapter(tmp_path, "all")
    with pytest.raises(ValueError, match="nothing to export"):
        export(str(tmp_path / "base"), tmp_path / "exported")
    with pytest.raises(ValueError, match="new or empty"):
        export(path, tmp_path / "base")
