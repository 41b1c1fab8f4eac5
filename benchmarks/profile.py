"""Where a step of the learned environment spends its time, and how far that is from what the machine can do.

    hma-gym bench profile

The machine's limits are measured first: the rate of large matrix products, and of copies that no cache holds. Then the
parts of a step are timed (trunk, token head and the rest of the dynamics, decoder, judge, the environment about them),
the operations inside a model step one by one, and the floating-point operations and bytes of the trunk are set against
the limits. Bytes are the least that a step must move: weights once, and keys and values of the window once. Writes
``<out>/profile.json`` and ``.md``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hma_gym.benchmarks._timing import Clock, Timing, machine_lines, markdown_table, time_calls, write_results
from hma_gym.benchmarks.throughput import checkpoint_in_precision
from hma_gym.dynamics.rollout import RolloutState
from hma_gym.envs.tasks import get_task
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.envs.world import LearnedWorld
from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.provenance import provenance
from hma_gym.judges.protocol import FrameCoder, Judge, TokenJudge, ask, told_state
from hma_gym.nn.precision import Precision
from hma_gym.nn.transformer import Cache


@dataclass(frozen=True)
class ProfileConfig:
    """One run of the benchmark.

    Attributes:
        task: key of the task table.
        checkpoint: name, folder or hub id; None takes the task's own.
        envs: numbers of environments.
        precision: of the learned world's matrix products.
        repeats, warmup: timed calls of each part, and calls before.
        operations: how many of the slowest operations are shown.
        matrix, copy_mb: side of the matrices and size of the copies by which the machine is measured.
        clock: ``wall``, or ``cpu`` for a shared machine.
        device: where the learned world runs.
        threads: torch threads; None leaves torch's choice.
        out: folder of the results.
        name: of the result files.
    """

    task: str = "lift"
    checkpoint: str | None = None
    envs: tuple[int, ...] = (1, 32)
    precision: Precision = "float32"
    repeats: int = 10
    warmup: int = 2
    operations: int = 12
    matrix: int = 1024
    copy_mb: int = 256
    clock: Clock = "wall"
    device: str = "cpu"
    threads: int | None = None
    out: Path = Path("benchmarks/results")
    name: str = "profile"

    def __post_init__(self) -> None:
        if not self.envs or min(self.envs) < 1:
            raise InvalidArgument(f"envs must be one or more numbers of at least 1, got {self.envs}.")


@dataclass(frozen=True)
class Limits:
    """What the machine does at best: matrix products in FLOP/s, copies in bytes/s read and written."""

    matrix: float
    copy: float


@dataclass(frozen=True)
class Operation:
    """One kind of operation inside a model step: seconds and calls of one step."""

    name: str
    shapes: str
    seconds: float
    calls: float


@dataclass(frozen=True)
class StepProfile:
    """One number of environments.

    Attributes:
        envs: rows.
        parts: seconds of the whole step and of its parts.
        trunk_flop, trunk_bytes: floating-point operations of the trunk, and the least bytes that it must move.
        operations: the slowest first.
    """

    envs: int
    parts: dict[str, Timing]
    trunk_flop: float
    trunk_bytes: float
    operations: tuple[Operation, ...]


class _Clockwork(TorchDispatchMode):
    """Sums the time of every operation by name and shapes; on a GPU each is waited for."""

    def __init__(self, now: Callable[[], float], device: torch.device) -> None:
        super().__init__()
        self.now = now
        self.device = device
        self.seconds: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        begin = self.now()
        result = func(*args, **(kwargs or {}))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        shapes = " ".join("x".join(map(str, x.shape)) for x in args if isinstance(x, Tensor))
        key = (str(func).removeprefix("aten.").partition(".")[0], shapes)
        self.seconds[key] += self.now() - begin  # type: ignore[assignment]
        self.calls[key] += 1
        return result


def measure_limits(config: ProfileConfig) -> Limits:
    """The machine's own rates, in the precision of the run."""
    device = torch.device(config.device)
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    a = torch.randn(config.matrix, config.matrix, device=device).to(dtype)
    product = torch.empty_like(a)
    source = torch.zeros(config.copy_mb * 250_000, device=device)
    target = torch.ones_like(source)
    timings = time_calls(
        {"matrix": lambda: torch.mm(a, a, out=product), "copy": lambda: target.copy_(source)},
        repeats=config.repeats,
        warmup=config.warmup,
        clock=config.clock,
        device=device,
    )
    return Limits(
        2 * config.matrix**3 / timings["matrix"].median.value,
        2 * source.numel() * source.element_size() / timings["copy"].median.value,
    )


def _trunk_work(world: LearnedWorld, state: RolloutState) -> tuple[Callable[[], object], float, float]:
    """The trunk alone on one new frame of every row: the call, its FLOP and its bytes."""
    dynamics, B = world.dynamics, len(state)
    trunk, N = dynamics.trunk, dynamics.positions
    generator = torch.Generator().manual_seed(0)
    M = trunk.config.modulation_vectors
    x = torch.randn(B, 1, N, trunk.config.width, generator=generator).to(world.device)
    modulation = 0.1 * torch.randn(B, 1, trunk.config.layers, M, trunk.config.width, generator=generator)
    modulation = modulation.to(world.device)
    copy = state.clone()
    cache = Cache(copy.keys_BLWND, copy.values_BLWND, copy.step_B)

    def call() -> None:
        trunk.extend(x, modulation, cache, 1, True)

    with FlopCounterMode(display=False) as counter:
        call()
    weights = sum(p.numel() * p.element_size() for p in trunk.parameters())
    keys = 2 * cache.keys_BLWND.numel() * cache.keys_BLWND.element_size()
    return call, float(counter.get_total_flops()), float(weights + keys)


def _judging(judge: Judge | TokenJudge, frames_BKHWC: Tensor, tokens_B: Tensor) -> Callable[[], object]:
    """What the judge does in one step."""
    if isinstance(judge, TokenJudge):
        tokens_BK = torch.stack([tokens_B] * judge.window, dim=1)
        return lambda: judge.probability_of_tokens(tokens_BK)
    told_BKP = torch.zeros(*frames_BKHWC.shape[:2], told_state(judge), device=frames_BKHWC.device)
    if isinstance(judge, FrameCoder):
        codes_BKD = torch.zeros(*frames_BKHWC.shape[:2], judge.code_size, device=frames_BKHWC.device)
        last = (frames_BKHWC[:, -1], told_BKP[:, -1])
        return lambda: (ask(judge, judge.code, *last), judge.probability_of_codes(codes_BKD))
    return lambda: ask(judge, judge.probability, frames_BKHWC, told_BKP)


def profile_step(config: ProfileConfig, world: LearnedWorld, count: int) -> StepProfile:
    """Time the parts of a step of ``count`` environments, and the operations of its model step."""
    device = torch.device(config.device)
    envs = HMAVectorEnv(count, checkpoint=world, output="torch", render_mode=None)
    envs.reset(seed=0)
    envs.action_space.seed(0)
    action = torch.from_numpy(envs.action_space.sample()).to(device)
    state = RolloutState(
        **{k.removeprefix("rollout."): v for k, v in envs.save_state()["tensors"].items() if k.startswith("rollout.")}
    )
    frames = torch.zeros(count, world.window, *world.image_size, 3, dtype=torch.uint8, device=device)
    with torch.inference_mode():
        state = state.clone()
        trunk, flop, size = _trunk_work(world, state)
        calls: dict[str, Callable[[], object]] = {
            "step of the environment": lambda: envs.step(action),
            "model step": lambda: world.dynamics.step(state, action, in_place=True),
            "trunk": trunk,
            "decoder": lambda: world.tokenizer.decode(state.tokens),
        }
        if world.judge is not None:
            calls["judge"] = _judging(world.judge, frames, state.tokens)
        timings = time_calls(calls, repeats=config.repeats, warmup=config.warmup, clock=config.clock, device=device)
        now = time.perf_counter if config.clock == "wall" else time.process_time
        with _Clockwork(now, device) as clockwork:
            for _ in range(config.repeats):
                world.dynamics.step(state, action, in_place=True)
    slowest = clockwork.seconds.most_common(config.operations)
    operations = tuple(
        Operation(key[0], key[1], seconds / config.repeats, clockwork.calls[key] / config.repeats)
        for key, seconds in slowest
    )
    return StepProfile(count, timings, flop, size, operations)


def profile(config: ProfileConfig) -> tuple[Path, Path]:
    """Run the benchmark and write its tables; returns the paths."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    source = config.checkpoint if config.checkpoint is not None else get_task(config.task).checkpoint
    world = LearnedWorld(checkpoint_in_precision(source, config.precision, config.device))
    limits = measure_limits(config)
    profiles = [profile_step(config, world, count) for count in config.envs]
    parts = [
        "# Where a step spends its time",
        machine_lines(provenance(device), config.clock),
        f"Products in {config.precision}. The machine: {limits.matrix / 1e9:.0f} GFLOP/s in matrix products of side "
        f"{config.matrix}, {limits.copy / 1e9:.1f} GB/s in copies of {config.copy_mb} MB (bytes read and written).",
        *(_tables(found, limits) for found in profiles),
    ]
    content = {
        "benchmark": "profile",
        "config": {**asdict(config), "out": config.out.name},
        "limits": asdict(limits),
        "profiles": [asdict(found) for found in profiles],
    }
    return write_results(config.out, config.name, content, "\n\n".join(parts), device)


def _tables(found: StepProfile, limits: Limits) -> str:
    total = found.parts["step of the environment"].median.value
    parts = [
        (name, 1000 * timing.median.value, f"{100 * timing.median.value / total:.0f} %")
        for name, timing in found.parts.items()
    ]
    seconds = found.parts["trunk"].median.value
    reached = found.trunk_flop / seconds
    bound = max(found.trunk_flop / limits.matrix, found.trunk_bytes / limits.copy)
    operations = [(o.name, o.shapes, 1000 * o.seconds, o.calls) for o in found.operations]
    return "\n\n".join(
        (
            f"## {found.envs} environments",
            markdown_table(("part", "ms", "of the step"), parts),
            f"Trunk: {found.trunk_flop / 1e9:.2f} GFLOP, {found.trunk_bytes / 1e6:.0f} MB; {reached / 1e9:.0f} "
            f"GFLOP/s, {100 * reached / limits.matrix:.0f} percent of the matrix rate. By these limits it could take "
            f"{1000 * bound:.2f} ms; it takes {1000 * seconds:.2f}. The slowest operations of a model step, timed one "
            "by one:",
            markdown_table(("operation", "shapes", "ms a step", "calls"), operations),
        )
    )
