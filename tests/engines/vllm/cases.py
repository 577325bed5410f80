"""Requests with blanks and what `generate_any_order` answers.

vLLM computes in float32 and the oracle in float64: the tests' models have weights that are drawn wide, so that no two tokens
are near. `scripts/confirm_vllm.py` asks the same of other models.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.export import export
from a3_hf.adapters.layers import attach
from a3_hf.engines.vllm.requests import Blanks, Dynamic, OneRowScript, Sampling
from a3_hf.models.a3_llama.generation_decoder import row_seed
from a3_hf.models.a3_llama.orders import GroupOrder

SHAPE = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}
# (given before, between and after), (lengths)
LAYOUTS = (
    ((40, 30), (5,)),
    ((35, 3, 20), (4, 6)),
    ((50, 0), (7,)),
    ((33, 0, 12), (3, 4)),
    ((64, 40, 0), (2, 8)),
    ((1, 70), (6,)),
    ((20, 10, 5, 7), (3, 3, 3)),
    ((32, 33), (9,)),
)
WAYS = {
    "one by one": {},
    "groups of 4": {"group_size": 4},
    "groups of 3 from the right": {"group_size": 3, "order": "right_to_left"},
    "random pairs": {"group_size": 2, "order": "random"},
    "spans": {"order": "spans", "span_length": 3, "group_size": 2},
    "sampled": {"group_size": 3, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 5},
    "sampled, top_k and min_p": {"do_sample": True, "top_k": 20, "min_p": 0.05, "seed": 6},
    "dynamic": {"strategy": "dynamic", "tokens_per_step": 2},
    "dynamic by a threshold": {"strategy": "dynamic", "threshold": 0.3},
    "dynamic, sampled": {"strategy": "dynamic", "entropy_budget": 1.0, "do_sample": True, "seed": 3},
    "dynamic at random in a window": {"strategy": "dynamic", "window": 3, "criterion": "random", "seed": 4},
}
DRAFTS = {  # where a slot starts as the token on its left
    "drafts": {"strategy": "speculative", "draft_tokens": 4},
    "drafts, sampled": {
        "strategy": "speculative",
        "draft_tokens": 3,
        "do_sample": True,
        "temperature": 0.7,
        "seed": 9,
    },
}
# engines that are short of room: blanks as long as blocks run out while they are written
ROOM = {"num_gpu_blocks_override": 14}
GROUPS_ROOM = {**ROOM, "max_num_batched_tokens": 53, "hf_overrides": {"canvas_length": 49}}


@dataclass(frozen=True)
class Case:
    """A request and its answer.

    Attributes:
        blanks: None: the prompt is continued.
        answer: tokens in the order in which vLLM reports them.
        log_probs: of these.
        columns: of these.
        groups: of all columns, in which the answer is written; None: the worker chooses (dynamic).
        is_greedy: the likeliest tokens are taken.
    """

    blanks: Blanks | None
    given: tuple[int, ...]
    answer: tuple[int, ...]
    log_probs: tuple[float, ...]
    columns: tuple[int, ...] = ()
    groups: tuple[int, ...] | None = None
    is_greedy: bool = True

    def prompt(self) -> dict:
        if self.blanks is None or self.blanks.sampling is not None:
            return {"prompt_token_ids": list(self.given)}
        return {"prompt_token_ids": OneRowScript(self.blanks).prompt(self.given)}

    def sampling_params(self, **changes):
        from vllm import SamplingParams

        extra, outputs = {}, len(self.answer)
        settings = {"temperature": 0.0, "ignore_eos": True, "detokenize": False, "logprobs": 1}
        if self.blanks is not None:
            extra = self.blanks.extra_args()
            if self.blanks.sampling is None:
                outputs = OneRowScript(self.blanks).num_outputs
            else:
                extra["diffusion_canvas_length"] = self.blanks.width()
                settings["temperature"] = 1.0
        return SamplingParams(**settings | {"max_tokens": outputs, "extra_args": extra} | changes)

    def written(self, output) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The tokens of a vLLM output that are the blanks', and their log-probabilities."""
        tokens = list(output.token_ids)
        log_probs = [of[token].logprob for token, of in zip(tokens, output.logprobs, strict=True)]
        if self.blanks is not None and self.blanks.sampling is None:
            kept = [number for number, column in enumerate(OneRowScript(self.blanks).columns) if column is not None]
            tokens, log_probs = [tokens[number] for number in kept], [log_probs[number] for number in kept]
        return tuple(tokens), tuple(log_probs)


def given_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, SHAPE["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def filled(model, blanks: Blanks, given: list[int], **settings) -> Case:
    """Returns the case that `generate_any_order(**settings)` answers; its blanks get the way of writing that settings name."""
    input_ids = torch.zeros(1, blanks.size, dtype=torch.long)
    blank_mask = torch.zeros(1, blanks.size, dtype=torch.bool)
    input_ids[0, blanks.given_columns()] = torch.tensor(given)
    blank_mask[0, blanks.open_columns()] = True
    settings = {"seed": 0, **settings}
    strategy, in_groups = settings.get("strategy"), settings.pop("in_groups", True)
    if strategy == "speculative":  # what it writes is what one token at a time is
        reference = {name: settings[name] for name in settings if name not in ("strategy", "draft_tokens")}
    else:
        reference = settings
    output = model.generate_any_order(input_ids.to(model.device), blank_mask.to(model.device), **reference)
    seed = row_seed(settings["seed"], input_ids[0].masked_fill(blank_mask[0], -1), 0)
    groups = None if strategy == "dynamic" else _groups_of(blank_mask, settings, seed)
    if in_groups:
        sampling = Sampling(
            settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0,
            *(settings.get(name) for name in ("top_k", "top_p", "min_p")),
            seed=seed,
        )
        blanks = replace(blanks, sampling=sampling, **_way(blanks, groups, settings))
    columns = [column for step in blanks.steps for column in step] or blanks.open_columns()
    answer, log_probs = output.sequences[0, columns].tolist(), output.log_probs[0, columns].tolist()
    return Case(
        blanks, tuple(given), tuple(answer), tuple(log_probs), tuple(columns), groups, not settings.get("do_sample")
    )


def _groups_of(blank_mask: torch.Tensor, settings: dict, seed: int) -> tuple[int, ...]:
    groups = GroupOrder.infilling(
        blank_mask,
        order=settings.get("order", "left_to_right"),
        group_size=settings.get("group_size", 1),
        span_length=settings.get("span_length"),
        generator=[torch.Generator().manual_seed(seed)],
    ).group_ids[0]
    return tuple(groups.tolist())


def _way(blanks: Blanks, groups: tuple[int, ...] | None, settings: dict) -> dict:
    if settings.get("strategy") == "speculative":
        return {"drafts": settings["draft_tokens"]}
    if groups is None:
        names = ("criterion", "tokens_per_step", "threshold", "entropy_budget", "window")
        return {"dynamic": Dynamic(**{name: settings.get(name) for name in names})}
    steps: dict[int, list[int]] = {}
    for column in blanks.open_columns():
        steps.setdefault(groups[column], []).append(column)
    return {"steps": tuple(tuple(steps[number]) for number in sorted(steps))}


def continued(model, given: list[int], length: int) -> Case:
    """Returns the case of a plain continuation, as transformers' `generate` answers it."""
    output = model.generate(
        torch.tensor([given], device=model.device),
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    answer = output.sequences[0, len(given) :].tolist()
    log_probs = [logits[0].log_softmax(-1)[token].item() for logits, token in zip(output.logits, answer, strict=True)]
    columns, groups = range(len(given), len(given) + length), range(len(given) + length)
    return Case(None, tuple(given), tuple(answer), tuple(log_probs), tuple(columns), tuple(groups))


def cases_of(model, ways: dict, layouts=LAYOUTS) -> list[Case]:
    """Each layout in each way of groups."""
    return [
        filled(model, Blanks(*layout, is_text=False), given_tokens(sum(layout[0]), number), **way)
        for way in ways.values()
        for number, layout in enumerate(layouts)
    ]


def one_token_cases(model) -> list[Case]:
    """Each layout, one row a token."""
    return cases_of(model, {"one token a step": {"in_groups": False}})


def same_tokens(model) -> list[Case]:
    """Four lengths before the same text, two other cuts of the same tokens, and two continuations."""
    given = given_tokens(90, 100)
    splits = [((50, 40), (length,)) for length in (3, 5, 8, 11)] + [((64, 26), (5,)), ((33, 57), (5,))]
    cases = [filled(model, Blanks(*split, is_text=False), given, in_groups=False) for split in splits]
    return [*cases, continued(model, given, 6), continued(model, given[:50], 6)]


def long_blanks(model) -> list[Case]:
    """What takes more blocks than `ROOM` has, one row a token."""
    splits = [((60, 30, 10), (20, 15)), ((60, 40, 0), (12, 30)), ((62, 30), (40,)), ((40, 20), (50,))]
    return [
        filled(model, Blanks(*split, is_text=False), given_tokens(sum(split[0]), seed), in_groups=False)
        for split in splits
        for seed in (7, 8)
    ]


def long_groups(model, ways: dict) -> list[Case]:
    """What takes more blocks than `GROUPS_ROOM` has."""
    layouts, found = [((60, 30, 10), (14, 9)), ((90, 10), (22,)), ((60, 0), (24,))], []
    for number, way in enumerate([*ways.values(), *ways.values()]):
        pieces, lengths = layouts[number % 3]
        found.append(filled(model, Blanks(pieces, lengths, is_text=False), given_tokens(sum(pieces), number), **way))
    return found


def adapter(folder: Path, base, rows: str, seed: int):
    """Returns `base` with a random adapter, and the folders of the adapter as saved and as exported."""
    (folder / "base").mkdir(exist_ok=True)
    base.save_pretrained(folder / "base")
    model = attach(base, LoraArguments(r=4, rows=rows))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=generator)
    saved, exported = folder / f"{rows}{seed}", folder / f"{rows}{seed}-exported"
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(saved)
    export(str(saved), exported)
    return model.eval(), str(saved), str(exported)
