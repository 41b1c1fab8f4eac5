"""Freed memory that a process keeps."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Pieces of memory that are freed all at once, again and again: pages that the system had to clear for them.
CHILD = """
import resource, sys
import numpy as np
from hma_gym.nn.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(12):
    if turn == 2:
        before = pages()
    pieces = [np.ones(2**20) for _ in range(6)]
    del pieces
print(kept, pages() - before)
"""


def _run(how: str) -> tuple[bool, int]:
    made = subprocess.run([sys.executable, "-c", CHILD, how], capture_output=True, text=True, check=True)
    kept, pages = made.stdout.split()
    return kept == "True", int(pages)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the C library of GNU can be told")
def test_freed_memory_is_kept() -> None:
    _, given_back = _run("give back")
    kept, pages = _run("keep")
    assert kept
    assert given_back > 10 * 2048  # each turn at least a piece of 8 MB anew
    assert pages < given_back / 20


def test_a_system_that_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from hma_gym.nn import memory

    def refuse(name: object) -> object:
        raise OSError("no C library")

    monkeypatch.setattr(memory.ctypes, "CDLL", refuse)
    assert memory.keep_freed_memory() is False
