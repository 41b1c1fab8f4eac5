"""Who may speak to the app: the token, the host name and the origin of each request are checked before any route.

* Beyond this machine a token is needed: once in the address, then in a cookie; programs send
  ``Authorization: Bearer TOKEN``.
* On this machine only, the host name must be this machine's, so that no foreign page can reach the app by a name of
  its own that points here (DNS rebinding).
* What changes something, and every WebSocket, must come from the app's own pages (``Origin``).
"""

from __future__ import annotations

import secrets
from urllib.parse import parse_qsl, urlencode, urlsplit

from hma_gym.web.kit import (
    ASGIApp,
    Headers,
    JSONResponse,
    Message,
    Receive,
    RedirectResponse,
    Response,
    Scope,
    Send,
    cookie_parser,
)
from hma_gym.web.serve import is_loopback

COOKIE = "hma_gym_token"
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """ASGI middleware; ``token=None`` means that only this machine's own names are served."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with the headers of safety, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None and scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 4403, "reason": "refused"})
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message["headers"])
                if not any(name == b"content-security-policy" for name, _ in headers):
                    headers.append((b"content-security-policy", _POLICY.encode()))
                message = {**message, "headers": [*headers, *_HEADERS]}
            await send(message)

        await (refusal or self._app)(scope, receive, send_safely)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._token is None and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return _refuse(
                403,
                f"this app serves this machine only, and was asked for as {host!r}; start it with --host to share it.",
            )
        origin = headers.get("origin")
        changes = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD")
        if changes and origin is not None and urlsplit(origin).netloc != host:
            return _refuse(403, f"a request from {origin!r} is foreign to this app; use its own pages.")
        return None if self._token is None else self._without_token(scope, headers, self._token)

    def _without_token(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        asked = dict(query).get("token")
        if asked is not None and scope["type"] == "http" and scope["method"] == "GET" and _same(asked, token):
            rest = urlencode([(key, value) for key, value in query if key != "token"])
            redirect = RedirectResponse(scope["path"] + (f"?{rest}" if rest else ""), status_code=303)
            redirect.set_cookie(COOKIE, token, max_age=30 * 86400, httponly=True, samesite="strict")
            return redirect
        given = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if _same(given, token) or _same(bearer, token):
            return None
        return _refuse(401, "the token is missing or wrong; open the whole address that hma-gym serve printed.")


def _same(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode(), token.encode())


def _refuse(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status_code=status)
