"""Datasets of the toy task for judges."""

from __future__ import annotations

from pathlib import Path

import pytest
from judge_toy import toy_episode, write_toy


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("judge") / "toy.hdf5", [toy_episode(seed) for seed in range(48)])


@pytest.fixture
def data_without_success(tmp_path: Path) -> Path:
    """Two rows are too few to rise to the line."""
    return write_toy(tmp_path / "flat.hdf5", [toy_episode(seed, length=2) for seed in range(12)])
