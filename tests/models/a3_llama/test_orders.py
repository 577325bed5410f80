import pytest
import torch

from a3_hf.models.a3_llama.orders import ORDERS, GroupOrder

BUILDERS = {
    "left_to_right": lambda mask, gens: GroupOrder.left_to_right(mask),
    "right_to_left": lambda mask, gens: GroupOrder.right_to_left(mask, group_size=2),
    "contiguous": lambda mask, gens: GroupOrder.contiguous(mask, group_size=3),
    "scattered": lambda mask, gens: GroupOrder.scattered(mask, group_size=4, generator=gens),
    "spans": lambda mask, gens: GroupOrder.spans(mask, span_length=5, group_size=2, generator=gens),
    "infilling": lambda mask, gens: GroupOrder.infilling(
        mask & (torch.arange(mask.shape[1]) % 4 > 1), attention_mask=mask, order="random", group_size=2, generator=gens
    ),
}


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + row) for row in range(count)]


def ragged_mask(lengths, width, side):
    columns = torch.arange(width)
    lengths = torch.tensor(lengths)[:, None]
    return columns < lengths if side == "right" else columns >= width - lengths


def naive_groups(open_positions, size):
    return [open_positions[start : start + size] for start in range(0, len(open_positions), size)]


def groups_of(order, row):
    """The groups of a row as lists of positions, given singletons included."""
    ids = order.group_ids[row].tolist()
    return [[i for i, g in enumerate(ids) if g == k] for k in range(max(ids) + 1)]


def test_left_to_right_and_contiguous_against_their_definition():
    mask = torch.ones(1, 11, dtype=torch.bool)
    assert groups_of(GroupOrder.left_to_right(mask), 0) == [[i] for i in range(11)]
    assert groups_of(GroupOrder.contiguous(mask, group_size=4), 0) == [[0], *naive_groups(list(range(1, 11)), 4)]
    assert groups_of(GroupOrder.right_to_left(mask, group_size=4), 0) == [
        [0],
        [7, 8, 9, 10],
        [3, 4, 5, 6],
        [1, 2],
    ]


def test_scattered_is_a_uniform_permutation_in_equal_groups():
    mask = torch.ones(400, 9, dtype=torch.bool)
    order = GroupOrder.scattered(mask, group_size=2, generator=torch.Generator().manual_seed(0))
    assert all([len(g) for g in groups_of(order, row)] == [1, 2, 2, 2, 2] for row in range(400))
    # each open position is in each of the four groups about a quarter of the time
    share = torch.stack([(order.group_ids[:, 1:] == k).float().mean(0) for k in range(1, 5)])
    assert (share - 0.25).abs().max() < 0.08
    assert not torch.equal(order.group_ids[0], order.group_ids[1])


def test_spans_are_runs_in_random_order_filled_left_to_right():
    mask = torch.ones(50, 14, dtype=torch.bool)
    order = GroupOrder.spans(mask, span_length=5, group_size=2, generator=torch.Generator().manual_seed(1))
    pieces = [[1, 2], [3, 4], [5]], [[6, 7], [8, 9], [10]], [[11, 12], [13]]
    seen = set()
    for row in range(50):
        groups = groups_of(order, row)
        assert groups[0] == [0]
        sequence = sorted(range(3), key=lambda span: groups.index(pieces[span][0]))
        assert groups[1:] == [group for span in sequence for group in pieces[span]]
        seen.add(tuple(sequence))
    assert len(seen) == 6
    whole = GroupOrder.spans(mask, span_length=5, generator=torch.Generator().manual_seed(1))
    assert sorted(map(len, groups_of(whole, 0))) == [1, 3, 5, 5]


@pytest.mark.parametrize("order", ORDERS)
def test_infilling_gives_all_text_first(order):
    blanks = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 1]], dtype=torch.bool)
    span_length = 2 if order == "spans" else None
    result = GroupOrder.infilling(blanks, order=order, group_size=2, span_length=span_length, generator=generators(1))
    groups = groups_of(result, 0)
    assert groups[:4] == [[0], [1], [4], [6]]
    assert sorted(sum(groups[4:], [])) == [2, 3, 5, 7]
    assert torch.equal(result.scored_mask, blanks)
    expected = {"left_to_right": [[2, 3], [5, 7]], "right_to_left": [[5, 7], [2, 3]]}
    assert groups[4:] == expected.get(order, groups[4:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_row_does_not_depend_on_padding_or_neighbours(name, side):
    lengths = [17, 9, 12]
    together = BUILDERS[name](ragged_mask(lengths, 17, side), generators(3))
    for row, length in enumerate(lengths):
        alone = BUILDERS[name](torch.ones(1, length, dtype=torch.bool), generators(1, seed=row))
        real = together.attention_mask[row]
        if name != "infilling" or side == "right":  # its blanks here are cut by column
            assert torch.equal(together.group_ids[row][real], alone.group_ids[0])
        assert (together.group_ids[row][~real] == -1).all()
        assert not together.given_mask[row][~real].any()


@pytest.mark.parametrize("name", BUILDERS)
def test_group_ids_are_dense_and_given_tokens_come_first(name):
    order = BUILDERS[name](ragged_mask([16, 5], 16, "left"), generators(2))
    for row in range(2):
        ids = order.group_ids[row][order.attention_mask[row]]
        assert ids.unique().tolist() == list(range(int(ids.max()) + 1))
        given = order.group_ids[row][order.given_mask[row]]
        assert given.tolist() == list(range(len(given)))


@pytest.mark.parametrize("name", BUILDERS)
def test_lay_out_stores_the_text_in_generation_order(name):
    order = BUILDERS[name](ragged_mask([16, 7], 16, "left"), generators(2))
    input_ids = torch.arange(100, 132).view(2, 16)
    layout = order.lay_out(input_ids)
    for row in range(2):
        real = [i for i in range(16) if order.attention_mask[row, i]]
        expected = sorted(real, key=lambda i: (int(order.group_ids[row, i]), i))
        count = len(real)
        assert layout.input_ids[row, :count].tolist() == [int(input_ids[row, i]) for i in expected]
        assert layout.position_ids[row, :count].tolist() == [real.index(i) for i in expected]
        assert layout.group_ids[row, :count].tolist() == [int(order.group_ids[row, i]) for i in expected]
        scored = [int(input_ids[row, i]) if order.scored_mask[row, i] else -100 for i in expected]
        assert layout.labels[row].tolist() == scored + [-100] * (16 - count)
        assert layout.attention_mask[row].tolist() == [True] * count + [False] * (16 - count)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: GroupOrder.contiguous(m, group_size=0), "group_size=0"),
        (lambda m: GroupOrder.contiguous(m, group_size=2.0), "group_size=2.0"),
        (lambda m: GroupOrder.spans(m, span_length=-1), "span_length=-1"),
        (lambda m: GroupOrder.contiguous(m[0], group_size=1), "attention_mask has shape"),
        (lambda m: GroupOrder.left_to_right(m, given_mask=m[:, :3]), "given_mask has shape"),
        (lambda m: GroupOrder.scattered(m, group_size=1, generator=generators(1)), "expected 2, one per row"),
        (lambda m: GroupOrder.infilling(m, order="spiral"), "left_to_right, right_to_left, random, spans"),
        (lambda m: GroupOrder.infilling(m, order="spans"), "span_length"),
        (lambda m: GroupOrder.left_to_right(m).lay_out(torch.zeros(2, 5)), "input_ids has shape"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 6, dtype=torch.bool))
