"""The curriculum against a definition that looks at each step on its own."""

from fractions import Fraction

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from a3_hf.training.curriculum import Curriculum, Stage, draw_order
from a3_hf.training.curriculum_callbacks import CurriculumCallback
from a3_hf.training.schedule import StageAtStep

THREE = [
    {"name": "ar", "until": 0.25},
    {"name": "expand", "until": 0.5, "group_size": [1, 4]},
    {"name": "permute", "group_size": [1, 4]},
]
ENDS = {"steps": (40, 80), "tokens": (40_000, 80_000), "fraction": (0.25, 0.5)}
CURRICULA = {
    "three stages": (THREE, "fraction", 160),
    "steps": ([{**THREE[0], "until": 7}, {**THREE[1], "until": 20}, {**THREE[2], "until": 31}], "steps", 31),
    "tokens, between steps": ([{**THREE[0], "until": 2500}, {**THREE[1], "until": 9999}, THREE[2]], "tokens", 23),
    "decimals that binary misses": (
        [{**THREE[0], "until": 0.07}, {**THREE[1], "until": 0.29}, THREE[2]],
        "fraction",
        100,
    ),
    "one name twice": (
        [
            {"name": "expand", "until": 5, "group_size": 2},
            {"name": "expand", "until": 9, "group_size": 4},
            {"name": "permute"},
        ],
        "steps",
        12,
    ),
    "permute alone": ([{"name": "permute", "group_size": 3}], "fraction", 5),
    "fewer steps than sizes": ([{"name": "permute", "group_size": [1, 8]}], "fraction", 3),
    "the last is cut off": ([{"name": "ar", "until": 3}, {"name": "permute", "until": 100}], "steps", 6),
    "one step": ([{"name": "ar"}], "fraction", 1),
}
TOKENS_PER_STEP = 1000


def naive_table(stages, unit, max_steps):
    """What each step trains on, by asking of every step where in the run it begins."""
    progress = {"steps": 1, "tokens": TOKENS_PER_STEP, "fraction": Fraction(1, max_steps)}[unit]
    members = []
    for step in range(max_steps):
        for index, stage in enumerate(stages):
            if stage.get("until") is None or step * progress < Fraction(str(stage["until"])):
                members.append(index)
                break
    table = []
    for step, index in enumerate(members):
        first, last = sizes if isinstance(sizes := stages[index].get("group_size", 1), list) else (sizes, sizes)
        inside, length = step - members.index(index), members.count(index)
        size = first
        while size < last and inside >= Fraction(length, last - first + 1) * (size - first + 1):
            size += 1
        table.append(StageAtStep(stages[index]["name"], size, index))
    return table


@pytest.mark.parametrize("name", CURRICULA)
def test_every_step_has_the_stage_and_size_of_the_definition(name):
    stages, unit, max_steps = CURRICULA[name]
    schedule = Curriculum.from_config(stages, unit=unit).resolve(max_steps=max_steps, tokens_per_step=TOKENS_PER_STEP)
    assert [schedule.at(step) for step in range(max_steps)] == naive_table(stages, unit, max_steps)
    assert schedule.ends[-1] == max_steps


def test_boundaries_by_hand():
    schedule = Curriculum.from_config(THREE, unit="fraction").resolve(max_steps=16)
    assert [schedule.at(step).name for step in range(16)] == ["ar"] * 4 + ["expand"] * 4 + ["permute"] * 8
    assert [schedule.at(step).group_size for step in range(16)] == [1] * 4 + [1, 2, 3, 4] + [1, 1, 2, 2, 3, 3, 4, 4]
    assert schedule.ends == (4, 8, 16)


@pytest.mark.parametrize("unit", ENDS)
def test_the_units_agree(unit):
    stages = [{**THREE[0], "until": ENDS[unit][0]}, {**THREE[1], "until": ENDS[unit][1]}, THREE[2]]
    schedule = Curriculum.from_config(stages, unit=unit).resolve(max_steps=160, tokens_per_step=TOKENS_PER_STEP)
    assert schedule.ends == (40, 80, 160)


BAD = {
    "unknown name": ([{"name": "shuffle"}], "fraction", "'shuffle'.*ar, expand, permute"),
    "a number for a name": ([{"name": 1}], "fraction", "name=1: expected one of ar"),
    "unknown key": (
        [{"name": "ar", "untl": 1, "size": 2}],
        "fraction",
        "stage 1: unknown key 'untl'; did you mean 'until'",
    ),
    "no name": ([{"until": 1}], "fraction", "stage 1 has no name"),
    "not a mapping": (["ar"], "fraction", "stage 1 is 'ar'"),
    "no list": ("ar", "fraction", "a list of stages"),
    "none": (None, "fraction", "a list of stages"),
    "empty": ([], "fraction", "has no stages"),
    "unknown unit": ([{"name": "ar"}], "epochs", "'epochs'.*steps, tokens, fraction"),
    "until a string": ([{"name": "ar", "until": "0.5"}], "fraction", "until='0.5': expected a number"),
    "until a bool": ([{"name": "ar", "until": True}], "steps", "until=True: expected a number"),
    "until nan": ([{"name": "ar", "until": float("nan")}], "fraction", "until=nan"),
    "until inf": ([{"name": "ar", "until": float("inf")}], "steps", "until=inf"),
    "until missing": ([{"name": "ar"}, {"name": "permute"}], "fraction", "'ar'. has no until"),
    "fraction above 1": ([{"name": "ar", "until": 1.5}], "fraction", "ends at 1.5: expected a fraction"),
    "fraction 0": ([{"name": "ar", "until": 0.0}, {"name": "permute"}], "fraction", "ends at 0.0: expected a fraction"),
    "half a step": ([{"name": "ar", "until": 2.5}], "steps", "a whole number of steps"),
    "negative": ([{"name": "ar", "until": -2}], "tokens", "a whole number of tokens"),
    "backwards": (
        [{"name": "ar", "until": 0.5}, {"name": "permute", "until": 0.3}],
        "fraction",
        r"stage 2 \('permute'\) ends at 0.3, before stage 1 ends at 0.5: stages overlap or run backwards",
    ),
    "equal": ([{"name": "ar", "until": 3}, {"name": "permute", "until": 3}], "steps", "overlap or run backwards"),
    "out of order": ([{"name": "permute", "until": 0.5}, {"name": "ar"}], "fraction", "in the order ar, expand"),
    "ar with groups": ([{"name": "ar", "group_size": 2}], "fraction", "ar is one token at a time"),
    "ar with a pair": ([{"name": "ar", "group_size": [1, 2]}], "fraction", "ar is one token at a time"),
    "size 0": ([{"name": "expand", "group_size": 0}], "fraction", "group_size=0"),
    "size a string": ([{"name": "expand", "group_size": "2"}], "fraction", "group_size='2'"),
    "size a bool": ([{"name": "expand", "group_size": True}], "fraction", "group_size=True"),
    "size a fraction": ([{"name": "expand", "group_size": 1.5}], "fraction", "group_size=1.5"),
    "size of three": ([{"name": "expand", "group_size": [1, 2, 3]}], "fraction", r"group_size=\(1, 2, 3\)"),
    "size null": ([{"name": "expand", "group_size": None}], "fraction", "group_size=None"),
    "shrinking": ([{"name": "expand", "group_size": [4, 1]}], "fraction", "grows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_stages_are_refused(name):
    stages, unit, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        Curriculum.from_config(stages, unit=unit)


@pytest.mark.parametrize(
    "stages, unit, settings, message",
    [
        ([{"name": "ar", "until": 5}], "steps", {"max_steps": 9}, "ends at step 5, but the run has 9.*unit: fraction"),
        ([{"name": "ar", "until": 0.5}], "fraction", {"max_steps": 9}, "ends at step 5, but the run has 9"),
        (
            [{"name": "ar", "until": 9}, {"name": "permute"}],
            "steps",
            {"max_steps": 9},
            r"stage 2 \('permute'\) would begin at step 9, but the run has 9 steps; unit: fraction",
        ),
        (
            [{"name": "ar", "until": 0.31}, {"name": "expand", "until": 0.32}, {"name": "permute"}],
            "fraction",
            {"max_steps": 10},
            "no step of its own",
        ),
        ([{"name": "ar"}], "tokens", {"max_steps": 10}, "tokens_per_step=None"),
        ([{"name": "ar"}], "fraction", {"max_steps": 0}, "max_steps=0"),
    ],
)
def test_a_curriculum_that_does_not_fit_the_run_is_refused(stages, unit, settings, message):
    with pytest.raises(ValueError, match=message):
        Curriculum.from_config(stages, unit=unit).resolve(**settings)


@pytest.mark.parametrize("step", [-1, 16])
def test_steps_outside_the_run_have_no_stage(step):
    schedule = Curriculum.from_config(THREE).resolve(max_steps=16)
    with pytest.raises(ValueError, match="outside the run of 16"):
        schedule.at(step)


def test_the_shape_of_each_stage():
    mask = torch.ones(2, 6, dtype=torch.bool)
    ar = draw_order(StageAtStep("ar", 1, 0), mask)
    expand = draw_order(StageAtStep("expand", 2, 1), mask)
    assert ar.group_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert expand.group_ids.tolist() == [[0, 1, 1, 2, 2, 3]] * 2

    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    permute = draw_order(StageAtStep("permute", 2, 2), mask, generator=generators).group_ids
    assert permute.sort(dim=1).values.tolist() == [[0, 1, 1, 2, 2, 3]] * 2
    assert not torch.equal(permute[0], permute[1])


@pytest.mark.parametrize("eval_strategy", ["no", "steps"])
def test_the_callback_announces_and_evaluates_at_the_ends(tmp_path, capsys, eval_strategy):
    stages = (Stage("ar", 2), Stage("expand", 6, (1, 2)), Stage("permute", None, 2))
    callback = CurriculumCallback(Curriculum(stages, "steps").resolve(max_steps=8))
    args = TrainingArguments(str(tmp_path), eval_strategy=eval_strategy, use_cpu=True)
    state, evaluated = TrainerState(is_world_process_zero=True), []
    for step in range(8):
        control = TrainerControl()
        state.global_step = step
        callback.on_step_begin(args, state, control)
        state.global_step = step + 1
        if callback.on_step_end(args, state, control).should_evaluate:
            evaluated.append(step + 1)
    assert evaluated == ([] if eval_strategy == "no" else [2, 6, 8])
    assert capsys.readouterr().out.splitlines() == [
        "step 0: stage ar begins, group size 1",
        "step 2: stage expand begins, group size 1",
        "step 4: stage expand continues, group size 2",
        "step 6: stage permute begins, group size 2",
    ]


@pytest.mark.parametrize(("eval_steps", "expected"), [(4, [3, 8]), (2, [2, 3, 6, 8]), (1, [1, 2, 3, 4, 5, 6, 7, 8])])
def test_an_evaluation_that_was_just_made_is_not_repeated_a_step_later(tmp_path, eval_steps, expected):
    stages = Curriculum.from_config([{"name": "ar", "until": 3}, {"name": "permute", "group_size": 2}], unit="steps")
    callback = CurriculumCallback(stages.resolve(max_steps=8))
    args = TrainingArguments(str(tmp_path), eval_strategy="steps", eval_steps=eval_steps, max_steps=8, use_cpu=True)
    evaluated = []
    for step in range(1, 9):
        state = TrainerState(global_step=step, max_steps=8)
        asked = TrainerControl(should_evaluate=step % eval_steps == 0)
        if callback.on_step_end(args, state, asked).should_evaluate:
            evaluated.append(step)
    assert evaluated == expected
