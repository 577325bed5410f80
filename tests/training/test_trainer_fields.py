"""Every field of the installed transformers' TrainingArguments has its effect here, or is refused."""

from dataclasses import MISSING, fields

import pytest
from transformers import TrainingArguments

from a3_hf.training import trainer_fields as training_fields
from a3_hf.training.arguments import A3TrainingArguments
from a3_hf.training.trainer_fields import RANGES, REFUSED, REFUSED_WITH_SOURCES, USED

NAMES = {f.name for f in fields(TrainingArguments)}
NEWER = {
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
}  # than the oldest transformers that is supported


def test_every_field_is_on_one_of_the_lists():
    """Where this fails, a new transformers has a new field: see what it does here, and put it on a list."""
    assert not USED & set(REFUSED)
    assert NAMES - USED - set(REFUSED) == set(), "fields that are on no list"
    assert (USED | set(REFUSED)) - NAMES <= NEWER, "fields that are no longer there"
    assert (
        set(RANGES) <= USED | {"content_loss_weight", "distillation_weight", "peak_flops"}
        and set(REFUSED_WITH_SOURCES) <= USED
    )


def other_value(f):
    default = f.default if f.default is not MISSING else f.default_factory()
    if isinstance(default, bool):
        return not default
    return ["loss"] if isinstance(default, list) else "something else"


@pytest.mark.parametrize("name", sorted(NAMES & set(REFUSED)))
def test_a_field_without_effect_is_refused_with_the_reason(tmp_path, name):
    value = other_value(next(f for f in fields(TrainingArguments) if f.name == name))
    with pytest.raises(ValueError, match=f"^{name}=.*; leave it out$") as raised:
        A3TrainingArguments(str(tmp_path), use_cpu=True, **{name: value})
    assert REFUSED[name] in str(raised.value)


def test_a_field_that_nobody_knows_is_refused_where_it_is_set(tmp_path, monkeypatch):
    monkeypatch.setattr(training_fields, "USED", USED - {"weight_decay"})
    A3TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="weight_decay=0.1: a3_hf does not know this field"):
        A3TrainingArguments(str(tmp_path), use_cpu=True, weight_decay=0.1)


def test_what_is_used_reaches_transformers(tmp_path):
    made = A3TrainingArguments(str(tmp_path), use_cpu=True, weight_decay=0.1, adam_beta2=0.9, data_seed=3)
    assert (made.weight_decay, made.adam_beta2, made.data_seed) == (0.1, 0.9, 3)
