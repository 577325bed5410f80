"""What a3_hf takes for granted about the libraries it stands on. Runs first: where a new release breaks something, this file
says what has changed.
"""

import importlib
import inspect
import json
import subprocess
import sys
import tomllib
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    TextDiffusionStreamer,
    Trainer,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.utils import logging

import a3_hf
from a3_hf import (
    A3LlamaForCausalLM,
    A3LlamaModel,
    DecoupledRopeLlamaConfig,
    DecoupledRopeLlamaForCausalLM,
    MaskedDiffusionLlamaConfig,
    MaskedDiffusionLlamaForCausalLM,
)
from a3_hf.models.a3_llama.caching import CACHE, PAGED
from a3_hf.versions import warn_if_newer
from tests.conftest import compiles_flex, tiny_config

IDS = torch.tensor([[1, 5, 9, 14, 3, 8]])
GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}

# Each interface that is not documented, by the file that uses it: (module, dotted name, parameters that are given by name).
PRIVATE = {
    "models/a3_llama/attention": [
        ("transformers.models.llama.modeling_llama", "eager_attention_forward", ["scaling", "dropout"]),
        ("transformers.models.llama.modeling_llama", "repeat_kv", []),
        ("transformers.models.llama.modeling_llama", "LlamaDecoderLayer.forward", [CACHE, "position_embeddings"]),
        ("transformers.models.llama.modeling_llama", "LlamaAttention.forward", [CACHE]),
        ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS.get_interface", []),
    ],
    "models/a3_llama/rope": [
        ("transformers.models.llama.modeling_llama", "rotate_half", []),
    ],
    "models/a3_llama/modeling_a3_llama": [
        ("transformers.models.llama.modeling_llama", "LlamaModel._no_split_modules", None),
        ("transformers.utils.generic", "can_return_tuple", []),
        ("transformers.utils.generic", "merge_with_config_defaults", []),
        ("transformers.utils.output_capturing", "capture_outputs", []),
    ],
    "models/a3_draft_head/drafter": [  # guarded: without them, products with plain weights
        ("torch", "quantize_per_channel", None),
        ("torch", "ops.quantized.linear_prepack", None),
        ("torch", "ops.quantized.linear_dynamic", None),
    ],
    "models/a3_llama/packed_layers": [
        ("torch", "Tensor._version", None),
    ],
    "models/a3_llama/pretrained": [
        ("transformers.integrations", "is_deepspeed_zero3_enabled", []),
        ("transformers", "LlamaPreTrainedModel._keys_to_ignore_on_load_unexpected", None),
    ],
    "models/a3_llama/attention_masks": [
        ("transformers.masking_utils", "create_causal_mask", ["config", "inputs_embeds", "attention_mask", CACHE]),
        ("torch.nn.attention.flex_attention", "BlockMask", None),
        ("torch.nn.attention.flex_attention", "create_block_mask", ["mask_mod", "B", "H", "Q_LEN", "KV_LEN"]),
        ("transformers.cache_utils", "Cache.get_mask_sizes", []),
    ],
    "models/a3_llama/generation_cache": [
        ("transformers.cache_utils", "DynamicLayer.lazy_initialization", ["key_states", "value_states"]),
        ("transformers.cache_utils", "DynamicLayer.get_seq_length", []),
        ("transformers.cache_utils", "Cache.__init__", ["layers"]),
    ],
    "models/a3_llama/generation_runner": [
        ("transformers.cache_utils", "Cache.crop", []),
        ("transformers.modeling_utils", "PreTrainedModel.get_compiled_call", ["compile_config"]),
    ],
    "models/a3_llama/caching": [
        ("transformers.generation.continuous_batching.cache", PAGED, None),
    ],
    "models/a3_llama/infilling_pipeline": [
        ("transformers.pipelines", "PIPELINE_REGISTRY.register_pipeline", ["pipeline_class", "pt_model"]),
    ],
    "training/base_trainer": [
        ("transformers", "Trainer.get_batch_samples", ["epoch_iterator", "num_batches", "device"]),
        ("transformers", "Trainer.training_step", ["inputs", "num_items_in_batch"]),
        ("transformers", "Trainer.compute_loss", ["return_outputs", "num_items_in_batch"]),
    ],
    "training/trainer": [
        ("transformers", "Trainer.compute_loss_context_manager", []),
        ("transformers", "Trainer._prepare_inputs", []),
    ],
    "training/stream_trainer": [
        ("transformers", "Trainer._save_checkpoint", ["trial"]),
        ("transformers", "Trainer._save_rng_state", ["output_dir"]),
    ],
    "training/recipes": [
        ("transformers", "HfArgumentParser.parse_args_into_dataclasses", []),
    ],
    "training/dry_run": [
        ("accelerate.commands.config.config_args", "ClusterConfig", None),
    ],
    "adapters/layers": [
        ("peft", "LoraConfig._register_custom_module", []),
        ("peft.tuners.lora", "LoraLayer", None),
        ("peft.tuners.lora", "Linear.merge", []),
    ],
    "adapters/checkpoints": [
        ("peft", "PeftModel.load_adapter", ["is_trainable"]),
    ],
    "evaluation/lm_harness/batched_lm": [
        ("lm_eval.models.huggingface", "HFLM._encode_pair", []),
        ("lm_eval.models.huggingface", "HFLM._detect_batch_size", []),
        ("lm_eval.models.huggingface", "HFLM.loglikelihood_rolling", []),
        ("lm_eval.models.huggingface", "HFLM.set_cache_hook", []),
        ("lm_eval.models.utils", "normalize_gen_kwargs", []),
    ],
    "evaluation/lm_harness/a3_lm": [
        ("lm_eval.models.huggingface", "HFLM._create_model", []),
    ],
    "evaluation/lm_harness/causal_lm": [
        ("lm_eval.models.huggingface", "HFLM._model_generate", []),
    ],
    "evaluation/measures/text_windows": [
        ("lm_eval.utils", "get_rolling_token_windows", ["token_list", "prefix_token", "max_seq_len", "context_len"]),
        ("lm_eval.utils", "make_disjoint_window", []),
    ],
    "evaluation/tasks/functions": [
        ("lm_eval.api.task", "ConfigurableTask.construct_requests", []),
        ("lm_eval.api.task", "ConfigurableTask.doc_to_choice", []),
        ("lm_eval.api.task", "ConfigurableTask.dump_config", []),
    ],
    "models/a3_llama/input_validation": [
        ("transformers.utils", "TransformersKwargs.__annotations__", None),
    ],
}


@pytest.mark.parametrize(
    "file, module, name, parameters",
    [(file, *row) for file, rows in PRIVATE.items() for row in rows],
    ids=[f"{file}-{row[1]}" for file, rows in PRIVATE.items() for row in rows],
)
def test_private_interfaces_are_where_they_were(file, module, name, parameters):
    if module.startswith("lm_eval"):
        pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    found = importlib.import_module(module)
    version = getattr(importlib.import_module(module.partition(".")[0]), "__version__", "?")
    for part in name.split("."):
        assert hasattr(found, part), f"{module} {version} has no {name}, which a3_hf/{file}.py uses"
        found = getattr(found, part)
    if parameters is not None:
        missing = set(parameters) - set(inspect.signature(found).parameters)
        assert not missing, f"{module}.{name} {version} takes no {missing}; a3_hf/{file}.py gives it"
    source = (Path(a3_hf.__file__).parent / f"{file}.py").read_text(encoding="utf-8")
    assert name.rpartition(".")[2] in source, f"a3_hf/{file}.py no longer uses {name}: take it off this list"


def llama(folder: Path) -> LlamaForCausalLM:
    """A random LLaMA in float64, where two ways to the same logits differ by 1e-13 and two tokens' logits by far more."""
    torch.manual_seed(3)
    settings = tiny_config(num_hidden_layers=2, vocab_size=31).to_dict()
    for name in ("model_type", "slot_start", "architectures"):
        settings.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).double().eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A LLaMA, and A3 and Decoupled RoPE from it, which left to right are the LLaMA."""
    folder = tmp_path_factory.mktemp("llama")
    base = llama(folder)
    a3 = A3LlamaForCausalLM.from_pretrained(folder, slot_start="left_token").eval()
    return base, {"a3": a3, "decoupled_rope": DecoupledRopeLlamaForCausalLM.from_pretrained(folder).eval()}


def assistant() -> LlamaForCausalLM:
    torch.manual_seed(4)
    settings = tiny_config(num_hidden_layers=1, vocab_size=31).to_dict()
    for name in ("model_type", "slot_start", "architectures"):
        settings.pop(name, None)
    return LlamaForCausalLM(LlamaConfig(**settings)).double().eval()


WAYS = {
    "dynamic": lambda base: {},
    "uncached": lambda base: {"use_cache": False},
    "static": lambda base: {"cache_implementation": "static"},
    "static of one's own": lambda base: {CACHE: StaticCache(config=base.config, max_cache_len=32)},
    "beams": lambda base: {"num_beams": 3},
    "assisted": lambda base: {"assistant_model": assistant()},
    "prompt lookup": lambda base: {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["a3", "decoupled_rope"])
def test_generate_is_that_of_the_llama(models, name, way):
    base, others = models
    expected = base.generate(IDS, **{**GREEDY, **({"num_beams": 3} if way == "beams" else {})})
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert torch.equal(others[name].generate(IDS, **GREEDY, **WAYS[way](base)), expected)


@pytest.mark.parametrize("name", ["a3", "decoupled_rope"])
def test_generate_under_checkpointing_in_training_mode_is_right_or_an_error(models, name):
    base, others = models
    model = others[name].train()
    try:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        try:
            assert torch.equal(model.generate(IDS, **GREEDY), base.generate(IDS, **GREEDY))
        except RuntimeError as error:
            assert "checkpointing" in str(error)
    finally:
        disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        disable()
        model.eval()


def test_generate_with_an_adapter_is_that_without_a_cache(models):
    _, others = models
    adapted = get_peft_model(others["a3"], LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    cached, uncached = (adapted.generate(input_ids=IDS, use_cache=use_cache, **GREEDY) for use_cache in (True, False))
    adapted.unload()
    assert torch.equal(cached, uncached) and not torch.equal(cached, others["a3"].generate(IDS, **GREEDY))


def test_generate_of_a_checkpoint_with_code_is_that_of_the_llama(models, tmp_path):
    base, others = models
    others["a3"].save_pretrained(tmp_path / "checkpoint")
    code = (
        "import sys, torch\n"
        "sys.modules['a3_hf'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        f"print(model.generate(torch.tensor({IDS.tolist()}), **{GREEDY}).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "checkpoint")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1]) == base.generate(IDS, **GREEDY).tolist()


def test_a_checkpoint_saved_before_transformers_renamed_the_cache_is_right_with_the_package_installed():
    """Saved by the release before, under transformers 5.17, which wrote down what it generated in float64."""
    folder = Path(__file__).parent / "checkpoints" / "before_5_24"
    expected = json.loads((folder / "expected.json").read_text())
    ids = torch.tensor(expected["input_ids"])
    greedy = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    for trust in (False, True):  # the package's classes serve in either case
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).double().eval()
        assert type(model) is A3LlamaForCausalLM
        assert model.generate(ids, **greedy).tolist() == expected["greedy"]
    blanks = model.generate_any_order(ids, max_new_tokens=8, group_size=2)
    assert blanks.sequences.tolist() == expected["groups_of_2"]
    log_probs = model.log_likelihood(ids, torch.tensor([[0, 3, 1, 4, 2]])).float()
    torch.testing.assert_close(log_probs, torch.tensor(expected["random_order_log_probs"]), rtol=0, atol=1e-4)


def test_models_have_what_a_llama_has():
    settings = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    for model in (
        A3LlamaForCausalLM(tiny_config(**settings)),
        DecoupledRopeLlamaForCausalLM(DecoupledRopeLlamaConfig(**settings)),
        MaskedDiffusionLlamaForCausalLM(MaskedDiffusionLlamaConfig(**settings)),
    ):
        assert set(vars(plain)) <= set(vars(model)), "LlamaForCausalLM.__init__ sets more than ours do"
        assert set(vars(plain.model)) <= set(vars(model.model))
        assert {type(layer).__name__ for layer in model.model.layers} <= set(model._no_split_modules)
        assert len(model.model.layers) == 3
        # What keeps a cache whole where accelerate spreads layers over devices.
        skipped = plain._skip_keys_device_placement
        assert model._skip_keys_device_placement == skipped and CACHE in skipped
        assert {name.replace("model.query_embed.weight", "") for name in model.state_dict()} - {""} == set(
            plain.state_dict()
        )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hidden_states_and_attentions_have_their_shapes(implementation):
    model = A3LlamaForCausalLM(tiny_config(attn_implementation=implementation)).eval()
    outputs = model(IDS, output_hidden_states=True, output_attentions=implementation == "eager")
    rows = 2 * IDS.shape[1]
    assert [tuple(states.shape) for states in outputs.hidden_states[:-1]] == [(1, rows, 32)] * 3
    if implementation == "eager":
        assert [tuple(weights.shape) for weights in outputs.attentions] == [(1, 4, rows, IDS.shape[1])] * 3


@pytest.mark.parametrize("kind", [A3LlamaForCausalLM, A3LlamaModel, DecoupledRopeLlamaForCausalLM])
def test_a_cache_goes_by_both_words(kind):
    config = tiny_config() if kind is not DecoupledRopeLlamaForCausalLM else DecoupledRopeLlamaConfig(**SMALL)
    model = kind(config).double().eval()
    with torch.no_grad():
        whole = model(IDS, use_cache=True)
        assert whole.cache is whole.past_key_values and whole.cache.get_seq_length() == IDS.shape[1]
        assert whole["cache"] is whole["past_key_values"] is whole.cache
        for word in ("cache", "past_key_values"):
            cache = DynamicCache(config=model.config)
            model(IDS[:, :4], **{word: cache})
            assert [cache.get_seq_length(layer) for layer in range(3)] == [4] * 3
            rest = model(IDS[:, 4:], **{word: cache})
            torch.testing.assert_close(rest[0], whole[0][:, 4:], rtol=0, atol=1e-9)


SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize("name", ["a3", "decoupled_rope"])
def test_generate_any_order_takes_a_cache_by_both_words(models, name):
    model = models[1][name]
    first = model.generate_any_order(IDS, max_new_tokens=4)
    assert first.cache is first.past_key_values is not None
    for word in ("cache", "past_key_values"):
        again = model.generate_any_order(IDS, max_new_tokens=4, **{word: first.cache})
        assert torch.equal(again.sequences, first.sequences)
    with pytest.raises(ValueError, match="past_key_values and cache"):
        model.generate_any_order(IDS, max_new_tokens=4, cache=first.cache, past_key_values=first.cache)


def test_attention_without_a_mask_obeys_is_causal():
    """Where groups are single tokens, no mask is made, and nothing but `is_causal` hides later tokens."""
    module = modeling_llama.LlamaAttention(LlamaConfig(**SMALL), layer_idx=0).eval()
    queries, keys, values = torch.randn(3, 1, 4, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    changed = values.clone()
    changed[:, :, 2:] += 1.0
    one, other = (
        attend(module, queries, keys[:, ::2], each[:, ::2], None, scaling=1.0, dropout=0.0, is_causal=True)[0]
        for each in (values, changed)
    )
    moved = (one - other).abs().amax(dim=(0, 2, 3))
    assert (moved[:2] < 1e-12).all() and (moved[2:] > 1e-3).all()


def test_a_norm_is_torchs_in_float32():
    """`packed_layers` takes torch's operation in its place."""
    norm = modeling_llama.LlamaRMSNorm(24, eps=1e-3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    rows = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)) / 10
    wanted = torch.nn.functional.rms_norm(rows, (24,), norm.weight, norm.variance_epsilon)
    assert norm.variance_epsilon == 1e-3 and (norm(rows) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager", pytest.param("flex_attention", marks=compiles_flex)])
def test_masked_diffusion_sees_both_sides(implementation):
    config = MaskedDiffusionLlamaConfig(**SMALL, attn_implementation=implementation)
    model = MaskedDiffusionLlamaForCausalLM(config).eval()
    other = IDS.clone()
    other[:, -1] = 7
    with torch.no_grad():
        moved = (model(IDS).logits - model(other).logits).abs().amax(dim=(0, 2))
    assert (moved > 1e-3).all()


def test_names_that_are_looked_up_by_name():
    assert hasattr(TextDiffusionStreamer, "put_draft"), "a3_hf.models.a3_llama.generation_observers shows drafts by it"
    assert {field.name for field in fields(BaseModelOutputWithPast)} >= {CACHE, "hidden_states", "attentions"}
    assert CACHE in inspect.signature(create_causal_mask).parameters
    assert callable(Trainer.create_optimizer)
    for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "repetition_penalty"):
        assert hasattr(transformers.GenerationConfig(), name)


def test_continuous_batching_is_refused(models):
    _, others = models
    with pytest.raises(ValueError, match="continuous batching"):
        others["a3"].generate_batch([IDS[0].tolist()])
    with pytest.raises(ValueError, match="continuous batching"):
        others["a3"].init_continuous_batching()
    with pytest.raises(ValueError, match="continuous batching"):
        MaskedDiffusionLlamaForCausalLM(MaskedDiffusionLlamaConfig(**SMALL)).generate_batch([[1, 2]])


def test_continuous_batching_of_decoupled_rope_is_the_llamas(models):
    base, others = models
    settings = transformers.GenerationConfig(**{**GREEDY, "max_new_tokens": 6, "eos_token_id": 2})
    few = {"num_blocks": 8, "max_batch_tokens": 64}  # else a good part of the memory
    (request,) = (
        others["decoupled_rope"]
        .generate_batch(
            [IDS[0].tolist()],
            generation_config=settings,
            continuous_batching_config=transformers.ContinuousBatchingConfig(**few),
        )
        .values()
    )
    assert request.error is None
    assert request.generated_tokens == base.generate(IDS, generation_config=settings)[0, IDS.shape[1] :].tolist()


def test_the_versions_that_were_tested_are_those_of_the_package():
    """pyproject's range ends at the newest minor that was tested, and the line at import says the same."""
    oldest, newest = a3_hf.TESTED_TRANSFORMERS
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    stated = next(line for line in project["dependencies"] if line.startswith("transformers"))
    major, minor = newest.split(".")
    assert stated == f"transformers>={oldest},<{major}.{int(minor) + 1}"


@pytest.mark.parametrize("installed, warns", [("5.17.0", 0), ("5.24.1", 0), ("5.25.0.dev0", 1), ("6.0", 1)])
def test_one_line_where_transformers_is_newer_than_what_was_tested(installed, warns, monkeypatch):
    lines = []
    monkeypatch.setattr(logging.get_logger("a3_hf.versions"), "warning", lines.append)
    monkeypatch.setattr("a3_hf.versions.TESTED_TRANSFORMERS", ("5.17", "5.24"))
    warn_if_newer(installed)
    assert lines == [f"a3_hf was tested with transformers 5.17 to 5.24, this is {installed}"] * warns
