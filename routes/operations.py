"""Routes for operators: health, liveness and readiness; and the models on offer."""

from __future__ import annotations

import functools

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from chat.errors import not_found
from chat.store.mask import model_card

from . import inputs

VERSION = "1.1.0"


async def health(request: Request) -> Response:
    """The exact body existing monitors compare; details and addresses never appear here."""
    checks = await inputs.state(request).checks.get()
    return _health(**checks)


@functools.cache  # three checks, two outcomes each: eight responses
def _health(**checks: str) -> Response:
    failed = "failed" in checks.values()
    body = {
        "status": "unhealthy" if failed else "healthy",
        "container_type": "asgi",
        "async_enabled": True,
        "checks": checks,
        "version": VERSION,
    }
    return inputs.answer(body, 503 if failed else 200)


async def live(request: Request) -> Response:
    return PlainTextResponse("ok")


async def ready(request: Request) -> Response:
    """Whether this worker can take a turn: 503 while it starts or drains, or while the database is away.

    A Redis that is away keeps no worker from answering: a balancer would remove them all.
    """
    chat = inputs.state(request)
    able = chat.providers.ready and not chat.generation.draining
    if not able or (await chat.checks.get())["database"] == "failed":
        return PlainTextResponse("not ready", 503, {"Retry-After": "2"})
    return PlainTextResponse("ok")


async def metrics(request: Request) -> Response:
    """This worker's metrics, for whoever has ADMIN_TOKEN; nothing is here where none is set."""
    chat = inputs.state(request)
    await inputs.check_operator(request)
    return Response(chat.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def models(request: Request) -> Response:
    offered = inputs.state(request).providers.models
    return inputs.answer([model_card(model) for model in offered.values()])


async def model(request: Request) -> Response:
    found = inputs.state(request).providers.models.get(request.path_params["model_id"])
    if found is None:
        raise not_found("model")
    return inputs.answer(model_card(found))
