"""What a GPU must confirm of the plugin for vLLM, in one call, in an environment that has vLLM (`pip install 'a3-hf[vllm]'`):

    python scripts/confirm_vllm.py models/smollm2-135m --out confirmed.json
    python scripts/confirm_vllm.py --tiny                  # a random model, with adapters; on a CPU, five minutes

Each engine runs in a process of its own with a time limit: one that dies or hangs has failed, and the next one starts. What
vLLM writes is compared with `generate_any_order` of the same dtype, token by token. Two answers may part by rounding: then, up
to the first token that differs, both have the same log-probabilities, and there the two tokens are nearly equally likely. Such
answers are counted, with the gap in nats; all others fail. "Nearly" is 0.05 nats in float32, and in bfloat16 three times the
95th percentile of what `generate_any_order` itself differs between bfloat16 and float32. The exit code is 1 if a check failed.

Every device: blanks one token a step, alone, in batches, from the prefix cache, in chunks, after preemption, with seeds;
groups, random and dynamic orders, speculation; bfloat16; adapters (--adapter). A GPU: CUDA graphs as vLLM chooses them beside
eager mode, three attention backends, asynchronous scheduling on and off. Several: tensor parallelism.
"""

import argparse
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

BLOCK = 32  # tokens of a block of the cache
CANVAS = 16  # rows that a request may have in a step of groups
LIKELY = 50  # alternatives that the reference keeps of each token
NATS = (
    0.05  # that two computations of a log-probability in float32 may be apart; attention on a GPU may multiply in TF32
)
TIMES_ROUNDING = 3  # so many times the reference's own rounding in bfloat16
HITS, PREEMPTIONS = "prefix_cache_hits", "num_preemptions"  # of vLLM's metrics
ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "a3"}
ON_CPU = {"TRITON_INTERPRET": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
EAGER = {"enforce_eager": True}
BACKENDS = {"FLASH_ATTN": "bfloat16", "TRITON_ATTN": "float32", "FLASHINFER": "bfloat16"}
PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "flashinfer-python", "transformers", "peft", "a3-hf")
ADAPTER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
TINY = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PEOPLE, PLACES = "Tom Lily Mia Ben Anna Max Sue Tim".split(), "park,old barn,small shop,river,kitchen,school".split(",")
EVENTS = (
    "One day, {who} went to the {place} with {friend}.", "{who} had never seen the {place} before.", "It rained all night.",
    "\"Look at that!\" said {friend}, and ran back to the {place}.", "{who} was sad, so {friend} told a story.",
    "They came home late, tired and happy.", "In the {place} there was a box that nobody could open.",
)  # fmt: skip

# How blanks are written: arguments of `generate_any_order`. Speculation writes what one token at a time is.
WAYS: dict[str, dict[str, Any]] = {
    "one at a time": {},
    "groups of 4": {"group_size": 4},
    "groups of 8 from the right": {"group_size": 8, "order": "right_to_left"},
    "random order": {"group_size": 2, "order": "random", "seed": 3},
    "sampled": {"group_size": 3, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 5},
    "dynamic": {"strategy": "dynamic", "tokens_per_step": 2},
    "dynamic by a threshold": {"strategy": "dynamic", "threshold": 0.3},
    "speculation": {"strategy": "speculative", "draft_tokens": 4},
    "speculation, sampled": {"strategy": "speculative", "draft_tokens": 4, "do_sample": True, "seed": 9},
}
ONE_BLANK = (((40, 30), (5,)), ((1, 70), (6,)), ((50, 0), (7,)), ((32, 33), (9,)), ((150, 40), (12,)))
SEVERAL = (((35, 3, 20), (4, 6)), ((33, 0, 12), (3, 4)), ((64, 40, 0), (2, 8)), ((20, 10, 5, 7), (3, 3, 3)))


@dataclass(frozen=True)
class Case:
    """A request.

    Attributes:
        pieces, lengths: numbers of given tokens and of blanks' tokens, as in `Blanks`.
        text: number of the text that the given tokens are from; equal numbers, equal tokens.
        way: of `WAYS`; "" for one token a step by vLLM's own sampler; "continued": no blank, `lengths[0]` tokens behind the
            prompt.
        adapter: number of the folder of --adapter; None: the model itself.
    """

    pieces: tuple[int, ...]
    lengths: tuple[int, ...]
    text: int = 0
    way: str = ""
    adapter: int | None = None

    def key(self, dtype: str) -> str:
        """What the answer depends on."""
        way = {name: value for name, value in WAYS.get(self.way, {}).items()}
        if way.get("strategy") == "speculative":
            way = {name: value for name, value in way.items() if name not in ("strategy", "draft_tokens")}
        shown = "continued" if self.way == "continued" else sorted(way.items())
        return f"{dtype} {self.adapter} {self.pieces} {self.lengths} {self.text} {shown}"


@dataclass
class Check:
    """Requests that are asked together.

    Attributes:
        together: in one batch; else one by one.
        counter: of vLLM's metrics, which must grow, as without it the check would test nothing.
        of_seeds: the first case is sampled with several seeds, and compared with itself.
    """

    name: str
    cases: Sequence[Case] = ()
    together: bool = True
    counter: str = ""
    of_seeds: bool = False


@dataclass
class Engine:
    """An engine of vLLM and what it is asked.

    Attributes:
        settings: arguments of `vllm.LLM` beside the defaults.
        folder: of the model; "" for the one that is tested.
        why_not: why it is not started.
    """

    name: str
    checks: list[Check]
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    folder: str = ""
    slot_start: str = ""
    why_not: str = ""


@dataclass
class Setting:
    """What is tested.

    Attributes:
        folder: of a LLaMA or an A3 model.
        slot_start: of the model; a LLaMA is served with "left_token".
        is_llama: its configuration does not know A3.
        device: "cpu" or "cuda".
        adapters: folders that `a3 export` wrote, and the `adapter_config.json` of each.
        llama: folder of a plain LLaMA with the same weights, to be served beside it; "": none.
    """

    folder: str
    slot_start: str
    is_llama: bool
    device: str
    adapters: list[tuple[str, dict]] = field(default_factory=list)
    tensor_parallel_size: int = 1
    memory: float = 0.6
    llama: str = ""

    @classmethod
    def read(cls, folder: str, *, adapters: Sequence[str] = (), **more) -> "Setting":
        """Reads the model's and the adapters' configurations.

        Raises:
            ValueError: no LLaMA or A3 model in the folder, or an adapter that `a3 export` did not write.
        """
        path = Path(folder, "config.json")
        config = json.loads(path.read_text()) if path.is_file() else {}
        if config.get("model_type") not in ("llama", "a3_llama"):
            raise ValueError(
                f"model={folder!r}: expected a folder with a LLaMA or an A3 model (make smollm2 fetches one)"
            )
        found = []
        for each in adapters:
            file = Path(each, "adapter_config.json")
            settings = json.loads(file.read_text()) if file.is_file() else {}
            if "a3_rows" not in settings:
                raise ValueError(f"adapter={each!r}: expected a folder that `a3 export` wrote")
            found.append((each, settings))
        is_llama = config["model_type"] == "llama"
        start = "left_token" if is_llama else config.get("slot_start", "query_embed")
        return cls(folder, start, is_llama, adapters=found, **more)

    def start_of(self, adapter: dict) -> str:
        """`slot_start` of the model with an adapter."""
        return adapter.get("slot_start") or self.slot_start

    @property
    def num_seqs(self) -> int:
        """Requests that run at once; a CPU interprets some of vLLM's kernels."""
        return 16 if self.device == "cuda" else 8


# ------------------------------------------------------------------------------------------------------- what is checked


def cases(layouts: Iterable, way: str = "", *, first_text: int = 0, adapter: int | None = None) -> list[Case]:
    """One case of each layout, each with another text."""
    return [Case(*layout, first_text + number, way, adapter) for number, layout in enumerate(layouts)]


def blanks_of_all_kinds() -> list[Case]:
    return cases(ONE_BLANK) + cases(SEVERAL, first_text=20)


def same_text() -> list[Case]:
    """One text with four lengths of its blank, cut at two other places, and continued: equal tokens at other positions."""
    splits = [((50, 40), (length,)) for length in (3, 5, 8, 11)] + [((64, 26), (5,)), ((33, 57), (5,))]
    found = [Case(*split, text=100) for split in splits]
    return [*found, Case((90, 0), (6,), 100, "continued"), Case((50, 0), (6,), 100, "continued")]


def many(num_seqs: int, way: str = "") -> Check:
    """Twice as many as run at once, of one length, so that all that run end together and as many begin."""
    layouts = [((20 + number % 9, 12), (4,)) for number in range(2 * num_seqs)]
    return Check("many new requests at once", cases(layouts, way, first_text=200))


def one_token_checks(num_seqs: int) -> list[Check]:
    return [
        Check("a blank in the middle", cases(ONE_BLANK)),
        Check("several blanks", cases(SEVERAL, first_text=20)),
        Check("the same from the prefix cache", blanks_of_all_kinds(), counter=HITS),
        Check("one text, other positions, one by one", same_text()[:4], together=False),
        Check("one text, other positions, together", same_text(), counter=HITS),
        many(num_seqs),
    ]


def group_checks(setting: Setting, ways: Iterable[str] = WAYS) -> list[Check]:
    """Each way on blanks of its own."""
    layouts = [((40, 30), (5,)), ((33, 0, 12), (3, 4)), ((20, 10, 5, 7), (3, 3, 3))]
    found = [
        Check(way, cases(layouts, way, first_text=10 * number))
        for number, way in enumerate(ways)
        if setting.slot_start == "left_token" or not way.startswith("speculation")  # which needs it
    ]
    again = Check("all from the prefix cache", [one for check in found for one in check.cases], counter=HITS)
    return [*found, again, many(setting.num_seqs, "groups of 4")]


def preempted(found: list[Case]) -> Check:
    return Check("requests that lose their blocks", found, counter=PREEMPTIONS)


def adapter_checks(setting: Setting, start: str, *, in_groups: bool) -> list[Check]:
    """The adapters beside each other and beside none, in one batch."""
    numbers: list[int | None] = [
        number
        for number, (_, config) in enumerate(setting.adapters)
        if setting.start_of(config) == start and (in_groups or config["a3_rows"] == "all")
    ]
    if numbers and not (setting.is_llama and start == "query_embed"):  # a LLaMA alone has no query_embed
        numbers.append(None)
    ways, layouts = ("groups of 4", "dynamic", "sampled") if in_groups else ("",), (ONE_BLANK[0], SEVERAL[0])
    found = [one for number in numbers for way in ways for one in cases(layouts, way, first_text=40, adapter=number)]
    again = Check("the same from the prefix cache", found, counter=HITS)
    return [Check("adapters beside each other", found), again]


def plan(setting: Setting) -> list[Engine]:
    """All engines, the most important ones first."""
    is_gpu, seqs = setting.device == "cuda", setting.num_seqs
    groups = {"hf_overrides": {"canvas_length": CANVAS}}
    usual, no_gpu = ({}, "") if is_gpu else (EAGER, "no GPU")
    one_token, seeds = one_token_checks(seqs), Check("seeds and n", [Case((40, 30), (8,), 7)], of_seeds=True)
    fixed = [way for way in WAYS if not way.startswith("dynamic") and "sampled" not in way]
    chunks = Check("prompts in chunks of 32 tokens", [*same_text(), *cases(SEVERAL)])
    short_of_room = usual | {"max_num_seqs": 8, "num_gpu_blocks_override": 14, "max_num_batched_tokens": 32}
    # 32 would be two requests' canvases, and too few at once to run out of blocks
    groups_short_of_room = short_of_room | groups | {"max_num_batched_tokens": 8 * CANVAS}
    # each takes two blocks at first, and a third one soon
    growing = [((40, 20), (12,)), ((30, 20, 10), (6, 8)), ((62, 0), (9,)), ((20, 38), (16,))]
    grown = cases(growing * 3, first_text=50)
    ways = ("groups of 4", "sampled", "dynamic", *(["speculation"] if setting.slot_start == "left_token" else []))
    grown_groups = [one for way in ways for one in cases(growing, way, first_text=60)]
    found = [
        Engine("one token, CUDA graphs", [*one_token, seeds], why_not=no_gpu),
        Engine("groups, CUDA graphs", group_checks(setting), groups, why_not=no_gpu),
        Engine("one token, eager", [*one_token, seeds], EAGER),
        Engine("groups, eager", group_checks(setting), EAGER | groups),
        Engine("one token, bfloat16", one_token if is_gpu else one_token[:3], usual, dtype="bfloat16"),
        Engine("groups, bfloat16", group_checks(setting, fixed), groups, dtype="bfloat16", why_not=no_gpu),
        *(
            Engine(
                f"one token, {name}", one_token, {"attention_config": {"backend": name}}, dtype=dtype, why_not=no_gpu
            )
            for name, dtype in BACKENDS.items()
        ),
        Engine("one token, short of room", [chunks, preempted(grown)], short_of_room, folder=setting.llama),
        Engine("groups, short of room", [preempted(grown_groups)], groups_short_of_room),
    ]
    why_not = "" if is_gpu else "vLLM has none on a CPU"
    for is_on in (True, False):
        name, settings = f"asynchronous scheduling {'on' if is_on else 'off'}", {"async_scheduling": is_on}
        found.append(Engine(f"one token, {name}", [*one_token[:3], many(seqs)], settings, why_not=why_not))
        checks = group_checks(setting, ("groups of 4", "dynamic", "speculation"))
        found.append(Engine(f"groups, {name}", checks, settings | groups, why_not=why_not))
    found += _adapter_engines(setting, usual, groups)
    parallel = usual | {"tensor_parallel_size": setting.tensor_parallel_size, "distributed_executor_backend": "mp"}
    why_not = "" if setting.tensor_parallel_size > 1 else "not asked for (--tensor-parallel-size)"
    found.append(Engine("one token, tensor parallel", one_token, parallel, why_not=why_not))
    found.append(Engine("groups, tensor parallel", group_checks(setting), parallel | groups, why_not=why_not))
    for engine in found:
        engine.slot_start = engine.slot_start or ("left_token" if engine.folder else setting.slot_start)
        if engine.name.startswith("one token") and engine.slot_start != "left_token":
            engine.why_not = engine.why_not or "the model's slots start as query_embed, which takes groups"
    return found


def _adapter_engines(setting: Setting, usual: dict, groups: dict) -> list[Engine]:
    if not setting.adapters:
        return [Engine("adapters", [], why_not="none given (--adapter)")]
    rank = max(config["r"] for _, config in setting.adapters)
    lora = {
        "enable_lora": True,
        "max_loras": len(setting.adapters) + 1,
        "max_lora_rank": next(room for room in ADAPTER_RANKS if room >= rank),
    }
    found = []
    for start in sorted({setting.start_of(config) for _, config in setting.adapters}):
        settings = usual | lora
        checks = adapter_checks(setting, start, in_groups=True)
        found.append(Engine(f"groups, adapters, {start}", checks, settings | groups, slot_start=start))
        checks = adapter_checks(setting, start, in_groups=False)
        if start == "left_token":
            why_not = "" if checks[0].cases else "no adapter of all rows"
            found.append(Engine("one token, adapters", checks, settings, slot_start=start, why_not=why_not))
    return found


# --------------------------------------------------------------------------------------------------------- the reference


@lru_cache
def _tokenizer(folder: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder) if Path(folder, "tokenizer_config.json").is_file() else None


def given_tokens(folder: str, count: int, text: int) -> list[int]:
    """Returns the first tokens of a text made of stories; without a tokenizer at random."""
    draw, tokenizer = random.Random(text), _tokenizer(folder)
    if tokenizer is None:
        size = json.loads(Path(folder, "config.json").read_text())["vocab_size"]
        return [draw.randrange(3, size) for _ in range(count)]
    sentences = [
        draw.choice(EVENTS).format(who=draw.choice(PEOPLE), friend=draw.choice(PEOPLE), place=draw.choice(PLACES))
        for _ in range(count // 3 + 1)
    ]
    return tokenizer(" ".join(sentences))["input_ids"][:count]


def blanks_of(case: Case, given: list[int]):
    """Returns the `Blanks` of a case."""
    import torch

    from a3_hf.engines.vllm.requests import Blanks, Dynamic, Sampling
    from a3_hf.models.a3_llama.generation_decoder import row_seed
    from a3_hf.models.a3_llama.orders import GroupOrder

    blanks = Blanks(case.pieces, case.lengths, is_text=False)
    if case.way not in WAYS:
        return blanks
    way = WAYS[case.way]
    input_ids, blank_mask = canvas(blanks, given)
    seed = row_seed(way.get("seed", 0), input_ids[0].masked_fill(blank_mask[0], -1), 0)
    temperature = way.get("temperature", 1.0) if way.get("do_sample") else 0.0
    sampling = Sampling(temperature, *(way.get(name) for name in ("top_k", "top_p", "min_p")), seed=seed)
    if way.get("strategy") == "speculative":
        return replace(blanks, sampling=sampling, drafts=way["draft_tokens"])
    if way.get("strategy") == "dynamic":
        names = ("criterion", "tokens_per_step", "threshold", "entropy_budget", "window")
        return replace(blanks, sampling=sampling, dynamic=Dynamic(*(way.get(name) for name in names)))
    groups = GroupOrder.infilling(
        blank_mask,
        order=way.get("order", "left_to_right"),
        group_size=way.get("group_size", 1),
        generator=[torch.Generator().manual_seed(seed)],
    ).group_ids[0]
    steps: dict[int, list[int]] = {}
    for column in blanks.open_columns():
        steps.setdefault(int(groups[column]), []).append(column)
    return replace(blanks, sampling=sampling, steps=tuple(tuple(steps[number]) for number in sorted(steps)))


def canvas(blanks, given: list[int]):
    """Returns the text (1, S) with 0 at blanks, and where they are (1, S)."""
    import torch

    input_ids = torch.zeros(1, blanks.size, dtype=torch.long)
    blank_mask = torch.zeros(1, blanks.size, dtype=torch.bool)
    input_ids[0, blanks.given_columns()] = torch.tensor(given)
    blank_mask[0, blanks.open_columns()] = True
    return input_ids, blank_mask


def request_of(case: Case, given: list[int]) -> tuple[list[int], dict[str, Any]]:
    """Returns the prompt's tokens and the arguments of `SamplingParams`."""
    from a3_hf.engines.vllm.requests import OneRowScript

    params = {"ignore_eos": True, "detokenize": False, "logprobs": 1}
    if case.way == "continued":
        return given, params | {"temperature": 0.0, "max_tokens": case.lengths[0]}
    blanks = blanks_of(case, given)
    if case.way:
        extra = {**blanks.extra_args(), "diffusion_canvas_length": blanks.width()}
        return given, params | {"temperature": 1.0, "max_tokens": sum(case.lengths), "extra_args": extra}
    script = OneRowScript(blanks)
    params |= {"temperature": 0.0, "max_tokens": script.num_outputs, "extra_args": blanks.extra_args()}
    return script.prompt(given), params


def reported(case: Case, given: list[int]) -> tuple[list[int], list[int]]:
    """Returns which of vLLM's output tokens are a blank's, and for each of these its number among the blanks' tokens."""
    from a3_hf.engines.vllm.requests import OneRowScript

    if case.way == "continued":
        return list(range(case.lengths[0])), list(range(case.lengths[0]))
    blanks = blanks_of(case, given)
    number_of = {column: number for number, column in enumerate(blanks.open_columns())}
    if case.way:
        columns = [column for step in blanks.steps for column in step] or blanks.open_columns()
        return list(range(len(columns))), [number_of[column] for column in columns]
    kept = [(place, column) for place, column in enumerate(OneRowScript(blanks).columns) if column is not None]
    return [place for place, _ in kept], [number_of[column] for _, column in kept]


def answer_of(model, case: Case, given: list[int]) -> dict[str, list]:
    """Returns what `generate_any_order` writes, in text order: tokens, their log-probabilities, and of each the likeliest
    tokens where it was chosen with their log-probabilities.
    """
    import torch

    from a3_hf.engines.vllm.requests import Blanks

    def likeliest(logits: torch.Tensor) -> list[tuple[int, float]]:
        values, ids = logits.float().log_softmax(-1).topk(min(LIKELY, len(logits)))
        return list(zip(ids.tolist(), values.tolist(), strict=True))

    if case.way == "continued":
        output = model.generate(
            torch.tensor([given], device=model.device), max_new_tokens=case.lengths[0], do_sample=False, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens = output.sequences[0, len(given) :].tolist()
        likely = [likeliest(logits[0]) for logits in output.logits]
        log_probs = [
            logits[0].float().log_softmax(-1)[token].item() for logits, token in zip(output.logits, tokens, strict=True)
        ]
        return {"tokens": tokens, "log_probs": log_probs, "likely": likely}
    blanks, seen = Blanks(case.pieces, case.lengths, is_text=False), {}
    input_ids, blank_mask = (each.to(model.device) for each in canvas(blanks, given))

    def see(step: int, columns: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        for column, row in zip(columns[0].tolist(), logits[0], strict=True):
            seen[column] = row  # of the last pass that predicted it
        return logits

    way = {"seed": 0} | WAYS.get(case.way, {})
    if way.get("strategy") == "speculative":
        way = {name: value for name, value in way.items() if name not in ("strategy", "draft_tokens")}
    output = model.generate_any_order(input_ids, blank_mask, logits_hook=see, **way)
    columns = blanks.open_columns()
    return {
        "tokens": output.sequences[0, columns].tolist(),
        "log_probs": output.log_probs[0, columns].tolist(),
        "likely": [likeliest(seen[column]) for column in columns],
    }


def write_reference(setting: Setting, engines: Sequence[Engine], file: Path) -> None:
    """Answers all cases, one by one."""
    import gc

    import torch

    torch.set_grad_enabled(False)
    wanted: dict[tuple, dict[str, Case]] = {}
    for engine in engines:
        if not engine.why_not:
            for case in (case for check in engine.checks if not check.of_seeds for case in check.cases):
                folder = engine.folder or setting.folder
                key = (engine.dtype, folder, engine.slot_start, case.adapter)
                wanted.setdefault(key, {})[case.key(engine.dtype)] = case
    for (dtype, *rest), found in list(wanted.items()):
        if dtype != "float32":  # whose rounding is measured by it
            wanted.setdefault(("float32", *rest), {}).update({case.key("float32"): case for case in found.values()})
    answers: dict[str, dict[str, list]] = {}
    for (dtype, folder, start, adapter), found in wanted.items():
        model = load(setting, folder, start, adapter, getattr(torch, dtype))
        for key, case in found.items():
            given = given_tokens(folder, sum(case.pieces), case.text)
            answers[f"{folder} {start} {key}"] = answer_of(model, case, given)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    file.write_text(json.dumps({"answers": answers, "nats": nats_of(answers)}))


def nats_of(answers: dict[str, dict]) -> dict[str, float]:
    """Returns how far log-probabilities may be apart in each dtype. For bfloat16 it is measured: of the ten likeliest tokens
    where the reference has seen the same tokens in both dtypes, 95 % differ by less than a third of it.
    """
    apart = []
    for key, answer in answers.items():
        if " bfloat16 " in key:
            other = answers[key.replace(" bfloat16 ", " float32 ")]
            for place, (mine, theirs) in enumerate(zip(answer["likely"], other["likely"], strict=True)):
                values = dict(theirs)
                apart += [abs(value - values[token]) for token, value in mine[:10] if token in values]
                if answer["tokens"][place] != other["tokens"][place]:
                    break
    measured = sorted(apart)[int(0.95 * len(apart))] if apart else 0.0
    return {"float32": NATS, "bfloat16": max(TIMES_ROUNDING * measured, NATS)}


def load(setting: Setting, folder: str, start: str, adapter: int | None, dtype):
    """Returns a model of this package, with an exported adapter as it was before."""
    from a3_hf import A3LlamaForCausalLM
    from a3_hf.adapters.checkpoints import load_model

    if adapter is None:
        model = A3LlamaForCausalLM.from_pretrained(folder, dtype=dtype, slot_start=start)
    else:
        with tempfile.TemporaryDirectory() as saved:
            unexport(*setting.adapters[adapter], Path(saved))
            model = load_model(saved, base=folder, dtype=dtype)
    return model.eval().to(setting.device)


def unexport(folder: str, config: dict, output: Path) -> None:
    """Writes an exported adapter as this package's own: `a3 export` backwards."""
    from peft.utils import load_peft_weights
    from safetensors.torch import load_file, save_file

    weights = load_peft_weights(folder, device="cpu")
    own = Path(folder, "query_embed.safetensors")
    if own.is_file():
        weights |= {f"base_model.model.model.{name}": tensor for name, tensor in load_file(own).items()}
    save_file(weights, output / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {name: value for name, value in config.items() if name != "a3_rows"}
    settings |= {
        "peft_type": "A3_SLOT_LORA" if config["a3_rows"] == "slots" else "LORA",
        "task_type": None,
        "modules_to_save": ["query_embed"],
    }
    (output / "adapter_config.json").write_text(json.dumps(settings))


def make_tiny(scratch: Path) -> tuple[str, list[str]]:
    """Writes a random A3 model, the LLaMA of the same weights, and an adapter of each kind; returns the model's folder and
    the adapters'.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from a3_hf import A3LlamaForCausalLM
    from a3_hf.adapters.arguments import LoraArguments
    from a3_hf.adapters.export import export
    from a3_hf.adapters.layers import attach

    torch.manual_seed(42)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(scratch / "llama")
    A3LlamaForCausalLM.from_pretrained(scratch / "llama", slot_start="left_token").save_pretrained(scratch / "a3")
    adapters = []
    for rows in ("slots", "all"):
        base = A3LlamaForCausalLM.from_pretrained(scratch / "a3")
        model = attach(base, LoraArguments(r=4, rows=rows))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.2)
        model.peft_config["default"].base_model_name_or_path = str(scratch / "a3")
        model.save_pretrained(scratch / f"{rows}-saved")
        export(str(scratch / f"{rows}-saved"), scratch / rows)
        adapters.append(str(scratch / rows))
    return str(scratch / "a3"), adapters


# ------------------------------------------------------------------------------------------------------------ one engine


@dataclass
class Comparison:
    """Answers beside those of the reference.

    Attributes:
        equal, total: numbers of tokens.
        apart: answers with a token that differs.
        rounded: those of them that part where the two tokens are nearly equally likely.
        gap: nats between the two tokens where an answer parts, in the reference; the largest one.
        drift: difference of the log-probabilities of the same token after the same text; the largest one.
    """

    equal: int = 0
    total: int = 0
    apart: int = 0
    rounded: int = 0
    gap: float = 0.0
    drift: float = 0.0

    def add(
        self, tokens, log_probs, expected: dict[str, list], nats: float, *, is_greedy: bool, is_ordered: bool
    ) -> None:
        """Adds an answer.

        Args:
            tokens, log_probs: in the order in which they were written.
            expected: `answer_of` in the same order.
            nats: the largest difference that is rounding.
            is_greedy: the likeliest tokens are taken. Else a draw near the border of two tokens may fall on its other side.
            is_ordered: tokens were written in this order. Else only tokens are compared.
        """
        wanted = expected["tokens"]
        same = [mine == theirs for mine, theirs in zip(tokens, wanted, strict=False)]
        self.equal, self.total = self.equal + sum(same), self.total + len(wanted)
        until = next((place for place, is_same in enumerate(same) if not is_same), len(same))
        drift = max((abs(log_probs[n] - expected["log_probs"][n]) for n in range(until)), default=0.0)
        if is_ordered:
            self.drift = max(self.drift, drift)
        if until == len(wanted) == len(tokens):
            return
        self.apart += 1
        if until >= min(len(wanted), len(tokens)) or not is_ordered:
            self.gap = math.inf
            return
        likely = dict(expected["likely"][until])
        theirs = likely.get(tokens[until], -math.inf)
        gap = max(likely.get(wanted[until], -math.inf) - theirs, 0.0) if theirs > -math.inf else math.inf
        seen = abs(log_probs[until] - theirs)
        self.gap = max(self.gap, gap)
        self.rounded += drift <= nats and seen <= nats and (gap <= nats or not is_greedy)

    def verdict(self, nats: float) -> tuple[str, str]:
        """Returns "passed" or "failed", and why."""
        if self.apart > self.rounded:
            gap = (
                f"{self.gap:.3g} nats apart at most" if math.isfinite(self.gap) else f"not among the {LIKELY} likeliest"
            )
            return "failed", f"{self.apart - self.rounded} answers differ, {gap}"
        if self.drift > nats:
            return "failed", f"log-probabilities differ by up to {self.drift:.3g} nats"
        if self.apart:
            return "passed", f"{self.apart} answers part by rounding, at most {self.gap:.2g} nats apart"
        return "passed", ""


def run_engine(engine: Engine, setting: Setting, answers: Path, results: Path) -> None:
    """Starts an engine in this process, and writes a line of JSON for each check that is done."""
    from vllm import LLM

    started = time.perf_counter()

    def tell(**line) -> None:
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")

    why_not = missing(engine, setting)
    if why_not:
        tell(why_not=why_not)
        return
    folder = engine.folder or setting.folder
    expected = json.loads(answers.read_text())
    llm = LLM(model=folder, **engine_settings(engine, setting))
    config = llm.llm_engine.vllm_config
    graphs, is_on = config.compilation_config.cudagraph_mode, config.scheduler_config.async_scheduling
    chose = f"CUDA graphs {'?' if graphs is None else graphs.name}, asynchronous scheduling {'on' if is_on else 'off'}"
    tell(started=time.perf_counter() - started, chose=chose)
    for check in engine.checks:
        started = time.perf_counter()
        try:
            line = run_check(llm, check, engine, setting, folder, expected)
        except Exception as error:
            tell(check=check.name, status="failed", why=_told(error), seconds=time.perf_counter() - started)
            raise
        tell(check=check.name, seconds=time.perf_counter() - started, **line)
    llm.llm_engine.engine_core.shutdown()


def engine_settings(engine: Engine, setting: Setting) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    found = {
        "dtype": engine.dtype, "max_model_len": 256, "max_num_seqs": setting.num_seqs, "max_num_batched_tokens": 2048,
        "block_size": BLOCK,
        "skip_tokenizer_init": True, "enable_prefix_caching": True, "disable_log_stats": False, "seed": 0,
    } | engine.settings  # fmt: skip
    if setting.device == "cuda":
        found |= {"gpu_memory_utilization": setting.memory, "kv_cache_memory_bytes": 2 << 30}
    overrides = {"slot_start": engine.slot_start} | found.get("hf_overrides", {})
    if setting.is_llama or engine.folder:
        overrides |= {"architectures": ["A3LlamaForCausalLM"], "model_type": "a3_llama"}
    return found | {"hf_overrides": overrides}


def missing(engine: Engine, setting: Setting) -> str:
    """Why this machine can't run an engine; "": it can. In a process that may use the GPU."""
    import torch
    from vllm.platforms import current_platform

    count = engine.settings.get("tensor_parallel_size", 1)
    if setting.device == "cuda" and torch.cuda.device_count() < count:
        return f"{torch.cuda.device_count()} GPUs"
    backend = engine.settings.get("attention_config", {}).get("backend")
    if backend is None:
        return ""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    try:
        found = AttentionBackendEnum[backend].get_class()
    except ImportError as error:
        return _told(error)
    config = json.loads(Path(engine.folder or setting.folder, "config.json").read_text())
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if not found.supports_head_size(head_size):
        return f"heads of {head_size} are not supported"
    if not found.supports_dtype(getattr(torch, engine.dtype)):
        return f"{engine.dtype} is not supported"
    if not found.supports_compute_capability(current_platform.get_device_capability()):
        return "the GPU is not supported"
    return ""


def run_check(llm, check: Check, engine: Engine, setting: Setting, folder: str, expected: dict) -> dict[str, Any]:
    """Returns the fields of a check's line."""
    given = [given_tokens(folder, sum(case.pieces), case.text) for case in check.cases]
    if check.of_seeds:
        return compare_seeds(llm, check.cases[0], given[0])
    before = counter(llm, check.counter)
    found, nats = Comparison(), expected["nats"][engine.dtype]
    written = ask(llm, check, given, setting)
    for case, ids, (tokens, log_probs) in zip(check.cases, given, written, strict=True):
        kept, numbers = reported(case, ids)
        tokens, log_probs = ([each[place] for place in kept if place < len(each)] for each in (tokens, log_probs))
        answer = expected["answers"][f"{folder} {engine.slot_start} {case.key(engine.dtype)}"]
        answer = {name: [values[number] for number in numbers] for name, values in answer.items()}
        way = WAYS.get(case.way, {})
        kind = {"is_greedy": not way.get("do_sample"), "is_ordered": way.get("strategy") != "dynamic"}
        found.add(tokens, log_probs, answer, nats, **kind)
    status, why = found.verdict(nats)
    more = counter(llm, check.counter) - before
    if check.counter and not more:
        status, why = "failed", f"{check.counter} did not grow, so that nothing was tested"
    elif check.counter:
        why = f"{why}{'; ' if why else ''}{check.counter} +{more:.0f}"
    numbers = {name: value if math.isfinite(value) else None for name, value in asdict(found).items()}
    return numbers | {"status": status, "why": why}


def ask(llm, check: Check, given: Sequence[list[int]], setting: Setting) -> list[tuple[list[int], list[float]]]:
    """Returns the output tokens of each case and their log-probabilities."""
    from vllm import SamplingParams

    asked = [request_of(case, ids) for case, ids in zip(check.cases, given, strict=True)]
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in asked]
    params = [SamplingParams(**one) for _, one in asked]
    loras = [None] * len(asked)
    if any(case.adapter is not None for case in check.cases):
        from vllm.lora.request import LoRARequest

        loras = [
            None if one is None else LoRARequest(f"adapter{one}", one + 1, setting.adapters[one][0])
            for one in (case.adapter for case in check.cases)
        ]
    if check.together:
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=loras)
    else:
        outputs = [
            llm.generate([prompt], [one], use_tqdm=False)[0] for prompt, one in zip(prompts, params, strict=True)
        ]
    found = []
    for one in (output.outputs[0] for output in outputs):
        log_probs = [of[token].logprob for token, of in zip(one.token_ids, one.logprobs, strict=True)]
        found.append((list(one.token_ids), log_probs))
    return found


def compare_seeds(llm, case: Case, given: list[int]) -> dict[str, Any]:
    """Samples a case with vLLM's own sampler: the same seed gives the same, others and further answers give others."""
    from vllm import SamplingParams

    prompt, params = request_of(case, given)
    kept, _ = reported(case, given)

    def write(**changes) -> list[tuple[int, ...]]:
        changes = {"temperature": 1.0, **changes}
        [output] = llm.generate([{"prompt_token_ids": prompt}], [SamplingParams(**params | changes)], use_tqdm=False)
        return [tuple(one.token_ids[place] for place in kept) for one in output.outputs]

    one, three = write(seed=7), write(n=3, seed=1)
    true = {
        "equal seeds, equal answers": one == write(seed=7),
        "another seed, another answer": one != write(seed=8),
        "n=3 gives 3 answers": len(set(three)) == 3,
        "equal seeds, equal 3 answers": sorted(three) == sorted(write(n=3, seed=1)),
    }
    wrong = [name for name, is_so in true.items() if not is_so]
    status, why = ("failed", f"not so: {'; '.join(wrong)}") if wrong else ("passed", "")
    return {"equal": len(true) - len(wrong), "total": len(true), "status": status, "why": why}


def counter(llm, name: str) -> float:
    """A counter of vLLM's metrics; 0 without a name."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}") if name else 0.0


def _told(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


# ----------------------------------------------------------------------------------------------- all of them, one by one


def run_process(command: Sequence[str], log: Path, environment: dict[str, str], seconds: float) -> str:
    """Runs a command that must end in time, and ends all that it started; returns why it failed, "" if it did not."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            code = process.wait(seconds)
            why = "" if code == 0 else reason_in(log.read_text(errors="replace"), code)
        except subprocess.TimeoutExpired:
            why = f"not done after {seconds:.0f} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    return why


def reason_in(log: str, code: int) -> str:
    """Returns the error that ended a process: the last one that is not vLLM's "see above"."""
    errors = re.findall(r"(?:^|[ :])((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b: .+)$", log, re.MULTILINE)
    told = [error for error in errors if "Engine core init" not in error and "EngineDeadError" not in error]
    if told:
        return told[-1].strip()
    return f"ended by signal {-code}" if code < 0 else f"exit code {code}"


def lines_of(engine: Engine, results: Path, why: str, seconds: float) -> list[dict[str, Any]]:
    """Returns a line for each check of an engine; those that its process did not come to have failed, for `why`."""
    told = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    why_not = engine.why_not or next((line["why_not"] for line in told if "why_not" in line), "")
    shared = {"engine": engine.name, "dtype": engine.dtype}
    if why_not:
        return [shared | {"check": "", "status": "not there", "why": why_not, "seconds": seconds}]
    start = next((line for line in told if "started" in line), {})
    done = {line["check"]: line for line in told if "check" in line}
    found = []
    for check in engine.checks:
        line = done.get(check.name, {"check": check.name, "status": "failed", "why": why or "not run", "seconds": None})
        found.append(shared | line | {"start_seconds": start.get("started"), "vllm_chose": start.get("chose")})
    if why and all(line["status"] == "passed" for line in found):
        found.append(shared | {"check": "its end", "status": "failed", "why": why, "seconds": None})
    return found


def table_of(lines: Sequence[dict[str, Any]]) -> Table:
    """One row for each check."""
    table = Table(box=box.MARKDOWN)
    for heading in ("engine", "check", "equal", "of", "s", "result", "why"):
        table.add_column(heading, no_wrap=True)
    for line in lines:
        seconds = line.get("seconds")
        cells = (line.get("equal"), line.get("total"), None if seconds is None else f"{seconds:.1f}")
        cells = ["–" if cell is None else str(cell) for cell in cells]
        why = line["why"] if len(line["why"]) <= 120 else f"{line['why'][:119]}…"
        table.add_row(line["engine"], line["check"] or "–", *cells, line["status"], why.replace("[", "\\["))
    return table


def device_line() -> tuple[str, str]:
    """Returns "cuda" or "cpu", and the name of the GPUs or the CPU."""
    program = shutil.which("nvidia-smi")
    if program:
        done = subprocess.run([program, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
        names = done.stdout.split("\n")[:-1]
        if done.returncode == 0 and names:
            return "cuda", f"{len(names)} × {names[0].strip()}"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = re.findall(r"model name\s*: (.+)", info)
    return "cpu", f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Installed versions of what matters here."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment_of(device: str, engine: Engine | None = None) -> dict[str, str]:
    """Returns a process's environment; what the user has set stays, but for what blanks need."""
    own = dict(ENVIRONMENT) | (ON_CPU if device == "cpu" else {})
    count = 1 if engine is None else engine.settings.get("tensor_parallel_size", 1)
    if device == "cpu" and count > 1:
        own["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(core % (os.cpu_count() or 1)) for core in range(count))
    elif engine is not None and engine.settings.get("enforce_eager"):
        # the engine in the same process: all requests are there when its first step begins
        own["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    found = own | os.environ
    return found | {
        name: own[name] for name in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_PLUGINS", "TRITON_INTERPRET") if name in own
    }


def confirm(arguments: argparse.Namespace, setting: Setting, scratch: Path, report: dict[str, Any]) -> None:
    """Runs the reference and all engines, and adds their lines to the report."""
    engines = chosen(plan(setting), arguments.only)
    own = ["--device", setting.device, "--scratch", str(scratch), "--child"]
    command = [sys.executable, __file__, *sys.argv[1:], *own]
    began = time.perf_counter()
    why = run_process(
        [*command, "reference"], scratch / "reference.log", environment_of(setting.device), arguments.timeout
    )
    report["reference_seconds"] = round(time.perf_counter() - began, 1)
    print(f"generate_any_order: {report['reference_seconds']} s {why}", flush=True)
    if why:
        line = {"engine": "generate_any_order", "check": "", "status": "failed", "why": why, "seconds": None}
        report["checks"].append(line | {"log": (scratch / "reference.log").read_text(errors="replace")[-4000:]})
        return
    report["nats"] = json.loads((scratch / "answers.json").read_text())["nats"]
    print(
        ", ".join(f"{dtype}: rounding is up to {nats:.2g} nats" for dtype, nats in report["nats"].items()), flush=True
    )

    def run(numbered: tuple[int, Engine]) -> None:
        number, engine = numbered
        results, log = scratch / f"{number}.jsonl", scratch / f"{number}.log"
        started, why = time.perf_counter(), ""
        if not engine.why_not and time.perf_counter() - began > arguments.budget:
            engine = replace(engine, why_not=f"--budget {arguments.budget:.0f} is spent")
        if not engine.why_not:
            environment = environment_of(setting.device, engine)
            why = run_process([*command, engine.name, "--results", str(results)], log, environment, arguments.timeout)
        lines = lines_of(engine, results, why, time.perf_counter() - started)
        if any(line["status"] == "failed" for line in lines) and log.is_file():
            lines[-1]["log"] = log.read_text(errors="replace")[-4000:]
        report["checks"] += lines
        failed = sum(line["status"] == "failed" for line in lines)
        told = f"{failed} of {len(lines)} failed" if failed else lines[0]["status"]
        chose = lines[0].get("vllm_chose")
        print(
            f"{engine.name}: {told}, {time.perf_counter() - started:.0f} s{f'; {chose}' if chose else ''}", flush=True
        )
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")

    parallel = arguments.parallel or (1 if setting.device == "cuda" else min(2, os.cpu_count() or 1))
    if parallel == 1:
        for numbered in enumerate(engines):
            run(numbered)
    else:
        with ThreadPoolExecutor(parallel) as pool:
            list(pool.map(run, enumerate(engines)))
    order = {engine.name: number for number, engine in enumerate(engines)}
    report["checks"].sort(key=lambda line: order[line["engine"]])


def chosen(engines: Sequence[Engine], only: str | None) -> list[Engine]:
    """Engines whose name holds a word."""
    return [engine for engine in engines if only is None or only in engine.name]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="models/smollm2-135m", help="folder of a LLaMA or an A3 model")
    parser.add_argument("--tiny", action="store_true", help="a random model in place of it, with adapters")
    parser.add_argument("--adapter", action="append", default=[], help="folder that `a3 export` wrote; repeat for more")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--out", type=Path, help="writes the table, versions and device; .json")
    parser.add_argument("--only", help="engines whose name holds this, as 'one token' or 'room'")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each engine, its start included")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further engine starts")
    parser.add_argument(
        "--parallel", type=int, help="engines at a time; what took how long then says little; default: 1, on a CPU 2"
    )
    parser.add_argument(
        "--memory", type=float, default=0.6, help="share of the GPU's memory that must be free for an engine"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    for name in ("--child", "--scratch", "--results"):  # of the processes that this script starts
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> int:
    arguments = parse()
    device, name = device_line()
    more = {"tensor_parallel_size": arguments.tensor_parallel_size, "memory": arguments.memory}
    more["device"] = arguments.device or device

    def setting_in(scratch: Path) -> Setting:
        if arguments.tiny:
            found = [str(scratch / rows) for rows in ("slots", "all")]
            return Setting.read(str(scratch / "a3"), adapters=found, llama=str(scratch / "llama"), **more)
        return Setting.read(arguments.model, adapters=arguments.adapter, **more)

    if arguments.child:
        scratch = Path(arguments.scratch)
        setting = setting_in(scratch)
        engines = plan(setting)
        if arguments.child == "reference":
            write_reference(setting, chosen(engines, arguments.only), scratch / "answers.json")
        else:
            [engine] = [engine for engine in engines if engine.name == arguments.child]
            run_engine(engine, setting, scratch / "answers.json", Path(arguments.results))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # which ends the engine that runs, too
    with tempfile.TemporaryDirectory(prefix="confirm-vllm-") as folder:
        if arguments.tiny:
            make_tiny(Path(folder))
        try:
            setting = setting_in(Path(folder))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        report = {
            "date": str(date.today()), "device": name if setting.device == device else setting.device, "versions": versions(),
            "model": "random" if arguments.tiny else Path(arguments.model).name, "checks": [],
        }  # fmt: skip
        began = time.perf_counter()
        confirm(arguments, setting, Path(folder), report)
        report["seconds"] = round(time.perf_counter() - began, 1)
    Console(width=1000).print(table_of(report["checks"]))
    statuses = [line["status"] for line in report["checks"]]
    counts = [f"{statuses.count(status)} {status}" for status in ("passed", "failed", "not there")]
    print(f"{', '.join(counts)}, {report['seconds']:.0f} s")
    numbers = ", ".join(f"{package} {number}" for package, number in report["versions"].items())
    print(f"{report['device']}; {numbers}; {report['date']}")
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return int("failed" in statuses)


if __name__ == "__main__":
    sys.exit(main())
