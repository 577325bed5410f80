"""UniformInt rows against what their settings say, by counting and one by one."""

import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml

from a3_hf.models.a3_llama.orders import GroupOrder
from a3_hf.training.base_trainer import row_generator
from a3_hf.training.curriculum import Curriculum, draw_order
from a3_hf.training.order_sampling import RowSpec, draw_rows
from tests.conftest import tiny_model
from tests.training.test_trainer import make_trainer, naive_loss, rows

TRAINING = Path(__file__).parents[2] / "docs" / "training.md"
LENGTH = 13  # BOS and 12 open tokens


def schedule_of(*stages, max_steps=30):
    return Curriculum.from_config(list(stages), unit="steps").resolve(max_steps=max_steps)


def draw(stage, *, num_rows=400, length=LENGTH, step=0) -> GroupOrder:
    mask = torch.ones(num_rows, length, dtype=torch.bool)
    return draw_order(stage, mask, generator=[row_generator(7, step, row) for row in range(num_rows)])


def sizes_of(group_ids: list[int]) -> list[int]:
    """Tokens of each group after BOS, in the order of the groups."""
    counts = Counter(group_ids)
    return [counts[group] for group in sorted(counts)][1:]


def assert_share(count: int, share: float, rows: int) -> None:
    """Within four standard deviations."""
    assert abs(count - share * rows) < 4 * (rows * share * (1 - share)) ** 0.5, (count, share * rows)


def test_sizes_are_drawn_evenly_for_each_row():
    stage = schedule_of({"name": "permute", "group_size": {"draw": [2, 4]}}).at(0)
    assert stage.group_size == stage.largest_group == 4
    order = draw(stage)
    first = Counter()
    for row in order.group_ids.tolist():
        sizes = sizes_of(row)
        assert sizes == [sizes[0]] * (12 // sizes[0])
        first[sizes[0]] += 1
    for size in (2, 3, 4):
        assert_share(first[size], 1 / 3, 400)


def test_the_rows_of_other_stages_can_draw_sizes_too():
    stage = schedule_of({"name": "expand", "group_size": {"draw": [1, 2]}}).at(0)
    seen = {tuple(row) for row in draw(stage, length=5).group_ids.tolist()}
    assert seen == {(0, 1, 2, 3, 4), (0, 1, 1, 2, 2)}


def shape_of(order: GroupOrder, row: int) -> str:
    if order.given_mask[row].sum() > 1:
        return "infilling"
    groups = order.group_ids[row, 1:].tolist()
    spans = [groups[start : start + 3] for start in range(0, 12, 3)]
    return "spans" if all(span[0] == span[1] and span[2] == span[0] + 1 for span in spans) else "scattered"


def test_shapes_come_as_often_as_their_weights_say():
    weights = {"scattered": 5, "spans": 3, "infilling": 2}
    stage = schedule_of({"name": "permute", "group_size": 2, "shapes": weights, "span_length": 3}).at(0)
    order = draw(stage, num_rows=800)
    seen = Counter(shape_of(order, row) for row in range(800))
    # One blank in 72 is the whole row, given nothing but BOS: it passes for another shape, far within the tolerance.
    for shape, weight in weights.items():
        assert_share(seen[shape], weight / 10, 800)


def test_span_lengths_are_drawn_evenly():
    kind = RowSpec(1, range(12, 13), (("spans", 1),), span_lengths=range(2, 5))
    order = draw_rows([kind], torch.ones(300, LENGTH, dtype=torch.bool), generator=torch.Generator().manual_seed(0))
    seen = Counter()
    for row in order.group_ids.tolist():
        sizes = sizes_of(row)  # the group is the whole span
        seen[sizes[0]] += 1
        assert set(sizes) == {sizes[0]}
        starts = range(1, LENGTH, sizes[0])
        assert all(len(set(row[start : start + sizes[0]])) == 1 for start in starts)
    for length in (2, 3, 4):
        assert_share(seen[length], 1 / 3, 300)


def test_an_infilled_row_gives_all_but_one_blank_written_left_to_right():
    stage = schedule_of({"name": "permute", "group_size": 2, "shapes": {"infilling": 1}}).at(0)
    assert not stage.scores_everything
    order = draw(stage, num_rows=300)
    ends = Counter()
    for groups, given in zip(order.group_ids.tolist(), order.given_mask.tolist(), strict=True):
        blank = [position for position in range(LENGTH) if not given[position]]
        assert given[0] and blank == list(range(blank[0], blank[-1] + 1))
        num_given = LENGTH - len(blank)
        assert [groups[position] for position in blank] == [num_given + place // 2 for place in range(len(blank))]
        assert [groups[position] for position in range(LENGTH) if given[position]] == list(range(num_given))
        ends[blank[0], blank[-1]] += 1
    # Of two ends drawn from 12 places, (1, 12) comes in either order, (3, 3) in one.
    assert_share(ends[1, 12], 2 / 144, 300)
    assert_share(sum(count for (first, last), count in ends.items() if first == last), 12 / 144, 300)


@pytest.mark.parametrize("share", ["1/2", "1/6", 0.3, 1])
def test_partial_prediction_scores_the_end_of_the_order(share):
    stage = schedule_of({"name": "permute", "group_size": 3, "predict_last": share}).at(0)
    assert stage.scores_everything == (share == 1)
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[1, 9:] = False
    mask[2, 1:] = False
    generators = [row_generator(7, 0, row) for row in range(3)]
    order = draw_order(stage, mask, generator=generators)
    for row in range(3):
        ranked = sorted(range(1, int(mask[row].sum())), key=lambda position: int(order.group_ids[row, position]))
        groups = [int(order.group_ids[row, position]) for position in ranked]
        left_out = int(len(ranked) * (1 - Fraction(str(share))))
        # A group is context where its last token is.
        context = {group for group in groups if len([g for g in groups if g <= group]) <= left_out}
        scored = {position for position, group in zip(ranked, groups, strict=True) if group not in context}
        assert set(order.scored_mask[row].nonzero().flatten().tolist()) == scored
        assert scored or not ranked
    whole = draw_order(schedule_of({"name": "permute", "group_size": 3}).at(0), mask, generator=generators)
    assert order.given_mask.equal(whole.given_mask)
    labels = order.lay_out(torch.arange(3, 3 + LENGTH).repeat(3, 1)).labels
    assert (labels != -100).sum(dim=1).tolist() == order.scored_mask.sum(dim=1).tolist()


def test_rehearsed_rows_are_those_of_earlier_stages():
    stages = (
        {"name": "ar", "until": 10},
        {"name": "expand", "until": 20, "group_size": [2, 3]},
        {"name": "permute", "group_size": 4, "rehearsal": 0.4},
    )
    schedule = schedule_of(*stages)
    assert schedule.at(15).kinds == () and schedule.at(25).largest_group == 4
    seen = Counter()
    for row in draw(schedule.at(25), num_rows=600).group_ids.tolist():
        sizes = sizes_of(row)
        seen[sizes[0] if row == sorted(row) else "permute"] += 1
    assert_share(seen["permute"], 0.6, 600)
    assert_share(seen[1], 0.2, 600)  # ar
    assert_share(seen[2], 0.1, 600)  # expand at either of its sizes
    assert_share(seen[3], 0.1, 600)
    assert set(seen) == {"permute", 1, 2, 3}


EVERYTHING = {
    "name": "permute",
    "group_size": {"draw": [1, 4]},
    "shapes": {"scattered": 1, "spans": 1, "infilling": 1},
    "span_length": {"draw": [2, 5]},
    "predict_last": "2/3",
    "rehearsal": 0.3,
}


def test_a_rows_order_is_its_own():
    """The same at each drawing, in any batch and on any rank; another at each step."""
    stage = schedule_of({"name": "ar", "until": 5}, EVERYTHING).at(9)
    mask = torch.ones(8, LENGTH, dtype=torch.bool)
    mask[3, 10:] = False

    def drawn(indices, step=9):
        order = draw_order(stage, mask[indices], generator=[row_generator(7, step, row) for row in indices])
        return order.group_ids, order.scored_mask, order.given_mask

    together = drawn(list(range(8)))
    assert all(torch.equal(a, b) for a, b in zip(together, drawn(list(range(8))), strict=True))
    for indices in ([0, 2, 4], [1, 3, 5], [6], [7]):  # as two ranks, then as the rest of another batch
        for whole, part in zip(together, drawn(indices), strict=True):
            assert torch.equal(whole[indices], part)
    assert not torch.equal(together[0], drawn(list(range(8)), step=8)[0])


@pytest.mark.parametrize("rows_at_once, accumulation", [(4, 1), (2, 2), (1, 4)])
def test_training_equals_a_plain_loop(tmp_path, rows_at_once, accumulation):
    """Whatever the micro-batches: each scored token of the update step weighs the same, however few a row has."""
    # In the second stage singletons stand beside groups.
    stages = [
        {"name": "expand", "until": 1, "group_size": 3},
        {"name": "permute", "until": 2, "rehearsal": 0.5},
        EVERYTHING,
    ]
    train = rows([9, 4, 7, 2, 12, 3, 14, 15, 6, 12, 2, 8, 13, 9, 10, 9])
    trainer = make_trainer(
        tmp_path,
        train,
        stages=stages,
        model=tiny_model(num_hidden_layers=2),
        per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model, schedule = tiny_model(num_hidden_layers=2), schedule_of(*stages, max_steps=4)
    optimizer, num_left_out = torch.optim.SGD(model.parameters(), lr=1e-2), 0
    for step in range(4):
        total, num_scored = torch.zeros(()), 0
        for index, row in enumerate(train[4 * step : 4 * step + 4]):
            order = draw_order(
                schedule.at(step),
                torch.ones(1, len(row["labels"]), dtype=torch.bool),
                given_mask=torch.tensor([row["labels"]]) == -100,
                generator=[row_generator(42, step, index)],
            )
            labels = torch.tensor(row["input_ids"]).masked_fill(~order.scored_mask[0], -100).tolist()
            total = total + naive_loss(model, {**row, "labels": labels}, order.group_ids[0].tolist())
            num_scored += sum(label != -100 for label in labels)
        num_left_out += (
            sum(label != -100 for row in train[4 * step : 4 * step + 4] for label in row["labels"]) - num_scored
        )
        optimizer.zero_grad()
        (total / num_scored).backward()
        optimizer.step()
        assert losses[step] == pytest.approx(total.item() / num_scored, abs=2e-5), f"step {step}"
    assert num_left_out > 10
    trained = trainer.model.state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_rows_without_open_tokens_are_left_alone():
    stage = schedule_of({"name": "ar", "until": 5}, EVERYTHING).at(9)
    mask = torch.zeros(20, 6, dtype=torch.bool)
    mask[:, 0] = True
    mask[::2] = False
    order = draw_order(stage, mask, generator=[row_generator(0, row) for row in range(20)])
    assert not order.scored_mask.any()
    assert order.group_ids.tolist() == [[-1] * 6, [0, *[-1] * 5]] * 10


def test_what_a_recipe_does_not_mention_changes_no_order():
    """Bit for bit the orders of a curriculum of plain stages, as runs that are under way have drawn them."""
    stages = ({"name": "ar", "until": 10}, {"name": "expand", "until": 20, "group_size": [1, 3]}, {"name": "permute"})
    schedule = schedule_of(*stages[:2], {**stages[2], "group_size": 3})
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    for step in (0, 12, 25):
        generators = [row_generator(7, step, row) for row in range(2)]
        order = draw_order(schedule.at(step), mask, generator=generators)
        assert schedule.at(step).kinds == () and order.context_mask is None
        if step == 25:
            again = [row_generator(7, step, row) for row in range(2)]
            noise = torch.stack([torch.rand(LENGTH, generator=generator) for generator in again])
            rank = noise[:, :12].argsort(dim=1).argsort(dim=1)
            assert torch.equal(order.group_ids[:, 1:], rank // 3 + 1)


BAD = {
    "draw of one": (
        {"group_size": {"draw": [2]}},
        r"group_size=\{'draw': \[2\]\}: expected .draw: .smallest, largest..",
    ),
    "draw with more": (
        {"group_size": {"draw": [2, 3], "per": "step"}},
        "expected .draw: .smallest, largest..",
    ),
    "draw a word": ({"group_size": {"draw": "ab"}}, r"draw: \['a', 'b'\]\}: expected two whole numbers"),
    "draw backwards": ({"group_size": {"draw": [3, 2]}}, "the smaller first"),
    "draw 0": ({"group_size": {"draw": [0, 2]}}, "at least 1"),
    "draw a bool": ({"group_size": {"draw": [True, 2]}}, "two whole numbers"),
    "unknown shape": ({"shapes": {"rings": 1}}, "'rings': expected scattered, spans, infilling"),
    "shape of weight 0": ({"shapes": {"scattered": 0}}, "weight 0 of scattered: expected a number above 0"),
    "shape of weight nan": ({"shapes": {"scattered": float("nan")}}, "weight nan of scattered"),
    "shape of no weight": ({"shapes": {"scattered": "x"}}, "weight 'x' of scattered"),
    "shapes in a list": ({"shapes": ["scattered"]}, "expected weights"),
    "no shapes": ({"shapes": {}}, "has no shapes"),
    "shapes of ar": ({"name": "ar", "shapes": {"infilling": 1}}, "which only permute has"),
    "spans without length": ({"shapes": {"spans": 1}}, "span_length=None: expected a length with the shape spans"),
    "length without spans": (
        {"span_length": 4},
        "span_length=4: expected a length with the shape spans, and none without",
    ),
    "length 0": ({"shapes": {"spans": 1}, "span_length": 0}, "span_length=0: expected a whole"),
    "length drawn backwards": ({"shapes": {"spans": 1}, "span_length": {"draw": [4, 2]}}, "span_length={draw"),
    "a length that grows": ({"shapes": {"spans": 1}, "span_length": [2, 4]}, "span_length="),
    "predict nothing": ({"predict_last": 0}, "predict_last=0: expected a fraction above 0"),
    "predict more than all": ({"predict_last": "7/6"}, "predict_last='7/6'"),
    "predict a word": ({"predict_last": "half"}, "predict_last='half'"),
    "predict by zero": ({"predict_last": "1/0"}, "predict_last='1/0'"),
    "predict a bool": ({"predict_last": True}, "predict_last=True"),
    "predict null": ({"predict_last": None}, "predict_last=None"),
    "rehearse everything": ({"rehearsal": 1}, "rehearsal=1: expected a fraction"),
    "rehearse less than nothing": ({"rehearsal": -0.1}, "rehearsal=-0.1"),
    "rehearse a bool": ({"rehearsal": True}, "rehearsal=True"),
    "rehearse a word": ({"rehearsal": "0.1"}, "rehearsal='0.1'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused(name):
    settings, message = BAD[name]
    first = {"name": "ar", "until": 0.5}
    with pytest.raises(ValueError, match="stage 2.*" + message):
        Curriculum.from_config([first, {"name": "permute", **settings}])


def test_the_first_stage_has_nothing_to_rehearse():
    with pytest.raises(ValueError, match=r"stage 1 \('permute'\): rehearsal=0.5: expected 0 in the first stage"):
        Curriculum.from_config([{"name": "permute", "rehearsal": 0.5}])


def test_the_curriculum_of_the_documentation_is_one():
    block = re.search(r"```yaml\n(curriculum:.*?)```", TRAINING.read_text(encoding="utf-8"), re.DOTALL).group(1)
    config = yaml.safe_load(block)["curriculum"]
    schedule = Curriculum.from_config(config["stages"], unit=config["unit"]).resolve(max_steps=1000)
    assert schedule.at(999).largest_group == 8 and schedule.ends[-1] == 1000
