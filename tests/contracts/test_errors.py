"""Errors survive the way from a worker process to its parent."""

from __future__ import annotations

import inspect
import pickle

import pytest

from hma_gym import errors


@pytest.mark.parametrize(
    "name", [n for n, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
)
def test_errors_pickle(name: str) -> None:
    kind = getattr(errors, name)
    error = kind("task", "fly", ["lift"]) if kind is errors.UnknownName else kind("a message")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and str(copy) == str(error)
