"""The routes: from a request to its plan, and from finished rows to an answer or a stream."""

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from .answers import Answer, Stream, infill_answer, score_answer
from .engine import Cancelled, Engine, Invalid, OutOfTime, Refused, Ticket
from .limits import Limits, error_response
from .plans import Plan, Planner
from .playground import playground_page
from .schemas import ChatRequest, CompletionRequest, InfillRequest, ScoreRequest
from .schemas import Request as AnyRequest

POLL_SECONDS = 0.1  # between two looks whether the client is still there
PLANNERS = 64  # requests that are planned, or wait for a length, at once
log = logging.getLogger(__name__)


class UnknownModel(ValueError):
    """A request names another model than the one that is served."""


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

    async def plan(self, http: Request, body: AnyRequest, make: Callable[..., Any]) -> tuple[Any, Ticket]:
        """Plans a request in a thread of its own, and gives it up when its time is over or the client goes away.

        Raises:
            Invalid: the model does not take it.
            Refused: too many are being planned.
            OutOfTime: of the time limit.
        """
        if body.model not in (None, self.name) and not isinstance(body, InfillRequest):
            raise UnknownModel(f"model={body.model!r}: expected {self.name!r}")
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


def build_app(
    service: Service,
    *,
    api_key: str | None = None,
    max_body: int = 4 << 20,
    cors_origins: tuple[str, ...] = (),
) -> FastAPI:
    """Returns the ASGI application.

    Args:
        api_key: asked for by all routes but the page, its health and its description; None: by none.
        max_body: bytes of a request's body.
        cors_origins: web pages that may call it, as origins; empty: only its own.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="a3 serve", description="Any-order generation: blanks that are really filled.", lifespan=lifespan
    )
    app.add_middleware(
        Limits, api_key=api_key, max_body=max_body, send_seconds=service.timeout, metrics=service.metrics
    )
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
    _add_errors(app)
    planner, tokenizer, page = service.planner, service.planner.tokenizer, playground_page()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> str:
        return page

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": service.name, "object": "model", "created": service.started, "owned_by": "a3_hf"}
        return {"object": "list", "data": [model | {"max_model_len": planner.context}]}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request):
        plan, _ = await service.plan(http, body, planner.completion)
        answer = Answer(
            plan,
            request_id=f"cmpl-{http.state.request_id}",
            model=service.name,
            tokenizer=tokenizer,
            shows_commits=body.commits,
            shows_log_probs=body.logprobs is not None,
            echoes=bool(body.echo),
        )
        return await _answered(service, http, plan, answer, body)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: Request):
        plan, _ = await service.plan(http, body, planner.chat)
        answer = Answer(
            plan,
            request_id=f"chatcmpl-{http.state.request_id}",
            model=service.name,
            tokenizer=tokenizer,
            shows_log_probs=bool(body.logprobs),
            is_chat=True,
        )
        return await _answered(service, http, plan, answer, body)

    @app.post("/infill")
    async def infill(body: InfillRequest, http: Request):
        plan, ticket = await service.plan(http, body, planner.infill)

        def answer(content: str, is_last: bool = True) -> dict[str, Any]:
            first = ticket.first_token or time.monotonic()
            seconds = (first - ticket.arrived, time.monotonic() - first)
            return infill_answer(body, plan, model=service.name, seconds=seconds, content=content, is_last=is_last)

        def text() -> str:
            return plan.jobs[0].rows[0].text() if plan.jobs else ""

        if not body.stream:
            try:
                await service.whole(http, plan)
            except OutOfTime:
                return _timed_out(service, **answer(text()))
            return JSONResponse(answer(text()))
        sent = 0

        def new(is_last: bool = False) -> list[dict[str, Any]]:
            nonlocal sent
            now = text()
            fresh, sent = now[sent:], max(sent, len(now))
            return [answer(fresh, is_last)] if fresh or is_last else []

        return _events(service, http, plan, new, partial(new, True), first=[], done=None)

    @app.post("/v1/score")
    async def score(body: ScoreRequest, http: Request):
        scored, _ = await service.plan(http, body, planner.score)
        return JSONResponse(score_answer(scored, model=service.name, tokenizer=tokenizer))

    return app


async def _answered(
    service: Service, http: Request, plan: Plan, answer: Answer, body: CompletionRequest | ChatRequest
) -> Response:
    if not body.stream:
        try:
            await service.whole(http, plan)
        except OutOfTime:
            for row in (row for job in plan.jobs for row in job.rows if not row.is_closed):
                row.finish_reason = "timeout"
            return _timed_out(service, **answer.whole())
        return JSONResponse(answer.whole())
    stream = Stream(answer)

    def last() -> list[dict[str, Any]]:
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        return [*stream.last(), *([stream.usage()] if wants_usage else [])]

    return _events(service, http, plan, stream.chunks, last, first=stream.first(), done="[DONE]")


def _events(
    service: Service, http: Request, plan: Plan, chunks: Callable, last: Callable, *, first: list, done: str | None
) -> StreamingResponse:
    """A stream of events; an error inside it is its last one."""
    if len(service.engine) >= service.engine.max_queue:
        raise Refused

    async def events() -> AsyncIterator[str]:
        try:
            for chunk in first:
                yield _event(chunk)
            async for some in service.streamed(http, plan, chunks, last):
                for chunk in some:
                    yield _event(chunk)
        except Cancelled:
            return
        except Exception as error:
            status, message, kind = _described(service, error)
            yield _event({"error": {"message": message, "type": kind, "param": None, "code": status}})
            if status == 500:
                log.exception("a stream failed", exc_info=error)
        if done is not None:
            yield f"data: {done}\n\n"

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def _described(service: Service, error: Exception) -> tuple[int, str, str]:
    """The status, the message and the kind of an error."""
    if isinstance(error, OutOfTime):
        return 504, f"the answer took more than {service.timeout:g} seconds", "timeout_error"
    if isinstance(error, Refused):
        return 429, "the server has all the requests that it can queue; try again", "rate_limit_error"
    if isinstance(error, Invalid):
        return 400, str(error), "invalid_request_error"
    return 500, "the server failed; its log says why", "server_error"


def _timed_out(service: Service, **more: Any) -> JSONResponse:
    return error_response(504, f"the answer took more than {service.timeout:g} seconds", kind="timeout_error", **more)


def _add_errors(app: FastAPI) -> None:
    """Gives every error OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> JSONResponse:
        errors = error.errors()
        # of the forms that a field may have, the one that the value has
        same = [one for one in errors if one["loc"][:2] == errors[0]["loc"][:2]]
        first = next((one for one in same if not one["type"].endswith("_type")), errors[0])
        place = [str(part) for part in first["loc"] if part != "body"]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "value_error":  # of a request as a whole; the message begins with the field
            return error_response(400, message, param=_named(message))
        if first["type"] == "json_invalid":
            return error_response(400, f"the body is not JSON: {first['ctx']['error']}")
        name = place[0] if place else None
        where = ".".join(place)
        return error_response(400, f"{where}: {message}" if where else message, param=name)

    @app.exception_handler(UnknownModel)
    async def unknown(http: Request, error: UnknownModel) -> JSONResponse:
        return error_response(404, str(error), param="model", code="model_not_found")

    @app.exception_handler(Invalid)
    async def refused_value(http: Request, error: Invalid) -> JSONResponse:
        return error_response(400, str(error), param=_named(str(error)))

    @app.exception_handler(Refused)
    async def refused(http: Request, error: Refused) -> JSONResponse:
        message = "the server has all the requests that it can queue; try again"
        return error_response(429, message, kind="rate_limit_error", headers={"Retry-After": "1"})

    @app.exception_handler(OutOfTime)
    async def late(http: Request, error: OutOfTime) -> JSONResponse:
        return error_response(504, "the answer took more than the server's time limit", kind="timeout_error")

    @app.exception_handler(Cancelled)
    async def gone(http: Request, error: Cancelled) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), headers=error.headers)


def _named(message: str) -> str | None:
    """The field that a message begins with."""
    found = re.match(r"(\w+)(?=[=: ])", message)
    fields = {
        name for kind in (CompletionRequest, ChatRequest, InfillRequest, ScoreRequest) for name in kind.model_fields
    }
    return found[1] if found and found[1] in fields else None
