"""The auxiliary losses against a loop over tokens, values and gradients."""

import json
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from a3_hf.models.a3_llama.orders import GroupOrder
from a3_hf.training.auxiliary_losses import content_loss, distillation_loss, next_token_pairs
from a3_hf.training.base_trainer import row_generator
from a3_hf.training.curriculum import Curriculum, draw_order
from a3_hf.training.model_inputs import model_inputs
from a3_hf.training.recipes import parse_recipe
from tests.conftest import tiny_model
from tests.training.test_trainer import make_trainer, naive_loss, rows

STAGES = [
    {"name": "ar", "until": 1},
    {"name": "expand", "until": 3, "group_size": [1, 2]},
    {"name": "permute", "until": 4, "group_size": 3, "rehearsal": 0.7},
    {"name": "permute", "group_size": {"draw": [1, 2]}, "rehearsal": 0.5, "predict_last": "1/2"},
]
WEIGHTS = {"content only": (0.5, 0.0), "distillation only": (0.0, 0.7), "both": (0.3, 1.5)}


def naive_row(model, row: dict, groups: list[int], scored: list[bool]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Content loss and divergence of one row, summed token by token, and the number of tokens."""
    of_content, divergence, tokens = torch.zeros(()), torch.zeros(()), 0
    if any(later <= earlier for earlier, later in pairwise(groups)):
        return of_content, divergence, 0
    ids = row["input_ids"]
    for position in range(1, len(ids)):
        if not scored[position]:
            continue
        known = torch.tensor([ids[:position]])
        states = model.model(input_ids=known, target_position_ids=torch.zeros(1, 0, dtype=torch.long), use_cache=False)
        content = model.lm_head(states.content_hidden_state[0, -1]).log_softmax(dim=-1)
        query = model(
            input_ids=known,
            target_position_ids=torch.tensor([[position]]),
            target_group_ids=torch.tensor([[position]]),
            use_cache=False,
        ).logits[0, 0]
        of_content = of_content - content[ids[position]]
        teacher = content.detach()
        divergence = divergence + (teacher.exp() * (teacher - query.log_softmax(dim=-1))).sum()
        tokens += 1
    return of_content, divergence, tokens


@pytest.mark.parametrize("name", WEIGHTS)
def test_training_equals_a_plain_loop(tmp_path, name):
    content_weight, distillation_weight = WEIGHTS[name]
    train = rows([9, 4, 7, 2, 8, 3, 9, 5, 6, 9, 2, 8, 4, 7, 9, 3, 5, 5, 6, 8])
    model = tiny_model(num_hidden_layers=2)
    trainer = make_trainer(
        tmp_path,
        train,
        stages=STAGES,
        model=model,
        max_steps=5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        content_loss_weight=content_weight,
        distillation_weight=distillation_weight,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]

    model = tiny_model(num_hidden_layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    schedule = Curriculum.from_config(STAGES, unit="steps").resolve(max_steps=5)
    num_pairs = 0
    for step in range(5):
        total, sums, pairs, items = torch.zeros(()), [0.0, 0.0], 0, 0
        for index, row in enumerate(train[4 * step : 4 * step + 4]):
            order = draw_order(
                schedule.at(step),
                torch.ones(1, len(row["labels"]), dtype=torch.bool),
                given_mask=torch.tensor([row["labels"]]) == -100,
                generator=[row_generator(42, step, index)],
            )
            groups, scored = order.group_ids[0].tolist(), order.scored_mask[0].tolist()
            labels = [label if is_scored else -100 for label, is_scored in zip(row["labels"], scored, strict=True)]
            total = total + naive_loss(model, {**row, "labels": labels}, groups)
            of_content, divergence, tokens = naive_row(model, row, groups, scored)
            total = total + content_weight * of_content + distillation_weight * divergence
            sums = [sums[0] + of_content.item(), sums[1] + divergence.item()]
            pairs, items = pairs + tokens, items + sum(scored)
        optimizer.zero_grad()
        (total / items).backward()
        optimizer.step()
        assert logs[step]["loss"] == pytest.approx(total.item() / items, abs=2e-5), f"step {step}"
        for key, weight, value in zip(
            ("content_loss", "distillation_loss"), (content_weight, distillation_weight), sums, strict=True
        ):
            assert (key in logs[step]) == bool(weight and pairs)
            if weight and pairs:
                assert logs[step][key] == pytest.approx(value / pairs, abs=2e-5)
        num_pairs += pairs
    assert num_pairs > 30
    trained = trainer.model.state_dict()
    for key, weight in model.state_dict().items():
        torch.testing.assert_close(trained[key], weight, rtol=1e-4, atol=1e-5, msg=key)


def test_the_chunked_loss_goes_with_the_content_loss(tmp_path):
    trained = []
    for loss in ("plain", "chunked"):
        trainer = make_trainer(
            tmp_path,
            rows([8] * 20),
            stages=STAGES,
            max_steps=5,
            optim="sgd",
            content_loss_weight=0.5,
            loss=loss,
        )
        trainer.train()
        trained.append(trainer.model.state_dict())
    for key, weight in trained[0].items():
        torch.testing.assert_close(trained[1][key], weight, rtol=1e-4, atol=1e-6, msg=key)


def pairs_in_text(order: GroupOrder, group_size: int, document_ids=None) -> set[tuple[int, int]]:
    """(row, position of the token that is forecast), after checking that both places are those of that token."""
    input_ids = torch.arange(100, 100 + order.group_ids.numel()).view_as(order.group_ids)  # an id tells the place
    inputs = model_inputs(order, input_ids, group_size=group_size, implementation="sdpa", document_ids=document_ids)
    found = set()
    for row, content, slot in zip(*next_token_pairs(order, inputs["labels"], document_ids), strict=True):
        place = int(inputs["labels"][row, slot]) - 100 - int(row) * input_ids.shape[1]
        assert int(inputs["input_ids"][row, content]) - 100 - int(row) * input_ids.shape[1] == place - 1
        targets = inputs.get("target_position_ids", inputs["position_ids"])
        assert int(targets[row, slot]) == place
        found.add((int(row), place))
    return found


MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2], dtype=torch.bool)


@pytest.mark.parametrize("group_size", [1, 2])  # 1: the layout without the last content token
def test_pairs_of_plain_rows(group_size):
    order = GroupOrder.left_to_right(MASK)
    assert pairs_in_text(order, group_size) == {(0, place) for place in range(1, 6)} | {(1, 1), (1, 2), (1, 3)}


def test_pairs_of_partial_rows():
    order = GroupOrder.left_to_right(MASK).scoring_last(Fraction(1, 2))
    assert pairs_in_text(order, 1) == {(0, 3), (0, 4), (0, 5), (1, 2), (1, 3)}


def test_rows_in_other_orders_have_no_pairs():
    given = torch.zeros_like(MASK)
    given[:, [0, 3]] = True  # a token known from the start, behind others that are not
    for order in (
        GroupOrder.contiguous(MASK, group_size=2),
        GroupOrder.right_to_left(MASK),
        GroupOrder.scattered(MASK, group_size=1, generator=torch.Generator().manual_seed(0)),
        GroupOrder.left_to_right(MASK, given_mask=given),
    ):
        assert pairs_in_text(order, 2) == set()


def test_each_document_of_a_row_goes_from_left_to_right():
    documents = torch.tensor([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 0, 0]])
    given = torch.zeros_like(MASK)
    given[0, [0, 3]] = given[1, [0, 2]] = True  # BOS of each
    order = GroupOrder.left_to_right(MASK, given_mask=given)
    assert pairs_in_text(order, 2) == set()
    assert pairs_in_text(order, 1, documents) == {(0, 1), (0, 2), (0, 4), (0, 5), (1, 1), (1, 3)}


def test_the_teacher_gets_no_gradient_and_the_slots_that_of_the_definition():
    torch.manual_seed(0)
    query, content = (torch.randn(5, 7, requires_grad=True) for _ in range(2))
    loss = distillation_loss(query, content)
    p, q = content.detach().softmax(dim=-1), query.detach().softmax(dim=-1)
    torch.testing.assert_close(loss, (p * (p.log() - q.log())).sum())
    loss.backward()
    assert content.grad is None
    torch.testing.assert_close(query.grad, q - p)
    torch.testing.assert_close(distillation_loss(content, content), torch.zeros(()))

    labels = torch.tensor([0, 6, 2, 2, 5])
    torch.testing.assert_close(content_loss(content, labels), -content.log_softmax(dim=-1)[range(5), labels].sum())


def test_off_by_default_and_then_the_content_is_not_asked_for(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, rows([6] * 4), stages=[{"name": "ar"}], max_steps=1)
    asked, forward = [], trainer.model.forward

    def spy(*args, **kwargs):
        asked.append(kwargs.get("content_logits_at"))
        return forward(*args, **kwargs)

    monkeypatch.setattr(trainer.model, "forward", spy)
    trainer.train()
    assert asked == [None, None]
    assert not {"content_loss", "distillation_loss"} & set(trainer.state.log_history[0])


@pytest.mark.parametrize(
    "settings, stages, message",
    [
        ({"content_loss_weight": -0.1}, STAGES, "content_loss_weight=-0.1: expected a number of at least 0"),
        ({"distillation_weight": float("nan")}, STAGES, "distillation_weight=nan"),
        (
            {"content_loss_weight": 1.0},
            [{"name": "permute"}],
            "content_loss_weight=1.0 has no effect without rows",
        ),
        (
            {"distillation_weight": 1.0},
            [{"name": "expand", "group_size": 2}],
            "distillation_weight=1.0 has no effect without rows",
        ),
        ({"distillation_weight": 1.0, "loss": "chunked"}, STAGES, "has no logits to distil"),
    ],
)
def test_weights_that_can_not_be_used_are_refused(tmp_path, settings, stages, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rows([6] * 4), stages=stages, max_steps=5, **settings)


def test_a_recipe_sets_them(tmp_path):
    path = tmp_path / "recipe.yaml"
    settings = {
        "model_name_or_path": "model",
        "train_file": "text.txt",
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "curriculum": {"stages": [{"name": "ar"}]},
    }
    path.write_text(json.dumps(settings))
    training = parse_recipe(path).training
    assert (training.content_loss_weight, training.distillation_weight) == (0.0, 0.0)
    path.write_text(json.dumps({**settings, "content_loss_weight": 0.1}))
    training = parse_recipe(path, ["--distillation_weight", "0.5"]).training
    assert (training.content_loss_weight, training.distillation_weight) == (0.1, 0.5)
