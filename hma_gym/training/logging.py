"""Metrics of a run: averaged on the device, written as JSON lines and, when asked for, to TensorBoard.

``metrics.jsonl`` has one JSON object a line: ``{"kind": "train" | "eval" | "session", "step": int, "minutes": float,
...}``. Values that are not finite are written as null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hma_gym.errors import DatasetError
from hma_gym.extras import require

LOG_NAME = "metrics.jsonl"


class RunningMeans:
    """Means of scalar tensors since the last read. Adding never waits for the device; reading waits once.

    Values that are not finite are left out of the mean; a metric that was never finite reads as NaN.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            value = value.detach().float()
            finite = value.isfinite()
            clean = torch.where(finite, value, 0.0)
            if name in self._sums:
                self._sums[name] += clean
                self._counts[name] += finite
            else:
                self._sums[name] = clean
                self._counts[name] = finite.float()

    def read(self) -> dict[str, float]:
        """The means, in order of first appearance; starts anew."""
        names = list(self._sums)
        if not names:
            return {}
        means = torch.stack([self._sums[n] / self._counts[n] for n in names]).tolist()
        self._sums, self._counts = {}, {}
        return dict(zip(names, means, strict=True))


class MetricsLog:
    """The log of one run folder, continued on resume.

    Args:
        folder: the run's folder.
        from_step: rows of later steps, which a resumed run is about to repeat, are dropped, and so is a last line cut
            short by a kill.
        tensorboard: also write event files to ``<folder>/tensorboard`` (needs the package ``tensorboard``).
    """

    def __init__(self, folder: Path, *, from_step: int, tensorboard: bool) -> None:
        tensorboard_writer = _tensorboard_writer(folder, from_step) if tensorboard else None
        self.path = folder / LOG_NAME
        kept = [row for row in read_log(self.path) if row["step"] <= from_step] if self.path.exists() else []
        partial = self.path.with_suffix(".tmp")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(partial, self.path)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._writer = tensorboard_writer

    def write(self, kind: str, step: int, minutes: float, values: Mapping[str, Any]) -> None:
        row = {"kind": kind, "step": step, "minutes": round(minutes, 4)}
        row.update({name: _json_ready(value) for name, value in values.items()})
        self._file.write(json.dumps(row) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``. A last line cut short by a kill is left out.

    Raises:
        DatasetError: the file is missing, or a line before the last is not a row.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"path must be a metrics log, got {path}, which is not a file; is it the right run folder?")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DatasetError(f"{path}, line {number} is not JSON ({error}); move the file away to go on.") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DatasetError(f"{path}, line {number} has no integer 'step'; move the file away to go on.")
        rows.append(row)
    return rows


def _tensorboard_writer(folder: Path, from_step: int) -> Any:
    purpose = "TensorBoard logs (TrainConfig.tensorboard)"
    require("tensorboard", extra="train", purpose=purpose)
    module = require("torch.utils.tensorboard", extra="train", purpose=purpose)
    return module.SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)


def _json_ready(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
