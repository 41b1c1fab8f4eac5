"""Label: the queues of videos below the data folder, their hand-out, and verdicts.

Every answer that confirms a verdict is sent after :meth:`LabelStore.save <hma_gym.judges.labels.LabelStore.save>` has
returned, that is, after it is on disk.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

from hma_gym.errors import HMAError, InvalidArgument, StorageError, UnknownName
from hma_gym.judges.human import LabelQueue
from hma_gym.judges.labels import FILE_NAME, Item
from hma_gym.web.kit import FileResponse, JSONResponse, Request, Response, Route, run_in_threadpool
from hma_gym.web.requests import field, find_folders, read_json

MOST_ITEMS = 24
"""Videos handed out, or verdicts taken, at a time."""


class QueueBook:
    """The label queues below a folder; each is opened when it is first asked for and stays open."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._open: dict[str, LabelQueue] = {}
        self._lock = threading.Lock()

    def queue(self, name: str) -> LabelQueue:
        """The queue of an opaque name; :class:`UnknownName` if there is none (any more)."""
        with self._lock:
            queue = self._open.get(name)
            if queue is not None and queue.store.path.is_file():
                return queue
            folder = find_folders(self._data, FILE_NAME).get(name)
            if folder is None:
                raise UnknownName("label queue", name, [], "Reload the page to see those that are there.")
            self._open[name] = LabelQueue.open(folder)
            return self._open[name]

    def overview(self) -> list[dict[str, Any]]:
        """Every queue with its progress and agreement; a queue that cannot be read says why."""
        rows: list[dict[str, Any]] = []
        for name, folder in sorted(find_folders(self._data, FILE_NAME).items(), key=lambda pair: pair[1].as_posix()):
            shown = folder.relative_to(self._data).as_posix()
            row: dict[str, Any] = {"id": name, "name": self._data.name if shown == "." else shown}
            try:
                rows.append(row | _summary(self.queue(name)))
            except HMAError as error:
                rows.append(row | {"error": str(error)})
        return rows

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            for queue in self._open.values():
                queue.close()
            self._open = {}


def _summary(queue: LabelQueue) -> dict[str, Any]:
    outcomes = list(queue.outcomes().values())
    agreement = queue.agreement()
    return {
        "items": len(outcomes),
        "complete": sum(outcome.complete for outcome in outcomes),
        "overlap": queue.store.overlap,
        "success": sum(outcome.success is True for outcome in outcomes),
        "failure": sum(outcome.success is False for outcome in outcomes),
        "annotators": agreement.annotators,
        "fleiss": agreement.fleiss,
        "shared": agreement.shared_items,
        "pairs": [dataclasses.asdict(pair) for pair in agreement.pairs],
        "confusions": [
            {**dataclasses.asdict(confusion), "agreement": confusion.agreement if confusion.items else None}
            for confusion in agreement.confusions
        ],
    }


def label_routes(book: QueueBook) -> list[Route]:
    """The addresses of Label."""

    async def overview(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(book.overview))

    async def hand_out(request: Request) -> Response:
        body = await read_json(request)
        annotator, count = field(body, "annotator", str), field(body, "count", int)
        if not 1 <= count <= MOST_ITEMS:
            raise InvalidArgument(f"count must lie in [1, {MOST_ITEMS}], got {count}.")
        return await run_in_threadpool(_hand_out, book, request.path_params["queue"], annotator, count)

    async def save(request: Request) -> Response:
        body = await read_json(request)
        annotator, given = field(body, "annotator", str), field(body, "verdicts", list)
        if not 1 <= len(given) <= MOST_ITEMS or not all(isinstance(one, dict) for one in given):
            raise InvalidArgument(f"verdicts must be a list of 1 to {MOST_ITEMS} objects, got {len(given)}.")
        verdicts = [(field(one, "item", str), field(one, "verdict", str)) for one in given]
        return await run_in_threadpool(_save, book, request.path_params["queue"], annotator, verdicts)

    async def undo(request: Request) -> Response:
        annotator = field(await read_json(request), "annotator", str)
        return await run_in_threadpool(_undo, book, request.path_params["queue"], annotator)

    async def video(request: Request) -> Response:
        return await run_in_threadpool(_video, book, request.path_params["queue"], request.path_params["item"])

    return [
        Route("/api/queues", overview),
        Route("/api/queues/{queue}/next", hand_out, methods=["POST"]),
        Route("/api/queues/{queue}/verdicts", save, methods=["POST"]),
        Route("/api/queues/{queue}/undo", undo, methods=["POST"]),
        Route("/api/queues/{queue}/videos/{item}", video),
    ]


def _hand_out(book: QueueBook, name: str, annotator: str, count: int) -> Response:
    queue = book.queue(name)
    items = queue.store.next_items(annotator, count)
    return JSONResponse({"items": _shown(items), "progress": _progress(queue, annotator)})


def _save(book: QueueBook, name: str, annotator: str, verdicts: list[tuple[str, str]]) -> Response:
    queue = book.queue(name)
    queue.store.save(annotator, verdicts)
    return JSONResponse({"saved": len(verdicts), "progress": _progress(queue, annotator)})


def _undo(book: QueueBook, name: str, annotator: str) -> Response:
    queue = book.queue(name)
    items = queue.store.undo(annotator)
    return JSONResponse({"items": _shown(items), "progress": _progress(queue, annotator)})


def _video(book: QueueBook, name: str, item: str) -> Response:
    queue = book.queue(name)
    path = queue.video(queue.store.item(item).item)
    if not path.is_file():
        raise StorageError(f"the video of item {item!r} is no longer in the queue's folder; put it back.")
    return FileResponse(path, media_type="video/mp4", headers={"cache-control": "private, max-age=86400"})


def _shown(items: list[Item]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(item) for item in items]


def _progress(queue: LabelQueue, annotator: str) -> dict[str, int]:
    return dataclasses.asdict(queue.store.progress(annotator))
