"""One training loop that knows no model: batches in, better weights out, resumable at any step.

    result = train(model, batches, TrainConfig(out=Path("runs/toy"), steps=1000))
    weights = result.ema.state_dict(model)

**Exact resume.** All randomness of a step is a function of (seed, step): ``Batches.batch(step)`` is pure, and before
each step the generator given to ``loss`` and torch's global generators are seeded from (seed, step). So a saved state
is weights, average, optimiser state and step, and a run that was interrupted anywhere and resumed ends with weights
equal to an uninterrupted run's, bit for bit on the same CPU, thread count and library versions
(``deterministic=True`` asks torch for the same on CUDA). With ``schedule_minutes`` the learning rate follows the
clock, and so is never repeated exactly.
"""

from __future__ import annotations

import hashlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hma_gym.errors import ResumeError, TrainingDiverged
from hma_gym.nn.parameters import ParameterGroup
from hma_gym.training.config import FREE_ON_RESUME, TrainConfig, config_json, differences
from hma_gym.training.ema import EMA
from hma_gym.training.logging import MetricsLog, RunningMeans
from hma_gym.training.optim import Optimizer
from hma_gym.training.saved import SavedState, make_folder, read_state, saved_files, write_state


class Trainable(Protocol):
    """What an ``nn.Module`` must offer to be trained here."""

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss and scalar metrics (tensors on the device, never ``.item()``).

        ``batch`` is on the model's device, and so is ``generator``, the one source of randomness.
        """
        ...

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Every trainable parameter once; :func:`hma_gym.training.default_parameter_groups` is the plain answer."""
        ...


class Batches(Protocol):
    """The data: a pure function of the step (and of its own seed), callable from a background thread."""

    def batch(self, step: int) -> Mapping[str, Tensor]:
        """The batch of optimiser step ``step`` (0 is the first), on CPU or already on the device."""
        ...


class Evaluator(Protocol):
    """Measures the averaged weights; called in eval mode without gradients, with torch's global generators isolated."""

    def __call__(self, model: nn.Module, step: int) -> Mapping[str, float]: ...


LossFunction = Callable[[Mapping[str, Tensor], torch.Generator], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class TrainResult:
    """How a session ended.

    Attributes:
        finished: the schedule is complete; otherwise the run goes on when ``train`` is called again.
        reason: ``"finished"``, ``"max_minutes"`` or ``"signal"``.
        step: optimiser steps done in all.
        minutes: minutes in the loop, over all sessions.
        checkpoint: the saved state of this step.
        ema: the averaged weights; ``ema.applied_to(model)`` and ``ema.state_dict(model)`` use them.
        metrics: the last line of training metrics.
        evaluation: the last evaluation of this session, empty if there was none.
    """

    finished: bool
    reason: Literal["finished", "max_minutes", "signal"]
    step: int
    minutes: float
    checkpoint: Path
    ema: EMA
    metrics: Mapping[str, float]
    evaluation: Mapping[str, float]


def train(
    model: nn.Module,
    batches: Batches,
    config: TrainConfig,
    evaluate: Evaluator | None = None,
) -> TrainResult:
    """Train ``model`` (an ``nn.Module`` that is :class:`Trainable`) in place, from the start or from where it stopped.

    SIGINT and SIGTERM let the present step end, save, and return. The model is left with the trained weights, in eval
    mode; use ``result.ema`` for the averaged ones.

    Raises:
        InvalidArgument: the configuration or the parameter groups break a rule.
        ResumeError: ``out`` holds a run that differs in more than :data:`FREE_ON_RESUME`, or a damaged one.
        TrainingDiverged: losses or gradients stayed non-finite; the last saved state is from before.
        StorageError: the state cannot be saved.
    """
    device = torch.device(config.device)
    model.to(device)
    ema = EMA(model, config.ema_decay)
    trainable = cast(Trainable, model)  # Python has no type for "an nn.Module and a Trainable".
    optimizer = Optimizer(model, trainable.parameter_groups(), config.optimizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    step, clock = _resume(model, ema, optimizer, config)
    compute_loss: LossFunction = torch.compile(trainable.loss) if config.compile else trainable.loss
    generator = torch.Generator(device=device)
    make_folder(config.out)
    metrics: dict[str, float] = {}
    evaluation: dict[str, float] = {}

    def save() -> None:
        meter.check()
        broken = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
        if broken:
            raise TrainingDiverged(f"at step {step} weights are not finite: {', '.join(broken[:5])}; {_remedy(config)}")
        tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"ema/{name}": value for name, value in ema.average.items()}
        tensors |= {f"optimizer/{name}": value for name, value in optimizer.state_tensors().items()}
        state = SavedState(step, clock.minutes(), ema.updates, config_json(config), tensors)
        with clock.measured("save"):
            write_state(config.out, state, keep=config.keep_checkpoints)

    with (
        MetricsLog(config.out, from_step=step, tensorboard=config.tensorboard) as log,
        _deterministic(config.deterministic),
        _isolated_generators(device),
        _stop_signals() as stop,
        _Feed(batches, device, config.prefetch) as feed,
        _Bar(config, step) as bar,
    ):
        log.write("session", step, clock.minutes(), {"torch": torch.__version__, "device": str(device)})
        meter = _Meter(config, device, step, clock)
        model.train()
        progress = config.progress_at(step, clock.minutes())
        while (reason := _reason_to_stop(progress, config, clock, stop)) is None:
            with clock.measured("step"):
                _seed_step(config.seed, step, generator)
                batch = feed.take(step)
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
                    loss, step_metrics = compute_loss(batch, generator)
                loss.backward()
                grad_norm, bad = _clip_or_clear(parameters, loss, config.grad_clip)
                factor = config.lr_factor(step, progress)
                optimizer.step(factor)
                ema.update(model)
                meter.add({"loss": loss.detach(), **step_metrics, "grad_norm": grad_norm}, bad)
                step += 1
            progress = config.progress_at(step, clock.minutes())
            if step % config.log_every == 0 or progress >= 1:
                metrics = {"lr": config.optimizer.lr * factor, **meter.read(step)}
                log.write("train", step, clock.minutes(), metrics)
            bar.show(step, clock.minutes(), metrics)
            # Saved before evaluated: an evaluator that fails costs no training.
            if progress >= 1 or config.checkpoint.due(step, clock.since("save")):
                save()
            if evaluate is not None and (progress >= 1 or config.evaluation.due(step, clock.since("evaluate"))):
                with clock.measured("evaluate"), _isolated_generators(device), ema.applied_to(model), torch.no_grad():
                    model.eval()
                    evaluation = {name: float(value) for name, value in evaluate(model, step).items()}
                    model.train()
                log.write("eval", step, clock.minutes(), evaluation)
        if reason != "finished":
            save()
    model.eval()
    newest = saved_files(config.out)[-1]
    result = TrainResult(reason == "finished", reason, step, clock.minutes(), newest, ema, metrics, evaluation)
    if config.progress:
        _say(result, config)
    return result


class _Clock:
    """Minutes over all sessions, and how long each activity last took."""

    def __init__(self, minutes_before: float) -> None:
        self._start = time.monotonic()
        self._before = minutes_before
        self._ended: dict[str, float] = {}
        self._took: dict[str, float] = {}

    def minutes(self) -> float:
        return self._before + self.session_minutes()

    def session_minutes(self) -> float:
        return (time.monotonic() - self._start) / 60

    def since(self, activity: str) -> float:
        """Minutes since ``activity`` last ended, or since the session began."""
        return (time.monotonic() - self._ended.get(activity, self._start)) / 60

    def took(self, *activities: str) -> float:
        """Minutes that the last round of these activities took together; those not yet seen count nothing."""
        return sum(self._took.get(activity, 0.0) for activity in activities) / 60

    @contextmanager
    def measured(self, activity: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self._ended[activity] = time.monotonic()
        self._took[activity] = self._ended[activity] - begin


def _reason_to_stop(
    progress: float, config: TrainConfig, clock: _Clock, stop: threading.Event
) -> Literal["finished", "max_minutes", "signal"] | None:
    if progress >= 1:
        return "finished"
    if stop.is_set():
        return "signal"
    # One more round must still fit: a step, perhaps an evaluation and a save, and the last save.
    needed = clock.took("step", "evaluate", "save", "save")
    if config.max_minutes is not None and clock.session_minutes() + needed >= config.max_minutes:
        return "max_minutes"
    return None


def _resume(model: nn.Module, ema: EMA, optimizer: Optimizer, config: TrainConfig) -> tuple[int, _Clock]:
    """Load the newest saved state of ``config.out`` as ``config.resume`` says; the step to go on from and the clock."""
    files = saved_files(config.out)
    if config.resume == "never" and files:
        raise ResumeError(
            f"resume is 'never' and {config.out} already holds a run ({files[-1].name}); "
            "choose another `out`, or resume='auto' to go on with it."
        )
    if not files:
        if config.resume == "must":
            raise ResumeError(
                f"resume is 'must' and {config.out} holds no saved state; check `out`, or use resume='auto' to start."
            )
        return 0, _Clock(0.0)
    saved = read_state(files[-1])
    differing = differences(saved.config, config_json(config), step=saved.step, minutes=saved.minutes)
    if differing:
        raise ResumeError(
            f"the run in {config.out} (step {saved.step}) was configured differently:\n  "
            + "\n  ".join(differing)
            + f"\nOnly {', '.join(sorted(FREE_ON_RESUME))} may change; steps or schedule_minutes too while decay is "
            "'constant', or 'wsd' on its plateau before and after. Restore the values above or choose another `out`."
        )
    weights, average = saved.part("model"), saved.part("ema")
    problems = _tensor_differences("model", weights, model.state_dict())
    problems += _tensor_differences("ema", average, ema.average)
    if problems:
        raise ResumeError(
            f"the model does not fit the one saved in {files[-1]}:\n  " + "\n  ".join(problems[:10]) + "\nBuild the "
            "model as it was, or choose another `out`."
        )
    model.load_state_dict(weights)
    for name, tensor in ema.average.items():
        tensor.copy_(average[name])
    ema.updates = saved.ema_updates
    optimizer.load_state_tensors(saved.part("optimizer"))
    return saved.step, _Clock(saved.minutes)


def _tensor_differences(part: str, then: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[str]:
    def form(tensor: Tensor | None) -> str:
        return "absent" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"

    return [
        f"{part} {name}: {form(then.get(name))} then, {form(now.get(name))} now"
        for name in sorted(then.keys() | now.keys())
        if form(then.get(name)) != form(now.get(name))
    ]


def _seed_step(seed: int, step: int, generator: torch.Generator) -> None:
    """Make the randomness of a step a function of (seed, step): the loss's generator, and torch's own for dropout."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=16).digest()
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    torch.manual_seed(int.from_bytes(digest[8:], "big") >> 1)


@torch.no_grad()
def _clip_or_clear(parameters: list[nn.Parameter], loss: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    """Clip the whole gradient to norm ``limit``, or clear it when it or the loss is not finite.

    Returns the norm before clipping and 1.0 for a cleared step, else 0.0, as tensors: nothing waits for the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    bad = ~(norm.isfinite() & loss.isfinite())
    for gradient in gradients:
        gradient.masked_fill_(bad, 0.0)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, torch.where(bad, 1.0, norm))
    return norm, bad.float()


class _Meter:
    """Metrics since the last line of the log, and the watch on non-finite steps."""

    def __init__(self, config: TrainConfig, device: torch.device, step: int, clock: _Clock) -> None:
        self._config = config
        self._means = RunningMeans()
        self._clock = clock
        self._since = (step, clock.minutes())
        self._bad = torch.zeros((), device=device)
        self._row = torch.zeros((), device=device)
        self._longest_row = torch.zeros((), device=device)

    def add(self, metrics: Mapping[str, Tensor], bad: Tensor) -> None:
        self._means.add(metrics)
        self._bad = self._bad + bad
        self._row = (self._row + bad) * bad
        self._longest_row = torch.maximum(self._longest_row, self._row)

    def read(self, step: int) -> dict[str, float]:
        """Means, steps per second, count of non-finite steps. Raises :class:`TrainingDiverged` as :meth:`check`."""
        self.check()
        metrics = self._means.read()
        metrics["nonfinite_steps"] = self._bad.item()
        self._bad = torch.zeros_like(self._bad)
        minutes = self._clock.minutes()
        metrics["steps_per_second"] = (step - self._since[0]) / max((minutes - self._since[1]) * 60, 1e-9)
        self._since = (step, minutes)
        return metrics

    def check(self) -> None:
        """Raise :class:`TrainingDiverged` if ``nonfinite_limit`` steps in a row were not finite."""
        row = int(self._longest_row.item())
        if row >= self._config.nonfinite_limit:
            raise TrainingDiverged(
                f"the loss or its gradient was not finite for {row} steps in a row (nonfinite_limit is "
                f"{self._config.nonfinite_limit}); {_remedy(self._config)}"
            )


def _remedy(config: TrainConfig) -> str:
    files = saved_files(config.out)
    last = f"the last saved state, {files[-1]}, is from before." if files else "nothing was saved before."
    return f"{last} Lower the learning rate, lengthen warmup_steps, or look for values that are not finite in the data."


class _Feed:
    """Batches on the device, made ahead in threads when ``ahead`` > 0."""

    def __init__(self, batches: Batches, device: torch.device, ahead: int) -> None:
        self._batches = batches
        self._device = device
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(max_workers=max(ahead, 1), thread_name_prefix="hma-gym-batches")
        self._waiting: dict[int, Future[Mapping[str, Tensor]]] = {}

    def __enter__(self) -> _Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, step: int) -> dict[str, Tensor]:
        if self._ahead == 0:
            batch = self._make(step)
        else:
            for coming in range(step, step + self._ahead + 1):
                if coming not in self._waiting:
                    self._waiting[coming] = self._pool.submit(self._make, coming)
            batch = self._waiting.pop(step).result()
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}

    def _make(self, step: int) -> Mapping[str, Tensor]:
        batch = self._batches.batch(step)
        if self._device.type != "cuda":
            return batch
        return {name: t.pin_memory() if t.device.type == "cpu" else t for name, t in batch.items()}


class _Bar:
    """The progress bar: loss, steps per second, time left."""

    def __init__(self, config: TrainConfig, step: int) -> None:
        in_steps = config.steps is not None
        self._in_steps = in_steps
        self._shown = step if in_steps else 0.0
        self._bar = tqdm(
            total=config.steps if in_steps else config.schedule_minutes,
            initial=step if in_steps else 0.0,
            unit="step" if in_steps else "min",
            disable=not config.progress,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            bar_format=None if in_steps else "{l_bar}{bar}| {n:.1f}/{total:.1f} min [{remaining} left{postfix}]",
            dynamic_ncols=True,
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, step: int, minutes: float, metrics: Mapping[str, float]) -> None:
        if metrics:
            facts = {"loss": f"{metrics['loss']:.4g}", "steps/s": f"{metrics['steps_per_second']:.2f}"}
            self._bar.set_postfix(facts if self._in_steps else {"step": step, **facts}, refresh=False)
        now = step if self._in_steps else min(minutes, self._bar.total)
        self._bar.update(now - self._shown)
        self._shown = now


def _say(result: TrainResult, config: TrainConfig) -> None:
    words = {
        "finished": "training finished",
        "max_minutes": "stopped before max_minutes; run again to go on",
        "signal": "stopped by a signal; run again to go on",
    }[result.reason]
    tqdm.write(f"{words}: step {result.step}, {result.minutes:.1f} minutes, in {config.out}", file=sys.stderr)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@contextmanager
def _isolated_generators(device: torch.device) -> Iterator[None]:
    """Give torch's global generators back as they were found."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        index = device.index if device.index is not None else 0
        with torch.random.fork_rng(devices=[index], device_type=device.type):
            yield


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event set by the first SIGINT or SIGTERM; a second one acts as usual. Outside the main thread, never set."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        tqdm.write("stopping after this step, then saving; once more to stop at once", file=sys.stderr)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
