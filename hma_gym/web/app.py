"""The app: pages, the addresses of its three parts, and one way to say what went wrong.

Every error is JSON, ``{"error": "..."}``, with the text of the exception: it says the remedy.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from hma_gym.errors import (
    EnvironmentState,
    HMAError,
    InvalidArgument,
    MissingExtra,
    StorageError,
    UnknownName,
)
from hma_gym.web.guard import Guard
from hma_gym.web.kit import (
    FileResponse,
    HTTPException,
    JSONResponse,
    Middleware,
    Mount,
    Receive,
    Request,
    Response,
    Route,
    Router,
    Scope,
    Send,
    Starlette,
    StaticFiles,
    run_in_threadpool,
)
from hma_gym.web.label import QueueBook, label_routes
from hma_gym.web.reports import report_routes
from hma_gym.web.serve import ServeConfig

STATIC = Path(__file__).parent / "static"
PAGES = {"/": "index.html", "/label": "label.html", "/play": "play.html", "/reports": "reports.html"}
STATUS: tuple[tuple[type[HMAError], int], ...] = (
    (UnknownName, 404),
    (InvalidArgument, 400),
    (EnvironmentState, 409),
    (MissingExtra, 501),
    (StorageError, 503),
    (HMAError, 500),
)
"""HTTP status of each kind of error; the first that fits."""


def build_app(config: ServeConfig, token: str | None) -> Starlette:
    """The ASGI app.

    Args:
        config: what is served.
        token: what every request must show; None serves this machine only.
    """
    data = config.data.resolve()
    book = QueueBook(data)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        book.close()

    return Starlette(
        routes=[
            *(Route(address, _page(name)) for address, name in PAGES.items()),
            *label_routes(book),
            Mount("/api/play", _Later(config)),
            *report_routes(data),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(Guard, token=token)],
        exception_handlers={HMAError: _hma_error, HTTPException: _http_error},  # type: ignore[dict-item]
        lifespan=lifespan,
    )


class _Later:
    """Play's addresses, imported when first asked for: they bring torch, which Label and Reports do without."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._lock = asyncio.Lock()
        self._router: Router | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        async with self._lock:
            if self._router is None:
                self._router = await run_in_threadpool(_build_play, self._config)
        await self._router(scope, receive, send)


def _build_play(config: ServeConfig) -> Router:
    from hma_gym.web.play import PlayRoom, play_routes

    return Router(play_routes(PlayRoom(config)))


def _page(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        return FileResponse(STATIC / name, media_type="text/html", headers={"cache-control": "no-cache"})

    return page


def _hma_error(request: Request, error: HMAError) -> Response:
    status = next(status for kind, status in STATUS if isinstance(error, kind))
    return JSONResponse({"error": " ".join(str(error).split())}, status_code=status)


def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, status_code=error.status_code)
