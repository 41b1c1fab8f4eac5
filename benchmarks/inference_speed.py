"""Inference speed of the paper's models (Table 1 of HMA, arXiv 2502.04296): cached rollouts, frames a second.

    hma-gym bench inference_speed --reference path/to/HMA
    hma-gym bench inference_speed --models mar-base

Random weights: speed does not depend on them. ``--reference`` times a checkout of the reference implementation
(github.com/liruiw/HMA) with the same weights, side by side; it runs the whole context again for every frame.

The discrete models are timed in three ways, each with as many unmasking passes as the reference:

- ``cached``: one frame with a full context, all of it in the cache;
- ``sliding``: frame after frame without end, the oldest half of the context given up whenever it is full;
- ``same context``: the reference's own context at every frame, which costs a new cache at every frame.

The soft models (MAR) make one frame with a full context in the cache, sampled by the paper's 100 DDIM steps and by the
few-step head in its place; both with two unmasking passes.

``--ways compiled`` runs the steps of the discrete models through ``torch.compile`` (half a minute for each batch),
``graphs`` records them as CUDA graphs, ``compiled-graphs`` compiles them first, ``tuned-graphs`` tries many kernels for
them; ``fused-graphs`` records our own kernels, which ``early-graphs`` begins while the one before ends.
``--precisions`` and ``--reference-precisions`` choose how products are rounded; the reference as it comes is
``float32``, in ``bfloat16`` it runs under autocast.

XL on one CPU core takes a minute a frame with the reference; ``--repeats 1`` there. Writes
``<out>/inference_speed.json`` and ``.md``, anew after each measurement.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hma_gym.benchmarks._reference import PUBLISHED_FIELDS, ReferenceAttention, load_reference, random_reference
from hma_gym.benchmarks._timing import (
    Clock,
    Timing,
    in_products,
    machine_lines,
    markdown_table,
    time_calls,
    write_results,
)
from hma_gym.domains import Domain
from hma_gym.dynamics.mar import DiffusionHeadConfig, FlowHeadConfig, SoftHeadConfig
from hma_gym.dynamics.maskgit import MaskGITHeadConfig
from hma_gym.dynamics.model import Dynamics
from hma_gym.dynamics.published import (
    PublishedConfig,
    PublishedGraphs,
    PublishedModel,
    PublishedState,
    published_trunk,
    read_published,
)
from hma_gym.dynamics.rollout import RolloutState
from hma_gym.dynamics.sizes import named_model
from hma_gym.errors import InvalidArgument, UnknownName
from hma_gym.evaluation.provenance import provenance
from hma_gym.nn.int8 import in_int8, input_ranges
from hma_gym.nn.packed import packed
from hma_gym.nn.precision import Products, in_precision
from hma_gym.nn.replacing import ModuleT

#: Widths of the paper's discrete models; 32 layers, 8 heads, 12 frames each.
WIDTHS = {"base": 256, "xl": 1024}
#: The paper's soft models, by their names in :data:`hma_gym.dynamics.sizes.MODELS`.
SOFT_MODELS = ("mar-base", "mar-xl")
Way = Literal["eager", "compiled", "graphs", "compiled-graphs", "tuned-graphs", "fused-graphs", "early-graphs"]
Engine = Literal["cached", "sliding", "same context"]
DOMAIN = "arm"
ACTION_SIZE = 7


@dataclass(frozen=True)
class InferenceSpeedConfig:
    """One run of the benchmark.

    Attributes:
        models: of ``base`` and ``xl`` (discrete), ``mar-base`` and ``mar-xl`` (soft).
        batches: rollouts at once; a batch that does not fit into a GPU's memory ends the list.
        reference: a checkout of the reference implementation to time beside our discrete models.
        reference_attention: ``plain`` is its own code without xformers, ``fused`` its fast attention (xformers, or
            PyTorch's where that is not installed).
        precisions: of our matrix products; ``tf32`` is for GPUs, ``int8`` for CPUs.
        reference_precisions: likewise of the reference, whose float32 is what ours is compared with.
        ways: how our discrete models run; ``eager``, ``compiled``, or on a GPU ``graphs``, ``compiled-graphs``,
            ``tuned-graphs``, ``fused-graphs`` and ``early-graphs``.
        engines: of ``cached``, ``sliding`` and ``same context``, those of the discrete models to time.
        packed: rearrange our weights for the CPU first (see :mod:`hma_gym.nn.packed`).
        limit_s: after so many seconds no further measurement begins; None for no limit.
        repeats, warmup: timed calls of each, and calls before.
        each_s: fewer repeats where they would take more seconds, but three; None for no limit.
        clock: ``wall``, or ``cpu`` for a shared machine.
        device: where the models run.
        threads: torch threads; None leaves torch's choice.
        layers, side: depth, and side of the token grid; smaller ones are for trials.
        out: folder of the results.
        name: of the result files.
    """

    models: tuple[str, ...] = ("base",)
    batches: tuple[int, ...] = (1,)
    reference: Path | None = None
    reference_attention: ReferenceAttention = "fused"
    precisions: tuple[Products, ...] = ("float32",)
    reference_precisions: tuple[Products, ...] = ("float32",)
    ways: tuple[Way, ...] = ("eager",)
    engines: tuple[Engine, ...] = ("cached", "sliding", "same context")
    limit_s: float | None = None
    packed: bool = False
    repeats: int = 5
    warmup: int = 1
    each_s: float | None = None
    clock: Clock = "wall"
    device: str = "cpu"
    threads: int | None = None
    layers: int = 32
    side: int = 16
    out: Path = Path("benchmarks/results")
    name: str = "inference_speed"

    def __post_init__(self) -> None:
        for model in self.models:
            if model not in (*WIDTHS, *SOFT_MODELS):
                raise UnknownName("model", model, [*WIDTHS, *SOFT_MODELS])
        if not self.batches or min(self.batches) < 1:
            raise InvalidArgument(f"batches must be one or more numbers of at least 1, got {self.batches}.")
        if "int8" in self.reference_precisions:
            raise InvalidArgument(
                "reference_precisions must not name 'int8', which is a precision of our models alone, got "
                f"{self.reference_precisions}."
            )


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model, batch, engine: what was timed; ``engine`` is one of ours, a head of ours, or the reference.
        way, precision: how it ran, and how its products were rounded.
        frames: frames that one timed call made for each rollout.
        timing: of a call.
        weights_mb: of the model's parameters.
        cache_mb: of one rollout's keys and values; the reference keeps none.
        peak_mb: of the GPU's memory; 0 on a CPU.
    """

    model: str
    batch: int
    engine: str
    way: Way
    precision: Products
    frames: int
    timing: Timing
    weights_mb: float
    cache_mb: float
    peak_mb: float

    @property
    def frames_per_second(self) -> float:
        """Of all rollouts of the batch together."""
        return self.batch * self.frames / self.timing.median.value


def _fields(config: InferenceSpeedConfig, width: int) -> dict[str, Any]:
    return {
        "num_layers": config.layers,
        "num_heads": 8,
        "d_model": width,
        "T": 12,
        "S": config.side**2,
        "image_vocab_size": 512**2,
    }


def _own_model(config: InferenceSpeedConfig, width: int, theirs: Any | None) -> PublishedModel:
    if theirs is not None:
        model = read_published(theirs.state_dict(), {**PUBLISHED_FIELDS, **_fields(config, width)}, DOMAIN)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            head = MaskGITHeadConfig(grid=(config.side, config.side), vocabulary=(512, 512))
            model = PublishedModel(PublishedConfig(published_trunk(config.layers, width), head)).eval()
    return model.requires_grad_(False).to(config.device)


def _prepared(config: InferenceSpeedConfig, model: ModuleT, products: Products) -> ModuleT:
    """A model in its precision, packed if asked for; integers for what it reads in a frame."""
    positions = config.side**2 + 64
    if products == "int8":
        with torch.inference_mode(), input_ranges(model) as ranges:
            _frame(model, torch.device(config.device))
        model = in_int8(model, ranges, rows=1)
    else:
        model = in_precision(model, "bfloat16" if products == "bfloat16" else "float32")
    return packed(model, positions * config.batches[0]) if config.packed else model


def _full(model: PublishedModel, batch: int, device: torch.device) -> PublishedState:
    """Rollouts whose next frame takes the last time position: the longest context."""
    generator = torch.Generator().manual_seed(1)
    codes = 512**2
    tokens = torch.randint(codes, (batch, model.head.positions), generator=generator).to(device)
    state = model.start(tokens, torch.arange(batch))
    action = torch.zeros(batch, ACTION_SIZE, device=device)
    for _ in range(model.config.trunk.window - 2):
        state = model.observe(state, action, tokens, in_place=True)
    return state


def _frame(model: nn.Module, device: torch.device) -> None:
    """One frame of one rollout, with a full context."""
    action = torch.zeros(1, ACTION_SIZE, device=device)
    if isinstance(model, Dynamics):
        model.step(_soft_full(model, 1, device), action)
    elif isinstance(model, PublishedModel):
        model.step(_full(model, 1, device), action)


Calls = dict[str, tuple[int, Callable[[], object]]]


def _stepping(model: PublishedModel, way: Way) -> Callable[[PublishedState, Tensor], tuple[PublishedState, Tensor]]:
    """Steps that give up their state."""
    if way in ("eager", "compiled"):
        return lambda state, action: model.step(state, action, in_place=True)
    return PublishedGraphs(model).step


def _hastened(model: PublishedModel, way: Way) -> PublishedModel:
    """A model whose steps are compiled or fused, if its way says so."""
    if way in ("eager", "graphs"):
        return model
    model = copy.deepcopy(model)
    if way in ("fused-graphs", "early-graphs"):
        model.fuse_step(early=way == "early-graphs")
        return model
    torch._dynamo.reset()  # it keeps a limited number of sizes
    model.compile_step(tuned=way == "tuned-graphs")
    return model


def _engines(config: InferenceSpeedConfig, model: PublishedModel, way: Way, batch: int) -> Calls:
    """Our engines by name: frames a call, and the call. Each has graphs of its own, which take over its cache."""
    device = torch.device(config.device)
    full = _full(model, batch, device)
    action = torch.zeros(batch, ACTION_SIZE, device=device)
    window = model.config.trunk.window
    calls: Calls = {}
    # No time position is left afterwards: the next step begins by sliding, and what the cache held does not matter.
    after, _ = model.step(full, action, in_place="cached" not in config.engines)
    model = _hastened(model, way)
    if "cached" in config.engines:
        step = _stepping(model, way)
        calls["cached"] = 1, lambda: step(full, action)
    if "sliding" in config.engines:
        slide = _stepping(model, way)

        def sliding() -> None:
            state = after
            for _ in range(window - after.keep):
                state, _ = slide(state, action)

        calls["sliding"] = window - after.keep, sliding
    if "same context" in config.engines:
        again, long = _stepping(model, way), dataclasses.replace(after, keep=window - 1)
        calls["same context"] = 1, lambda: again(long, action)
    return calls


def _soft_models(config: InferenceSpeedConfig, name: str) -> Iterator[Dynamics]:
    """A soft model with the paper's head, and with the few-step one of the same size."""
    named = named_model(name)
    assert isinstance(named.head, DiffusionHeadConfig)
    paper = dataclasses.replace(named.head, grid=(2 * config.side, 2 * config.side))
    shared = {f.name: getattr(paper, f.name) for f in dataclasses.fields(SoftHeadConfig) if f.name != "flow_steps"}
    trunk = dataclasses.replace(named.trunk, layers=config.layers)
    arm = Domain(
        name=DOMAIN,
        action_dim=ACTION_SIZE,
        action_low=(-1.0,) * ACTION_SIZE,
        action_high=(1.0,) * ACTION_SIZE,
        action_mean=(0.0,) * ACTION_SIZE,
        action_std=(1.0,) * ACTION_SIZE,
    )
    for head in (paper, FlowHeadConfig(**shared)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Dynamics(dataclasses.replace(named, trunk=trunk, head=head), [arm]).eval()
        yield model.requires_grad_(False).to(config.device)


def _soft_full(model: Dynamics, batch: int, device: torch.device) -> RolloutState:
    """Rollouts whose next frame takes the last time position: the longest context."""
    head = model.config.head
    assert isinstance(head, SoftHeadConfig)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(batch, head.grid[0] * head.grid[1], head.channels, generator=generator).to(device)
    state = model.start(tokens, None, torch.arange(batch))
    for _ in range(model.config.trunk.window - 2):
        state = model.observe(state, torch.zeros(batch, ACTION_SIZE, device=device), tokens, None)
    return state


def _soft_ways(model: Dynamics, batch: int, device: torch.device) -> Calls:
    full, action = _soft_full(model, batch, device), torch.zeros(batch, ACTION_SIZE, device=device)
    head = model.config.head
    assert isinstance(head, SoftHeadConfig)
    name = "DDIM" if isinstance(head, DiffusionHeadConfig) else "flow"

    def cached() -> None:
        model.step(full, action, in_place=True)

    return {f"cached, {head.flow_steps}-step {name}": (1, cached)}


def _reference_call(
    theirs: Any, batch: int, side: int, device: torch.device, products: Products = "float32"
) -> Callable[[], object]:
    """One frame of the reference: its masked generation with two passes over 12 frames."""
    generator = torch.Generator().manual_seed(1)
    prompt: Tensor = torch.randint(512**2, (batch, 12, side, side), generator=generator).to(device)
    prompt[:, -1] = theirs.mask_token_id
    actions = torch.zeros(batch, 12, ACTION_SIZE, device=device)

    def call() -> None:
        low = torch.autocast(device.type, torch.bfloat16, enabled=products == "bfloat16")
        with contextlib.redirect_stderr(io.StringIO()), low:  # its progress bar
            theirs.maskgit_generate(
                prompt.clone(), 11, maskgit_steps=2, temperature=0.0, action_ids=actions, domain=[DOMAIN]
            )

    return call


@dataclass(frozen=True)
class _Group:
    """Measurements that are made together: of one model, batch, way and precision."""

    name: str
    batch: int
    way: Way
    precision: Products
    calls: Callable[[], Calls]
    cache_mb: float
    weights_mb: float


def _weights_mb(model: Any) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


def _groups(
    config: InferenceSpeedConfig, name: str, model: PublishedModel | Dynamics, theirs: Any
) -> Iterator[list[_Group]]:
    """What is measured of a model, in an order in which what takes long comes last; those of a list can take turns."""
    device = torch.device(config.device)
    shape = (config.layers, model.config.trunk.window, model.positions, model.config.trunk.width)
    cache = 2 * math.prod(shape) * model.position_embedding.element_size() / 1e6
    kinds: list[tuple[Way, Products, bool]] = []
    if theirs is not None:
        kinds += [("eager", products, True) for products in config.reference_precisions]
    ways: tuple[Way, ...] = ("eager",) if isinstance(model, Dynamics) else config.ways
    kinds += [(way, products, False) for way in ways for products in config.precisions]
    by_batch: dict[int, list[_Group]] = {batch: [] for batch in config.batches}
    for way, products, reference in kinds:
        own = model if reference else _prepared(config, model, products)
        for batch in config.batches:

            def calls(
                batch: int = batch,
                way: Way = way,
                products: Products = products,
                own: Any = own,
                reference: bool = reference,
            ) -> Calls:
                if reference:
                    return {"reference": (1, _reference_call(theirs, batch, config.side, device, products))}
                if isinstance(own, Dynamics):
                    return _soft_ways(own, batch, device)
                return _engines(config, own, way, batch)

            sizes = (0.0, _weights_mb(theirs)) if reference else (cache, _weights_mb(own))
            group = _Group(name, batch, way, products, calls, *sizes)
            if device.type == "cuda":  # nothing beside it on a GPU: neither work nor memory
                yield [group]
            by_batch[batch].append(group)
    if device.type != "cuda":
        yield from by_batch.values()


def _measure(config: InferenceSpeedConfig, groups: list[_Group]) -> list[Row]:
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    found = [(group, group.calls()) for group in groups]
    timings = time_calls(
        {
            f"{i} {engine}": in_products(group.precision, call)
            for i, (group, calls) in enumerate(found)
            for engine, (_, call) in calls.items()
        },
        repeats=config.repeats,
        warmup=config.warmup,
        clock=config.clock,
        device=device,
        limit_s=config.each_s,
    )
    peak = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else 0.0
    return [
        Row(
            group.name,
            group.batch,
            engine,
            group.way,
            group.precision,
            frames,
            timings[f"{i} {engine}"],
            group.weights_mb,
            group.cache_mb,
            peak,
        )
        for i, (group, calls) in enumerate(found)
        for engine, (frames, _) in calls.items()
    ]


def _models(config: InferenceSpeedConfig, reference: Any) -> Iterator[tuple[str, PublishedModel | Dynamics, Any]]:
    """Names, our models, and the reference's where there is one; one at a time in memory."""
    for name in config.models:
        if name in SOFT_MODELS:
            for soft in _soft_models(config, name):
                yield name, soft, None
            continue
        theirs = None
        if reference is not None:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints its geometry
                theirs = random_reference(reference, _fields(config, WIDTHS[name]), DOMAIN, ACTION_SIZE, 0)
            theirs = theirs.to(config.device)
        yield name, _own_model(config, WIDTHS[name], theirs), theirs


def inference_speed(config: InferenceSpeedConfig) -> tuple[Path, Path]:
    """Run the benchmark and write its table; returns the paths."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device, begin = torch.device(config.device), time.perf_counter()
    reference = None if config.reference is None else load_reference(config.reference, config.reference_attention)
    rows: list[Row] = []
    paths = _written(config, rows)
    for name, model, theirs in _models(config, reference):
        for groups in _groups(config, name, model, theirs):
            what = f"{name}, batch {groups[0].batch}, {groups[0].way}, {groups[0].precision}"
            if config.limit_s is not None and time.perf_counter() - begin > config.limit_s:
                print(f"{what}: left out, {config.limit_s:.0f} seconds are over")
                continue
            try:
                with torch.inference_mode():
                    rows += _measure(config, groups)
            except torch.cuda.OutOfMemoryError:
                print(f"{what}: does not fit into the memory of {device}")
                continue
            print(_table(rows).splitlines()[-1], flush=True)
            paths = _written(config, rows)
    return paths


def _written(config: InferenceSpeedConfig, rows: list[Row]) -> tuple[Path, Path]:
    device = torch.device(config.device)
    text = "\n\n".join(
        (
            "# Inference speed of the paper's models",
            machine_lines(provenance(device), config.clock),
            f"Our weights{' packed' if config.packed else ' as they are'}; reference: "
            + ("none" if config.reference is None else f"with its {config.reference_attention} attention")
            + f". {config.layers} layers, {config.side} x {config.side} tokens and 64 action tokens a frame, 12 "
            "frames, 2 unmasking passes a frame. Precision is that of products; ours is compared with the reference in "
            "float32, and in the same precision where that was timed.",
            _table(sorted(rows, key=lambda row: (row.model, config.batches.index(row.batch)))),
        )
    )
    plain = {**asdict(config), "reference": config.reference is not None, "out": config.out.name}
    content = {"benchmark": "inference_speed", "config": plain, "rows": [asdict(row) for row in rows]}
    return write_results(config.out, config.name, content, text, device)


def _table(rows: list[Row]) -> str:
    theirs = {(row.model, row.batch, row.precision): row.frames_per_second for row in rows if row.engine == "reference"}
    lines = []
    for row in rows:
        rate = row.timing.rate(row.batch * row.frames)
        scale = 1000 / row.frames
        percentiles = " / ".join(f"{scale * t:.3g}" for t in (row.timing.median.value, row.timing.p90, row.timing.p99))
        baselines = (theirs.get((row.model, row.batch, products)) for products in ("float32", row.precision))
        ratios = [f"{row.frames_per_second / baseline:.1f}" if baseline else "" for baseline in baselines]
        memory = (row.weights_mb, row.cache_mb, row.timing.repeats)
        ran = (row.engine, row.way, row.precision)
        lines.append([row.model, row.batch, *ran, str(rate), percentiles, *ratios, *memory])
    header = ("model", "batch", "engine", "run", "precision", "frames/s", "ms a frame: 50 / 90 / 99 %")
    times = ("times the reference", "in the same precision")
    return markdown_table((*header, *times, "weights MB", "cache MB a rollout", "repeats"), lines)
