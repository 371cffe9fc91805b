"""The addresses of the server."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from arena import __version__
from arena.command_line import command
from arena.serving import answers, schema
from arena.serving.body import GONE, read_body
from arena.serving.limits import RefusedError
from arena.serving.packer import Batch, Job, Verdict
from arena.serving.service import Service

PAGE = Path(__file__).parent / "page"
# a report brings its own scripts; apart from the server's origin they can ask it for nothing
REPORT_POLICY = "sandbox allow-scripts allow-downloads allow-popups; frame-ancestors 'none'"
STATUSES = {400: "not JSON", 404: "no such judge", 408: "too slow", 413: "too large", 415: "not JSON by its type",
            422: "wrong fields or rows", 429: "too many requests wait", 500: "no row could be judged",
            503: "the server is stopping", 504: "not answered in time"}  # fmt: skip


def make_app(service: Service, reports: Mapping[str, Sequence[Path]]) -> FastAPI:
    """The application.

    Args:
        reports: by the names of judges, the HTML files of which the first that is there is served.
    """
    app = FastAPI(title="arena", version=__version__, docs_url=None, redoc_url=None)
    _handle_errors(app)
    _add_judging(app, service)
    _add_facts(app, service, reports)
    for file in PAGE.iterdir():
        address = "/" if file.name == "index.html" else f"/{file.name}"
        app.add_api_route(address, partial(_file, file), include_in_schema=False)
    return app


async def _file(path: Path) -> Response:
    return FileResponse(path)


def _handle_errors(app: FastAPI) -> None:
    def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        return refusal(error)

    def refuse_by_status(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known, headers = [route.path for route in app.routes if isinstance(route, APIRoute)], error.headers or {}
        what = error.detail
        if error.status_code == 404:
            what = f"there is no such address: there are {', '.join(sorted({*known, '/openapi.json'}))}"
        elif error.status_code == 405:
            what = f"this address does not take the method {request.method[:16]}: use {headers['Allow']}"
        return refusal(RefusedError(error.status_code, what, headers=headers))

    def fail(request: Request, error: Exception) -> Response:
        return refusal(RefusedError(500, "the server failed; its log says where"))

    app.add_exception_handler(RefusedError, refuse)
    app.add_exception_handler(HTTPException, refuse_by_status)
    app.add_exception_handler(Exception, fail)


def refusal(error: RefusedError) -> Response:
    """The form of all errors, in ASCII, as a name may hold half a character."""
    content = json.dumps({"error": {"message": error.message, "problems": error.problems}})
    return Response(content, error.status, error.headers, "application/json")


def _add_judging(app: FastAPI, service: Service) -> None:
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": schema.Refusal, "description": what} for status, what in STATUSES.items()
    }

    @app.post("/v1/judge", responses=refusals, openapi_extra=_body(*service.judge_schema()))
    async def judge(request: Request) -> schema.Judged:
        """The probabilities of one row or several."""
        job = service.judge_job(await read_body(request, service.limits))
        return answers.judged(job, *await answered(request, service, job))

    @app.post("/v1/rank", responses=refusals, openapi_extra=_body(*service.rank_schema()))
    async def rank(request: Request) -> schema.Ranked:
        """Compares each of some answers to a prompt with each other, and ranks them."""
        job = service.rank_job(await read_body(request, service.limits))
        return answers.ranked(job, *await answered(request, service, job))


async def answered(request: Request, service: Service, job: Job) -> tuple[list[Verdict], Batch]:
    """Has a job judged. It is cancelled when the client leaves or the time is over. Raises `RefusedError`."""
    service.submit(job)
    gone = asyncio.ensure_future(_disconnected(request))
    answer = asyncio.wrap_future(job.answer)
    try:
        await asyncio.wait((answer, gone), timeout=service.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if gone.done():
            raise RefusedError(GONE, "the client is gone")
        raise RefusedError(504, f"there was no answer within {service.limits.seconds:g} s: try again, with fewer rows")
    finally:
        gone.cancel()
        answer.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_facts(app: FastAPI, service: Service, reports: Mapping[str, Sequence[Path]]) -> None:
    def report_of(name: str) -> Path | None:
        return next((path for path in reports.get(name, ()) if path.is_file()), None)

    @app.head("/health", include_in_schema=False)  # some load balancers ask with HEAD
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "alive"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses={503: {"description": "the server is stopping"}})
    async def ready() -> JSONResponse:
        """Whether requests are taken: the judges are loaded, and the server is not stopping."""
        status = "stopping" if service.draining else "ready"
        return JSONResponse({"status": status, "judges": list(service.judges)}, 503 if service.draining else 200)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/judges")
    async def judges() -> list[dict[str, Any]]:
        """The judges, with their classes and the columns of their rows."""
        return [{**facts, "report": report_of(facts["name"]) is not None} for facts in service.facts()]

    @app.get("/report", response_class=FileResponse)
    async def report(judge: str | None = None) -> Response:
        """The HTML report of a judge's run, by default the first one's."""
        name = service.named({"judge": judge or None})
        if (path := report_of(name)) is None:
            files = reports.get(name)
            write = command("arena", "report", os.path.relpath(files[0].parent) if files else name)
            raise RefusedError(404, f"{name} has no report yet: `{write}` writes it")
        return FileResponse(path, media_type="text/html", headers={"content-security-policy": REPORT_POLICY})


def _body(schema: Mapping[str, Any], examples: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a request's body."""
    named = {name: {"value": value} for name, value in examples.items()}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "examples": named}}}}
