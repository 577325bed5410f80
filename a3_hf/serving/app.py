"""The application: its routes, and what stands before them."""

import asyncio
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from .answers import score_answer
from .errors import KINDS, UnknownModel, failed, invalid_body
from .limits import Limits, error_response
from .playground import playground_page
from .routes import answer_choices, answer_infill
from .schemas import ChatRequest, CompletionRequest, InfillRequest, ScoreRequest
from .service import Service


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
        return await answer_choices(service, http, body)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: Request):
        return await answer_choices(service, http, body)

    @app.post("/infill")
    async def infill(body: InfillRequest, http: Request):
        return await answer_infill(service, http, body)

    @app.post("/v1/score")
    async def score(body: ScoreRequest, http: Request):
        scored, _ = await service.plan(http, body, planner.score)
        return JSONResponse(score_answer(scored, model=service.name, tokenizer=tokenizer))

    return app


def _add_errors(app: FastAPI) -> None:
    """Gives every error OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> JSONResponse:
        return invalid_body(error.errors())

    async def known(http: Request, error: Exception) -> Response:
        return failed(error)

    for kind in (UnknownModel, *KINDS):
        app.add_exception_handler(kind, known)

    @app.exception_handler(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), headers=error.headers)
