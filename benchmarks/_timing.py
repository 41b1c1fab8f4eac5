"""Timing shared by the speed benchmarks: warm-up, interleaved repeats, medians with intervals, machine lines.

Candidates are timed in turn, round by round, so that what else a machine does falls on all of them alike. Two clocks
run: ``wall``, and ``cpu``, the processor time of this process. On a machine that is shared, processor time with one
thread says what an idle machine would show; a result names its clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.provenance import provenance
from hma_gym.metrics.statistics import Interval, bootstrap_interval
from hma_gym.nn.precision import Products, tensor_float32

Clock = Literal["wall", "cpu"]


@dataclass(frozen=True)
class Timing:
    """How long one call took, in seconds.

    Attributes:
        median: with its 95 percent bootstrap interval.
        p90, p99: percentiles.
        repeats: calls that were timed, after the warm-up.
    """

    median: Interval
    p90: float
    p99: float
    repeats: int

    def rate(self, count: float) -> Interval:
        """``count`` things a call as things a second."""
        return Interval(count / self.median.value, count / self.median.high, count / self.median.low)


def summary(seconds: NDArray[np.float64]) -> Timing:
    """Of the durations of single calls."""
    return Timing(
        bootstrap_interval(seconds, lambda rows: float(np.median(rows))),
        float(np.quantile(seconds, 0.9)),
        float(np.quantile(seconds, 0.99)),
        len(seconds),
    )


def time_calls(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    clock: Clock = "wall",
    device: torch.device | None = None,
    limit_s: float | None = None,
) -> dict[str, Timing]:
    """Time callables against each other.

    Args:
        candidates: by name; each is called ``warmup`` times, then once in each of ``repeats`` rounds.
        clock: ``wall``, or ``cpu`` for the processor time of this process.
        device: a CUDA device is waited for before the clock is read.
        limit_s: after so many seconds of rounds, and three of them, no further one begins; None for no limit.

    Raises:
        InvalidArgument: fewer than one repeat, or processor time asked for work on a GPU.
    """
    on_gpu = device is not None and device.type == "cuda"
    if repeats < 1 or (on_gpu and clock == "cpu"):
        raise InvalidArgument(
            f"repeats must be at least 1, and clock 'wall' on a GPU, got repeats={repeats}, clock={clock!r}."
        )
    now = time.perf_counter if clock == "wall" else time.process_time

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    for call in candidates.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    first = time.perf_counter()
    for done in range(repeats):
        if limit_s is not None and done >= 3 and time.perf_counter() - first > limit_s:
            break
        for name, call in candidates.items():
            wait()
            begin = now()
            call()
            wait()
            seconds[name].append(now() - begin)
    return {name: summary(np.array(values)) for name, values in seconds.items()}


def in_products(products: Products, call: Callable[[], object]) -> Callable[[], object]:
    """A call whose float32 products run in TF32 if that was chosen, and in full float32 if not."""

    def chosen() -> object:
        with tensor_float32(products == "tf32"):
            return call()

    return chosen


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; numbers are shown with three digits, intervals as ``median [low, high]``."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        return str(value)

    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows)])


def machine_lines(facts: Mapping[str, Any], clock: Clock) -> str:
    """Commit, machine, versions and clock as a paragraph for the head of a table."""
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    measured = "wall time" if clock == "wall" else "processor time of the process (the machine was shared)"
    return (
        f"Commit {facts['commit']}, {facts['date']}. {facts['processor']}, {facts['cpus']} CPUs in use, "
        f"{facts['torch_threads']} threads, device {facts['device']}. Python {facts['python']}, {packages}. "
        f"Medians of {measured}, with 95 percent intervals."
    )


def write_results(
    out: Path, name: str, content: Mapping[str, Any], text: str, device: torch.device
) -> tuple[Path, Path]:
    """``<out>/<name>.json`` with the machine's facts, and ``<out>/<name>.md``."""
    out.mkdir(parents=True, exist_ok=True)
    data, table = out / f"{name}.json", out / f"{name}.md"
    data.write_text(json.dumps({**content, "provenance": provenance(device)}, indent=1) + "\n")
    table.write_text(text.rstrip() + "\n")
    return data, table
