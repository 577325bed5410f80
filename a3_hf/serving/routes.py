"""What the routes answer: from a request's body to an answer or a stream, for any engine."""

import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from .answers import Answer, Stream, infill_answer
from .engine import Cancelled, OutOfTime, Refused
from .errors import described
from .limits import error_response
from .plans import Plan
from .schemas import ChatRequest, CompletionRequest, InfillRequest
from .service import Service

log = logging.getLogger(__name__)


async def answer_choices(service: Service, http: Request, body: CompletionRequest | ChatRequest) -> Response:
    """Answers `/v1/completions` and `/v1/chat/completions`.

    Raises:
        Exception: as `Service.plan` and `Service.whole`.
    """
    planner, is_chat = service.planner, isinstance(body, ChatRequest)
    plan, _ = await service.plan(http, body, planner.chat if is_chat else planner.completion)
    answer = Answer(
        plan,
        request_id=f"{'chatcmpl' if is_chat else 'cmpl'}-{http.state.request_id}",
        model=service.name if body.model is None else body.model,
        tokenizer=planner.tokenizer,
        shows_commits=not is_chat and body.commits,
        shows_log_probs=bool(body.logprobs) if is_chat else body.logprobs is not None,
        echoes=not is_chat and bool(body.echo),
        is_chat=is_chat,
    )
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


async def answer_infill(service: Service, http: Request, body: InfillRequest) -> Response:
    """Answers llama.cpp's `/infill`.

    Raises:
        Exception: as `Service.plan` and `Service.whole`.
    """
    plan, ticket = await service.plan(http, body, service.planner.infill)

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
            status, message, kind = described(error, service.timeout)
            yield _event({"error": {"message": message, "type": kind, "param": None, "code": status}})
            if status == 500:
                log.exception("a stream failed", exc_info=error)
        if done is not None:
            yield f"data: {done}\n\n"

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def _timed_out(service: Service, **more: Any) -> JSONResponse:
    return error_response(504, f"the answer took more than {service.timeout:g} seconds", kind="timeout_error", **more)
