"""A real server in a process of its own, as ``hma-gym serve`` starts it, and a client that sends paths as they are."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hma_gym.judges.human import LabelQueue
from hma_gym.judges.labels import Machine


@dataclass(frozen=True)
class Answer:
    """Status, headers and body of a response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    data: Path
    port: int
    printed: str

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: bytes | dict[str, Any] | None = None, **headers: str) -> Answer:
        """GET, or POST where there is a body; the path goes out exactly as written."""
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.putrequest("GET" if body is None else "POST", path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name, value)
            if content is not None:
                connection.putheader("Content-Length", str(len(content)))
            connection.endheaders(content)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def queue(self) -> str:
        """The opaque name of the only queue."""
        (row,) = self.ask("/api/queues").json
        return str(row["id"])

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait()


@contextmanager
def serving(data: Path, *options: str) -> Iterator[Server]:
    """``hma-gym serve`` over a data folder, at a free port."""
    command = [sys.executable, "-m", "hma_gym.cli", "serve", "--data", str(data), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://\S+:(\d+)/\S*", line)
            assert found is not None, line + process.stdout.read()
            yield Server(process, data, int(found.group(1)), line)
        finally:
            process.kill()


def make_queue(folder: Path, items: int, overlap: int = 1) -> None:
    """Small videos in which a square of the item's own colour moves."""
    generator = np.random.default_rng(0)
    with LabelQueue.create(folder, overlap=overlap) as queue:
        for i in range(items):
            frames = np.full((6, 96, 96, 3), 230, dtype=np.uint8)
            colour = generator.integers(0, 200, 3)
            for t in range(6):
                frames[t, 70 - 8 * t : 86 - 8 * t, 40:56] = colour
            machine = Machine("classifier", 0.8, i % 2 == 0)
            queue.add(f"secret-policy/{i}", frames, fps=20.0, policy="secret-policy", machine=machine)


def make_report(folder: Path) -> None:
    """A report, and what must not be served beside it."""
    folder.mkdir(parents=True)
    (folder / "report.html").write_text('<!doctype html><title>Toy report</title><img src="figures/dot.png">')
    (folder / "figures").mkdir()
    (folder / "figures" / "dot.png").write_bytes(b"\x89PNG")
    (folder / "secret.key").write_text("secret")
    (folder / "way_out.txt").symlink_to("/etc/hostname")
