"""Time, tokens and passes of each task."""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any


@dataclass
class Spent:
    """The cost of a task's requests.

    Attributes:
        requests: number of answers.
        tokens: scored or written, the context not counted.
        passes: forward passes, each counted once per row.
        seconds: time of the model's work, tokenization included.
    """

    requests: int = 0
    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0


class Speed:
    """Adds up the cost of each task on this process."""

    def __init__(self):
        self._spent: defaultdict[str, Spent] = defaultdict(Spent)

    @contextmanager
    def timing(self, task: str):
        """The `Spent` of a task, whose seconds run until the block ends."""
        spent, start = self._spent[task], perf_counter()
        try:
            yield spent
        finally:
            spent.seconds += perf_counter() - start

    def table(self) -> dict[str, dict[str, Any]]:
        """Per task the fields of `Spent`, tokens per second, and tokens per forward pass and row."""
        return {
            task: {
                **vars(spent),
                "tokens_per_second": spent.tokens / spent.seconds if spent.seconds else 0.0,
                "tokens_per_forward": spent.tokens / spent.passes if spent.passes else 0.0,
            }
            for task, spent in self._spent.items()
        }
