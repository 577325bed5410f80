"""Lossless drafts: trees of guesses, which a LLaMA's content stream checks in one pass. Not in the paper.

A tree's nodes are content rows that see the text and their ancestors. The row of a node is where a LLaMA predicts the token
after it, so the walk from the root takes at each row the token that decoding one by one would take there, and goes on while
that token is a node. The text is the LLaMA's own, token by token: if greedy, and under sampling for the same seed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from .generation_canvas import Canvas, pack
from .generation_decoder import Decoder
from .generation_filling import Filling, padded_alike
from .generation_sampling import NGRAM_LEAST, ngram_draft

NGRAM_TOKENS, TREE_NODES, TREE_WIDTH = 7, 8, 4
COMPACT_EVERY = 16  # passes of a batch between compactions of the cache
PROBED_PASSES, KEPT_PASSES = 4, 48  # with and without drafts in turns; and then with what was faster


@dataclass
class DraftTree:
    """Guesses for each text of a batch, parents before their children.

    Attributes:
        tokens: (B, N).
        parents: (B, N) the number of the node before; −1: the last certain token.
        is_node: (B, N), False at padding.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    is_node: torch.Tensor

    @classmethod
    def empty(cls, batch_size: int, device: torch.device) -> "DraftTree":
        none = torch.empty(batch_size, 0, dtype=torch.long, device=device)
        return cls(none, none, none.bool())

    @classmethod
    def chain(cls, tokens: torch.Tensor, count: torch.Tensor) -> "DraftTree":
        """The tree of one path: the first `count` (B,) of `tokens` (B, N)."""
        number = torch.arange(tokens.shape[1], device=tokens.device)
        return cls(tokens, (number - 1).expand_as(tokens), number < count[:, None])

    @classmethod
    def joined(cls, trees: "Sequence[DraftTree]") -> "DraftTree":
        """The trees of several batches' texts."""
        parts = zip(*((tree.tokens, tree.parents, tree.is_node) for tree in trees), strict=True)
        return cls(*(torch.cat(padded_alike(part, 0)) for part in parts))

    def rows(self, index: torch.Tensor) -> "DraftTree":
        """The trees of the texts `index` (n,)."""
        return DraftTree(self.tokens[index], self.parents[index], self.is_node[index])

    def with_nodes(self, tokens: torch.Tensor, parents: torch.Tensor, is_node: torch.Tensor) -> "DraftTree":
        pairs = ((self.tokens, tokens), (self.parents, parents), (self.is_node, is_node))
        return DraftTree(*(torch.cat(pair, dim=1) for pair in pairs))

    def likeliest(self, probabilities: torch.Tensor, most: int) -> "DraftTree":
        """The `most` nodes of the highest `probabilities` (B, N), which are no higher than their parents'."""
        if self.tokens.shape[1] <= most:
            return self
        best = probabilities.argsort(dim=1, descending=True, stable=True)[:, :most].sort(dim=1).values
        new = torch.full_like(self.tokens, -1).scatter_(1, best, torch.arange(most, device=best.device).expand_as(best))
        parents = self.parents.gather(1, best)
        moved = new.gather(1, parents.clamp_min(0)).masked_fill(parents < 0, -1)
        return DraftTree(self.tokens.gather(1, best), moved, self.is_node.gather(1, best))

    def merged(self, other: "DraftTree") -> "DraftTree":
        """This tree in rows where it has nodes, else the other one."""
        width = max(self.tokens.shape[1], other.tokens.shape[1])
        mine, its = (
            [pad(part, (0, width - part.shape[1])) for part in (one.tokens, one.parents, one.is_node)]
            for one in (self, other)
        )
        first = self.is_node.any(dim=1, keepdim=True)
        return DraftTree(*(torch.where(first, a, b) for a, b in zip(mine, its, strict=True)))

    def ancestry(self) -> torch.Tensor:
        """(B, N, N), True where a node (row) is another (column) or comes after it."""
        number = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        same = (number[:, None] == number).expand(len(self.tokens), -1, -1).clone()
        for node in range(1, len(number)):
            parent = self.parents[:, node]
            above = same[torch.arange(len(same)), parent.clamp_min(0)] & (parent >= 0)[:, None]
            same[:, node] |= above
        return same

    def walk(self, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Follows the tree while its nodes are what is chosen.

        Args:
            chosen: (B, 1 + N) the token chosen after the last certain token, and after each node.

        Returns:
            (B, M) the rows (0: of the certain token, 1 + n: of node n) whose tokens are written, (B, M) these tokens, and
            (B, M), False after a text's last.
        """
        row, goes_on = torch.zeros_like(chosen[:, 0]), torch.ones_like(chosen[:, 0], dtype=torch.bool)
        rows, tokens, written = [], [], []
        while True:
            token = chosen.gather(1, row[:, None])
            rows.append(row)
            tokens.append(token[:, 0])
            written.append(goes_on)
            follows = self.is_node & (self.parents + 1 == row[:, None]) & (self.tokens == token)
            goes_on = goes_on & follows.any(dim=1)
            if not goes_on.any():
                return tuple(torch.stack(each, dim=1) for each in (rows, tokens, written))
            row = torch.where(goes_on, follows.long().argmax(dim=1) + 1, row)


class Pace:
    """Whether a batch is written faster with drafts or without, by the clock: in a batch the rows of drafts may cost more than
    they bring. Both are tried in turns, the faster one is kept, and after a while the other is tried again.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, *, drafts: bool = True):
        self.clock, self.drafts = clock, drafts
        self._rates: dict[bool, float] = {}  # tokens a second
        self._tokens, self._passes, self._left, self._start = 0, 0, PROBED_PASSES, clock()

    def after_pass(self, num_tokens: int) -> None:
        """Counts a pass and what it wrote."""
        self._tokens += num_tokens
        self._left -= 1
        if self._left:
            return
        now = self.clock()
        self._rates[self.drafts] = self._tokens / max(now - self._start, 1e-9)
        other = not self.drafts
        is_new = other not in self._rates
        best = max(self._rates, key=self._rates.get)
        if self._passes == KEPT_PASSES or is_new:  # try the other one
            self.drafts, self._left, self._passes = other, PROBED_PASSES, PROBED_PASSES
        else:
            self.drafts, self._left, self._passes = best, KEPT_PASSES, KEPT_PASSES
        self._tokens, self._start = 0, now


class CheckedFilling(Filling):
    """Fills blanks left to right by `verify="content"`, with drafts from the text so far, from a draft head, or both: the
    head's where the text gives none.

    Args:
        path: (B, N) each row's blanks in generation order, then the padding column.
        drafter: a `Drafter`; None: drafts come from the text alone.
    """

    columns = ("rest", "pending")

    def __init__(self, decoder: Decoder, path: torch.Tensor, drafter=None):
        super().__init__(decoder)
        canvas, config, runner = decoder.canvas, decoder.config, decoder.runner
        # Processors that read the text so far know one text, not a tree.
        self.reads_text = decoder.processors.reads_text
        self.width = 1 if self.reads_text else config.draft_width or TREE_WIDTH
        self.rest, self.pending, self.drafter = path, runner.given_columns(), drafter
        if (self.pending == canvas.pad_column).all(dim=1).any():
            raise ValueError(
                "past_key_values holds a row's whole prompt: verify='content' expects a cache without its last token"
            )
        runner.kept_layer = None if drafter is None else drafter.kept_layer
        self.tree = DraftTree.empty(len(path), path.device)
        self.pace = Pace() if len(path) > 1 else None

    def is_open(self) -> torch.Tensor:
        return (self.rest != self.decoder.canvas.pad_column).any(dim=1)

    def keep_rows(self, index: torch.Tensor) -> None:
        super().keep_rows(index)
        self.tree = self.tree.rows(index)
        self._change_pace()

    @classmethod
    def joined(cls, fillings: "Sequence[CheckedFilling]") -> "CheckedFilling":
        whole = super().joined(fillings)
        whole.tree = DraftTree.joined([filling.tree for filling in fillings])
        whole._change_pace()
        return whole

    def _change_pace(self) -> None:
        # Batches whose rows come and go begin without drafts, which seldom pay there.
        self.pace = Pace(drafts=False) if len(self.rest) > 1 else None

    def step(self) -> bool:
        decoder, canvas = self.decoder, self.decoder.canvas
        runner, rest, pending, tree = decoder.runner, self.rest, self.pending, self.tree
        if decoder.out_of_time():
            decoder.fill_remaining(pending)
            return False
        # 1. One pass over the certain tokens that are not encoded yet, and the tree.
        ancestry = tree.ancestry()
        depth = pad(ancestry.sum(dim=2), (1, 0))  # of each row: 0 for the certain token
        slots = rest.gather(1, depth.clamp_max(rest.shape[1] - 1))  # the column after each row
        slots = slots.masked_fill(~pad(tree.is_node, (1, 0), value=True), canvas.pad_column)
        nodes = rest.gather(1, (depth[:, 1:] - 1)).masked_fill(~tree.is_node, canvas.pad_column)
        node_places = pending.shape[1] + torch.arange(nodes.shape[1], device=nodes.device).expand_as(nodes)
        row_places = torch.cat([_last_real(pending, canvas.pad_column), node_places], dim=1)
        logits = decoder.logits_of(
            torch.cat([pending, nodes], dim=1),
            pending[:, :0],
            singletons=True,
            logits_at=row_places,
            tree=(tree.tokens, ancestry),
        )
        # 2. The token after each row.
        known = None
        if self.reads_text:
            canvas.sequences.scatter_(1, nodes, tree.tokens)
            order = torch.full_like(canvas.sequences, len(tree.tokens[0])).scatter_(1, nodes, depth[:, 1:] - 1)
            known = canvas.known()[:, None] | (order[:, None, :-1] < depth[..., None])
        scores = decoder.warped(decoder.processed(logits, slots, known))
        # a token's number is that of the step that would write it one by one
        numbers = decoder.chance.place.gather(1, slots) - 1
        rows, tokens, written = tree.walk(decoder.choose(scores, slots, numbers))
        # 3. Commit them.
        columns = slots.gather(1, rows).masked_fill(~written, canvas.pad_column)
        text = torch.arange(len(rows), device=rows.device)[:, None]
        of_rows = logits[text, rows]
        decoder.commit(columns, tokens, of_rows, of_rows if scores is logits else scores[text, rows])
        # 4. What stays in the cache: the certain tokens, and the nodes that were right.
        num_written = written.sum(dim=1)
        is_right = written[:, 1:] & (rows[:, 1:] > 0)
        right = (pending.shape[1] - 1 + rows[:, 1:]).masked_fill(~is_right, -1)
        before = torch.arange(pending.shape[1], device=rows.device).expand(len(rows), -1)
        final_row = rows.gather(1, num_written[:, None] - 1)
        state_place = row_places.gather(1, final_row)
        states = None if self.drafter is None else runner.kept_states[text[:, 0], state_place[:, 0]]
        runner.keep(torch.cat([before, right], dim=1))
        if len(rest) > 1 and runner.passes % COMPACT_EVERY == 0:
            runner.compact()
        # 5. The next blanks, and drafts for those after the token that the next pass encodes.
        self.pending = pending = columns.gather(1, num_written[:, None] - 1)
        rest = pad(rest, (0, rows.shape[1]), value=canvas.pad_column)
        ahead = num_written[:, None] + torch.arange(rest.shape[1] - rows.shape[1], device=rest.device)
        rest = rest.gather(1, ahead)
        if decoder.has_ended:
            rest = decoder.mask_finished(rest)
            rest = pack(rest, rest != canvas.pad_column, canvas.pad_column)
        left = (rest != canvas.pad_column).sum(dim=1)
        self.rest = rest = rest[:, : int(left.max())]
        deepest = (left - 1).clamp_min(0)  # the last blank's token is what a check chooses
        self.tree = DraftTree.empty(len(rest), rest.device)
        if self.pace is not None:
            if runner.passes == 1:
                self.pace = Pace()  # the prompt's pass does not count
            else:
                self.pace.after_pass(int((columns != canvas.pad_column).sum()))
        if self.pace is None or self.pace.drafts:
            self.tree = _next_tree(decoder, rest, deepest, pending[:, 0], states, self.drafter, self.width)
        return rest.shape[1] > 0


def _next_tree(
    decoder: Decoder,
    rest: torch.Tensor,
    deepest: torch.Tensor,
    pending: torch.Tensor,
    states: torch.Tensor | None,
    drafter,
    width: int,
) -> DraftTree:
    """Returns drafts for the columns `rest` (B, N), at most `deepest` (B,) of them in a row.

    Args:
        pending: (B,) the column before, whose token is certain and not encoded yet.
        states: (B, D) of the token before that, where a draft head starts.
        width: most drafts of a head after the same token.
    """
    canvas, config = decoder.canvas, decoder.config
    tree = DraftTree.empty(len(rest), rest.device)
    if config.draft != "head" and rest.shape[1] > 1:
        most = deepest.clamp_max(config.draft_tokens or NGRAM_TOKENS)
        tree = DraftTree.chain(*ngram_drafts(canvas, rest, most, int(most.max())))
    lacks = (deepest > 0) & ~tree.is_node.any(dim=1)
    if drafter is None or not lacks.any():
        return tree
    proposed = drafter.propose(
        states,
        canvas.sequences.gather(1, pending[:, None])[:, 0],
        canvas.position_ids.gather(1, pending[:, None])[:, 0],
        decoder.runner.cache,
        decoder.runner.key_mask(),
        most_nodes=config.draft_tokens or TREE_NODES,
        width=width,
        deepest=deepest * lacks,
        never=canvas.eos_token_ids,
    )
    return tree.merged(proposed)


def _last_real(columns: torch.Tensor, pad_column: int) -> torch.Tensor:
    """Returns (B, 1) the place of each row's last column (B, C) that is not padding; 0 if there is none."""
    place = torch.arange(columns.shape[1], device=columns.device)
    return torch.where(columns != pad_column, place, 0).amax(dim=1, keepdim=True)


def ngram_drafts(
    canvas: Canvas, rest: torch.Tensor, most: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (B, n) drafts for the next columns, each based on the earlier ones, and (B,) their number: at most `most` (B,),
    and up to the first one for which too few neighbours match, or which is an EOS.
    """
    pad = torch.nn.functional.pad
    by_position = pad(canvas.by_position, (0, 1), value=canvas.pad_column)
    tokens = canvas.sequences.gather(1, by_position)
    known = pad(canvas.known(), (0, 1)).gather(1, by_position)
    drafts, count, goes_on = [], torch.zeros_like(most), torch.ones_like(most, dtype=torch.bool)
    for number, column in enumerate(rest[:, :width].unbind(dim=1)):
        place = canvas.position_ids.gather(1, column[:, None]).masked_fill(
            column[:, None] == canvas.pad_column, canvas.pad_column
        )
        draft, matched = ngram_draft(tokens[:, :-1], known[:, :-1], place[:, 0])
        goes_on = goes_on & (number < most) & (matched >= NGRAM_LEAST) & ~torch.isin(draft, canvas.eos_token_ids)
        if not goes_on.any():
            break
        drafts.append(draft)
        count = count + goes_on
        tokens.scatter_(1, place, draft[:, None])
        known.scatter_(1, place, True)
    return torch.stack(drafts, dim=1) if drafts else rest[:, :0], count
