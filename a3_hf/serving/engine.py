"""One thread that owns the model and decodes the requests of strangers together."""

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from a3_hf.models.a3_llama.generation_filling import Filling

from .metrics import Metrics
from .texts import Commit, Row

JOINS = ("pass", "batch")  # when rows join a batch that runs: between two passes, or not at all
log = logging.getLogger(__name__)


class Invalid(ValueError):
    """A request that the model does not take; the message names the field."""


class Refused(Exception):
    """The queue is full, or the server is about to stop."""


class OutOfTime(Exception):
    """A request's time was over before it was finished; its rows hold what was written."""


class Cancelled(Exception):
    """Nobody waits for a request any more."""


@dataclass
class Ticket:
    """What all jobs of one request share.

    Attributes:
        deadline: `time.monotonic()` after which it is given up.
        is_cancelled: nobody waits for it.
        arrived: `time.monotonic()`.
        first_token: when the first token of the answer was written.
    """

    deadline: float
    is_cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)
    first_token: float | None = None


@dataclass
class Job:
    """Rows that one request wants written.

    Attributes:
        ticket: the request's.
        begin: makes the filling, whose rows are `rows` in their order.
        key: jobs of the same key may be decoded together.
        joins: they may also do so when one of them has begun.
        num_columns: the width of its rows.
        is_answer: its tokens are those of the answer, not of candidates for a length.
        on_pass: called by the engine's thread after each pass that wrote something.
        done: gets None when all rows are finished; an exception if not.
    """

    ticket: Ticket
    begin: Callable[[], Filling]
    rows: list[Row]
    key: Hashable
    joins: bool
    num_columns: int
    is_answer: bool = True
    on_pass: Callable[[], None] | None = None
    done: Future = field(default_factory=Future)


class Batch:
    """Jobs of one key that are decoded together."""

    def __init__(self, joins: bool):
        self.joins = joins
        self.filling: Filling | None = None
        self.owners: list[tuple[Job, Row]] = []

    @property
    def width(self) -> int:
        """The columns of its rows, which are padded to the widest."""
        return 0 if self.filling is None else self.filling.decoder.canvas.pad_column


class Engine:
    """Decodes jobs in one thread: between two passes rows leave that are finished, out of time or no longer wanted, and new
    jobs begin, in the order in which they came.

    Args:
        model: an `A3LlamaForCausalLM`.
        max_batch: most rows of one batch; a job with more rows is decoded alone.
        max_queue: most requests that wait; more are refused.
        max_tokens: most columns of all rows together; it bounds the memory.
        join: when new rows join a batch that runs, one of `JOINS`.
    """

    def __init__(
        self,
        model,
        *,
        max_batch: int = 32,
        max_queue: int = 256,
        max_tokens: int = 1 << 15,
        join: str = "pass",
    ):
        if join not in JOINS:
            raise ValueError(f"join={join!r}: expected one of {', '.join(JOINS)}")
        for name, value in (("max_batch", max_batch), ("max_queue", max_queue), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected a whole number of at least 1")
        self.model, self.max_batch, self.max_queue, self.max_tokens = model, max_batch, max_queue, max_tokens
        self.join, self.metrics = join, Metrics()
        self._waiting: list[Job] = []
        self._calls: list[tuple[Callable[[], Any], Ticket, Future]] = []
        self._batches: dict[Hashable, Batch] = {}
        self._wake = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="a3-engine", daemon=True)
        self._thread.start()

    # Called by other threads.

    def submit(self, *jobs: Job) -> Job:
        """Queues the jobs of a request, all or none, and returns the first.

        Raises:
            Refused: the queue is full, or closed.
        """
        with self._wake:
            if self._is_closed or self._num_waiting() >= self.max_queue:
                raise Refused
            self._waiting += jobs
            self.metrics.waiting.set(self._num_waiting())
            self._wake.notify()
        return jobs[0]

    def _num_waiting(self) -> int:
        return len({id(job.ticket) for job in self._waiting})

    def call(self, function: Callable[[], Any], ticket: Ticket) -> Future:
        """Runs a function of the model between two passes, unless the ticket's request is given up before.

        Raises:
            Refused: as `submit`.
        """
        future: Future = Future()
        with self._wake:
            if self._is_closed or len(self._calls) >= self.max_queue:
                raise Refused
            self._calls.append((function, ticket, future))
            self._wake.notify()
        return future

    def close(self) -> None:
        """Refuses further jobs, gives up those that are not finished, and ends the thread."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def __len__(self) -> int:
        """The number of requests that wait for their first pass."""
        with self._wake:
            return self._num_waiting()

    @property
    def is_idle(self) -> bool:
        with self._wake:
            return not (self._waiting or self._calls or self._batches)

    # The engine's thread.

    def _run(self) -> None:
        with torch.no_grad():
            while True:
                with self._wake:
                    while not (self._is_closed or self._waiting or self._calls or self._batches):
                        self._wake.wait()
                    if self._is_closed:
                        break
                    calls, self._calls = self._calls, []
                for function, ticket, future in calls:
                    if reason := _given_up(ticket):
                        future.set_exception(reason)
                    else:
                        _settle(future, function)
                with self.model.generation_context():
                    self._admit()
                    for key, batch in list(self._batches.items()):
                        self._step(key, batch)
        jobs = [*self._waiting, *(job for batch in self._batches.values() for job, _ in batch.owners)]
        for job in jobs:
            _fail(job, Refused())
        for *_, future in self._calls:
            future.set_exception(Refused())

    def _admit(self) -> None:
        """Begins jobs that wait, in their order, as far as rows and memory allow."""
        with self._wake:
            waiting = list(self._waiting)
        taken: dict[Hashable, list[Job]] = {}
        gone, blocked = [], set()
        sizes = {key: (len(batch.owners), batch.width) for key, batch in self._batches.items()}
        for job in waiting:
            if reason := _given_up(job.ticket):
                gone.append(job)
                _fail(job, reason)
                continue
            is_late = job.key in self._batches and not (job.joins and self.join == "pass")
            rows, width = sizes.get(job.key, (0, 0))
            size = (rows + len(job.rows), max(width, job.num_columns))
            if is_late or job.key in blocked or (rows and size[0] > self.max_batch):
                blocked.add(job.key)  # the first one of its kind that waits is not overtaken
                continue
            total = sum(rows * width for rows, width in (sizes | {job.key: size}).values())
            if total > self.max_tokens and sizes:
                break  # nor is the first one that waits for memory
            sizes[job.key] = size
            taken.setdefault(job.key, []).append(job)
        begun = [job for wave in taken.values() for job in wave]
        with self._wake:
            left = {id(job) for job in (*gone, *begun)}
            self._waiting = [job for job in self._waiting if id(job) not in left]
            self.metrics.waiting.set(self._num_waiting())
        for key, wave in taken.items():
            self._begin(key, wave)

    def _begin(self, key: Hashable, wave: Sequence[Job]) -> None:
        """Runs the first pass of jobs, together, and lets them join their batch."""
        new = Batch(wave[0].joins)
        parts = []
        for job in wave:
            try:
                parts.append(job.begin())
                new.owners += [(job, row) for row in job.rows]
            except ValueError as error:
                _fail(job, Invalid(error))
            except Exception as error:
                _fail(job, error)
        if not parts:
            return
        batch = self._batches.get(key)
        try:
            new.filling = parts[0] if len(parts) == 1 else type(parts[0]).joined(parts)
            self._pass(new)
            if batch is not None and new.filling is not None:
                batch.filling = type(batch.filling).joined([batch.filling, new.filling])
                batch.owners += new.owners
            elif new.filling is not None:
                self._batches[key] = new
        except Exception as error:  # the batch that runs goes on without them
            self._give_up(key, new, error)

    def _step(self, key: Hashable, batch: Batch) -> None:
        try:
            self._leave(batch)
            if batch.filling is not None:
                self._pass(batch)
            if batch.filling is None:
                self._batches.pop(key, None)
        except Exception as error:
            self._give_up(key, batch, error)

    def _give_up(self, key: Hashable, batch: Batch, error: Exception) -> None:
        """Ends a batch whose pass failed."""
        log.exception("a pass failed", exc_info=error)
        for job, _ in batch.owners:
            _fail(job, error)
        batch.owners, batch.filling = [], None
        if self._batches.get(key) is batch:
            del self._batches[key]

    def _leave(self, batch: Batch) -> None:
        """Lets rows go that nobody waits for, or whose time is over."""
        for job in {id(job): job for job, _ in batch.owners}.values():
            if reason := _given_up(job.ticket):
                for owner, row in batch.owners:
                    if owner is job:
                        row.is_done = True
                _fail(job, reason)
        self._drop(batch)

    def _pass(self, batch: Batch) -> None:
        """Runs one pass and hands what it wrote to the rows."""
        filling, start = batch.filling, time.monotonic()
        has_more = filling.step()
        decoder, canvas = filling.decoder, filling.decoder.canvas
        if filling.rewrites:  # its tokens are told when they are final
            fresh = (canvas.commit_step[:, :-1] >= 0) & (not has_more)
        else:
            fresh = canvas.commit_step[:, :-1] == decoder.row_step() - 1
        commits = _commits(canvas, fresh, [row for _, row in batch.owners])
        written, now = sum(map(len, commits)), time.monotonic()
        self.metrics.passes.inc()
        self.metrics.rows.observe(len(batch.owners))
        self.metrics.written.inc(written)
        self.metrics.pass_seconds.observe(now - start)
        is_open, texts = filling.is_open().tolist(), canvas.sequences[:, :-1].tolist()
        if not all(is_open):
            decoder.check_finite()  # on a GPU it is not checked in each pass
        told: dict[int, Job] = {}
        for (job, row), new, goes_on, tokens in zip(batch.owners, commits, is_open, texts, strict=True):
            if not row.is_done:  # a row that is done may wait for the others of a batch that ends together
                told[id(job)] = job
                row.take(new)
                if row.is_done or not goes_on:
                    row.close(tokens)
        for job in told.values():
            if job.is_answer and job.ticket.first_token is None:
                job.ticket.first_token = now
            if job.on_pass is not None:
                job.on_pass()
        self._drop(batch)

    def _drop(self, batch: Batch) -> None:
        """Takes the rows out of a batch that are done, and answers jobs whose rows are all done."""
        stays = [number for number, (_, row) in enumerate(batch.owners) if not row.is_done]
        if len(stays) == len(batch.owners):
            return
        for job in {id(job): job for job, _ in batch.owners}.values():
            if all(row.is_done for row in job.rows) and not job.done.done():
                job.done.set_result(None)
        if not stays:
            batch.owners, batch.filling = [], None
        elif batch.joins:
            batch.owners = [batch.owners[number] for number in stays]
            batch.filling.keep_rows(torch.tensor(stays, device=batch.filling.decoder.canvas.end.device))


def _commits(canvas, fresh: torch.Tensor, rows: Sequence[Row]) -> list[list[Commit]]:
    """Returns each row's tokens at `fresh` (B, S), in text order."""
    numbers, columns = fresh.nonzero(as_tuple=True)
    values = [tensor[numbers, columns].tolist() for tensor in (canvas.sequences, canvas.log_probs, canvas.commit_step)]
    tops: Sequence = [()] * len(numbers)
    if canvas.top_log_probs is not None:
        pairs = (canvas.top_token_ids[numbers, columns].tolist(), canvas.top_log_probs[numbers, columns].tolist())
        tops = [tuple(zip(*pair, strict=True)) for pair in zip(*pairs, strict=True)]
    commits: list[list[Commit]] = [[] for _ in rows]
    for number, column, token_id, log_prob, step, top in zip(
        numbers.tolist(), columns.tolist(), *values, tops, strict=True
    ):
        commits[number].append(Commit(column, token_id, log_prob, step, top))
    return commits


def _given_up(ticket: Ticket) -> Exception | None:
    if ticket.is_cancelled:
        return Cancelled()
    return OutOfTime() if time.monotonic() > ticket.deadline else None


def _fail(job: Job, error: Exception) -> None:
    if not job.done.done():
        job.done.set_exception(error)


def _settle(future: Future, function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
