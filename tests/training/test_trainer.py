"""The trainer against a plain loop that scores group by group, and its evaluation against the same by hand."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.layers import attach
from a3_hf.models.a3_llama.orders import GroupOrder
from a3_hf.training.base_trainer import (
    EVALUATION_SEED,
    NonFiniteLossError,
    first_row_index,
    given_tokens,
    row_generator,
)
from a3_hf.training.callbacks import InterruptCallback, MetricsFileCallback
from a3_hf.training.checkpoints import last_whole_checkpoint, set_aside, what_is_missing
from a3_hf.training.curriculum import Curriculum
from a3_hf.training.curriculum_callbacks import CurriculumCallback
from a3_hf.training.model_inputs import model_inputs
from a3_hf.training.throughput import AdapterWeights, training_flops
from a3_hf.training.trainer import A3Trainer
from tests.conftest import tiny_model

STAGES = [
    {"name": "ar", "until": 1},
    {"name": "expand", "until": 2, "group_size": 2},
    {"name": "permute", "until": 3, "group_size": 1},
    {"name": "permute", "group_size": 3},
]


def rows(lengths, *, seed=0) -> list[dict]:
    """Rows of random tokens: the first is given; in the fourth of five the second instead, in the fifth the last two as
    well.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, 61, (length,), generator=generator).tolist()
        labels = [-100, *ids[1:]]
        if index % 5 == 3:
            labels[:2] = [ids[0], -100]
        if index % 5 == 4:
            labels[-2:] = [-100, -100]
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return made


def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in batch)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in batch])
        for name, value in fill.items()
    }


def make_trainer(
    output_dir,
    train=None,
    evaluation=None,
    *,
    stages=STAGES,
    model=None,
    callbacks=(),
    loss="plain",
    content_loss_weight=0.0,
    distillation_weight=0.0,
    **settings,
):
    settings = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **settings,
    }
    return A3Trainer(
        tiny_model() if model is None else model,
        TrainingArguments(str(output_dir), **settings),
        curriculum=Curriculum.from_config(stages, unit="steps"),
        data_collator=collate,
        train_dataset=train,
        eval_dataset=evaluation,
        callbacks=callbacks,
        loss=loss,
        content_loss_weight=content_loss_weight,
        distillation_weight=distillation_weight,
    )


def naive_loss(model, row: dict, group_ids: list[int]) -> torch.Tensor:
    """The loss of one row, summed: group by group, each from the tokens of earlier groups alone, in text order of
    positions and in the order of their groups.
    """
    total = torch.zeros(())
    for group in sorted(set(group_ids)):
        targets = [i for i, other in enumerate(group_ids) if other == group and row["labels"][i] != -100]
        known = [i for i, other in enumerate(group_ids) if other < group]
        if not targets:
            continue
        logits = model(
            input_ids=torch.tensor([[row["input_ids"][i] for i in known]]),
            position_ids=torch.tensor([known]),
            group_ids=torch.tensor([[group_ids[i] for i in known]]),
            target_position_ids=torch.tensor([targets]),
            target_group_ids=torch.full((1, len(targets)), group),
            use_cache=False,
        ).logits
        labels = torch.tensor([row["labels"][i] for i in targets])
        total = total + nn.functional.cross_entropy(logits[0], labels, reduction="sum")
    return total


def naive_groups(row: dict, kind: str, group_size: int, generator: torch.Generator) -> list[int]:
    given = [i for i, label in enumerate(row["labels"]) if label == -100]
    scored = [i for i, label in enumerate(row["labels"]) if label != -100]
    if kind == "scattered":
        mask = torch.ones(1, len(row["labels"]), dtype=torch.bool)
        given_mask = torch.tensor([row["labels"]]) == -100
        order = GroupOrder.scattered(mask, group_size=group_size, given_mask=given_mask, generator=[generator])
        return order.group_ids[0].tolist()
    groups = {position: rank for rank, position in enumerate(given)}
    groups.update({position: len(given) + rank // group_size for rank, position in enumerate(scored)})
    return [groups[i] for i in range(len(row["labels"]))]


NAIVE_STAGES = [("contiguous", 1), ("contiguous", 2), ("scattered", 1), ("scattered", 3)]


RAGGED = [9, 4, 7, 2, 8, 3, 9, 5, 6, 9, 2, 8, 4, 7, 9, 3]


@pytest.mark.parametrize(
    "lengths, few_scored",
    [([9] * 16, False), (RAGGED, False), ([9] * 16, True), ([max(length, 4) for length in RAGGED], True)],
    ids=["even", "ragged", "even, two tokens scored", "ragged, two tokens scored"],
)
def test_training_equals_a_plain_loop(tmp_path, monkeypatch, lengths, few_scored):
    train = rows(lengths)
    for row in train if few_scored else ():
        row["labels"] = [-100] * (len(row["labels"]) - 2) + row["input_ids"][-2:]
    widths = []

    def inputs(*args, **kwargs):
        arguments = model_inputs(*args, **kwargs)
        widths.append(arguments["labels"].shape[1])
        return arguments

    monkeypatch.setattr("a3_hf.training.trainer.model_inputs", inputs)
    trainer = make_trainer(
        tmp_path,
        train,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step, (kind, group_size) in enumerate(NAIVE_STAGES):
        batch = train[4 * step : 4 * step + 4]
        loss = sum(
            naive_loss(model, row, naive_groups(row, kind, group_size, row_generator(42, step, index)))
            for index, row in enumerate(batch)
        )
        loss = loss / sum(label != -100 for row in batch for label in row["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert losses[step] == pytest.approx(loss.item(), abs=2e-5), f"step {step}"
    assert (set(widths) == {2}) == few_scored
    trained = trainer.model.state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.equal(trained["model.query_embed.weight"], tiny_model().model.query_embed.weight)


def test_rows_keep_their_index_on_any_number_of_ranks():
    # 24 rows in one update step: rank r of w takes batches r, r + w, r + 2w, … of the sampler's.
    for world_size, rows_per_batch in [(1, 24), (1, 4), (2, 4), (3, 2), (4, 3), (2, 12)]:
        seen = {}
        for batch in range(24 // rows_per_batch):
            rank, micro_batch = batch % world_size, batch // world_size
            first = first_row_index(micro_batch, world_size=world_size, rank=rank, rows_per_batch=rows_per_batch)
            seen.update({first + row: batch * rows_per_batch + row for row in range(rows_per_batch)})
        assert seen == {index: index for index in range(24)}


def test_row_generators_differ_and_repeat():
    drawn = {
        (seed, step, row): tuple(torch.rand(4, generator=row_generator(seed, step, row)).tolist())
        for seed in (0, 42)
        for step in range(10)
        for row in range(10)
    }
    assert len(set(drawn.values())) == len(drawn)
    assert drawn[0, 3, 5] == tuple(torch.rand(4, generator=row_generator(0, 3, 5)).tolist())


def test_the_orders_do_not_depend_on_the_split_into_micro_batches(tmp_path):
    train = rows([8, 5, 7, 8, 6, 8, 4, 8])
    trained = []
    for batch_size, accumulation in [(4, 1), (2, 2), (1, 4)]:
        trainer = make_trainer(
            tmp_path,
            train,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            stages=[{"name": "permute", "group_size": 2}],
            max_steps=2,
            optim="sgd",
        )
        trainer.train()
        trained.append(trainer.model.state_dict())
    for other in trained[1:]:
        for name, weight in trained[0].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_evaluation_equals_the_definition(tmp_path):
    evaluation = rows([9, 4, 7, 2, 8], seed=3)
    trainer = make_trainer(tmp_path, evaluation=evaluation)
    metrics = trainer.evaluate()

    model = tiny_model()
    tokens = sum(label != -100 for row in evaluation for label in row["labels"])
    naive = {}
    for index, (name, kind, group_size) in enumerate(
        [
            ("left_to_right", "contiguous", 1),
            ("contiguous_4", "contiguous", 4),
            ("scattered_1", "scattered", 1),
            ("scattered_4", "scattered", 4),
        ]
    ):
        with torch.no_grad():
            naive[name] = sum(
                naive_loss(
                    model, row, naive_groups(row, kind, group_size, row_generator(EVALUATION_SEED, index, number))
                ).item()
                for number, row in enumerate(evaluation)
            )
        assert metrics[f"eval_loss_{name}"] == pytest.approx(naive[name] / tokens, abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(sum(naive.values()) / tokens / 4, abs=1e-5)
    assert len({round(metrics[f"eval_loss_{name}"], 6) for name in naive}) == 4


def test_evaluation_repeats_itself_in_any_batch_size_and_takes_a_prefix(tmp_path):
    evaluation = rows([9, 4, 7, 2, 8], seed=3)
    first = make_trainer(tmp_path, evaluation=evaluation)
    metrics = first.evaluate()
    again = first.evaluate(metric_key_prefix="held_out")
    wide = make_trainer(tmp_path, evaluation=evaluation, per_device_eval_batch_size=5, seed=7).evaluate()
    for name in ("loss", "loss_left_to_right", "loss_contiguous_4", "loss_scattered_1", "loss_scattered_4"):
        assert again[f"held_out_{name}"] == metrics[f"eval_{name}"]
        assert wide[f"eval_{name}"] == pytest.approx(metrics[f"eval_{name}"], abs=1e-5)
    assert not any(name.startswith("eval") for name in again)


def test_evaluation_does_not_disturb_training(tmp_path):
    train, evaluation = rows([8] * 12), rows([6] * 3, seed=5)

    def trained(**settings) -> dict[str, torch.Tensor]:
        model = tiny_model(attention_dropout=0.2)  # draws from the global generator
        trainer = make_trainer(tmp_path, train, evaluation, model=model, **settings)
        trainer.train()
        return trainer.model.state_dict()

    undisturbed = trained()
    evaluated = trained(eval_strategy="steps", eval_steps=1, eval_on_start=True)
    assert all(torch.equal(weight, evaluated[name]) for name, weight in undisturbed.items())


def test_evaluation_leaves_the_mode_as_it_was(tmp_path):
    trainer = make_trainer(tmp_path, evaluation=rows([6] * 3))
    for training in (True, False):
        trainer.model.train(training)
        trainer.evaluate()
        assert trainer.model.training is training


def test_losses_are_known_before_and_after_each_stage(tmp_path):
    trainer = make_trainer(
        tmp_path, rows([8] * 8), rows([6] * 3), eval_strategy="steps", eval_steps=1000, eval_on_start=True
    )
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [0, 1, 2, 3, 4]
    assert [entry["group_size"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 1, 3]


def test_the_callback_is_added_once(tmp_path):
    own = CurriculumCallback(Curriculum.from_config(STAGES, unit="steps").resolve(max_steps=4))
    for callbacks in ([], [own]):
        trainer = make_trainer(tmp_path, rows([6] * 4), callbacks=callbacks)
        found = [each for each in trainer.callback_handler.callbacks if isinstance(each, CurriculumCallback)]
        assert len(found) == 1


def test_the_schedule_follows_epochs_and_tokens(tmp_path):
    stages = [{"name": "ar", "until": 0.5}, {"name": "permute"}]
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True}
    epochs = A3Trainer(
        tiny_model(),
        TrainingArguments(str(tmp_path), num_train_epochs=3, report_to="none", **settings),
        curriculum=Curriculum.from_config(stages),
        train_dataset=rows([8] * 10),
    )
    assert epochs.schedule.ends == (5, 9)  # 3 steps an epoch, the last of 2 rows

    tokens = A3Trainer(
        tiny_model(),
        TrainingArguments(str(tmp_path), max_steps=6, report_to="none", **settings),
        curriculum=Curriculum.from_config([{"name": "ar", "until": 100}, {"name": "permute"}], unit="tokens"),
        train_dataset=rows([8] * 10),
    )
    assert tokens.schedule.ends == (4, 6)  # 32 tokens a step


def test_the_columns_that_orders_need_are_kept(tmp_path):
    from datasets import Dataset

    train = Dataset.from_list([{**row, "text": "words"} for row in rows([6] * 8)])
    make_trainer(tmp_path, train, remove_unused_columns=True, max_steps=4).train()


def test_a_first_token_that_sees_nothing_is_refused_before_training(tmp_path):
    train = rows([6] * 4)
    train[2]["labels"][0] = train[2]["input_ids"][0]
    trainer = make_trainer(tmp_path, train, max_steps=4)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"no given token.*would see nothing"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())
    with pytest.raises(ValueError, match="no given token"):
        make_trainer(tmp_path, evaluation=train).evaluate()


def test_given_tokens():
    inputs = {
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "labels": torch.tensor([[-100, 5, -100, -100], [-100, -100, -100, -100]]),
        "input_ids": torch.zeros(2, 4, dtype=torch.long),
    }
    assert given_tokens(inputs).tolist() == [[True, False, True, False], [True, True, False, False]]
    with pytest.raises(ValueError, match="row 1 of the batch has labels at padding"):
        given_tokens(
            {**inputs, "labels": inputs["labels"].clone().index_fill_(1, torch.tensor([2]), 4)[[1, 1]]}
            | {"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])}
        )
    with pytest.raises(ValueError, match="no labels"):
        given_tokens({name: inputs[name] for name in ("input_ids", "attention_mask")})


def test_settings_that_orders_do_not_go_with_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1"):
        make_trainer(tmp_path, rows([6] * 4), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="would begin at step 3, but the run has 3"):
        make_trainer(tmp_path, rows([6] * 4), max_steps=3)
    with pytest.raises(ValueError, match="every label is -100"):
        make_trainer(
            tmp_path, evaluation=[{"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, -100]}]
        ).evaluate()


def test_an_attention_that_drops_masks_is_refused_before_training(tmp_path):
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'sdpa', 'flex_attention' or 'eager'"):
        make_trainer(tmp_path, rows([6] * 4), model=model)


def test_metrics_file_drops_what_a_resumed_run_repeats(tmp_path):
    path = tmp_path / "out" / "metrics.jsonl"
    callback = MetricsFileCallback(path, Curriculum.from_config(STAGES, unit="steps").resolve(max_steps=4))
    args, control, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl(), TrainerState()
    callback.on_train_begin(args, state, control)
    for step in range(4):
        state.global_step = step
        callback.on_log(args, state, control, logs={"loss": float(step)})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    state.global_step = 2
    callback.on_train_begin(args, state, control)
    state.global_step = 3
    callback.on_log(args, state, control, logs={"loss": 9.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "stage": "ar", "loss": 0.0},
        {"step": 1, "stage": "ar", "loss": 1.0},
        {"step": 2, "stage": "expand", "loss": 2.0},
        {"step": 3, "stage": "permute", "loss": 9.0},
    ]


def test_ctrl_c_saves_and_stops_once_and_raises_twice(tmp_path):
    args, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(global_step=3, max_steps=5)
    callback, before = InterruptCallback(), signal.getsignal(signal.SIGINT)
    callback.on_train_begin(args, state, control)
    callback.on_step_end(args, state, control)
    assert not control.should_training_stop and callback.stopped_at is None
    signal.raise_signal(signal.SIGINT)
    callback.on_step_end(args, state, control)
    assert control.should_training_stop and control.should_save and callback.stopped_at == 3
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    callback.on_train_end(args, state, control)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with three checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    make_trainer(folder, rows([6] * 8), save_strategy="steps", save_steps=1, save_total_limit=3).train()
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


DAMAGE = {
    "weights cut off": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is cut off"),
    "weights empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is cut off"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "its weights is missing"),
    "optimizer cut off": (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt is cut off"),
    "no optimizer": (lambda folder: (folder / "optimizer.pt").unlink(), "its optimizer state is missing"),
    "no random state": (lambda folder: (folder / "rng_state.pth").unlink(), "its random state is missing"),
    "state cut off": (lambda folder: cut(folder / "trainer_state.json"), "trainer_state.json is cut off"),
    "no state": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "a shard missing": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "gone.safetensors"}}'
        ),
        "gone.safetensors is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_half_written_checkpoints_are_skipped_and_named(tmp_path, saved, damage, monkeypatch):
    import shutil

    from a3_hf.training import checkpoints

    for step in (3, 4):
        shutil.copytree(saved / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    newest = tmp_path / "checkpoint-4"
    assert last_whole_checkpoint(tmp_path) == (newest, [])

    break_it, reason = DAMAGE[damage]
    break_it(newest)
    warned = []
    monkeypatch.setattr(checkpoints.logger, "warning", warned.append)
    assert what_is_missing(newest) == reason
    assert last_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-3", [newest])
    assert len(warned) == 1 and str(newest) in warned[0] and reason in warned[0]

    aside = set_aside(newest)
    assert aside.is_dir() and not newest.exists()
    assert not list(tmp_path.glob("checkpoint-4*"))  # what `save_total_limit` counts
    assert last_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-3", [])


def test_no_checkpoints(tmp_path):
    assert last_whole_checkpoint(tmp_path / "none") == (None, [])
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) == (None, [])


# Documents apart, and the chunked loss


def document_rows(lengths) -> tuple[list[dict], list[dict]]:
    """Rows of two documents, which start with a given token each, and the same documents in rows of their own."""
    joined, alone = rows(lengths), []
    for row in joined:
        cut = max(len(row["input_ids"]) // 2, 1)
        row["labels"] = [-100 if i in (0, cut) else token for i, token in enumerate(row["input_ids"])]
        row["document_ids"] = [1 + (i >= cut) for i in range(len(row["input_ids"]))]
        alone += [{name: row[name][part] for name in row} for part in (slice(0, cut), slice(cut, None))]
    return joined, alone


@pytest.mark.parametrize("loss", ["plain", "chunked"])
def test_documents_are_kept_apart_in_training_and_evaluation(tmp_path, loss):
    joined, alone = document_rows([9, 6, 8, 9, 7, 8, 9, 4])

    def collate_documents(batch):
        width = max(len(row["input_ids"]) for row in batch)
        documents = [row["document_ids"] + [0] * (width - len(row["document_ids"])) for row in batch]
        return {**collate(batch), "document_ids": torch.tensor(documents)}

    trainer = make_trainer(tmp_path, joined, joined, stages=[{"name": "ar", "until": 1}, {"name": "expand"}], loss=loss)
    trainer.data_collator = collate_documents
    apart = make_trainer(tmp_path, evaluation=alone, loss=loss)
    # left to right, the order within a document is that of the row
    measured, expected = trainer.evaluate(), apart.evaluate()
    name = "eval_loss_left_to_right"
    assert measured[name] == pytest.approx(expected[name], abs=1e-5)

    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    model = tiny_model()
    batch = [alone[index] for index in alone_of_first_step(trainer)]
    total = sum(naive_loss(model, row, naive_groups(row, "contiguous", 1, None)).item() for row in batch)
    scored = sum(label != -100 for row in batch for label in row["labels"])
    assert first == pytest.approx(total / scored, abs=2e-5)


def alone_of_first_step(trainer) -> list[int]:
    """The documents in the first update step of a fresh loader, two for each row."""
    order = list(trainer.get_train_dataloader().batch_sampler)[:2]
    return [2 * int(row) + part for batch in order for row in batch for part in (0, 1)]


def test_bad_documents_are_refused():
    inputs = {
        "input_ids": torch.ones(1, 4, dtype=torch.long),
        "attention_mask": torch.ones(1, 4),
        "labels": torch.tensor([[-100, 5, 6, 7]]),
    }
    with pytest.raises(ValueError, match="document 2 in row 0 of the batch has no given token"):
        given_tokens({**inputs, "document_ids": torch.tensor([[1, 1, 2, 2]])})
    for wrong in ([[1, 1, 0, 2]], [[1, 1, 2]]):
        with pytest.raises(ValueError, match="document_ids has shape"):
            given_tokens({**inputs, "document_ids": torch.tensor(wrong)})
    assert given_tokens({**inputs, "document_ids": torch.ones(1, 4, dtype=torch.long)}).sum() == 1


def test_the_chunked_loss_trains_and_evaluates_as_the_plain_one(tmp_path):
    train, evaluation = rows([9, 4, 7, 2, 8, 3, 9, 5] * 2), rows([9, 4, 7, 2, 8], seed=3)
    found = []
    for loss in ("plain", "chunked"):
        trainer = make_trainer(tmp_path, train, evaluation, loss=loss, optim="sgd")
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((losses, trainer.evaluate(), trainer.model.state_dict()))
    (plain, plain_metrics, plain_weights), (chunked, chunked_metrics, chunked_weights) = found
    assert chunked == pytest.approx(plain, abs=1e-5) and len(plain) == 4
    for name, loss in plain_metrics.items():
        if name.startswith("eval_loss"):
            assert chunked_metrics[name] == pytest.approx(loss, abs=1e-5)
    for name, weight in plain_weights.items():
        torch.testing.assert_close(chunked_weights[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_losses_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(ValueError, match="loss='fused': expected one of plain, chunked"):
        make_trainer(tmp_path, rows([6] * 4), loss="fused")
    with pytest.raises(ValueError, match="use_liger_kernel=True: Liger's kernels do not support this model"):
        make_trainer(tmp_path, rows([6] * 4), use_liger_kernel=True)


def test_logs_tell_what_training_costs(tmp_path):
    trainer = make_trainer(tmp_path, rows([8] * 16))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["stage_index"] for entry in logs] == [0, 1, 2, 3]
    assert all(entry["tokens_per_second"] > 0 and entry["peak_memory_mib"] > 0 for entry in logs)
    assert not any("mfu" in entry for entry in logs)

    stated = A3Trainer(
        tiny_model(),
        TrainingArguments(str(tmp_path), max_steps=1, logging_steps=1, report_to="none", use_cpu=True),
        curriculum=Curriculum.from_config([{"name": "ar"}]),
        data_collator=collate,
        train_dataset=rows([8] * 8),
        peak_flops=1e12,
    )
    stated.train()
    entry = next(entry for entry in stated.state.log_history if "loss" in entry)
    flops = training_flops(stated.model.config, length=8)
    assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * flops / 1e12)


def logged_costs(folder, model, train, *, peak_flops: float | None = 1e12, **settings) -> tuple[A3Trainer, dict]:
    trainer = A3Trainer(
        model,
        TrainingArguments(str(folder), max_steps=1, logging_steps=1, report_to="none", use_cpu=True),
        curriculum=Curriculum.from_config([{"name": "ar"}]),
        data_collator=collate,
        train_dataset=train,
        peak_flops=peak_flops,
        **settings,
    )
    trainer.train()
    return trainer, next(entry for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("lora", [None, LoraArguments(r=2), LoraArguments(r=2, rows="slots")])
@pytest.mark.parametrize("num_scored", [7, 2])
def test_the_utilization_counts_slots_and_what_is_trained(tmp_path, lora, num_scored):
    train, model = rows([8] * 8), tiny_model()
    for row in train:
        row["labels"] = [-100] * (8 - num_scored) + row["input_ids"][-num_scored:]
    model = model if lora is None else attach(model, lora)
    adapters = AdapterWeights.of(model)
    assert any(adapters) == (lora is not None)
    trainer, entry = logged_costs(tmp_path, model, train)
    flops = training_flops(trainer.model.config, length=8, slots=1 if num_scored == 7 else 2 / 8, adapters=adapters)
    assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * flops / 1e12)


@pytest.mark.parametrize("why", ["some weights are frozen", "some weights beside adapters are trained", "another loss"])
def test_a_utilization_that_the_formula_does_not_give_is_not_stated(tmp_path, why):
    model, settings = tiny_model(), {}
    if why == "some weights are frozen":
        model.model.layers[0].requires_grad_(False)
    elif why == "another loss":
        settings = {"content_loss_weight": 0.5}
    else:
        model = attach(model, LoraArguments(r=2))
        model.get_base_model().lm_head.requires_grad_(True)
    _, entry = logged_costs(tmp_path, model, rows([8] * 8), **settings)
    assert entry["tokens_per_second"] > 0 and "mfu" not in entry


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_peak_is_that_of_the_precision_that_accelerate_sets(tmp_path, monkeypatch, precision):
    """`args.bf16` stays False where an accelerate config says bf16."""
    trainer, _ = logged_costs(tmp_path, tiny_model(dtype=torch.float32), rows([8] * 8), peak_flops=None)
    asked = []
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", precision)
    monkeypatch.setattr("a3_hf.training.trainer.peak_flops", lambda device, dtype: asked.append(dtype))
    trainer.costs()
    assert asked == [{"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]]
    assert not trainer.args.bf16


@pytest.mark.slow
def test_compiled_training_is_training(tmp_path):
    stages = [{"name": "ar", "until": 1}, {"name": "permute", "group_size": 2}]
    losses = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.reset()
        model = tiny_model(num_hidden_layers=1)
        trainer = make_trainer(
            tmp_path, rows([9] * 8), model=model, stages=stages, max_steps=2, optim="sgd", loss="chunked", **settings
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[0]) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, value):
    trainer = make_trainer(tmp_path, train=rows([9] * 12), save_strategy="steps", save_steps=1)
    forward = trainer.model.lm_head.forward

    def broken(states):
        return forward(states) * (value if trainer.state.global_step == 2 else 1.0)

    trainer.model.lm_head.forward = broken
    with pytest.raises(NonFiniteLossError, match=r"step 3: the loss is not finite in rows 0 to \d+"):
        trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    weights = trainer.model.state_dict()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
