"""SIGKILL of the server while people label: what the page was told is saved, is saved."""

from __future__ import annotations

import http.client
import random
import threading
from pathlib import Path

from web_serving import Server, make_queue, serving

from hma_gym.judges.labels import LabelStore


def label_until_death(server: Server, queue: str, annotator: str, confirmed: list[tuple[str, str, str]]) -> None:
    verdicts = random.Random(annotator)
    try:
        while True:
            (item,) = server.ask(f"/api/queues/{queue}/next", {"annotator": annotator, "count": 1}).json["items"]
            verdict = verdicts.choice(("success", "failure", "unsure"))
            given = {"annotator": annotator, "verdicts": [{"item": item["item"], "verdict": verdict}]}
            if server.ask(f"/api/queues/{queue}/verdicts", given).json["saved"] == 1:
                confirmed.append((annotator, item["item"], verdict))
    except (OSError, http.client.HTTPException):
        return  # the server is dead; what it confirmed until then counts


def kill_while_labelling(folder: Path, after: int) -> tuple[int, int]:
    """Kill once ``after`` verdicts are confirmed; how many were, and how many of those are lost."""
    make_queue(folder, 1, overlap=2)
    with LabelStore.open(folder / "labels.sqlite") as store:
        for i in range(400):
            store.add_item(f"more/{i}", frames=6, fps=20.0)
    confirmed: list[tuple[str, str, str]] = []
    with serving(folder) as server:
        queue = server.queue()
        people = [
            threading.Thread(target=label_until_death, args=(server, queue, name, confirmed)) for name in ("ana", "bob")
        ]
        for person in people:
            person.start()
        while len(confirmed) < after and any(person.is_alive() for person in people):
            pass
        server.kill()
        for person in people:
            person.join()
    with LabelStore.open(folder / "labels.sqlite") as store:
        kept = {(name, entry.item, verdict) for entry in store.entries() for name, verdict in entry.verdicts.items()}
    return len(confirmed), len(set(confirmed) - kept)


def test_no_confirmed_verdict_is_lost(tmp_path: Path) -> None:
    for trial, after in enumerate((3, 11)):
        confirmed, lost = kill_while_labelling(tmp_path / str(trial), after)
        assert confirmed >= after and lost == 0
