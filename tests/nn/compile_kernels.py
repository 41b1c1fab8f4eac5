"""Compiles every kernel of a step of the published models for a GPU that need not be there, and prints what each needs.

    python compile_kernels.py BATCH PRECISION CAPABILITY WIDTH [FOLDER]

PRECISION: float32, tf32 or bfloat16; CAPABILITY: of an NVIDIA GPU, 80 or 90; WIDTH: 256, or XL's 1024. One line of JSON
a kernel: its name, how often it is launched, tiles, how many programs, bytes of shared memory, a thread's registers and
bytes of those that did not fit ("spilled"). In FOLDER, if given, what was compiled.
"""

from __future__ import annotations

import json
import math
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


def resources(cubin: bytes) -> dict[str, int]:
    """Of a thread: registers, and bytes of those that did not fit."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        made = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", made.stdout)
    assert found is not None, made.stdout
    return {"registers": int(found[1]), "spilled": int(found[2])}


def main() -> None:
    batch, precision, capability, width = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    driver.set_active(Absent(capability))
    found: dict[str, dict[str, Any]] = {}

    def compile_only(
        self: fused.Launcher,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
    ) -> None:
        made = kernel.warmup(*arguments, **constants, grid=grid)
        tiles = {name: size for name, size in constants.items() if name.endswith("TILE")}
        needs = {"kernel": kernel.fn.__name__, "launched": 0, **tiles, "programs": math.prod(grid)}
        needs |= {"warps": constants["num_warps"], "stages": constants["num_stages"], "shared": made.metadata.shared}
        entry = found.setdefault(made.hash, {**needs, **resources(made.asm["cubin"])})
        if len(sys.argv) > 5:
            stem = Path(sys.argv[5]) / f"{kernel.fn.__name__}-{made.hash[:8]}"
            stem.with_suffix(".cubin").write_bytes(made.asm["cubin"])
            for form in ("ttgir", "ptx"):
                stem.with_suffix(f".{form}").write_text(made.asm[form])
            entry["file"] = stem.name
        entry["launched"] += 1

    fused.Launcher._start = compile_only  # type: ignore[method-assign]
    fused.check_device = lambda device, early, interpreted: None
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    model = PublishedModel(PublishedConfig(published_trunk(1, width))).eval().requires_grad_(False)
    model = in_precision(model, "bfloat16" if precision == "bfloat16" else "float32")
    model.fuse_step(early=capability >= 90)
    tokens = torch.zeros(batch, model.head.positions, dtype=torch.int64)
    with torch.inference_mode():
        model.step(model.start(tokens, torch.arange(batch)), torch.zeros(batch, model.config.action_size))
    for entry in found.values():
        print(json.dumps(entry))


if __name__ == "__main__":
    main()
