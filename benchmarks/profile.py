"""Where a step of the learned environment spends its time, and how far that is from what the machine can do.

    hma-gym bench profile

The machine's limits are measured first: the rate of large matrix products, and of copies that no cache holds. Then the
parts of a step are timed (trunk, token head and the rest of the dynamics, decoder, judge, the environment about them),
the operations inside a model step one by one, and the floating-point operations and bytes of the trunk are set against
the limits. Bytes are the least that a step must move: weights once, and keys and values of the window once; beside them
stand those that its operations read and write one by one, and the time of the trunk's matrix products alone, of the
same shapes. ``--ways eager packed`` times the parts with packed weights, too, ``graphs compiled-graphs`` as CUDA
graphs. The rate of a CPU is that of PyTorch's own products or of oneDNN's, whichever is higher. Writes
``<out>/profile.json`` and ``.md``, anew for each number of environments.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hma_gym.benchmarks._timing import (
    Clock,
    Timing,
    in_products,
    machine_lines,
    markdown_table,
    time_calls,
    write_results,
)
from hma_gym.benchmarks.throughput import checkpoint_in_precision, hastened
from hma_gym.dynamics.rollout import RolloutState
from hma_gym.dynamics.steppers import CudaGraphs
from hma_gym.envs.tasks import get_task
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.envs.world import LearnedWorld
from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.provenance import provenance
from hma_gym.judges.protocol import FrameCoder, Judge, TokenJudge, ask, told_state
from hma_gym.nn import graphs
from hma_gym.nn.packed import packed
from hma_gym.nn.precision import Products, tensor_float32

Way = Literal["eager", "packed", "graphs", "compiled-graphs"]


@dataclass(frozen=True)
class ProfileConfig:
    """One run of the benchmark.

    Attributes:
        task: key of the task table.
        checkpoint: name, folder or hub id; None takes the task's own.
        envs: numbers of environments.
        precision: of the learned world's matrix products; ``tf32`` is for GPUs.
        ways: how the parts run, ``packed`` with the weights rearranged for the CPU; operations are those of ``eager``.
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
    precision: Products = "float32"
    ways: tuple[Way, ...] = ("eager",)
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
        if self.precision == "int8":
            raise InvalidArgument(
                "precision must be one in which the machine's matrix rate can be measured, got 'int8'; choose another."
            )


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
        parts: seconds of the whole step and of its parts; ``, graphs`` and so on follow their names in other ways.
        trunk_flop, trunk_bytes: floating-point operations of the trunk, and the least bytes that it must move.
        trunk_moved: bytes that its operations read and write one by one.
        operations: the slowest first.
    """

    envs: int
    parts: dict[str, Timing]
    trunk_flop: float
    trunk_bytes: float
    trunk_moved: float
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


class _Traffic(TorchDispatchMode):
    """Sums the bytes of what operations read and write; those that only look at memory another way do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        read, made = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in (args, result))
        if not any(x.data_ptr() == y.data_ptr() for x in read for y in made) or func._schema.is_mutable:
            self.bytes += sum(x.numel() * x.element_size() for x in (*read, *made))
        return result


def measure_limits(config: ProfileConfig) -> Limits:
    """The machine's own rates, in the precision of the run."""
    device = torch.device(config.device)
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    a = torch.randn(config.matrix, config.matrix, device=device).to(dtype)
    product = torch.empty_like(a)
    source = torch.zeros(config.copy_mb * 250_000, device=device)
    target = torch.ones_like(source)
    products: dict[str, Callable[[], object]] = {"matrix": lambda: torch.mm(a, a, out=product)}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        linear = nn.Linear(config.matrix, config.matrix, bias=False).to(dtype)
        rearranged = packed(nn.Sequential(linear), config.matrix)
        products["packed matrix"] = lambda: rearranged(a)
    timings = time_calls(
        {name: in_products(config.precision, call) for name, call in products.items()}
        | {"copy": lambda: target.copy_(source)},
        repeats=config.repeats,
        warmup=config.warmup,
        clock=config.clock,
        device=device,
    )
    return Limits(
        max(2 * config.matrix**3 / timings[name].median.value for name in products),
        2 * source.numel() * source.element_size() / timings["copy"].median.value,
    )


def _trunk_call(world: LearnedWorld, state: RolloutState) -> Callable[[], object]:
    """The trunk alone on one new frame of every row; it writes into the state's cache."""
    dynamics, B = world.dynamics, len(state)
    trunk, N = dynamics.trunk, dynamics.positions
    generator = torch.Generator().manual_seed(0)
    M = trunk.config.modulation_vectors
    x = torch.randn(B, 1, N, trunk.config.width, generator=generator).to(world.device)
    modulation = 0.1 * torch.randn(B, 1, trunk.config.layers, M, trunk.config.width, generator=generator)
    modulation = modulation.to(world.device)
    return lambda: trunk.extend(x, modulation, state.cache, 1, True)


def _trunk_work(world: LearnedWorld, state: RolloutState, call: Callable[[], object]) -> tuple[float, float, float]:
    """Of the trunk's call: its FLOP, its least bytes, and those that its operations move one by one."""
    with FlopCounterMode(display=False) as counter:
        call()
    with _Traffic() as traffic:
        call()
    weights = sum(p.numel() * p.element_size() for p in world.dynamics.trunk.parameters())
    keys = 2 * state.keys_BLWND.numel() * state.keys_BLWND.element_size()
    return float(counter.get_total_flops()), float(weights + keys), float(traffic.bytes)


def _trunk_products(world: LearnedWorld, rows: int) -> Callable[[], object]:
    """The trunk's matrix products alone: its own weights, in their own type, and inputs of the same shapes."""
    dynamics = world.dynamics
    layers = [layer for layer in dynamics.trunk.modules() if isinstance(layer, nn.Linear)]
    sizes = {layer.in_features for layer in layers}
    dtype, positions = layers[0].weight.dtype, rows * dynamics.positions
    inputs = {size: torch.randn(positions, size, device=world.device).to(dtype) for size in sizes}

    def call() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return call


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


def _state(envs: HMAVectorEnv) -> RolloutState:
    """A copy of its rollouts."""
    tensors = envs.save_state()["tensors"]
    prefix = "rollout."
    return RolloutState(**{k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}).clone()


def _parts(config: ProfileConfig, source: LearnedWorld, count: int, way: Way) -> dict[str, Callable[[], object]]:
    """A step of ``count`` environments and its parts, by name."""
    checkpoint, judge, device = hastened(source.checkpoint, way, count), source.judge, source.device
    recorded = way.endswith("graphs")
    world = LearnedWorld(checkpoint, judge=judge, stepper=CudaGraphs if recorded else None)
    envs = HMAVectorEnv(count, checkpoint=world, output="torch", render_mode=None)
    envs.reset(seed=0)
    envs.action_space.seed(0)
    action, state = torch.from_numpy(envs.action_space.sample()).to(device), _state(envs)
    tokens = state.tokens.clone()
    calls: dict[str, Callable[[], object]] = {
        "trunk": _trunk_call(world, state),
        "products of the trunk's shapes alone": _trunk_products(world, count),
        "decoder": lambda: world.tokenizer.decode(tokens),
    }
    if judge is not None:
        frames = torch.zeros(count, world.window, *world.image_size, 3, dtype=torch.uint8, device=device)
        calls["judge"] = _judging(judge, frames, tokens)
    whole: dict[str, Callable[[], object]] = {"step of the environment": lambda: envs.step(action)}
    if recorded:
        stepper, another = CudaGraphs(world.dynamics), _state(envs)
        whole["model step"] = lambda: stepper.step(another, action)
        calls = {name: _as_graph(call, device) for name, call in calls.items()}
    else:
        whole["model step"] = lambda: world.dynamics.step(state, action, in_place=True)
    return {name if way == "eager" else f"{name}, {way}": call for name, call in (whole | calls).items()}


def _as_graph(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    def alone() -> tuple[()]:
        call()
        return ()

    return graphs.record(alone, device)[1]


def profile_step(config: ProfileConfig, world: LearnedWorld, count: int) -> StepProfile:
    """Time the parts of a step of ``count`` environments, and the operations of its model step."""
    device = torch.device(config.device)
    envs = HMAVectorEnv(count, checkpoint=world, output="torch", render_mode=None)
    envs.reset(seed=0)
    action = torch.zeros(count, world.action_size, device=device)
    timings: dict[str, Timing] = {}
    with torch.inference_mode(), tensor_float32(config.precision == "tf32"):
        state = _state(envs)
        work = _trunk_work(world, state, _trunk_call(world, state))
        for way in config.ways:
            timings |= time_calls(
                _parts(config, world, count, way),
                repeats=config.repeats,
                warmup=config.warmup,
                clock=config.clock,
                device=device,
            )
        now = time.perf_counter if config.clock == "wall" else time.process_time
        with _Clockwork(now, device) as clockwork:
            for _ in range(config.repeats):
                world.dynamics.step(state, action, in_place=True)
    slowest = clockwork.seconds.most_common(config.operations)
    operations = tuple(
        Operation(key[0], key[1], seconds / config.repeats, clockwork.calls[key] / config.repeats)
        for key, seconds in slowest
    )
    return StepProfile(count, timings, *work, operations)


def profile(config: ProfileConfig) -> tuple[Path, Path]:
    """Run the benchmark and write its tables; returns the paths."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    source = config.checkpoint if config.checkpoint is not None else get_task(config.task).checkpoint
    world = LearnedWorld(checkpoint_in_precision(source, config.precision, config.device))
    limits = measure_limits(config)
    profiles: list[StepProfile] = []
    for count in config.envs:
        profiles.append(profile_step(config, world, count))
        paths = _written(config, limits, profiles)
    return paths


def _written(config: ProfileConfig, limits: Limits, profiles: list[StepProfile]) -> tuple[Path, Path]:
    device = torch.device(config.device)
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
    total = max(timing.median.value for name, timing in found.parts.items() if name.startswith("step of"))
    parts = [
        (name, 1000 * timing.median.value, f"{100 * timing.median.value / total:.0f} %")
        for name, timing in found.parts.items()
    ]
    bounds = (found.trunk_flop / limits.matrix, found.trunk_bytes / limits.copy, found.trunk_moved / limits.copy)
    lines = []
    for name, timing in found.parts.items():
        if name.startswith(("trunk", "products of the trunk")):
            reached = found.trunk_flop / timing.median.value
            lines.append((name, 1000 * timing.median.value, reached / 1e9, f"{100 * reached / limits.matrix:.0f} %"))
    operations = [(o.name, o.shapes, 1000 * o.seconds, o.calls) for o in found.operations]
    products, least, moved = (1000 * bound for bound in bounds)
    return "\n\n".join(
        (
            f"## {found.envs} environments",
            markdown_table(("part", "ms", "of the longest step"), parts),
            f"Trunk: {found.trunk_flop / 1e9:.2f} GFLOP, {products:.2f} ms at the matrix rate; "
            f"{found.trunk_bytes / 1e6:.0f} MB at least, {least:.2f} ms at the copy rate; "
            f"{found.trunk_moved / 1e6:.0f} MB read and written by its operations one by one, {moved:.2f} ms. What it "
            "reaches:",
            markdown_table(("", "ms", "GFLOP/s", "percent of the matrix rate"), lines),
            "The slowest operations of a model step, timed one by one:",
            markdown_table(("operation", "shapes", "ms a step", "calls"), operations),
        )
    )
