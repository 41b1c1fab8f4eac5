"""The app over real HTTP and WebSockets: labelling, reports, playing, and every way to be refused."""

from __future__ import annotations

import io
import json
import sqlite3
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from web_serving import Server, make_queue, serving
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from hma_gym.data.robomimic_hdf5 import open_dataset
from hma_gym.errors import InvalidArgument, InvalidImage
from hma_gym.judges.labels import LabelStore
from hma_gym.web.driving import read_picture
from hma_gym.web.serve import ServeConfig, is_loopback


def png(width: int = 50, height: int = 40) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), (200, 60, 20), np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


# ---------------------------------------------------------------- pages, labels, reports


@pytest.mark.parametrize("page", ["/", "/label", "/play", "/reports", "/static/app.css", "/static/label.js"])
def test_pages_are_whole_and_need_nothing_from_elsewhere(server: Server, page: str) -> None:
    answer = server.ask(page)
    assert answer.status == 200 and b"http" not in answer.body
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_verdict_from_hand_out_to_file(server: Server) -> None:
    queue = server.queue()
    handed = server.ask(f"/api/queues/{queue}/next", {"annotator": "ana", "count": 3}).json
    assert len(handed["items"]) == 3 and handed["progress"]["left"] == 8
    assert "secret" not in json.dumps(handed), "annotators are blind to the policy"
    item = handed["items"][0]["item"]
    video = server.ask(f"/api/queues/{queue}/videos/{item}", Range="bytes=0-99")
    assert (video.status, video.headers["content-type"], len(video.body)) == (206, "video/mp4", 100)
    given = {"annotator": "ana", "verdicts": [{"item": item, "verdict": "success"}]}
    saved = server.ask(f"/api/queues/{queue}/verdicts", given).json
    assert saved["saved"] == 1 and saved["progress"]["mine"] == 1
    with LabelStore.open(server.data / "run" / "labels" / "labels.sqlite") as store:
        assert [e.verdicts for e in store.entries() if e.item == item] == [{"ana": "success"}]
    back = server.ask(f"/api/queues/{queue}/undo", {"annotator": "ana"}).json
    assert [one["item"] for one in back["items"]] == [item] and back["progress"]["mine"] == 0


def test_reports_and_what_lies_beside_them(server: Server) -> None:
    (report,) = server.ask("/api/reports").json
    assert (report["title"], report["name"]) == ("Toy report", "run/evaluation")
    page = server.ask(f"/reports/{report['id']}/report.html")
    assert page.status == 200 and "connect-src 'none'" in page.headers["content-security-policy"]
    assert server.ask(f"/reports/{report['id']}/figures/dot.png").body == b"\x89PNG"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "path",
    [
        "/reports/ID/../../../outside.html",
        "/reports/ID/..%2f..%2f..%2foutside.html",
        "/reports/ID/%2e%2e/%2e%2e/%2e%2e/outside.html",
        "/reports/ID//etc/hostname",
        "/reports/ID/way_out.txt",
        "/reports/ID/secret.key",
        "/reports/ID/figures",
        "/reports/ID/nul%00.html",
        "/reports/0123456789ab/report.html",
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/api/queues/QUEUE/videos/..%2flabels.sqlite",
        "/api/queues/..%2f..%2fdata/next",
        "/api/play/recordings/..%2frun%2flabels%2flabels.sqlite",
        "/api/play/recordings/absent.hdf5",
    ],
)
def test_no_path_leads_out(server: Server, path: str) -> None:
    (report,) = server.ask("/api/reports").json
    answer = server.ask(path.replace("ID", report["id"]).replace("QUEUE", server.queue()))
    assert answer.status in (404, 405), answer.body
    assert b"outside" not in answer.body and b"SQLite" not in answer.body


@pytest.mark.parametrize(
    ("what", "body", "status", "words"),
    [
        ("verdicts", {"annotator": "ana", "verdicts": [{"item": "nope", "verdict": "success"}]}, 404, "unknown video"),
        ("verdicts", {"annotator": "ana", "verdicts": [{"item": "nope", "verdict": "maybe"}]}, 400, "unsure"),
        ("verdicts", {"annotator": "", "verdicts": [{"item": "nope", "verdict": "success"}]}, 400, "printable"),
        ("verdicts", {"annotator": "ana", "verdicts": []}, 400, "1 to 24"),
        ("verdicts", {"annotator": "ana", "verdicts": "S"}, 400, "verdicts must be given as list"),
        ("next", {"annotator": "ana", "count": 1000}, 400, "count must lie"),
        ("next", {"annotator": 3, "count": 1}, 400, "annotator must be given as str"),
        ("undo", b"[1, 2]", 400, "JSON object"),
        ("undo", b"\xff{", 400, "JSON object"),
        ("undo", b"x" * 70_000, 413, "at most"),
    ],
)
def test_wrong_requests(server: Server, what: str, body: Any, status: int, words: str) -> None:
    answer = server.ask(f"/api/queues/{server.queue()}/{what}", body)
    assert answer.status == status and words in answer.error


def test_unknown_videos_and_queues(server: Server) -> None:
    assert "unknown video 'ffff'" in server.ask(f"/api/queues/{server.queue()}/videos/ffff").error
    answer = server.ask("/api/queues/ffff/undo", {"annotator": "ana"})
    assert answer.status == 404 and "unknown label queue" in answer.error


def test_foreign_pages_and_names_are_refused(server: Server) -> None:
    rebound = server.ask("/api/queues", Host="evil.example:80")
    assert rebound.status == 403 and "this machine only" in rebound.error
    crossed = server.ask(f"/api/queues/{server.queue()}/undo", {"annotator": "ana"}, Origin="http://evil.example")
    assert crossed.status == 403 and "foreign" in crossed.error
    own = server.ask(f"/api/queues/{server.queue()}/undo", {"annotator": "nobody"}, Origin=server.address)
    assert own.status == 200
    with pytest.raises(InvalidStatus):
        connect(f"ws://127.0.0.1:{server.port}/api/play/drive", origin="http://evil.example")  # type: ignore[arg-type]


def test_uploads_are_limited_and_decoded_safely(server: Server) -> None:
    assert server.ask("/api/play/picture", png()).json["image"].startswith("picture-")
    large = server.ask("/api/play/picture", b"\x89PNG" + b"0" * 300_000)
    assert large.status == 413 and "0.2 MB" in large.error
    for content in (b"", b"GIF89a" + b"0" * 100, png()[:60], b"\x89PNG\r\n\x1a\n" + b"\xff" * 200):
        malformed = server.ask("/api/play/picture", content)
        assert malformed.status == 400 and "PNG, JPEG or WebP" in malformed.error


def test_a_picture_of_absurd_size_is_not_decoded() -> None:
    content = bytearray(png())
    content[16:24] = struct.pack(">II", 60_000, 60_000)  # the header alone; decoding it would need 10 GB
    with pytest.raises(InvalidImage):
        read_picture(bytes(content), (40, 40))
    assert read_picture(png(90, 40), (40, 40)).shape == (40, 40, 3)


def test_locked_and_damaged_databases(tmp_path: Path) -> None:
    make_queue(tmp_path / "locked", 2)
    make_queue(tmp_path / "damaged", 1)
    damaged = tmp_path / "damaged" / "labels.sqlite"
    damaged.write_bytes(b"not a database any more" * 500)
    with serving(tmp_path) as running:
        rows = {row["name"]: row for row in running.ask("/api/queues").json}
        assert "damaged" in rows["damaged"]["error"] and rows["locked"]["items"] == 2
        broken = running.ask(f"/api/queues/{rows['damaged']['id']}/undo", {"annotator": "ana"})
        assert broken.status == 500 and "put a copy back" in broken.error
        holder = sqlite3.connect(tmp_path / "locked" / "labels.sqlite", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        held = running.ask(f"/api/queues/{rows['locked']['id']}/undo", {"annotator": "ana"})
        assert held.status == 503 and "locked by another program" in held.error
        holder.execute("ROLLBACK")
        holder.close()
        assert running.ask(f"/api/queues/{rows['locked']['id']}/undo", {"annotator": "ana"}).status == 200


def test_beyond_this_machine_a_token_is_needed(tmp_path: Path) -> None:
    with serving(tmp_path, "--host", "0.0.0.0") as running:
        token = running.printed.strip().split("token=")[1]
        assert len(token) >= 20, "one is drawn where none is given"
        for path in ("/", "/api/queues", f"/?token={token[:-1]}", "/static/app.css", "/?token="):
            answer = running.ask(path)
            assert answer.status == 401 and "token is missing or wrong" in answer.error
        assert running.ask("/api/queues", Authorization=f"Bearer {token}x").status == 401
        with pytest.raises(InvalidStatus):
            connect(f"ws://127.0.0.1:{running.port}/api/play/drive")
        assert running.ask("/api/queues", Authorization=f"Bearer {token}").json == []
        entered = running.ask(f"/label?token={token}&x=1")
        assert (entered.status, entered.headers["location"]) == (303, "/label?x=1")
        cookie = entered.headers["set-cookie"]
        assert "httponly" in cookie.lower() and "samesite=strict" in cookie.lower()
        assert running.ask("/label", Cookie=cookie.split(";")[0]).status == 200


def test_serve_config() -> None:
    assert is_loopback("localhost") and is_loopback("127.0.0.1") and is_loopback("::1")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org") and not is_loopback("")
    for change in ({"port": 70000}, {"token": "short"}, {"threads": 0}, {"players": 0}, {"upload_mb": 0.0}):
        with pytest.raises(InvalidArgument):
            ServeConfig(**change)  # type: ignore[arg-type]


# ---------------------------------------------------------------- playing


def play(server: Server) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{server.port}/api/play/drive", max_size=2**20, open_timeout=60)


def say(socket: ClientConnection, **message: Any) -> None:
    socket.send(json.dumps(message))


def hear(socket: ClientConnection) -> tuple[dict[str, Any], bytes]:
    """The next message: JSON, and the pixels of a frame."""
    message = socket.recv(timeout=120)
    if isinstance(message, str):
        return json.loads(message), b""
    size = struct.unpack("<I", message[:4])[0]
    return json.loads(message[4 : 4 + size]), message[4 + size :]


def test_driving_recording_and_reading_it_back(server: Server) -> None:
    info = server.ask("/api/play/info").json
    assert (info["checkpoint"], info["starts"], info["height"], info["actions"]) == ("toy", 6, 40, 7)
    assert not info["truth"]
    assert server.ask("/api/play/starts/2").body.startswith(b"\x89PNG")
    assert server.ask("/api/play/starts/6").status == 404
    with play(server) as socket:
        say(socket, type="start", start=2)
        assert hear(socket)[0] == {"type": "ready", "truth": False, "start": "start-2"}
        header, first = hear(socket)
        assert header["step"] == 0 and len(first) == 40 * 40 * 3
        say(socket, type="action", input=1, action=[1, 0, 0, 0, 0, 0, -1])
        frames = [hear(socket) for _ in range(4)]
        assert [told["step"] for told, _ in frames] == [1, 2, 3, 4] and {told["input"] for told, _ in frames} == {1}
        assert frames[0][1] != first and len(frames[0][0]["worlds"][0]["agent_pos"]) == 9
        say(socket, type="pause")
        say(socket, type="save")
        while "files" not in (told := hear(socket)[0]):
            assert told["step"] > 4
        with connect(f"ws://127.0.0.1:{server.port}/api/play/drive") as second:
            assert "all 1 places to play are taken" in hear(second)[0]["error"]
    hdf5, mp4 = told["files"]
    assert server.ask(f"/api/play/recordings/{mp4}").body[4:8] == b"ftyp"
    (episode,) = open_dataset(server.data / "play" / hdf5)
    assert len(episode) >= 4
    assert episode.images_THWC[0].tobytes() == first and episode.images_THWC[1].tobytes() == frames[0][1]
    assert episode.actions_TA[0].tolist() == [1, 0, 0, 0, 0, 0, -1]
    assert episode.attrs["policy"] == "human" and episode.attrs["start"] == "start-2"


def test_driving_from_an_uploaded_picture(server: Server) -> None:
    image = server.ask("/api/play/picture", png()).json["image"]
    with play(server) as socket:
        say(socket, type="start", start=None, image=image)
        assert hear(socket)[0]["start"] == image
        _, pixels = hear(socket)
        assert np.abs(np.frombuffer(pixels, np.uint8).reshape(-1, 3).astype(int) - (200, 60, 20)).max() <= 2


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("{", "JSON object"),
        ("[]", "JSON object"),
        ('{"type": "fly"}', "start, action, pause and save"),
        ('{"type": "action", "input": 1, "action": [0]}', "send start before action"),
        ('{"type": "save"}', "send start before save"),
        ('{"type": "start", "start": 99}', "start must lie in [0, 5]"),
        ('{"type": "start", "start": true}', "start must be given as int"),
        ('{"type": "start", "image": "picture-0"}', "unknown picture"),
        ('{"type": "start", "start": 0, "truth": true}', "truth must be false"),
    ],
)
def test_wrong_messages_are_answered(server: Server, message: str, words: str) -> None:
    with play(server) as socket:
        socket.send(message)
        told, _ = hear(socket)
        assert told["type"] == "error" and words in told["error"]


@pytest.mark.parametrize("action", [[0] * 6, [0] * 6 + ["x"], [0] * 6 + [float("nan")], [0] * 6 + [1e300], [[0]] * 7])
def test_wrong_actions_are_answered(server: Server, action: list[Any]) -> None:
    with play(server) as socket:
        say(socket, type="start", start=0)
        hear(socket), hear(socket)
        say(socket, type="action", input=1, action=action)
        assert "7 finite numbers" in hear(socket)[0]["error"]
