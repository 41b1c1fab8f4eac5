"""``hma-gym serve``: the web app on this machine.

    hma-gym serve --data outputs                  # this machine only: http://127.0.0.1:8000
    hma-gym serve --data outputs --host 0.0.0.0   # the whole network, with a token in the printed address

This module is the door: it imports the rest, and with it the extra ``web``, when it is called.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
import webbrowser
from dataclasses import dataclass
from pathlib import Path

from hma_gym.errors import InvalidArgument, StorageError
from hma_gym.extras import require

_SHORTEST_TOKEN = 12
_LARGEST_MESSAGE = 16 * 1024
"""Bytes of what a page may send over the WebSocket at once."""


@dataclass(frozen=True)
class ServeConfig:
    """What is served, and to whom.

    Attributes:
        data: folder whose label queues and reports are shown, at any depth; played episodes are saved in its ``play``.
        host: address to listen at; any but this machine's own needs a token.
        port: TCP port; 0 takes a free one.
        token: the secret that visitors from beyond this machine need, 12 characters or more; drawn if not given.
        task: key of the task that Play offers.
        checkpoint: name, folder or hub id; the task's own by default.
        truth: offer MuJoCo beside the learned world where the extra ``sim`` is installed.
        threads: CPU threads of the learned world.
        players: how many people may drive at the same time, each with a world of their own.
        upload_mb: most megabytes of an uploaded picture.
        show: open the web browser.
    """

    data: Path = Path("outputs")
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    task: str = "lift"
    checkpoint: str | None = None
    truth: bool = True
    threads: int = 2
    players: int = 2
    upload_mb: float = 8.0
    show: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InvalidArgument(f"port must lie in [0, 65535], got {self.port}.")
        if self.token is not None and len(self.token) < _SHORTEST_TOKEN:
            raise InvalidArgument(
                f"token must have {_SHORTEST_TOKEN} characters or more, got {len(self.token)}; leave it out to have "
                "one drawn."
            )
        if self.threads < 1 or self.players < 1 or not self.upload_mb > 0:
            raise InvalidArgument(
                "threads and players must be at least 1 and upload_mb above 0, got "
                f"threads={self.threads}, players={self.players}, upload_mb={self.upload_mb}."
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the address."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(config: ServeConfig) -> None:
    """Run the app until interrupted.

    Raises:
        MissingExtra: starlette, uvicorn or websockets is not installed.
        StorageError: the data folder cannot be used, or the address is taken.
    """
    require("websockets", extra="web", purpose="hma-gym serve")
    uvicorn = require("uvicorn", extra="web", purpose="hma-gym serve")
    from hma_gym.web.app import build_app

    try:
        config.data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"data: cannot make the folder {str(config.data)!r}: {error}; choose another.") from error
    token = config.token
    if token is None and not config.local:
        token = secrets.token_urlsafe(16)
    listener = _listen(config)
    port = listener.getsockname()[1]
    shown = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
    print(f"hma-gym serve: {address}", flush=True)
    if not config.local:
        print("Whoever has this address may label and play. Others need it in full, with this machine's name as host.")
    if config.show:
        webbrowser.open(address)
    with listener:
        settings = uvicorn.Config(
            build_app(config, token),
            log_level="warning",
            timeout_graceful_shutdown=3,
            ws_max_size=_LARGEST_MESSAGE,
            ws_per_message_deflate=False,
        )
        uvicorn.Server(settings).run(sockets=[listener])


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        listener.listen(128)  # before the address is printed: whoever reads it may connect
    except OSError as error:
        listener.close()
        raise StorageError(
            f"cannot listen at {config.host}:{config.port}: {error}; choose another port (--port 0 takes a free one)."
        ) from error
    return listener
