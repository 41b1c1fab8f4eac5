"""The configuration of a training run, and what of it a resumed run may change."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hma_gym.errors import InvalidArgument
from hma_gym.training.optim import OptimizerConfig
from hma_gym.training.schedule import DECAYS, Decay, learning_rate_factor


@dataclass(frozen=True)
class Every:
    """How often: every ``steps`` steps, every ``minutes`` minutes, both, or (neither given) never."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidArgument(f"Every.{name} must be positive, got {value}; leave it None for never.")

    def due(self, step: int, minutes_since: float) -> bool:
        """Whether it is time, ``step`` steps into the run and ``minutes_since`` the last time."""
        return (self.steps is not None and step % self.steps == 0) or (
            self.minutes is not None and minutes_since >= self.minutes
        )


@dataclass(frozen=True)
class TrainConfig:
    """All that the loop needs to know. Exactly one of ``steps`` and ``schedule_minutes`` is given.

    Attributes:
        out: the run's folder: ``metrics.jsonl``, ``saved/``, ``tensorboard/``.
        steps: length of the run in optimiser steps, and of the schedule.
        schedule_minutes: length in minutes of wall-clock time inside the loop, summed over resumed sessions.
        optimizer: see :class:`hma_gym.training.optim.OptimizerConfig`.
        warmup_steps, decay, decay_fraction, final_lr: see :func:`hma_gym.training.schedule.learning_rate_factor`;
            ``final_lr`` is a fraction of the peak.
        grad_clip: largest norm of the whole gradient; None for no clipping.
        ema_decay: see :class:`hma_gym.training.ema.EMA`.
        precision: ``"fp32"``, or ``"bf16"`` for bfloat16 autocast around the loss; weights stay fp32.
        compile: run ``model.loss`` through ``torch.compile``.
        device: where to train, e.g. ``"cpu"`` or ``"cuda"``.
        deterministic: use torch's deterministic algorithms while training.
        seed: of everything random in training (batches have their own).
        nonfinite_limit: steps in a row with a loss or gradient that is not finite before the run is given up. Such a
            step counts as one with zero gradient and is reported in the log as ``nonfinite_steps``.
        checkpoint: when to save, besides at the end.
        keep_checkpoints: how many saved states stay on disk.
        evaluation: when to evaluate, besides at the end of the schedule.
        log_every: steps between lines of the log; the only times at which the loop waits for the device.
        max_minutes: stop this session, saved, before so many minutes are over.
        prefetch: batches made ahead in a background thread; 0 makes them in line (best where cores are scarce).
        tensorboard: also write TensorBoard events.
        progress: show a progress bar.
        resume: ``"auto"`` goes on where ``out`` stopped, or starts; ``"never"`` refuses an ``out`` that holds a run;
            ``"must"`` refuses one that does not.
        recipe: what the loop cannot see and a resumed run must share: the model's and the data's configuration, as JSON
            values.
    """

    out: Path
    steps: int | None = None
    schedule_minutes: float | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    warmup_steps: int = 100
    decay: Decay = "wsd"
    decay_fraction: float = 0.2
    final_lr: float = 0.0
    grad_clip: float | None = 1.0
    ema_decay: float = 0.999
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    device: str = "cpu"
    deterministic: bool = False
    seed: int = 0
    nonfinite_limit: int = 20
    checkpoint: Every = Every(minutes=10)
    keep_checkpoints: int = 2
    evaluation: Every = Every()
    log_every: int = 50
    max_minutes: float | None = None
    prefetch: int = 0
    tensorboard: bool = False
    progress: bool = True
    resume: Literal["auto", "never", "must"] = "auto"
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        if (self.steps is None) == (self.schedule_minutes is None):
            raise InvalidArgument(
                f"give exactly one of steps and schedule_minutes, got steps={self.steps} and "
                f"schedule_minutes={self.schedule_minutes}."
            )
        for name in ("steps", "schedule_minutes", "max_minutes", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidArgument(f"{name} must be positive, got {value}.")
        for name in ("log_every", "keep_checkpoints", "nonfinite_limit"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} must be 1 or more, got {getattr(self, name)}.")
        for name, choices in (
            ("decay", DECAYS),
            ("precision", ("fp32", "bf16")),
            ("resume", ("auto", "never", "must")),
        ):
            if getattr(self, name) not in choices:
                raise InvalidArgument(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        for name in ("decay_fraction", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidArgument(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if self.warmup_steps < 0 or self.prefetch < 0:
            raise InvalidArgument(
                f"warmup_steps and prefetch must be 0 or more, got {self.warmup_steps} and {self.prefetch}."
            )
        try:
            json.dumps(dict(self.recipe))
        except TypeError as error:
            raise InvalidArgument(f"recipe must hold JSON values only: {error}; pass strings and numbers.") from error

    def since(self, began: float) -> TrainConfig:
        """The same for a session that began at this ``time.monotonic()``, for what is left of ``max_minutes``."""
        if self.max_minutes is None:
            return self
        return dataclasses.replace(self, max_minutes=max(self.max_minutes - (time.monotonic() - began) / 60, 0.1))

    def lr_factor(self, step: int, progress: float) -> float:
        """The factor on every learning rate at ``step``."""
        return learning_rate_factor(
            step,
            progress,
            warmup_steps=self.warmup_steps,
            decay=self.decay,
            decay_fraction=self.decay_fraction,
            final=self.final_lr,
        )

    def progress_at(self, step: int, minutes: float) -> float:
        """The share of the schedule that is spent, 1 or more at its end."""
        return step / self.steps if self.steps is not None else minutes / (self.schedule_minutes or math.inf)


# These say where and how watchfully a run works, not what it computes: a resumed run may change them. (device, compile
# and prefetch can change rounding or speed; the weights then agree to rounding only.)
FREE_ON_RESUME = frozenset(
    {
        "out", "compile", "device", "deterministic", "nonfinite_limit", "checkpoint", "keep_checkpoints", "evaluation",
        "log_every", "max_minutes", "prefetch", "tensorboard", "progress", "resume",
    }
)  # fmt: skip


def config_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON values, for a saved state."""
    plain: dict[str, Any] = json.loads(json.dumps({**dataclasses.asdict(config), "out": str(config.out)}))
    return plain


def differences(then: Mapping[str, Any], now: Mapping[str, Any], *, step: int, minutes: float) -> list[str]:
    """The fields, dotted, in which two :func:`config_json` differ and may not: ``optimizer.lr: 0.1 then, 0.2 now``.

    ``steps`` (or ``schedule_minutes``) may change while the learning rate has not yet begun to depend on it: always
    with decay ``constant``, and with ``wsd`` when ``step`` (``minutes``) is on the plateau of both schedules.
    """
    free = set(FREE_ON_RESUME)
    plateau = {"constant": 1.0, "wsd": 1.0 - now["decay_fraction"]}.get(now["decay"], 0.0)
    for length, spent in (("steps", step), ("schedule_minutes", minutes)):
        if then.get(length) and now[length] and spent <= plateau * min(then[length], now[length]):
            free.add(length)
    before = _flat({name: value for name, value in then.items() if name not in free})
    after = _flat({name: value for name, value in now.items() if name not in free})
    missing = "(absent)"
    return [
        f"{name}: {before.get(name, missing)!r} then, {after.get(name, missing)!r} now"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, missing) != after.get(name, missing)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and (value or not prefix):
        return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{prefix}.{name}").items()}
    return {prefix[1:]: value}
