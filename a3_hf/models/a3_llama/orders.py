"""Generation orders: the groups in which tokens are generated."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import torch

PADDING_GROUP = -1
Generators = torch.Generator | Sequence[torch.Generator] | None


class ContentTokens(NamedTuple):
    """Tokens that a pass encodes, stored in any order (paper §1). Content sees content of groups up to its own.

    Attributes:
        input_ids: (B, C) token ids; None if embeddings are given instead.
        position_ids: (B, C) or (1, C) positions in the text, for RoPE.
        group_ids: (B, C) groups, lower = earlier; None: left to right, as in LLaMA.
        document_ids: (B, C) documents of a row, which don't see each other; None: a row is one text.

    Example: a row of BOS and "a b c"; c is generated first, then a and b together.
        >>> ids = torch.tensor([[1, 10, 11, 12]])
        >>> content = ContentTokens(ids, torch.arange(4)[None], group_ids=torch.tensor([[0, 2, 2, 1]]))
        >>> content.slots().group_ids
        tensor([[0, 2, 2, 1]])
    """

    input_ids: torch.Tensor | None
    position_ids: torch.Tensor
    group_ids: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None

    def slots(self) -> "QuerySlots":
        """Returns a slot for each token, with its position, group and document."""
        return QuerySlots(self.position_ids, self.group_ids, self.document_ids)


class QuerySlots(NamedTuple):
    """Query slots of a pass: each predicts the token at one position. A slot sees content of groups before its own, and no
    row sees a slot (paper §1).

    Attributes:
        position_ids: (B, Q) or (1, Q) the predicted positions; None: those of all content tokens.
        group_ids: (B, Q) groups; None with prepared masks.
        document_ids: (B, Q) documents, if content has them.
        left_token_ids: (B, Q) with `slot_start="left_token"`: the token to the left of each position if the slot sees it,
            else −1 (`left_tokens`).
    """

    position_ids: torch.Tensor | None
    group_ids: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    left_token_ids: torch.Tensor | None = None

    def at(self, index: torch.Tensor | slice) -> "QuerySlots":
        """Returns the slots at `index`: (B, n) indices per row, or a slice of columns."""

        def pick(ids):
            if ids is None:
                return None
            return ids[:, index] if isinstance(index, slice) else ids.gather(1, index)

        return QuerySlots(*(pick(ids) for ids in self))


class Layout(NamedTuple):
    """A batch stored in generation order, each (B, S): given tokens first, then group by group, padding last."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    group_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    document_ids: torch.Tensor | None = None

    @property
    def content(self) -> ContentTokens:
        return ContentTokens(self.input_ids, self.position_ids, self.group_ids, self.document_ids)


@dataclass(frozen=True)
class GroupOrder:
    """An ordered partition of each row's positions into groups, p(x) = Π_k p(x_{G_k} | x_{G_<k}) (paper §1).

    Given tokens (known from the start, never scored) come first, as singletons in text order; then the open positions, in
    groups. Group ids are dense: 0, 1, 2, … in each row.

    Attributes:
        group_ids: (B, S) integers, lower = earlier; −1 at padding.
        attention_mask: (B, S) bool, False at padding.
        given_mask: (B, S) bool, True where a token is known from the start.
        context_mask: (B, S) bool, True at open positions that are not scored; None: nowhere.

    All constructors take `attention_mask` (B, S), True or 1 at real tokens, and `given_mask` (B, S), by default the first
    real token of each row (BOS). Random ones take a `generator`: one for the batch, or one per row, so that a row's order
    does not depend on other rows or on padding.

    Examples:
        Two rows of 6 tokens, the second with two padding tokens on the left. BOS is given:

        >>> mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
        >>> GroupOrder.contiguous(mask, group_size=2).group_ids
        tensor([[ 0,  1,  1,  2,  2,  3],
                [-1, -1,  0,  1,  1,  2]])
        >>> order = GroupOrder.right_to_left(mask, group_size=2)
        >>> order.group_ids
        tensor([[ 0,  3,  2,  2,  1,  1],
                [-1, -1,  0,  2,  1,  1]])

        The same rows in generation order, the model's input:

        >>> layout = order.lay_out(torch.arange(10, 22).view(2, 6))
        >>> layout.input_ids
        tensor([[10, 14, 15, 12, 13, 11],
                [18, 20, 21, 19, 16, 17]])
        >>> layout.position_ids
        tensor([[0, 4, 5, 2, 3, 1],
                [0, 2, 3, 1, 0, 0]])
    """

    group_ids: torch.Tensor
    attention_mask: torch.Tensor
    given_mask: torch.Tensor
    context_mask: torch.Tensor | None = None

    @classmethod
    def left_to_right(cls, attention_mask: torch.Tensor, *, given_mask: torch.Tensor | None = None) -> "GroupOrder":
        """Returns singletons in text order: plain autoregression."""
        return cls.contiguous(attention_mask, group_size=1, given_mask=given_mask)

    @classmethod
    def contiguous(
        cls, attention_mask: torch.Tensor, *, group_size: int, given_mask: torch.Tensor | None = None
    ) -> "GroupOrder":
        """Returns groups of `group_size` neighbouring open positions, left to right; the last group may be smaller."""
        return cls._by_key(attention_mask, given_mask, lambda rank: rank, group_size)

    @classmethod
    def right_to_left(
        cls, attention_mask: torch.Tensor, *, group_size: int = 1, given_mask: torch.Tensor | None = None
    ) -> "GroupOrder":
        """Returns groups of `group_size` from the end of the row to its start."""
        return cls._by_key(attention_mask, given_mask, lambda rank: -rank, group_size)

    @classmethod
    def scattered(
        cls,
        attention_mask: torch.Tensor,
        *,
        group_size: int,
        given_mask: torch.Tensor | None = None,
        generator: Generators = None,
    ) -> "GroupOrder":
        """Returns a random permutation of the open positions, split into groups of `group_size`."""
        noise = _uniform(attention_mask, generator)
        return cls._by_key(attention_mask, given_mask, lambda rank: noise.gather(1, rank), group_size)

    @classmethod
    def spans(
        cls,
        attention_mask: torch.Tensor,
        *,
        span_length: int,
        group_size: int | None = None,
        given_mask: torch.Tensor | None = None,
        generator: Generators = None,
    ) -> "GroupOrder":
        """Returns spans of `span_length` open positions in random order, each left to right in groups of `group_size`
        (default: the whole span is one group).
        """
        _check_size("span_length", span_length)
        group_size = span_length if group_size is None else group_size
        noise = _uniform(attention_mask, generator)
        return cls._by_key(
            attention_mask, given_mask, lambda rank: noise.gather(1, rank // span_length), group_size, span_length
        )

    @classmethod
    def infilling(
        cls,
        blank_mask: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        order: str = "left_to_right",
        group_size: int = 1,
        span_length: int | None = None,
        generator: Generators = None,
    ) -> "GroupOrder":
        """Returns an order in which all text outside `blank_mask` (B, S) is given, followed by the blanks in the named order
        (`ORDERS`).

        Raises:
            ValueError: an unknown order, or `span_length` missing for `spans` or given for another order.
        """
        if order not in ORDERS:
            raise ValueError(f"order={order!r}: expected one of {', '.join(ORDERS)}")
        if (order == "spans") != (span_length is not None):
            raise ValueError(
                f"span_length={span_length} with order={order!r}: expected a number with order='spans', else None"
            )
        blank_mask = _as_mask("blank_mask", blank_mask)
        real = torch.ones_like(blank_mask) if attention_mask is None else _as_mask("attention_mask", attention_mask)
        given = real & ~blank_mask
        if order == "left_to_right":
            return cls.contiguous(real, group_size=group_size, given_mask=given)
        if order == "right_to_left":
            return cls.right_to_left(real, group_size=group_size, given_mask=given)
        if order == "random":
            return cls.scattered(real, group_size=group_size, given_mask=given, generator=generator)
        return cls.spans(real, span_length=span_length, group_size=group_size, given_mask=given, generator=generator)

    @classmethod
    def _by_key(cls, attention_mask, given_mask, key_of, group_size, span_length=None) -> "GroupOrder":
        """Sorts each row's open positions by `key_of(place)`, `place` (B, S) being their rank in text order, and splits them
        into groups; a group never crosses a span boundary.
        """
        _check_size("group_size", group_size)
        real = _as_mask("attention_mask", attention_mask)
        given = real.long().cumsum(1).eq(1) if given_mask is None else _as_mask("given_mask", given_mask)
        if given.shape != real.shape:
            raise ValueError(
                f"given_mask has shape {tuple(given.shape)}: expected the shape of attention_mask, {tuple(real.shape)}"
            )
        given = given & real
        is_open = real & ~given
        place = (is_open.long().cumsum(1) - 1).clamp_min(0)
        by_key = key_of(place).double().masked_fill(~is_open, torch.inf).argsort(dim=1, stable=True)
        rank = by_key.argsort(dim=1)
        if span_length is None:
            group = rank // group_size
        else:
            starts = is_open & ((place % span_length) % group_size == 0)
            group = starts.gather(1, by_key).long().cumsum(1).gather(1, rank) - 1
        group_ids = torch.where(given, given.long().cumsum(1) - 1, group + given.long().sum(1, keepdim=True))
        return cls(group_ids.masked_fill(~real, PADDING_GROUP), real, given)

    @property
    def scored_mask(self) -> torch.Tensor:
        """(B, S), True at open positions that are scored: neither given nor context."""
        scored = self.attention_mask & ~self.given_mask
        return scored if self.context_mask is None else scored & ~self.context_mask

    def scoring_last(self, share: Fraction) -> "GroupOrder":
        """Returns the same order with only the last fraction `share`, in (0, 1], of each row's open tokens scored; earlier
        ones become context (XLNet's partial prediction; not specified in the paper). A group on the boundary is scored.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: expected a number above 0 and at most 1")
        is_open = self.attention_mask & ~self.given_mask
        num_open = is_open.long().sum(dim=1, keepdim=True)
        num_context = num_open * (share.denominator - share.numerator) // share.denominator
        group = self.group_ids.clamp_min(0).long()
        per_group = torch.zeros_like(group).scatter_add(1, group, is_open.long())
        through_its_group = per_group.cumsum(dim=1).gather(1, group)
        return replace(self, context_mask=is_open & (through_its_group <= num_context))

    def generation_order(self) -> torch.Tensor:
        """Returns (B, S) column indices in generation order, padding last."""
        last = torch.iinfo(self.group_ids.dtype).max
        return self.group_ids.masked_fill(~self.attention_mask, last).argsort(dim=1, stable=True)

    def lay_out(self, input_ids: torch.Tensor, *, document_ids: torch.Tensor | None = None) -> Layout:
        """Stores a batch (B, S) in generation order: masks are then block-causal for any order, and only `position_ids`
        depend on the permutation. `labels` are −100 at given tokens, context and padding.

        Args:
            document_ids: (B, S) documents of each row. They share one order, and positions continue across documents; only
                the mask separates them.

        Raises:
            ValueError: a shape other than the order's.
        """
        for name, tensor in (("input_ids", input_ids), ("document_ids", document_ids)):
            if tensor is not None and tensor.shape != self.group_ids.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}: expected the order's shape, {tuple(self.group_ids.shape)}"
                )
        index = self.generation_order()
        position_ids = (self.attention_mask.long().cumsum(1) - 1).clamp_min(0)
        labels = input_ids.masked_fill(~self.scored_mask, -100)
        stored = (tensor.gather(1, index) for tensor in (input_ids, position_ids, self.group_ids))
        documents = None if document_ids is None else document_ids.gather(1, index)
        return Layout(*stored, self.attention_mask.gather(1, index), labels.gather(1, index), documents)


def left_tokens(content: ContentTokens, slots: QuerySlots, *, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Returns (B, Q) the token to the left of each slot's position; −1 if there is none that the slot sees (of an earlier
    group and the same document).

    Args:
        content: tokens of a row must have distinct positions.
        key_mask: (B, C), 0 at padding.
    """
    batch_size = content.input_ids.shape[0]
    position_ids = content.position_ids.expand_as(content.input_ids)
    left = (slots.position_ids - 1).expand(batch_size, -1)
    width = int(torch.maximum(position_ids.max(), left.max())) + 2
    nowhere = width - 1
    places = position_ids if key_mask is None else position_ids.masked_fill(~key_mask.to(torch.bool), nowhere)
    left = torch.where(left < 0, nowhere, left)

    def at_left(values: torch.Tensor, missing: int) -> torch.Tensor:
        table = values.new_full((batch_size, width), missing).scatter(1, places, values)
        table[:, nowhere] = missing
        return table.gather(1, left)

    is_visible = at_left(content.group_ids, torch.iinfo(content.group_ids.dtype).max) < slots.group_ids
    if content.document_ids is not None:
        is_visible = is_visible & (at_left(content.document_ids, -1) == slots.document_ids)
    return at_left(content.input_ids, -1).masked_fill(~is_visible, -1)


ORDERS = ("left_to_right", "right_to_left", "random", "spans")
RANDOM_ORDERS = ("random", "spans")


def seed_of(*parts) -> int:
    """Returns a seed (63 bits) from the repr of `parts`, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def _uniform(like: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Returns (B, S) uniform noise. With a generator per row, a row's i-th number does not depend on S or other rows."""
    batch_size, length = like.shape
    if generator is None or isinstance(generator, torch.Generator):
        device = like.device if generator is None else generator.device
        return torch.rand(batch_size, length, generator=generator, device=device).to(like.device)
    if len(generator) != batch_size:
        raise ValueError(f"generator holds {len(generator)} generators: expected {batch_size}, one per row")
    return torch.stack([torch.rand(length, generator=of_row, device=of_row.device) for of_row in generator]).to(
        like.device
    )


def _as_mask(name: str, mask: torch.Tensor) -> torch.Tensor:
    if mask.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: expected (batch, sequence)")
    return mask.to(torch.bool)


def _check_size(name: str, size: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name}={size!r}: expected a whole number of at least 1")
