"""Compiles every kernel of a step of the published Base for a GPU that need not be there, and prints what each needs.

    python compile_kernels.py BATCH PRECISION CAPABILITY

PRECISION: float32, tf32 or bfloat16; CAPABILITY: of an NVIDIA GPU, 80 or 90. One line of JSON a kernel: its name, how
often it is launched, tiles, and bytes of shared memory and of registers that did not fit ("spilled").
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hma_gym.dynamics.published import PublishedConfig, PublishedModel, published_trunk
from hma_gym.nn import fused
from hma_gym.nn.precision import in_precision

TOOL = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


class Absent:
    """A GPU for which one can compile."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object = None) -> int:
        return 0


def spilled(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        made = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+)", made.stdout)
    assert found is not None, made.stdout
    return int(found[1])


def main() -> None:
    batch, precision, capability = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    driver.set_active(Absent(capability))
    found: dict[str, dict[str, Any]] = {}

    def compile_only(
        self: fused.Launcher, kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, **constants: Any
    ) -> None:
        made = kernel.warmup(*arguments, **constants, EARLY=self._early, num_warps=warps, grid=grid, **self._options)
        tiles = {name: size for name, size in constants.items() if name.endswith("TILE")}
        needs = {"kernel": kernel.fn.__name__, "launched": 0, **tiles, "shared": made.metadata.shared}
        entry = found.setdefault(made.hash, {**needs, "spilled": spilled(made.asm["cubin"])})
        entry["launched"] += 1

    fused.Launcher._launch = compile_only  # type: ignore[method-assign]
    fused.check_device = lambda device, early, interpreted: None
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    model = PublishedModel(PublishedConfig(published_trunk(layers=1))).eval().requires_grad_(False)
    model = in_precision(model, "bfloat16" if precision == "bfloat16" else "float32")
    model.fuse_step(early=capability >= 90)
    tokens = torch.zeros(batch, model.head.positions, dtype=torch.int64)
    with torch.inference_mode():
        model.step(model.start(tokens, torch.arange(batch)), torch.zeros(batch, model.config.action_size))
    for entry in found.values():
        print(json.dumps(entry))


if __name__ == "__main__":
    main()
