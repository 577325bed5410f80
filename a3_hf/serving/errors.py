"""Errors in OpenAI's shape, whatever engine they come from."""

import re
from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from .engine import Cancelled, Invalid, OutOfTime, Refused
from .limits import error_response
from .schemas import ChatRequest, CompletionRequest, InfillRequest, ScoreRequest

KINDS = (Invalid, Refused, OutOfTime, Cancelled)


class UnknownModel(ValueError):
    """A request names another model than those that are served."""


def invalid_body(errors: Sequence[dict[str, Any]]) -> JSONResponse:
    """Answers a body that is not as its schema says, by pydantic's `errors()`."""
    # of the forms that a field may have, the one that the value has
    same = [one for one in errors if one["loc"][:2] == errors[0]["loc"][:2]]
    first = next((one for one in same if not one["type"].endswith("_type")), errors[0])
    place = [str(part) for part in first["loc"] if part != "body"]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # of a request as a whole; the message begins with the field
        return error_response(400, message, param=named_field(message))
    if first["type"] == "json_invalid":
        return error_response(400, f"the body is not JSON: {first['ctx']['error']}")
    name = place[0] if place else None
    where = ".".join(place)
    return error_response(400, f"{where}: {message}" if where else message, param=name)


def failed(error: Exception) -> Response:
    """Answers one of `KINDS`, or an `UnknownModel`."""
    if isinstance(error, UnknownModel):
        return error_response(404, str(error), param="model", code="model_not_found")
    if isinstance(error, Invalid):
        return error_response(400, str(error), param=named_field(str(error)))
    if isinstance(error, Refused):
        message = "the server has all the requests that it can queue; try again"
        return error_response(429, message, kind="rate_limit_error", headers={"Retry-After": "1"})
    if isinstance(error, OutOfTime):
        return error_response(504, "the answer took more than the server's time limit", kind="timeout_error")
    return Response(status_code=499)  # the client is gone: nobody reads it


def described(error: Exception, timeout: float) -> tuple[int, str, str]:
    """Returns the status, the message and the kind of an error inside a stream."""
    if isinstance(error, OutOfTime):
        return 504, f"the answer took more than {timeout:g} seconds", "timeout_error"
    if isinstance(error, Refused):
        return 429, "the server has all the requests that it can queue; try again", "rate_limit_error"
    if isinstance(error, Invalid):
        return 400, str(error), "invalid_request_error"
    return 500, "the server failed; its log says why", "server_error"


def named_field(message: str) -> str | None:
    """Returns the field that a message begins with."""
    found = re.match(r"(\w+)(?=[=: ])", message)
    kinds = (CompletionRequest, ChatRequest, InfillRequest, ScoreRequest)
    return found[1] if found and found[1] in {name for kind in kinds for name in kind.model_fields} else None
