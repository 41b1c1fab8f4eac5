"""Tests of our GPU kernels on a machine without a GPU: in a process of their own, with Triton.

Triton and Mesa, which draws for MuJoCo, each bring a copy of LLVM; a process that loads both crashes. So the one that
tests share has no Triton, and this one nothing that draws.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
#: Where ``make install`` puts it.
FOLDER = Path(sys.prefix) / "triton"


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is here: they run by themselves")
@pytest.mark.parametrize("file", ["nn/test_kernels.py", "nn/test_fused.py", "dynamics/test_published_fused.py"])
def test_kernels(file: str) -> None:
    if not FOLDER.is_dir():
        reason = f"Triton, which has wheels for Linux only, is not in {FOLDER}: make install"
        if os.environ.get("CI") == "true" and platform.system() == "Linux":
            pytest.fail(f"needed under CI=true: {reason}", pytrace=False)
        pytest.skip(reason)
    path = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(TESTS / file)]
    environment = {**os.environ, "PYTHONPATH": path}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout + done.stderr
