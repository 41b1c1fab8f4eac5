"""Deep equality of what environments return: types, keys, dtypes, shapes and values."""

from __future__ import annotations

from typing import Any

import numpy as np


def assert_same(ours: Any, theirs: Any, pixels: int = 0, tolerance: float = 1e-6, where: str = "") -> None:
    """Equal up to ``tolerance`` in floats and ``pixels`` in uint8 values."""
    if isinstance(theirs, dict):
        assert isinstance(ours, dict) and ours.keys() == theirs.keys(), f"{where}: {list(ours)} != {list(theirs)}"
        for key in theirs:
            assert_same(ours[key], theirs[key], pixels, tolerance, f"{where}[{key!r}]")
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs), where
        for i, (mine, their) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(mine, their, pixels, tolerance, f"{where}[{i}]")
    elif isinstance(theirs, np.ndarray) and theirs.dtype == object:
        assert ours.dtype == object and ours.shape == theirs.shape, where
        for i, (mine, their) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(mine, their, pixels, tolerance, f"{where}[{i}]")
    elif isinstance(theirs, np.ndarray):
        assert isinstance(ours, np.ndarray) and ours.dtype == theirs.dtype and ours.shape == theirs.shape, (
            f"{where}: {ours.dtype} {ours.shape} != {theirs.dtype} {theirs.shape}"
        )
        allowed = {"u": pixels, "f": tolerance}.get(theirs.dtype.kind, 0)
        wrong = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
        assert wrong.size == 0 or wrong.max() <= allowed, f"{where}: off by {wrong.max()}"
    else:
        assert type(ours) is type(theirs) and ours == theirs, f"{where}: {ours!r} != {theirs!r}"
