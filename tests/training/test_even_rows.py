"""Every row once an epoch, on any number of processes."""

import pytest

from a3_hf.training.even_rows import FilledBatches, RowsAndBlank


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("num_rows", [1, 4, 12, 17, 60])
def test_batches_are_even_and_hold_each_row_once(num_rows, batch_size, world_size):
    batches = FilledBatches(range(num_rows), batch_size=batch_size, multiple=world_size, filler=num_rows)
    made = list(batches)
    assert len(made) == len(batches) and len(made) % world_size == 0
    assert {len(batch) for batch in made} == {batch_size}
    flat = [index for batch in made for index in batch]
    assert flat[:num_rows] == list(range(num_rows)) and set(flat[num_rows:]) <= {num_rows}
    assert len(flat) - num_rows < batch_size * world_size


def test_the_blank_row_scores_nothing():
    rows = RowsAndBlank([{"input_ids": [1, 5, 6], "attention_mask": [1, 1, 1], "labels": [-100, 5, 6]}] * 3)
    assert len(rows) == 3 and rows[2]["labels"] == [-100, 5, 6]
    assert rows[3] == {"input_ids": [1, 5, 6], "attention_mask": [1, 1, 1], "labels": [-100] * 3}
    assert rows[0]["labels"] == [-100, 5, 6]
