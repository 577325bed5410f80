#!/usr/bin/env python
"""What a user calls, with the installed packages, each call beside a plain LLaMA's or beside itself without a cache.

    python eval/check_transformers.py        # two minutes on a CPU, offline; exit code 1 if a row is wrong

Each row is `right`, `refused` (an error that says why, where there is no right answer to give) or `WRONG`. Models are random
and in float64, in which two ways to the same numbers differ by less than 1e-9, and a cache that was lost by far more.
"""

import io
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
    TrainingArguments,
    pipeline,
)
from transformers.utils import logging

from a3_hf import (
    A3LlamaForCausalLM,
    A3Trainer,
    Curriculum,
    DecoupledRopeLlamaForCausalLM,
    MaskedDiffusionLlamaForCausalLM,
)
from a3_hf.data.collator import RowCollator

TOLERANCE = 1e-9
PROMPT = "w1 w5 w9 w14 w3"
GREEDY = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}


class Row(NamedTuple):
    """A call, and whether it is as it should be; `may_refuse`: an error in words is as good."""

    name: str
    check: Callable[[], bool]
    may_refuse: bool = False


def make_llama(folder: Path, *, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """A random LLaMA in float64 with a tokenizer of 40 words, saved in `folder`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=44,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).double().eval()
    model.save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(41))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return model


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() < TOLERANCE)


def rows_of_generate(name: str, model, base, ids: torch.Tensor, *, is_llama: bool) -> Iterator[Row]:
    """transformers' own `generate` and what it stands on. `is_llama`: left to right the model is the base."""
    uncached = model.generate(ids, use_cache=False, **GREEDY)
    if is_llama:
        yield Row(
            f"{name}: generate without a cache is the base's",
            lambda: torch.equal(uncached, base.generate(ids, **GREEDY)),
        )
    ways = {
        "dynamic cache": lambda: {},
        "static cache": lambda: {"cache_implementation": "static"},
        "assisted": lambda: {"assistant_model": base},
        "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
    }
    for way, settings in ways.items():
        yield Row(
            f"{name}: generate, {way}",
            lambda settings=settings: torch.equal(model.generate(ids, **settings(), **GREEDY), uncached),
        )
    beams = {**GREEDY, "num_beams": 3}
    yield Row(
        f"{name}: generate, beams",
        lambda: torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams)),
    )
    yield Row(
        f"{name}: as the assistant of the base",
        lambda: torch.equal(base.generate(ids, assistant_model=model, **GREEDY), base.generate(ids, **GREEDY)),
    )

    def step(**cache) -> bool:
        first = model(ids[:, :-1], use_cache=True, **cache)
        filled = int(first.past_key_values.get_seq_length())
        second = model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True)
        return filled == ids.shape[1] - 1 and same(second.logits[:, -1], model(ids).logits[:, -1])

    yield Row(f"{name}: forward, a cache of its own", step)
    for word in ("past_key_values", "cache"):
        yield Row(
            f"{name}: forward, {word}=DynamicCache",
            lambda word=word: step(**{word: DynamicCache(config=model.config)}),
        )
        yield Row(
            f"{name}: forward, {word}=StaticCache",
            lambda word=word: step(**{word: StaticCache(config=model.config, max_cache_len=32)}),
        )
    yield Row(
        f"{name}: forward, a cache under another word",
        lambda: step(kv_store=DynamicCache(config=model.config)) and False,
        may_refuse=True,
    )


def rows_of_any_order(name: str, model, ids: torch.Tensor, strategies: tuple[str, ...]) -> Iterator[Row]:
    """`generate_any_order`: what it says of its tokens is their likelihood."""

    def exact(**settings) -> bool:
        output = model.generate_any_order(ids, max_new_tokens=10, seed=0, eos_token_id=None, **settings)
        expected = model.log_likelihood(output.sequences, output.group_ids)
        return same(output.log_probs[:, ids.shape[1] :], expected[:, ids.shape[1] :])

    for strategy in strategies:
        yield Row(f"{name}: generate_any_order, {strategy}", lambda strategy=strategy: exact(strategy=strategy))
    yield Row(f"{name}: generate_any_order, no cache", lambda: exact(use_cache=False))
    yield Row(f"{name}: generate_any_order, static cache", lambda: exact(cache_implementation="static"))


def rows_of_tools(folder: Path, model, base, ids: torch.Tensor, tokenizer) -> Iterator[Row]:
    """Other people's tools around an A3 model that left to right is the base."""

    def text(output: torch.Tensor) -> str:
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    def by_pipeline() -> bool:
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        written = write({"text": f"<s> {PROMPT}"}["text"], return_full_text=False, **GREEDY)[0]["generated_text"]
        return written.split() == text(base.generate(ids, **GREEDY)).split()

    yield Row("pipeline text-generation", by_pipeline)

    def by_infilling() -> bool:
        template = "w1 w5 <blank:4> w3"
        filled = pipeline("infilling", model=model, tokenizer=tokenizer)(template)
        return (filled[0] if isinstance(filled, list) else filled)["text"] == model.infill(tokenizer, template)

    yield Row("pipeline infilling", by_infilling)

    def by_peft() -> bool:
        other = A3LlamaForCausalLM.from_pretrained(folder, slot_start="left_token")
        adapted = get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
        for weight_name, weight in adapted.named_parameters():
            if "lora_B" in weight_name:
                weight.data.normal_(std=0.3)
        cached, uncached = (adapted.generate(input_ids=ids, use_cache=use, **GREEDY) for use in (True, False))
        return torch.equal(cached, uncached)

    yield Row("generate with an adapter (peft)", by_peft)

    def by_remote_code() -> bool:
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            code = (
                "import sys, torch; sys.modules['a3_hf'] = None\n"
                "from transformers import AutoModelForCausalLM\n"
                "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
                f"print(model.generate(torch.tensor({ids.tolist()}), **{GREEDY}).tolist())"
            )
            environment = {**os.environ, "HF_HOME": f"{scratch}/hf", "PYTHONPATH": ""}
            command = [sys.executable, "-c", code, scratch]
            done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=environment)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return done.stdout.strip().splitlines()[-1] == str(base.generate(ids, **GREEDY).tolist())

    yield Row("generate of a checkpoint with its code, without the package", by_remote_code)

    def scored() -> bool:
        ours = model.score(tokenizer, PROMPT).log_probs[0, 1:]
        log_probs = base(ids).logits[0, :-1].log_softmax(dim=-1)
        return bool((ours - log_probs.gather(1, ids[0, 1:, None])[:, 0]).abs().max() < 1e-5)  # `score` is in fp32

    yield Row("score from left to right is the base's", scored)

    def in_training_mode() -> bool:
        other = A3LlamaForCausalLM.from_pretrained(folder, slot_start="left_token").train()
        enable = getattr(other, "activation_checkpointing_enable", None) or other.gradient_checkpointing_enable
        enable()
        return torch.equal(other.generate(ids, **GREEDY), base.generate(ids, **GREEDY))

    yield Row("generate in training mode under activation checkpointing", in_training_mode, may_refuse=True)
    yield Row(
        "generate_batch (continuous batching)",
        lambda: model.generate_batch([ids[0].tolist()]) and False,
        may_refuse=True,
    )

    def shapes() -> bool:
        other = A3LlamaForCausalLM.from_pretrained(folder, slot_start="left_token", attn_implementation="eager").eval()
        output = other(ids, output_attentions=True, output_hidden_states=True)
        rows = 2 * ids.shape[1]
        attentions = {tuple(weights.shape) for weights in output.attentions}
        return attentions == {(1, 4, rows, ids.shape[1])} and output.hidden_states[0].shape[1] == rows

    yield Row("attentions and hidden states", shapes)


def rows_of_training(folder: Path) -> Iterator[Row]:
    """Three steps, with activation checkpointing and without."""
    rows = [
        {"input_ids": ids, "attention_mask": [1] * 12, "labels": [-100, *ids[1:]]}
        for ids in ([1] + [(7 * row + column) % 40 + 3 for column in range(11)] for row in range(8))
    ]

    def losses(kind, stage: str, checkpointing: bool) -> list[float]:
        model = kind.from_pretrained(folder)
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        with tempfile.TemporaryDirectory() as scratch:
            settings = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
            settings |= {"gradient_accumulation_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
            trainer = A3Trainer(
                model,
                TrainingArguments(scratch, learning_rate=1e-3, **settings),
                curriculum=Curriculum.from_config([{"name": stage, "until": 1.0}]),
                train_dataset=Dataset.from_list(rows),
                data_collator=RowCollator(),
            )
            with torch.enable_grad():
                trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def agree(kind, stage: str) -> bool:
        plain, checkpointed = (losses(kind, stage, checkpointing) for checkpointing in (False, True))
        return len(plain) == 3 and max(abs(a - b) for a, b in zip(plain, checkpointed, strict=True)) < 1e-6

    yield Row("training A3, with checkpointing and without", lambda: agree(A3LlamaForCausalLM, "permute"))
    yield Row(
        "training Decoupled RoPE, with checkpointing and without", lambda: agree(DecoupledRopeLlamaForCausalLM, "ar")
    )


def rows_of_lm_eval(folder: Path, base, tokenizer) -> Iterator[Row]:
    """lm-eval's own `hf` on the base, and our two models on the same requests."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from a3_hf.evaluation.lm_harness.a3_lm import A3LM
    from a3_hf.evaluation.lm_harness.causal_lm import CausalLM

    score = Instance("loglikelihood", {}, ("w1 w5 w9", " w14 w3"), 0, task_name="t", metadata=("t", 0, 1))
    stop = {"until": ["w0 w0"], "max_gen_toks": 8}
    write = Instance("generate_until", {}, ("w1 w5 w9", stop), 0, task_name="t", metadata=("t", 0, 1))
    # Without BOS, which our models put before every text, and `hf` does where the tokenizer does.
    settings = {"device": "cpu", "batch_size": 1, "dtype": "float64", "add_bos_token": False}
    reference = HFLM(base, tokenizer=tokenizer, batch_size=1)
    expected = reference.loglikelihood([score], disable_tqdm=True)[0][0]
    text = reference.generate_until([write], disable_tqdm=True)[0]
    for name, kind, more in (("a3", A3LM, {"slot_start": "left_token"}), ("a3_ar", CausalLM, {})):
        ours = kind(str(folder), **settings, **more)
        yield Row(
            f"lm-eval {name}: loglikelihood is hf's",
            lambda ours=ours: abs(ours.loglikelihood([score], disable_tqdm=True)[0][0] - expected) < 1e-4,
        )
        yield Row(
            f"lm-eval {name}: generate_until is hf's",
            lambda ours=ours: ours.generate_until([write], disable_tqdm=True)[0].split() == text.split(),
        )


def judged(row: Row) -> tuple[str, str]:
    """`right`, `refused` or `WRONG`, and the error."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), torch.no_grad():
            return ("right" if row.check() else "WRONG"), ""
    except Exception as error:
        refused = row.may_refuse and isinstance(error, ValueError | RuntimeError)
        return "refused" if refused else "WRONG", f"{type(error).__name__}: {error}"


def all_rows(folder: Path) -> Iterator[Row]:
    base = make_llama(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = torch.tensor([[1, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]])
    ours = {
        start: A3LlamaForCausalLM.from_pretrained(folder, slot_start=start).eval()
        for start in ("query_embed", "left_token")
    }
    decoupled = DecoupledRopeLlamaForCausalLM.from_pretrained(folder).eval()
    every = ("groupwise", "dynamic", "speculative", "refine")
    for start, model in ours.items():
        yield from rows_of_generate(f"A3 {start}", model, base, ids, is_llama=start == "left_token")
        yield from rows_of_any_order(f"A3 {start}", model, ids, every)
    yield from rows_of_generate("Decoupled RoPE", decoupled, base, ids, is_llama=True)
    yield from rows_of_any_order("Decoupled RoPE", decoupled, ids, ("groupwise",))

    def in_continuous_batching() -> bool:
        few = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # else a good part of the memory
        settings = {"generation_config": base.generation_config, "continuous_batching_config": few}
        output = decoupled.generate_batch([ids[0].tolist()], **settings)
        (request,) = output.values()
        return request.error is None and request.generated_tokens == base.generate(ids)[0, ids.shape[1] :].tolist()

    base.generation_config.update(do_sample=False, max_new_tokens=8, pad_token_id=0)
    yield Row("Decoupled RoPE: generate_batch (continuous batching)", in_continuous_batching)
    masked = MaskedDiffusionLlamaForCausalLM.from_pretrained(folder).eval()
    for word in ("past_key_values", "cache"):
        yield Row(
            f"masked diffusion: forward, {word}=DynamicCache",
            lambda word=word: masked(ids, **{word: DynamicCache(config=base.config)}) and False,
            may_refuse=True,
        )
    yield from rows_of_tools(folder, ours["left_token"], base, ids, tokenizer)
    yield from rows_of_training(folder)
    try:
        version("lm_eval")
    except PackageNotFoundError:
        return
    yield from rows_of_lm_eval(folder, base, tokenizer)


def main() -> int:
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "datasets")}
    table = Table(title=", ".join(f"{name} {number}" for name, number in packages.items()))
    for column in ("call", "", "why"):
        table.add_column(column, overflow="fold")
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        for row in all_rows(Path(folder)):
            verdict, why = judged(row)
            verdicts.append(verdict)
            table.add_row(row.name, verdict, why)
    Console(width=160).print(table)
    counts = {verdict: verdicts.count(verdict) for verdict in ("right", "refused", "WRONG")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(counts["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main())
