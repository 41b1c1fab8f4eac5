"""Stands in for CUDA graphs on a CPU: a run does a function's operations again, and writes where a graph would."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hma_gym.nn import graphs


def _parts(made: Any) -> list[Tensor]:
    if isinstance(made, Tensor):
        return [made]
    return list(made) if isinstance(made, tuple) else [getattr(made, f.name) for f in dataclasses.fields(made)]


def replay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Let graphs be recorded on a CPU; returns a list that grows with each recording."""
    recorded: list[torch.device] = []

    def record(
        function: Callable[[], Any], device: torch.device, rehearse: Callable[[], Any] | None = None
    ) -> tuple[Any, Callable[[], None]]:
        recorded.append(device)
        for _ in range(graphs.WARMUP):
            made = (rehearse or function)()

        def run() -> None:
            for mine, theirs in zip(_parts(made), _parts(function()), strict=True):
                mine.copy_(theirs)

        return made, run

    monkeypatch.setattr(graphs, "lacks_graphs", lambda device: "")
    monkeypatch.setattr(graphs, "record", record)
    return recorded
