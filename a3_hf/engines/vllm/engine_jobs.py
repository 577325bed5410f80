"""Runs the jobs of `a3_hf.serving` in vLLM: each row is a request of vLLM's engine."""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind

from a3_hf.serving.engine import Cancelled, Invalid, OutOfTime, Ticket
from a3_hf.serving.metrics import Metrics
from a3_hf.serving.texts import Commit, Row

POLL_SECONDS = 0.2  # between two looks whether a request is still wanted


@dataclass
class EngineRow:
    """What vLLM is asked for one row.

    Attributes:
        prompt: token ids.
        columns: for each output token its column and the pass that writes it; None: the token is no part of the text.
        given: the row's known tokens by column, which its end needs.
        is_whole: all of its tokens must come, as those of blanks.
    """

    prompt: list[int]
    params: SamplingParams
    columns: Sequence[tuple[int, int] | None]
    given: dict[int, int] = field(default_factory=dict)
    is_whole: bool = False

    def check_end(self, number: int) -> None:
        """Raises a RuntimeError where vLLM has ended a blank after `number` tokens, before its last."""
        if self.is_whole and number < len(self.columns):
            raise RuntimeError(f"vLLM ended a blank after {number} of {len(self.columns)} tokens")

    def commits(self, completion, first: int = 0) -> list[Commit]:
        """Returns the tokens of the text in a part of vLLM's output; `first` numbers the part's first token."""
        found = []
        for place, (token, where) in enumerate(zip(completion.token_ids, self.columns[first:], strict=False)):
            if where is not None:
                column, step = where
                found.append(Commit(column, token, *log_prob_of(completion, place, step, self.params.logprobs)))
        return found


@dataclass
class EngineJob:
    """Rows that one request wants written; as `serving.engine.Job`.

    Attributes:
        asked: what vLLM is asked for each of `rows`.
        num_columns: of a row.
        adapter: vLLM's `LoRARequest`, or None.
    """

    ticket: Ticket
    rows: list[Row]
    asked: list[EngineRow]
    num_columns: int
    adapter: Any = None
    is_answer: bool = True
    on_pass: Callable[[], None] | None = None
    done: Future = field(default_factory=Future)


class EngineJobs:
    """Stands where `serving.engine.Engine` does. vLLM queues, batches and preempts by itself.

    Args:
        client: vLLM's `EngineClient`.
        loop: the server's event loop, in which the client lives.
    """

    max_queue = 1 << 30

    def __init__(self, client, loop: asyncio.AbstractEventLoop):
        self.client, self.loop, self.metrics = client, loop, Metrics()
        self.tasks: set[asyncio.Task] = set()

    def __len__(self) -> int:
        return 0  # nothing waits here

    def submit(self, *jobs: EngineJob) -> None:
        """Starts jobs; callable from any thread."""
        for job in jobs:
            self.loop.call_soon_threadsafe(self._start, job)

    def ask(self, asked: Sequence[tuple[list[int], SamplingParams]], ticket: Ticket, adapter=None) -> list[Any]:
        """Returns vLLM's output for each prompt with its `final_params`, side by side; for threads beside the event loop.

        Raises:
            Invalid: vLLM does not take one.
            Cancelled: nobody waits for the request any more.
        """

        async def last(prompt: list[int], params: SamplingParams):
            found = None
            async for output in self._outputs(prompt, params, adapter):
                found = output
            return found

        async def all_of_them():
            tasks = [asyncio.ensure_future(last(*one)) for one in asked]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:  # the others of one that failed
                    task.cancel()

        future = asyncio.run_coroutine_threadsafe(all_of_them(), self.loop)
        while True:
            try:
                return future.result(timeout=POLL_SECONDS)
            except TimeoutError:
                if future.done():
                    raise
                if ticket.is_cancelled:
                    future.cancel()
                    raise Cancelled from None

    def _start(self, job: EngineJob) -> None:
        task = self.loop.create_task(self._run(job))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _run(self, job: EngineJob) -> None:
        rows = [
            self.loop.create_task(self._write(job, row, asked)) for row, asked in zip(job.rows, job.asked, strict=True)
        ]
        failure: Exception | None = None
        try:
            waiting = set(rows)
            while waiting and failure is None:
                done, waiting = await asyncio.wait(waiting, timeout=POLL_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
                failure = next((error for one in done if (error := one.exception()) is not None), None)
                if failure is None and waiting and job.ticket.is_cancelled:
                    failure = Cancelled()
                if failure is None and waiting and time.monotonic() > job.ticket.deadline:
                    failure = OutOfTime()
        except asyncio.CancelledError:
            job.done.set_exception(Cancelled())  # the server ends
            raise
        finally:
            for one in rows:
                one.cancel()
        await asyncio.gather(*rows, return_exceptions=True)
        if failure is None:
            job.done.set_result(None)
        else:
            job.done.set_exception(failure)

    async def _write(self, job: EngineJob, row: Row, asked: EngineRow) -> None:
        tokens, number = dict(asked.given), 0
        async for output in self._outputs(asked.prompt, asked.params, job.adapter):
            [completion] = output.outputs
            new = list(completion.token_ids)
            commits = []
            for place, token in enumerate(new):
                where = asked.columns[number + place] if number + place < len(asked.columns) else None
                if where is not None:
                    column, step = where
                    tokens[column] = token
                    commits.append(Commit(column, token, *log_prob_of(completion, place, step, asked.params.logprobs)))
            number += len(new)
            if commits:
                if job.is_answer and job.ticket.first_token is None:
                    job.ticket.first_token = time.monotonic()
                row.take(commits)
                if job.on_pass is not None:
                    job.on_pass()
            if row.is_done:
                break
        if not row.is_done:
            asked.check_end(number)
        row.close([tokens.get(column, 0) for column in range(job.num_columns)])

    async def _outputs(self, prompt: list[int], params: SamplingParams, adapter):
        """Yields vLLM's outputs; a request that nobody reads any more is aborted."""
        outputs = self.client.generate(tokens_input(prompt), params, f"a3-{uuid.uuid4().hex}", lora_request=adapter)
        try:
            async for output in outputs:
                yield output
        except (VLLMClientError, ValueError) as error:
            raise Invalid(str(error)) from error
        finally:
            await outputs.aclose()


def delta_params(**settings: Any) -> SamplingParams:
    """Returns parameters of a request whose outputs hold what is new, as tokens."""
    return _params(output_kind=RequestOutputKind.DELTA, **settings)


def final_params(**settings: Any) -> SamplingParams:
    """Returns parameters of a request with one output, which holds all."""
    return _params(output_kind=RequestOutputKind.FINAL_ONLY, **settings)


def _params(**settings: Any) -> SamplingParams:
    try:
        return SamplingParams(detokenize=False, **settings)
    except VLLMClientError as error:
        raise ValueError(str(error)) from error


def log_prob_of(
    completion, place: int, step: int, number: int | None
) -> tuple[float, int, tuple[tuple[int, float], ...]]:
    """Returns the end of a `Commit`: an output token's log-probability (0: none was wanted), its step, the likeliest ones."""
    if completion.logprobs is None:
        return 0.0, step, ()
    found = completion.logprobs[place]
    likely = sorted((one.rank, token, one.logprob) for token, one in found.items() if one.rank and one.rank <= number)
    return found[completion.token_ids[place]].logprob, step, tuple((token, value) for _, token, value in likely)
