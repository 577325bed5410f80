"""Futures of `Trainer` and of peft in which a hook that a3_hf leans on no longer does its part: each must be an error, not
another loss or other rows.
"""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft.tuners.lora import Linear as LoraLinear
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from a3_hf import A3LlamaForCausalLM, A3Trainer, Curriculum
from a3_hf.adapters import layers
from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.layers import SlotLinear, SlotLoraConfig, attach
from a3_hf.data.collator import RowCollator
from a3_hf.models.a3_llama.chunked_cross_entropy import slot_cross_entropy
from tests.conftest import tiny_config

ROWS = [
    {"input_ids": ids, "attention_mask": [1] * 10, "labels": [-100, *ids[1:]]}
    for ids in ([1] + [(5 * row + column) % 50 + 3 for column in range(9)] for row in range(6))
]


def make_trainer(folder, *, stage=None, **changes) -> A3Trainer:
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2, "use_cpu": True}
    settings |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, **changes}
    torch.manual_seed(0)
    return A3Trainer(
        A3LlamaForCausalLM(tiny_config(num_hidden_layers=1)),
        TrainingArguments(folder, **settings),
        curriculum=Curriculum.from_config([stage or {"name": "permute"}]),
        train_dataset=Dataset.from_list(ROWS),
        data_collator=RowCollator(),
    )


def test_a_trainer_that_divides_the_loss_again_is_an_error(tmp_path, monkeypatch):
    original = Trainer.training_step
    monkeypatch.setattr(
        Trainer, "training_step", lambda self, model, inputs, items=None: original(self, model, inputs, items) / 2
    )
    with pytest.raises(RuntimeError, match=r"Trainer of transformers \d.* changes the loss"):
        make_trainer(tmp_path).train()


def test_a_trainer_that_takes_its_batches_elsewhere_is_an_error(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    own = trainer.get_batch_samples
    seen = []

    def once(epoch_iterator, num_batches, device):  # from the second step on, Trainer goes by another way
        seen.append(num_batches)
        return own(epoch_iterator, num_batches, device) if len(seen) == 1 else ([next(epoch_iterator)], 9)

    monkeypatch.setattr(trainer, "get_batch_samples", once)
    with pytest.raises(RuntimeError, match=r"did not call get_batch_samples before step 2"):
        trainer.train()


def test_a_trainer_that_makes_another_number_of_steps_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    assert trainer.schedule.ends == (6,)  # six rows, two a step, twice
    trainer._planned_steps = 5
    with pytest.raises(RuntimeError, match="makes 6 steps; the curriculum was planned for 5"):
        trainer.train()


@pytest.mark.parametrize("epochs, accumulation, steps", [(1, 2, 3), (3, 4, 6), (0.5, 2, 2), (2, 1, 12)])
def test_the_steps_of_epochs_are_those_that_are_made(epochs, accumulation, steps, tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": epochs, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    assert trainer.state.global_step == trainer.schedule.ends[-1] == steps


def test_adapters_on_other_rows_than_the_slots_are_an_error(monkeypatch):
    monkeypatch.setattr(SlotLoraConfig, "_register_custom_module", lambda self, mapping: None)
    with pytest.raises(RuntimeError, match=r"peft \d.* made Linear: rows: slots expects SlotLinear"):
        attach(A3LlamaForCausalLM(tiny_config()), LoraArguments(r=2, rows="slots"))


def test_adapters_on_no_row_are_an_error(monkeypatch):
    plain = SimpleNamespace(modules=lambda: [torch.nn.Linear(2, 2)])
    with pytest.raises(RuntimeError, match="made no layer"):
        layers._check_slots_alone(plain)
    assert issubclass(SlotLinear, LoraLinear)


def test_the_loss_of_slots_is_transformers_loss_of_shifted_labels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 11, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (2, 7), generator=generator)
    labels[0, :3] = -100
    shifted = torch.nn.functional.pad(labels, (1, 0))  # their own shift takes it back
    for num_items in (None, 5, torch.tensor(9)):
        ours = slot_cross_entropy(logits, labels, num_items=num_items)
        theirs = ForCausalLMLoss(
            torch.nn.functional.pad(logits, (0, 0, 0, 1)), shifted, vocab_size=11, num_items_in_batch=num_items
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)), rtol=1e-5, atol=1e-8
        )


def test_unshifted_labels_are_not_shifted():
    """Left to right, `labels` under groups score the same tokens as the causal contract's, which shifts them."""
    settings = tiny_config(num_hidden_layers=1).to_dict()
    for name in ("model_type", "slot_start", "architectures"):
        settings.pop(name, None)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**settings)).double().eval()
    model = A3LlamaForCausalLM(tiny_config(num_hidden_layers=1, slot_start="left_token")).double().eval()
    model.load_state_dict(base.state_dict(), strict=False)
    ids = torch.tensor([[1, 8, 3, 40, 7]])
    groups = torch.arange(5)[None]
    ours = model(ids, group_ids=groups, labels=ids.masked_fill(groups == 0, -100)).loss
    torch.testing.assert_close(ours, base(ids, labels=ids).loss.double(), rtol=0, atol=1e-6)  # theirs is in fp32
    shifted = model(ids, group_ids=groups, labels=ids.roll(1, 1).masked_fill(groups == 0, -100)).loss
    assert abs(float(ours.detach() - shifted.detach())) > 0.1
