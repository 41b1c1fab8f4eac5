"""Our GPU kernels compile for GPUs that are not here, and fit into them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Bytes that a block may have on every GPU of compute capability 8.0 to 9.0; the least is that of 8.6 and 8.9.
SHARED = 99 * 1024


@pytest.mark.triton
@pytest.mark.parametrize(
    ("batch", "precision", "capability", "width"),
    [(1, "bfloat16", 90, 256), (8, "tf32", 90, 256), (32, "float32", 80, 256), (1, "bfloat16", 90, 1024)],
)
def test_kernels_fit_into_registers_and_shared_memory(
    batch: int, precision: str, capability: int, width: int, tmp_path: Path
) -> None:
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    made = subprocess.run(
        [*command, str(batch), precision, str(capability), str(width)], capture_output=True, text=True, env=environment
    )
    assert made.returncode == 0, made.stderr
    kernels = [json.loads(line) for line in made.stdout.splitlines()]
    names = {"embed", "modulate", "moments", "linear", "attend_frame", "attend_ring", "unmask"}
    assert {kernel["kernel"] for kernel in kernels} == names
    a_pass = 8 + 4  # a layer; embedding, moments, logits and unmasking; and once a frame, the modulation
    assert sum(kernel["launched"] for kernel in kernels) == 1 + 2 * a_pass
    for kernel in kernels:
        assert kernel["shared"] <= SHARED and kernel["spilled"] == 0, kernel
