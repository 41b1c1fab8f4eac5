"""What every test shares: a headless OpenGL, one thread per worker, and the rules for skipping.

A test says what it needs with a marker. ``gpu`` tests are skipped where there is no CUDA device, ``interpreted`` tests
where there is one, ``int8`` tests where the processor has no instructions for them. Tests with another marker are
skipped, with the reason, on a machine that lacks what they need; under ``CI=true`` they fail instead, so that
continuous integration cannot lose them silently.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from hma_gym.dynamics.checkpoint import Checkpoint

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():  # our GPU kernels run in Triton's interpreter; it is told before anybody imports it
    os.environ.setdefault("TRITON_INTERPRET", "1")

_MAKE_CONTEXT = """
import mujoco
context = mujoco.gl_context.GLContext(16, 16)
context.make_current()
context.free()
"""


@functools.cache
def _lacks_gl() -> str:
    if importlib.util.find_spec("mujoco") is None or importlib.util.find_spec("robosuite") is None:
        return 'the extra "sim" is not installed: pip install "hma_gym[sim]"'
    done = subprocess.run([sys.executable, "-c", _MAKE_CONTEXT], capture_output=True, text=True)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        return f"MuJoCo makes no OpenGL context here ({last}): apt-get install libegl1 libgl1-mesa-dri"
    return ""


@functools.cache
def _lacks_robomimic() -> str:
    if importlib.util.find_spec("robomimic") is None:
        return "robomimic is not installed: make install"
    return ""


@functools.cache
def _lacks_browser() -> str:
    if not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")):
        return "no Chromium here: apt-get install chromium"
    if importlib.util.find_spec("playwright") is None:
        return 'playwright is not installed: pip install "hma_gym[dev]"'
    return ""


@functools.cache
def _lacks_gpu() -> str:
    return "" if torch.cuda.is_available() else "no CUDA device here"


def _lacks_interpreter() -> str:
    return "our GPU kernels are compiled here, not interpreted" if torch.cuda.is_available() else ""


def _lacks_compiler() -> str:
    from hma_gym.dynamics.compiled import lacks_compiler

    return lacks_compiler()


def _lacks_int8() -> str:
    from hma_gym.nn.int8 import lacks_int8

    return lacks_int8()


#: What no installation can bring.
HARDWARE = ("gpu", "interpreted", "int8")

REQUIREMENTS = {
    "gl": _lacks_gl,
    "robomimic": _lacks_robomimic,
    "browser": _lacks_browser,
    "gpu": _lacks_gpu,
    "interpreted": _lacks_interpreter,
    "compiler": _lacks_compiler,
    "int8": _lacks_int8,
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("triton") is not None and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not in this process; tests/nn/test_kernels_apart.py runs this in one of its own")
    for marker, lacks in REQUIREMENTS.items():
        if item.get_closest_marker(marker) is None:
            continue
        reason = lacks()
        if reason and marker not in HARDWARE and os.environ.get("CI") == "true":
            pytest.fail(f"needed under CI=true: {reason}", pytrace=False)
        if reason:
            pytest.skip(reason)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved toy checkpoint; not to be changed."""
    from toy_checkpoint import toy_checkpoint

    from hma_gym.dynamics.checkpoint import save_checkpoint

    return save_checkpoint(toy_checkpoint(), tmp_path_factory.mktemp("checkpoint") / "toy")


@pytest.fixture(scope="session")
def toy(toy_folder: Path) -> Checkpoint:
    """The same, loaded once; environments share its weights and never change them."""
    from hma_gym.dynamics.checkpoint import load_checkpoint

    return load_checkpoint(toy_folder)
