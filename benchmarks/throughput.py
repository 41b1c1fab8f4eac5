"""Environment steps a second: the learned Lift beside the ground truth, on one machine in one run.

    hma-gym bench throughput

- ``learned``: ``make_vec`` of the learned task with every frame decoded and judged, and with 8-step chunks of which the
  last frame is; the same in bfloat16 and in 8-bit integers (``--precisions float32 bfloat16 int8``), with packed
  weights, through ``torch.compile`` or as CUDA graphs (``--ways eager packed compiled graphs``), and with the judge
  that reads tokens (``--judge feature``);
- ``ground truth``: the same task in MuJoCo with images, one process a core, each stepping as fast as it can, resets
  included; and robosuite's own image path (``plain``), at the same image size;
- how a step's cost grows with the rollout's length and with the model's context; on a GPU also its memory.

Writes ``<out>/throughput.json`` and ``.md``, anew after each measurement.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import torch

from hma_gym.benchmarks._timing import (
    Clock,
    Timing,
    in_products,
    machine_lines,
    markdown_table,
    time_calls,
    write_results,
)
from hma_gym.dynamics.checkpoint import Checkpoint, load_checkpoint
from hma_gym.dynamics.compiled import with_compilation
from hma_gym.dynamics.model import Dynamics
from hma_gym.dynamics.packed import with_packed_weights
from hma_gym.dynamics.precision import with_precision
from hma_gym.dynamics.steppers import CudaGraphs, InOrder, Sketch, SketchGraphs
from hma_gym.envs.tasks import Task, get_task
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.envs.world import LearnedWorld
from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.provenance import provenance
from hma_gym.extras import require
from hma_gym.metrics.statistics import Interval
from hma_gym.nn.precision import Products, tensor_float32

Renderer = Literal["ours", "plain"]
Way = Literal[
    "eager",
    "packed",
    "compiled",
    "packed-compiled",
    "graphs",
    "compiled-graphs",
    "sketch",
    "compiled-sketch",
    "packed-compiled-sketch",
    "sketch-graphs",
    "compiled-sketch-graphs",
]

_STEPPERS: dict[Way, type[CudaGraphs | Sketch]] = {
    "graphs": CudaGraphs,
    "compiled-graphs": CudaGraphs,
    "sketch": Sketch,
    "compiled-sketch": Sketch,
    "packed-compiled-sketch": Sketch,
    "sketch-graphs": SketchGraphs,
    "compiled-sketch-graphs": SketchGraphs,
}


@dataclass(frozen=True)
class ThroughputConfig:
    """One run of the benchmark.

    Attributes:
        task: key of the task table.
        checkpoint: name, folder or hub id; None takes the task's own.
        envs: numbers of learned environments in one vector environment.
        chunk: steps of a chunk.
        precisions: of the learned world's matrix products; ``tf32`` is for GPUs, ``int8`` for CPUs.
        ways: how its steps run; ``packed`` has the weights rearranged for the CPU, ``compiled`` compiles for each
            number of environments first, ``packed-compiled`` does both, ``graphs`` needs a GPU; ``sketch`` steps by the
            body alone.
        limit_s: after so many seconds no further learned environments are timed; None for no limit.
        judge: ``classifier`` or ``feature``, the checkpoint's own; None takes the classifier where there is one.
        repeats, warmup: timed calls of each, and calls before.
        growth_repeats: the same of the single model steps whose costs are compared.
        early, late: steps of a rollout whose costs are compared.
        contexts: windows of models (of random weights) whose costs are compared.
        context_envs: rows of these, and of the rollouts of ``early`` and ``late``.
        ground_truth: which ground truths to run, ``ours`` with the renderer of this package, ``plain`` robosuite's.
        processes: of the ground truth; None takes one for each core in use.
        seconds: how long each ground-truth process is timed, before the learned worlds and again after them.
        clock: ``wall``, or ``cpu`` for a shared machine.
        device: where the learned world runs.
        threads: torch threads; None leaves torch's choice.
        out: folder of the results.
        name: of the result files.
    """

    task: str = "lift"
    checkpoint: str | None = None
    envs: tuple[int, ...] = (1, 8, 32)
    chunk: int = 8
    precisions: tuple[Products, ...] = ("float32",)
    ways: tuple[Way, ...] = ("eager",)
    limit_s: float | None = None
    judge: str | None = None
    repeats: int = 20
    warmup: int = 3
    growth_repeats: int = 50
    early: int = 20
    late: int = 1000
    contexts: tuple[int, ...] = (4, 8, 16, 32)
    context_envs: int = 8
    ground_truth: tuple[Renderer, ...] = ("ours", "plain")
    processes: int | None = None
    seconds: float = 10.0
    clock: Clock = "wall"
    device: str = "cpu"
    threads: int | None = None
    out: Path = Path("benchmarks/results")
    name: str = "throughput"

    def __post_init__(self) -> None:
        if not self.envs or min(self.envs) < 1 or self.chunk < 1 or not 0 < self.early < self.late:
            raise InvalidArgument(
                "throughput: envs must be numbers of at least 1, chunk at least 1 and 0 < early < late, got "
                f"envs={self.envs}, chunk={self.chunk}, early={self.early}, late={self.late}."
            )


@dataclass(frozen=True)
class LearnedRow:
    """One vector environment: its size, its precision, how its steps run, and how long a step and a chunk take."""

    envs: int
    precision: Products
    way: Way
    step: Timing
    chunk: Timing
    state_mb: float


@dataclass(frozen=True)
class GroundTruthRow:
    """Steps a second of all processes of the ground truth together, with images; the mean of several times."""

    renderer: Renderer
    processes: int
    steps_per_second: float
    steps: int


@dataclass(frozen=True)
class GrowthRow:
    """The cost of one model step under a condition, e.g. at a step or with a context; and by how much the GPU's memory
    in use grew over the steps before (0 on a CPU)."""

    what: str
    at: int
    timing: Timing
    grown_mb: float = 0.0


# ------------------------------------------------------------------ the learned world


def checkpoint_in_precision(source: str | None, products: Products, device: str) -> Checkpoint:
    """Load a checkpoint and choose its precision; TF32 is up to each call, see
    :func:`hma_gym.benchmarks._timing.in_products`.

    Raises:
        InvalidArgument: None, which is what a task without a checkpoint has.
    """
    if source is None:
        raise InvalidArgument("the task has no checkpoint of its own; pass checkpoint.")
    return with_precision(load_checkpoint(source, device=device), "float32" if products == "tf32" else products)


def _checkpoint(config: ThroughputConfig, precision: Products) -> Checkpoint:
    source = config.checkpoint if config.checkpoint is not None else get_task(config.task).checkpoint
    return checkpoint_in_precision(source, precision, config.device)


def hastened(checkpoint: Checkpoint, way: str, count: int) -> Checkpoint:
    """A checkpoint for so many environments, packed and compiled if its way says so."""
    if "packed" in way:
        checkpoint = with_packed_weights(checkpoint, count)
    if "compiled" in way:
        torch._dynamo.reset()  # it keeps a limited number of sizes
        checkpoint = with_compilation(checkpoint)
    return checkpoint


def _world(config: ThroughputConfig, precision: Products, way: Way, count: int) -> LearnedWorld:
    checkpoint = hastened(_checkpoint(config, precision), way, count)
    return LearnedWorld(checkpoint, judge=config.judge, stepper=_STEPPERS.get(way))


_Kind = tuple[int, Products, Way]


def _kinds(config: ThroughputConfig) -> Iterator[list[_Kind]]:
    """Numbers of environments, precisions and ways, those together that can take turns: on a GPU none, for memory."""
    if torch.device(config.device).type == "cuda":
        for way, precision, count in itertools.product(config.ways, config.precisions, config.envs):
            yield [(count, precision, way)]
        return
    for count in config.envs:
        yield [(count, precision, way) for precision, way in itertools.product(config.precisions, config.ways)]


def _learned(config: ThroughputConfig, kinds: list[_Kind]) -> list[LearnedRow]:
    """Some kinds, interleaved."""
    calls: dict[str, Callable[[], object]] = {}
    sizes: dict[_Kind, float] = {}
    for count, precision, way in kinds:
        with tensor_float32(precision == "tf32"):  # graphs are recorded as early as at a reset
            envs = HMAVectorEnv(
                count, config.task, _world(config, precision, way, count), output="torch", render_mode=None
            )
            envs.reset(seed=0)
        envs.action_space.seed(0)
        action = torch.from_numpy(envs.action_space.sample()).to(config.device)
        actions = action[:, None].repeat(1, config.chunk, 1)
        ran: dict[str, Callable[[], object]] = {
            "step": lambda envs=envs, action=action: envs.step(action),  # type: ignore[misc]
            "chunk": lambda envs=envs, actions=actions: envs.step_chunk(actions),  # type: ignore[misc]
        }
        calls |= {f"{name} {count} {precision} {way}": in_products(precision, call) for name, call in ran.items()}
        tensors = envs.save_state()["tensors"].values()
        sizes[count, precision, way] = sum(x.numel() * x.element_size() for x in tensors) / count / 1e6
    timings = time_calls(
        calls,
        repeats=config.repeats,
        warmup=config.warmup,
        clock=config.clock,
        device=torch.device(config.device),
    )
    return [
        LearnedRow(
            count,
            precision,
            way,
            timings[f"step {count} {precision} {way}"],
            timings[f"chunk {count} {precision} {way}"],
            size,
        )
        for (count, precision, way), size in sizes.items()
    ]


# ------------------------------------------------------------------ the ground truth


def _plain_environment(task: Task, size: int) -> tuple[Callable[[], object], Callable[[Any], object], int]:
    """robosuite's own image path: reset, step, action dims."""
    robosuite = require("robosuite", extra="sim", purpose="the ground truth")
    env = robosuite.make(
        task.robosuite_env,
        robots=task.robot,
        has_renderer=False,
        has_offscreen_renderer=True,
        use_camera_obs=True,
        camera_names=task.camera,
        camera_heights=size,
        camera_widths=size,
        control_freq=task.control_hz,
        ignore_done=True,
    )
    return env.reset, env.step, task.action_dim


def _our_environment(task_name: str, size: int) -> tuple[Callable[[], object], Callable[[Any], object], int]:
    env = gymnasium.make(f"GroundTruth-{task_name.capitalize()}-v0", image_size=size, disable_env_checker=True)
    return env.reset, env.step, get_task(task_name).action_dim


def _run_ground_truth(renderer: Renderer, task_name: str, size: int, seconds: float, clock: Clock, result: Any) -> None:
    """One process: whole episodes under random actions until the time is over; (steps, seconds) into ``result``."""
    task = get_task(task_name)
    reset, step, dims = _our_environment(task_name, size) if renderer == "ours" else _plain_environment(task, size)
    now = time.perf_counter if clock == "wall" else time.process_time
    generator = np.random.default_rng(os.getpid())
    reset()
    for _ in range(3):
        step(generator.uniform(-1, 1, dims).astype(np.float32))
    begin, steps = now(), 0
    while now() - begin < seconds:
        if steps % task.horizon == task.horizon - 1:
            reset()
        step(generator.uniform(-1, 1, dims).astype(np.float32))
        steps += 1
    result.put((steps, now() - begin))


def _ground_truth(config: ThroughputConfig, renderer: Renderer, size: int) -> GroundTruthRow:
    count = config.processes if config.processes is not None else len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    arguments = (renderer, config.task, size, config.seconds, config.clock, result)
    workers = [context.Process(target=_run_ground_truth, args=arguments, daemon=True) for _ in range(count)]
    for worker in workers:
        worker.start()
    found = [result.get(timeout=120 + 60 * config.seconds) for _ in workers]
    for worker in workers:
        worker.join()
    return GroundTruthRow(
        renderer, count, sum(steps / seconds for steps, seconds in found), sum(steps for steps, _ in found)
    )


# ------------------------------------------------------------------ growth


def _growth(config: ThroughputConfig) -> list[GrowthRow]:
    """A model step after ``early`` and ``late`` steps (interleaved), and with other windows; as graphs if those were
    asked for."""
    checkpoint = _checkpoint(config, "float32")
    device, B = torch.device(config.device), config.context_envs
    frames = torch.from_numpy(checkpoint.starts.frames_NHWC[:1]).to(device).expand(B, -1, -1, -1)
    pose = torch.from_numpy(checkpoint.starts.agent_pos_NP[:1]).to(device).expand(B, -1)
    tokens = checkpoint.tokenizer.encode(frames)
    action = torch.zeros(B, checkpoint.dynamics.action_size, device=device)
    recorded = device.type == "cuda" and any("graphs" in way for way in config.ways)
    grown: dict[int, float] = {}

    def used() -> float:
        return torch.cuda.memory_allocated(device) / 1e6 if device.type == "cuda" else 0.0

    def after(model: Dynamics, steps: int) -> Callable[[], object]:
        stepper = CudaGraphs(model) if recorded else InOrder(model)
        state, before = model.start(tokens, pose, torch.arange(B, device=device)), 0.0
        for step in range(steps):
            state, _ = stepper.step(state, action)
            if step + 1 == min(config.early, steps):
                before = used()
        grown[steps] = used() - before
        return lambda: stepper.step(state, action)

    def measure(what: str, calls: dict[int, Callable[[], object]]) -> list[GrowthRow]:
        timings = time_calls(
            {str(at): call for at, call in calls.items()},
            repeats=config.growth_repeats,
            warmup=config.warmup,
            clock=config.clock,
            device=device,
        )
        return [GrowthRow(what, at, timings[str(at)], grown[at] if what == "step" else 0.0) for at in calls]

    model = checkpoint.dynamics
    rows = measure("step", {at: after(model, at) for at in (config.early, config.late)})
    windows: dict[int, Callable[[], object]] = {}
    for window in config.contexts:
        trunk = dataclasses.replace(model.config.trunk, window=window)
        with torch.random.fork_rng(devices=[]):
            other = Dynamics(dataclasses.replace(model.config, trunk=trunk), model.domains)
        other.to(device).load_state_dict(model.state_dict(), assign=True)
        windows[window] = after(other.eval().requires_grad_(False), 2)
    return rows + (measure("context", windows) if windows else [])


# ------------------------------------------------------------------ the table


def throughput(config: ThroughputConfig) -> tuple[Path, Path]:
    """Run the benchmark and write its tables; returns the paths."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    size, device = _checkpoint(config, "float32").tokenizer.image_size[0], torch.device(config.device)
    truth = [_ground_truth(config, renderer, size) for renderer in config.ground_truth]  # before, and again after
    begin, learned = time.perf_counter(), list[LearnedRow]()
    with torch.inference_mode(), tensor_float32(False):
        growth = _growth(config)
    _written(config, size, learned, truth, growth)
    for kinds in _kinds(config):
        if config.limit_s is not None and time.perf_counter() - begin > config.limit_s:
            print(f"{kinds}: left out, {config.limit_s:.0f} seconds are over")
            continue
        try:
            learned += _learned(config, kinds)
        except torch.cuda.OutOfMemoryError:
            print(f"{kinds}: does not fit into the memory of {device}")
        gc.collect()  # rollouts of many environments are gigabytes
        _written(config, size, learned, truth, growth)
        print(_learned_table(learned, config.chunk, 0.0).splitlines()[-1], flush=True)
    after = [_ground_truth(config, renderer, size) for renderer in config.ground_truth]
    truth = [_joined(*rows) for rows in zip(truth, after, strict=True)]
    return _written(config, size, learned, truth, growth)


def _joined(before: GroundTruthRow, after: GroundTruthRow) -> GroundTruthRow:
    """The same ground truth at two times, between which the machine may have become faster or slower."""
    mean = (before.steps_per_second + after.steps_per_second) / 2
    return dataclasses.replace(before, steps_per_second=mean, steps=before.steps + after.steps)


def _written(
    config: ThroughputConfig,
    size: int,
    learned: list[LearnedRow],
    truth: list[GroundTruthRow],
    growth: list[GrowthRow],
) -> tuple[Path, Path]:
    device = torch.device(config.device)
    learned = sorted(learned, key=lambda row: config.envs.index(row.envs))
    best = max((row.steps_per_second for row in truth), default=0.0)
    parts = [
        "# Throughput of the learned and the true simulator",
        machine_lines(provenance(device), config.clock),
        f"Task {config.task}, {size} x {size} pixels, judge {config.judge or 'classifier'}. One learned environment: "
        f"state and cache as given; every frame decoded and judged in `step`, the last of {config.chunk} in a chunk.",
        _learned_table(learned, config.chunk, best),
    ]
    if truth:
        lines = [(row.renderer, row.processes, row.steps_per_second, row.steps) for row in truth]
        parts.append(markdown_table(("ground truth", "processes", "steps/s, all together", "steps timed"), lines))
    parts.append(f"One model step of {config.context_envs} rollouts, without decoding:\n\n" + _growth_table(growth))
    content = {
        "benchmark": "throughput",
        "config": {**asdict(config), "out": config.out.name},
        "learned": [asdict(row) for row in learned],
        "ground_truth": [asdict(row) for row in truth],
        "growth": [asdict(row) for row in growth],
    }
    return write_results(config.out, config.name, content, "\n\n".join(parts), device)


def _learned_table(rows: list[LearnedRow], chunk: int, best: float) -> str:
    def times(rate: Interval) -> str:
        return f"{rate.value / best:.1f}" if best else ""

    lines = []
    for row in rows:
        step, chunks = row.step.rate(row.envs), row.chunk.rate(row.envs * chunk)
        latency = " / ".join(f"{1000 * t:.3g}" for t in (row.step.median.value, row.step.p90, row.step.p99))
        learned = (row.envs, row.precision, row.way)
        lines.append([*learned, str(step), times(step), latency, str(chunks), times(chunks), row.state_mb])
    truth = "times the fastest ground truth"
    header = ("environments", "precision", "run", "step: frames/s", truth, "ms a step: 50 / 90 / 99 %")
    return markdown_table((*header, "chunk: frames/s", truth, "state MB each"), lines)


def _growth_table(rows: list[GrowthRow]) -> str:
    first = {row.what: row for row in reversed(rows)}
    lines = [
        (
            row.what,
            row.at,
            1000 * row.timing.median.value,
            row.timing.median.value / first[row.what].timing.median.value,
            row.grown_mb,
        )
        for row in rows
    ]
    return markdown_table(("what", "at", "ms a step", "relative", "memory grown, MB"), lines)
