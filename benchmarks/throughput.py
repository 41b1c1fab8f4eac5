"""Environment steps a second: the learned Lift beside the ground truth, on one machine in one run.

    hma-gym bench throughput

- ``learned``: ``make_vec`` of the learned task with every frame decoded and judged, and with 8-step chunks of which the
  last frame is; the same in bfloat16 (``--precisions float32 bfloat16``), with packed weights, through
  ``torch.compile`` or as CUDA graphs (``--ways eager packed compiled graphs``), and with the judge that reads tokens
  (``--judge feature``);
- ``ground truth``: the same task in MuJoCo with images, one process a core, each stepping as fast as it can, resets
  included; and robosuite's own image path (``plain``), at the same image size;
- how a step's cost grows with the rollout's length and with the model's context.

Writes ``<out>/throughput.json`` and ``.md``.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import torch

from hma_gym.benchmarks._timing import Clock, Timing, machine_lines, markdown_table, time_calls, write_results
from hma_gym.dynamics.checkpoint import Checkpoint, load_checkpoint
from hma_gym.dynamics.compiled import with_compilation
from hma_gym.dynamics.model import Dynamics
from hma_gym.dynamics.packed import with_packed_weights
from hma_gym.dynamics.precision import with_precision
from hma_gym.dynamics.steppers import CudaGraphs, Sketch
from hma_gym.envs.tasks import Task, get_task
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.envs.world import LearnedWorld
from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.provenance import provenance
from hma_gym.extras import require
from hma_gym.metrics.statistics import Interval
from hma_gym.nn.precision import Precision

Renderer = Literal["ours", "plain"]
Way = Literal["eager", "packed", "compiled", "graphs", "sketch"]

_STEPPERS: dict[Way, type[CudaGraphs | Sketch]] = {"graphs": CudaGraphs, "sketch": Sketch}


@dataclass(frozen=True)
class ThroughputConfig:
    """One run of the benchmark.

    Attributes:
        task: key of the task table.
        checkpoint: name, folder or hub id; None takes the task's own.
        envs: numbers of learned environments in one vector environment.
        chunk: steps of a chunk.
        precisions: of the learned world's matrix products.
        ways: how its steps run; ``packed`` has the weights rearranged for the CPU, ``compiled`` compiles for each
            number of environments first, ``graphs`` needs a GPU; ``sketch`` steps by the body alone.
        judge: ``classifier`` or ``feature``, the checkpoint's own; None takes the classifier where there is one.
        repeats, warmup: timed calls of each, and calls before.
        growth_repeats: the same of the single model steps whose costs are compared.
        early, late: steps of a rollout whose costs are compared.
        contexts: windows of models (of random weights) whose costs are compared.
        context_envs: rows of these, and of the rollouts of ``early`` and ``late``.
        ground_truth: which ground truths to run, ``ours`` with the renderer of this package, ``plain`` robosuite's.
        processes: of the ground truth; None takes one for each core in use.
        seconds: how long each ground-truth process is timed.
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
    precisions: tuple[Precision, ...] = ("float32",)
    ways: tuple[Way, ...] = ("eager",)
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
    precision: Precision
    way: Way
    step: Timing
    chunk: Timing
    state_mb: float


@dataclass(frozen=True)
class GroundTruthRow:
    """Steps a second of all processes of the ground truth together, with images."""

    renderer: Renderer
    processes: int
    steps_per_second: float
    steps: int


@dataclass(frozen=True)
class GrowthRow:
    """The cost of one model step under a condition, e.g. at a step or with a context."""

    what: str
    at: int
    timing: Timing


# ------------------------------------------------------------------ the learned world


def checkpoint_in_precision(source: str | None, precision: Precision, device: str) -> Checkpoint:
    """Load a checkpoint and choose its precision.

    Raises:
        InvalidArgument: None, which is what a task without a checkpoint has.
    """
    if source is None:
        raise InvalidArgument("the task has no checkpoint of its own; pass checkpoint.")
    return with_precision(load_checkpoint(source, device=device), precision)


def _checkpoint(config: ThroughputConfig, precision: Precision) -> Checkpoint:
    source = config.checkpoint if config.checkpoint is not None else get_task(config.task).checkpoint
    return checkpoint_in_precision(source, precision, config.device)


def _world(config: ThroughputConfig, precision: Precision, way: Way, count: int) -> LearnedWorld:
    checkpoint = _checkpoint(config, precision)
    if way == "packed":
        checkpoint = with_packed_weights(checkpoint, count)
    elif way == "compiled":
        checkpoint = with_compilation(checkpoint)
    return LearnedWorld(checkpoint, judge=config.judge, stepper=_STEPPERS.get(way))


def _learned(config: ThroughputConfig, count: int) -> list[LearnedRow]:
    """All precisions and ways at one number of environments, interleaved."""
    calls: dict[str, Callable[[], object]] = {}
    sizes: dict[tuple[Precision, Way], float] = {}
    for precision, way in itertools.product(config.precisions, config.ways):
        envs = HMAVectorEnv(count, config.task, _world(config, precision, way, count), output="torch", render_mode=None)
        envs.reset(seed=0)
        envs.action_space.seed(0)
        action = torch.from_numpy(envs.action_space.sample()).to(config.device)
        actions = action[:, None].repeat(1, config.chunk, 1)
        calls[f"step {precision} {way}"] = lambda envs=envs, action=action: envs.step(action)  # type: ignore[misc]
        calls[f"chunk {precision} {way}"] = lambda envs=envs, actions=actions: envs.step_chunk(actions)  # type: ignore[misc]
        tensors = envs.save_state()["tensors"].values()
        sizes[precision, way] = sum(x.numel() * x.element_size() for x in tensors) / count / 1e6
    timings = time_calls(
        calls,
        repeats=config.repeats,
        warmup=config.warmup,
        clock=config.clock,
        device=torch.device(config.device),
    )
    return [
        LearnedRow(count, p, way, timings[f"step {p} {way}"], timings[f"chunk {p} {way}"], size)
        for (p, way), size in sizes.items()
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
    """A model step after ``early`` and ``late`` steps (interleaved), and with other windows."""
    checkpoint = _checkpoint(config, "float32")
    device, B = torch.device(config.device), config.context_envs
    frames = torch.from_numpy(checkpoint.starts.frames_NHWC[:1]).to(device).expand(B, -1, -1, -1)
    pose = torch.from_numpy(checkpoint.starts.agent_pos_NP[:1]).to(device).expand(B, -1)
    tokens = checkpoint.tokenizer.encode(frames)
    action = torch.zeros(B, checkpoint.dynamics.action_size, device=device)

    def after(model: Dynamics, steps: int) -> Callable[[], object]:
        state = model.start(tokens, pose, torch.arange(B, device=device))
        for _ in range(steps):
            state, _ = model.step(state, action, in_place=True)
        return lambda: model.step(state, action, in_place=True)

    def measure(what: str, calls: dict[int, Callable[[], object]]) -> list[GrowthRow]:
        timings = time_calls(
            {str(at): call for at, call in calls.items()},
            repeats=config.growth_repeats,
            warmup=config.warmup,
            clock=config.clock,
            device=device,
        )
        return [GrowthRow(what, at, timings[str(at)]) for at in calls]

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
    size = _checkpoint(config, "float32").tokenizer.image_size[0]
    learned = [row for count in config.envs for row in _learned(config, count)]
    truth = [_ground_truth(config, renderer, size) for renderer in config.ground_truth]
    with torch.inference_mode():
        growth = _growth(config)
    device = torch.device(config.device)
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
        )
        for row in rows
    ]
    return markdown_table(("what", "at", "ms a step", "relative"), lines)
