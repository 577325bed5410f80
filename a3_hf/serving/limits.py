"""What stands before every route: the key, the size of a body, a request's id, its line in the log and its counters."""

import asyncio
import hmac
import json
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics

OPEN_PATHS = ("/", "/health", "/docs", "/openapi.json")  # without a key
log = logging.getLogger("a3_hf.serving")


def error_response(
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
    **more,
) -> JSONResponse:
    """An error in OpenAI's shape."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error, **more}, status_code=status, headers=headers)


class Limits:
    """Refuses requests without the key or with too large a body, answers 500 where a route fails, logs and counts.

    Args:
        api_key: None: no key is asked for.
        max_body: bytes.
        send_seconds: that a client may take to read a part of its answer.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body: int, send_seconds: float, metrics: Metrics):
        self.app, self.api_key, self.max_body = app, api_key, max_body
        self.send_seconds, self.metrics = send_seconds, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path, start = Headers(scope=scope), scope["path"], time.monotonic()
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w-]{1,64}", given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await asyncio.wait_for(send(message), self.send_seconds)

        try:
            response, body = None, b""
            if not self._has_key(path, headers):
                response = error_response(
                    401,
                    "expected the API key, as Authorization: Bearer KEY",
                    kind="authentication_error",
                    code="invalid_api_key",
                )
            else:
                body = await self._body(headers, receive)
                if body is None:
                    response = error_response(
                        413, f"the body is larger than {self.max_body} bytes", code="body_too_large"
                    )
            if response is not None:
                await response(scope, receive, send_with_id)
            else:
                await self.app(scope, _replayed(body, receive), send_with_id)
        except Exception:
            log.exception("a request failed", extra={"facts": {"request_id": request_id}})
            if status:  # the answer has begun: to end it early is all that is left
                raise
            failed = error_response(500, "the server failed; its log says why", kind="server_error")
            await failed(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - start
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            facts = {"request_id": request_id, "method": scope["method"], "path": path, "status": status}
            log.info(
                "request", extra={"facts": {**facts, "seconds": round(seconds, 4), **scope["state"].get("facts", {})}}
            )

    def _has_key(self, path: str, headers: Headers) -> bool:
        if self.api_key is None or path in OPEN_PATHS:
            return True
        given = headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode("latin-1"), self.api_key.encode())

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None if it is too large, or the client went away."""
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.max_body:
            return None
        parts, total = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b"".join(parts)
            parts.append(message.get("body", b""))
            total += len(parts[-1])
            if total > self.max_body:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    is_sent = False

    async def replay() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class JsonLines(logging.Formatter):
    """A line of JSON for each record."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
