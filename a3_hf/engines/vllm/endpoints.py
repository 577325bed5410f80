"""Routes of vLLM's own server: `suffix`, blanks and orders in `/v1/completions`, and llama.cpp's `/infill`. The requests, the
answers and the errors are those of `a3 serve`; a plain completion is handed on to vLLM as it is.
"""

import asyncio
import hmac
import json
import os
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from vllm.entrypoints.openai.completion.api_router import create_completion
from vllm.entrypoints.openai.completion.protocol import CompletionRequest as PlainRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from a3_hf.serving.errors import KINDS, UnknownModel, failed, invalid_body
from a3_hf.serving.limits import error_response
from a3_hf.serving.routes import answer_choices, answer_infill
from a3_hf.serving.schemas import CompletionRequest, InfillRequest, Orders
from a3_hf.serving.service import Service

from .adapters import adapter_settings
from .engine_jobs import EngineJobs
from .plans import EnginePlanner
from .registration import ARCHITECTURE

OWN_FIELDS = frozenset({"suffix", "blanks", "auto_length", "suffix_template", "commits", *Orders.model_fields})
TIMEOUT = "A3_TIMEOUT"  # environment: seconds that a request may take


class FillingEndpoints:
    """vLLM finds it by the entry point `vllm.endpoint_plugins`, and loads it where `VLLM_PLUGINS` names `a3_endpoints`."""

    name = "a3_endpoints"
    required_tasks = ("generate",)

    def __init__(self):
        self.service: EngineService | None = None  # None: another model than A3 is served
        self.api_keys: list[str] = []

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes; called by vLLM once all others are there."""
        checked = [Depends(validate_json_request)]

        @app.post("/v1/completions", dependencies=checked)
        async def completions(http: Request) -> Response:
            body = await _json(http)
            if self.service is None or not self._is_ours(body):
                return await _handed_on(body, http)
            return await _answered(http, CompletionRequest, body, self.service, answer_choices)

        @app.post("/infill", dependencies=checked)
        async def infill(http: Request) -> Response:
            if not self._has_key(http):
                return error_response(401, "Unauthorized", kind="authentication_error")
            if self.service is None:
                return error_response(404, "the served model fills no blanks")
            return await _answered(http, InfillRequest, await _json(http), self.service, answer_infill)

    async def init_state(self, engine_client, state, args) -> None:
        """Called by vLLM once the engine is there."""
        self.api_keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
        if engine_client is not None and ARCHITECTURE in engine_client.model_config.architectures:
            self.service = EngineService.of(engine_client, state)

    def _is_ours(self, body: Any) -> bool:
        if not isinstance(body, dict):
            return False
        given = {name for name, value in body.items() if value is not None and value is not False}
        if given & OWN_FIELDS:
            return True
        # where groups are written, temperatures and seeds are this package's
        return self.service.planner.canvas_length is not None and set(body) <= set(CompletionRequest.model_fields)

    def _has_key(self, http: Request) -> bool:
        """Whether a request holds one of the server's keys: vLLM asks for them below /v1, /v2 and /inference only."""
        given = http.headers.get("Authorization", "").removeprefix("Bearer ")
        return not self.api_keys or any(hmac.compare_digest(given.encode(), key.encode()) for key in self.api_keys)


class EngineService(Service):
    """`serving.service.Service` on vLLM's engine: names of models are vLLM's, adapters among them."""

    def __init__(self, planner: EnginePlanner, engine: EngineJobs, models, *, timeout: float):
        super().__init__(planner, engine, name=models.model_name(), timeout=timeout)
        self.models = models

    @classmethod
    def of(cls, engine_client, state) -> "EngineService":
        """Returns the service of a server."""
        model_config, models = engine_client.model_config, state.openai_serving_models
        tokenizer = engine_client.renderer.get_tokenizer()
        config = model_config.hf_config

        def adapter_of(name: str | None) -> tuple[Any, dict[str, Any]]:
            adapter = None if name is None else models.lora_requests.get(name)
            return adapter, {} if adapter is None else adapter_settings(adapter.lora_path)

        own = model_config.try_get_generation_config().get("eos_token_id", tokenizer.eos_token_id)
        engine = EngineJobs(engine_client, asyncio.get_running_loop())
        planner = EnginePlanner(
            tokenizer,
            config=config,
            context=model_config.max_model_len,
            ends=[] if own is None else own if isinstance(own, list) else [own],
            canvas_length=getattr(config, "canvas_length", None),
            engine=engine,
            adapter_of=adapter_of,
        )
        return cls(planner, engine, models, timeout=float(os.environ.get(TIMEOUT, "600")))

    def check_model(self, name: str | None) -> None:
        if not (name is None or self.models.is_base_model(name) or name in self.models.lora_requests):
            raise UnknownModel(f"model={name!r}: expected one of those at /v1/models")


async def _json(http: Request) -> Any:
    try:
        return await http.json()
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return None  # what the schema then refuses


async def _handed_on(body: Any, http: Request) -> Response:
    """vLLM's own answer."""
    try:
        request = PlainRequest.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors(), body=body) from error
    return await create_completion(request, raw_request=http)


async def _answered(
    http: Request, schema: type, body: Any, service: Service, answer: Callable[..., Awaitable[Response]]
) -> Response:
    http.state.request_id = uuid.uuid4().hex
    try:
        request = schema.model_validate(body)
    except ValidationError as error:
        return invalid_body(error.errors())
    try:
        return await answer(service, http, request)
    except (UnknownModel, *KINDS) as error:
        return failed(error)
