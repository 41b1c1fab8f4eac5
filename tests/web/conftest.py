"""The server that the tests of the app share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from web_serving import Server, make_queue, make_report, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, toy_folder: Path) -> Iterator[Server]:
    """A server with a queue of 8, a report, and Play on the toy checkpoint, without MuJoCo."""
    data = tmp_path_factory.mktemp("served") / "data"
    make_queue(data / "run" / "labels", 8)
    make_report(data / "run" / "evaluation")
    (data.parent / "outside.html").write_text("outside")
    options = ("--checkpoint", str(toy_folder), "--no-truth", "--upload-mb", "0.2", "--players", "1", "--threads", "1")
    with serving(data, *options) as running:
        yield running
