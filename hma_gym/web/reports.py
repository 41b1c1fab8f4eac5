"""Reports: folders below the data folder that hold a ``report.html``, and the files beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hma_gym.web.kit import FileResponse, HTTPException, JSONResponse, Request, Response, Route, run_in_threadpool
from hma_gym.web.requests import find_folders

FILE_NAME = "report.html"
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
    ".csv": "text/csv",
    ".md": "text/plain",
    ".txt": "text/plain",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".svg": "image/svg+xml",
    ".gif": "image/gif",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
}
"""What a report may consist of; nothing else is served."""

# A report may show what lies beside it and run its own scripts, and may not speak to the app.
_POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; media-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; connect-src 'none'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_TITLE = re.compile(rb"<title>(.*?)</title>", re.DOTALL)


def report_routes(data: Path) -> list[Route]:
    """The addresses of Reports."""

    async def overview(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(list_reports, data))

    async def show(request: Request) -> Response:
        path = await run_in_threadpool(report_file, data, request.path_params["report"], request.path_params["path"])
        kind = KINDS[path.suffix.lower()]
        return FileResponse(path, media_type=kind, headers={"content-security-policy": _POLICY})

    return [Route("/api/reports", overview), Route("/reports/{report}/{path:path}", show)]


def list_reports(data: Path) -> list[dict[str, Any]]:
    """Every report, newest first: opaque name, folder, title, time."""
    rows = []
    for name, folder in find_folders(data, FILE_NAME).items():
        page = folder / FILE_NAME
        try:
            with open(page, "rb") as stream:
                title = _TITLE.search(stream.read(4096))
            modified = page.stat().st_mtime
        except OSError:  # it vanished meanwhile, or may not be read
            continue
        shown = folder.relative_to(data).as_posix()
        rows.append(
            {
                "id": name,
                "name": data.name if shown == "." else shown,
                "title": title.group(1).decode(errors="replace").strip() if title else "",
                "modified": modified,
            }
        )
    return sorted(rows, key=lambda row: -float(str(row["modified"])))


def report_file(data: Path, report: str, path: str) -> Path:
    """A file of a report; status 404 unless it lies in the report's folder, links resolved, and is of a known kind."""
    folder = find_folders(data, FILE_NAME).get(report)
    missing = HTTPException(404, "there is no such report or file; reload the list of reports.")
    if folder is None or "\0" in path:
        raise missing
    try:
        target = (folder / path).resolve(strict=True)
    except (OSError, ValueError) as error:
        raise missing from error
    if not target.is_relative_to(folder.resolve()) or not target.is_file() or target.suffix.lower() not in KINDS:
        raise missing
    return target
