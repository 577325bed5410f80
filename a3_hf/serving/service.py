"""A model that answers requests: plans are made beside the event loop, their jobs are decoded, and clients are watched."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request

from .engine import Cancelled, Engine, Invalid, OutOfTime, Refused, Ticket
from .errors import UnknownModel
from .plans import Plan, Planner
from .schemas import InfillRequest
from .schemas import Request as AnyRequest

POLL_SECONDS = 0.1  # between two looks whether the client is still there
PLANNERS = 64  # requests that are planned, or wait for a length, at once


class Service:
    """A model that answers requests.

    Args:
        planner: of the served model, and its engine.
        name: the model's, as clients see it.
        timeout: seconds that a request may take.
        logs_texts: log the bodies of requests.
    """

    def __init__(self, planner: Planner, engine: Engine, *, name: str, timeout: float, logs_texts: bool = False):
        self.planner, self.engine, self.name, self.timeout = planner, engine, name, timeout
        self.logs_texts, self.metrics = logs_texts, engine.metrics
        self.pool = ThreadPoolExecutor(PLANNERS, thread_name_prefix="a3-plan")
        self.started, self.planned = int(time.time()), 0

    def check_model(self, name: str | None) -> None:
        """Raises `UnknownModel` for a name that is not served."""
        if name not in (None, self.name):
            raise UnknownModel(f"model={name!r}: expected {self.name!r}")

    async def plan(self, http: Request, body: AnyRequest, make: Callable[..., Any]) -> tuple[Any, Ticket]:
        """Plans a request in a thread of its own, and gives it up when its time is over or the client goes away.

        Raises:
            Invalid: the model does not take it.
            Refused: too many are being planned.
            OutOfTime: of the time limit.
            UnknownModel: another model.
        """
        if not isinstance(body, InfillRequest):
            self.check_model(body.model)
        if self.logs_texts:
            http.state.facts = {"body": body.model_dump(exclude_unset=True)}
        ticket = Ticket(time.monotonic() + self.timeout)
        if self.planned >= PLANNERS + self.engine.max_queue:
            raise Refused

        def planned() -> Any:
            if time.monotonic() > ticket.deadline:
                raise OutOfTime
            try:
                return make(body, ticket)
            except ValueError as error:
                raise Invalid(error) from error

        self.planned += 1
        future = asyncio.get_running_loop().run_in_executor(self.pool, planned)
        future.add_done_callback(self._end_of_plan)
        with self.metrics.running.track_inprogress():
            await self.wait(http, ticket, [future], until=ticket.deadline)
        return future.result(), ticket

    def _end_of_plan(self, future: asyncio.Future) -> None:
        self.planned -= 1
        _ = future.cancelled() or future.exception()  # of a plan that nobody waits for any more

    async def wait(
        self, http: Request, ticket: Ticket, futures: list[asyncio.Future], *, until: float = math.inf
    ) -> None:
        """Waits for futures, looking now and then whether the client is still there.

        Args:
            until: `time.monotonic()`.

        Raises:
            Cancelled: the client is gone.
            OutOfTime: it is later.
        """
        try:
            while True:
                done, waiting = await asyncio.wait(futures, timeout=POLL_SECONDS)
                if any(one.exception() for one in done) and waiting:
                    ticket.is_cancelled = True
                if not waiting:
                    return
                if time.monotonic() > until:
                    raise OutOfTime
                if await http.is_disconnected():
                    raise Cancelled
        except BaseException:
            ticket.is_cancelled = True
            raise

    async def whole(self, http: Request, plan: Plan) -> None:
        """Decodes a plan's jobs and waits for them.

        Raises:
            Refused: the queue is full.
            OutOfTime: of the time limit.
        """
        with self.metrics.running.track_inprogress():
            jobs = self._submit(plan)
            if jobs:
                futures = [asyncio.wrap_future(job.done) for job in jobs]
                await self.wait(http, plan.ticket, futures)
                if errors := [error for future in futures if (error := future.exception()) is not None]:
                    raise errors[0]
        self._count(plan)

    async def streamed(
        self, http: Request, plan: Plan, chunks: Callable[[], list], last: Callable[[], list]
    ) -> AsyncIterator[Any]:
        """Yields what `chunks` returns after each pass, as it comes, and at the end `last`."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def on_pass() -> None:  # in the engine's thread, which alone changes rows
            if new := chunks():
                loop.call_soon_threadsafe(queue.put_nowait, new)

        for job in plan.jobs:
            job.on_pass = on_pass
        with self.metrics.running.track_inprogress():
            try:
                jobs = self._submit(plan)
                ends = [asyncio.wrap_future(job.done) for job in jobs]
                for end in ends:  # wakes the loop below
                    end.add_done_callback(lambda _: queue.put_nowait([]))
                while not (queue.empty() and all(end.done() for end in ends)):
                    try:
                        yield await asyncio.wait_for(queue.get(), POLL_SECONDS)
                    except TimeoutError:
                        if await http.is_disconnected():
                            raise Cancelled from None
                    if errors := [error for end in ends if end.done() and (error := end.exception()) is not None]:
                        raise errors[0]
                yield last()
            finally:
                plan.ticket.is_cancelled = True  # no effect on what is finished
        self._count(plan)

    def _submit(self, plan: Plan) -> list:
        if plan.jobs:
            self.engine.submit(*plan.jobs)
        return plan.jobs

    def _count(self, plan: Plan) -> None:
        if plan.ticket.first_token is not None:
            self.metrics.first_token.observe(plan.ticket.first_token - plan.ticket.arrived)

    def close(self) -> None:
        """Ends the engine's thread and those of plans."""
        self.engine.close()
        self.pool.shutdown(wait=False, cancel_futures=True)
