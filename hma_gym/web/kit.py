"""Starlette, through the one gate for optional packages: the rest of this room imports its names from here.

Type checkers read the names at their source; at run time they come from :func:`hma_gym.extras.require`, so that a
missing extra ``web`` is one clear error whichever module of the room is imported first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hma_gym.extras import require

if TYPE_CHECKING:
    from starlette.applications import Starlette as Starlette
    from starlette.concurrency import run_in_threadpool as run_in_threadpool
    from starlette.datastructures import Headers as Headers
    from starlette.exceptions import HTTPException as HTTPException
    from starlette.middleware import Middleware as Middleware
    from starlette.requests import Request as Request
    from starlette.requests import cookie_parser as cookie_parser
    from starlette.responses import FileResponse as FileResponse
    from starlette.responses import JSONResponse as JSONResponse
    from starlette.responses import RedirectResponse as RedirectResponse
    from starlette.responses import Response as Response
    from starlette.routing import BaseRoute as BaseRoute
    from starlette.routing import Mount as Mount
    from starlette.routing import Route as Route
    from starlette.routing import Router as Router
    from starlette.routing import WebSocketRoute as WebSocketRoute
    from starlette.staticfiles import StaticFiles as StaticFiles
    from starlette.types import ASGIApp as ASGIApp
    from starlette.types import Message as Message
    from starlette.types import Receive as Receive
    from starlette.types import Scope as Scope
    from starlette.types import Send as Send
    from starlette.websockets import WebSocket as WebSocket
    from starlette.websockets import WebSocketDisconnect as WebSocketDisconnect
else:
    _applications = require("starlette.applications", extra="web", purpose="the web app")
    Starlette = _applications.Starlette
    _concurrency = require("starlette.concurrency", extra="web", purpose="the web app")
    run_in_threadpool = _concurrency.run_in_threadpool
    _datastructures = require("starlette.datastructures", extra="web", purpose="the web app")
    Headers = _datastructures.Headers
    _exceptions = require("starlette.exceptions", extra="web", purpose="the web app")
    HTTPException = _exceptions.HTTPException
    _middleware = require("starlette.middleware", extra="web", purpose="the web app")
    Middleware = _middleware.Middleware
    _requests = require("starlette.requests", extra="web", purpose="the web app")
    Request = _requests.Request
    cookie_parser = _requests.cookie_parser
    _responses = require("starlette.responses", extra="web", purpose="the web app")
    FileResponse = _responses.FileResponse
    JSONResponse = _responses.JSONResponse
    RedirectResponse = _responses.RedirectResponse
    Response = _responses.Response
    _routing = require("starlette.routing", extra="web", purpose="the web app")
    BaseRoute = _routing.BaseRoute
    Mount = _routing.Mount
    Route = _routing.Route
    Router = _routing.Router
    WebSocketRoute = _routing.WebSocketRoute
    _staticfiles = require("starlette.staticfiles", extra="web", purpose="the web app")
    StaticFiles = _staticfiles.StaticFiles
    _types = require("starlette.types", extra="web", purpose="the web app")
    ASGIApp = _types.ASGIApp
    Message = _types.Message
    Receive = _types.Receive
    Scope = _types.Scope
    Send = _types.Send
    _websockets = require("starlette.websockets", extra="web", purpose="the web app")
    WebSocket = _websockets.WebSocket
    WebSocketDisconnect = _websockets.WebSocketDisconnect
