"""Reading requests: sizes are limited while they arrive, and fields have types."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from hma_gym.errors import InvalidArgument
from hma_gym.web.kit import HTTPException, Request

JSON_LIMIT = 64 * 1024
"""Bytes of a JSON request."""

T = TypeVar("T")


async def read_body(request: Request, limit: int) -> bytes:
    """The body; status 413 as soon as more than ``limit`` bytes have arrived or are announced."""
    too_large = HTTPException(413, f"the upload must have at most {limit / 1e6:.3g} MB; send a smaller one.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object; :class:`InvalidArgument` if it is something else."""
    body = await read_body(request, JSON_LIMIT)
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"the request must be a JSON object, got {body[:80]!r}: {error}.") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"the request must be a JSON object, got {type(value).__name__}.")
    return value


def field(values: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """A field of a request, of the right type; :class:`InvalidArgument` if it is missing or of another one."""
    value = values.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidArgument(f"{name} must be given as {kind.__name__}, got {value!r}.")
    return value


def find_folders(data: Path, file_name: str, depth: int = 6) -> dict[str, Path]:
    """Folders below ``data`` (itself included) that hold ``file_name``, by an opaque name; links are not followed."""
    found: dict[str, Path] = {}
    pending = [(data, 0)]
    while pending:
        folder, level = pending.pop()
        try:
            entries = sorted(folder.iterdir())
        except OSError:  # a folder that vanished or may not be read holds nothing for us
            continue
        for entry in entries:
            if entry.is_symlink():
                continue
            if entry.name == file_name and entry.is_file():
                found[opaque_name(data, folder)] = folder
            elif level < depth and not entry.name.startswith(".") and entry.is_dir():
                pending.append((entry, level + 1))
    return found


def opaque_name(data: Path, folder: Path) -> str:
    """What a folder is called in addresses: no path ever comes from outside."""
    return hashlib.sha256(folder.relative_to(data).as_posix().encode()).hexdigest()[:12]
