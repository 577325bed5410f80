"""Data types by device, and settings of torch for GPUs, on machines that only pretend."""

import pytest
import torch
from transformers import AutoTokenizer

from a3_hf import devices
from a3_hf.cli import common
from a3_hf.cli.common import load, report_user_errors
from a3_hf.devices import default_dtype, has_bf16_products, leave_out_cudnn_attention
from tests.conftest import tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, torch.float32),
        ({"architecture": "arm64"}, torch.float32),
    ],
)
def test_a_cpu_computes_in_what_it_multiplies_fast(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert default_dtype(CPU) is expected and has_bf16_products(CPU) is (expected is torch.bfloat16)


def test_an_older_torch_does_not_tell_and_a_gpu_keeps_the_checkpoints_type(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert default_dtype(CPU) is torch.float32
    assert default_dtype(GPU) == default_dtype(torch.device("mps")) == "auto"
    assert not has_bf16_products(torch.device("mps"))


@pytest.mark.parametrize("supported", [True, False])
def test_emulated_products_of_a_gpu_do_not_count(monkeypatch, supported):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or supported
    )
    assert has_bf16_products(GPU) is supported


@pytest.mark.parametrize(
    ("on_gpu", "environment", "calls"),
    [(True, None, [False]), (True, "0", []), (True, "1", []), (False, None, [])],
)
def test_cudnn_stays_out_of_attention_unless_the_environment_decides(monkeypatch, on_gpu, environment, calls):
    called = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", called.append)
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    if environment is not None:
        monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", environment)
    leave_out_cudnn_attention()
    assert called == calls


def test_every_command_leaves_it_out(monkeypatch):
    called = []
    monkeypatch.setattr(devices, "leave_out_cudnn_attention", lambda: called.append("before"))
    report_user_errors(lambda: called.append("action"))
    assert called == ["before", "action"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_commands_load_a_bf16_checkpoint_as_the_cpu_likes_it(source, tmp_path, monkeypatch, capsys, dtype):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "default_dtype", default_dtype)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": dtype == torch.bfloat16}, raising=False)
    model, _ = load(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    said = capsys.readouterr()
    has = "has" if dtype == torch.bfloat16 else "has no"
    assert f"Computing in {str(dtype)[6:]}: this CPU {has} bfloat16 products.\n" in said.err and not said.out


@pytest.mark.parametrize(
    ("dtype", "most", "is_packed"),
    [(torch.float32, 10**9, True), (torch.float32, 10, False), (torch.bfloat16, 10**9, False)],
)
def test_commands_pack_small_models_in_float32(source, monkeypatch, dtype, most, is_packed):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "default_dtype", lambda device: dtype)
    monkeypatch.setattr(common, "PACKED_PARAMETERS", most)
    model, _ = load(str(source))
    assert (model.model.packed_layers is not None) == is_packed
